import json

import pytest
import tiny
import torch

import rmt_kernels as rk
from rmt.checkpoint import load_task, save_task
from rmt.compare_tasks import diff, facts, format_rows, inspect
from rmt.config import MaskConfig, RunConfig, UserError
from rmt.masking import apply_masks

CONV = "visual.conv1.weight"


def task(path, off=(), seed=0, mask=MaskConfig(), **vision):  # noqa: B008, frozen
    """A task whose first mask is off at those flat places, and everything else on."""
    found = apply_masks(tiny.model(seed, **vision), mask)
    on = torch.ones(found[0].weight.shape, dtype=torch.bool)
    on.view(-1)[list(off)] = False
    found[0].set_bits(rk.pack_bits(on))
    save_task(path, found, ("cat",), RunConfig(model="local-dir:x", data="y"), "a {}.")
    return load_task(path)


def test_inspect_counts_by_layer_and_in_all(tmp_path):
    made = task(tmp_path / "a", range(1229))
    rows, coded = inspect(made), {key: len(rk.encode_bits(made.bits[key], k)) for key, (_, k) in made.shapes.items()}
    assert rows[0] == {
        "key": CONV, "shape": (64, 192), "weights": 12288, "selected": 12288, "off": 1229, "bytes": 64 * 6 * 4,
        "coded_bytes": coded[CONV], "percent_off": pytest.approx(10.0, abs=0.01),
    }  # fmt: skip
    # All on: the header alone.
    assert coded[CONV] > 36 and rows[1]["coded_bytes"] == 36
    assert [row["off"] for row in rows[1:]] == [0, 0, 0, 0, 1229] and len(rows) == 6
    total = 12288 + 2 * (192 * 64 + 64 * 64)
    assert rows[-1] == {
        "key": "total", "shape": None, "weights": total, "selected": total, "off": 1229, "bytes": total // 8,
        "coded_bytes": sum(coded.values()), "percent_off": 100 * 1229 / total,
    }  # fmt: skip


def test_blocks_come_in_order(tmp_path):
    keys = [row["key"] for row in inspect(task(tmp_path / "a", width=32, layers=11))]
    blocks = [int(key.split(".")[3]) for key in keys[1:-1:2]]
    assert keys[0] == CONV and blocks == list(range(11))


def test_selected_weights_are_counted(tmp_path):
    found = apply_masks(tiny.model(), MaskConfig())
    chosen = torch.zeros(64, 192, dtype=torch.bool)
    chosen[0, :7] = True
    found[0].module.select("", rk.pack_bits(chosen))
    save_task(tmp_path / "a", found)
    rows = inspect(load_task(tmp_path / "a"))
    assert rows[0]["selected"] == 7 and rows[-1]["selected"] == rows[-1]["weights"] - 12288 + 7


def test_facts_are_plain_data(tmp_path):
    made = task(tmp_path / "a")
    told = json.loads(json.dumps(facts(made)))
    assert told["base_sha256"] == made.base_sha256 and told["bits_sha256"] == made.bits_sha256
    assert (told["model"], told["template"], told["classnames"]) == ("local-dir:x", "a {}.", ["cat"])


def test_diff_counts_the_overlap(tmp_path):
    a, b = task(tmp_path / "a", range(100)), task(tmp_path / "b", range(60, 300))
    row, *others, total = diff(a, b)
    assert row == {
        "key": CONV, "weights": 12288, "both": 40, "only_a": 60, "only_b": 200, "by_chance": 100 * 240 / 12288,
        "jaccard": 40 / 300,
    }  # fmt: skip
    assert all(o["both"] == o["only_a"] == o["by_chance"] == 0 and o["jaccard"] is None for o in others)
    assert total == row | {"key": "total", "weights": total["weights"]} and total["weights"] == 45056
    assert diff(a, a)[0]["jaccard"] == 1


def test_random_masks_overlap_as_by_chance(tmp_path):
    places = [torch.randperm(12288, generator=torch.Generator().manual_seed(i))[:4000].tolist() for i in range(2)]
    row = diff(*(task(tmp_path / str(i), off) for i, off in enumerate(places)))[0]
    assert row["by_chance"] == pytest.approx(1302.08, abs=0.01) and abs(row["both"] - row["by_chance"]) < 100


def test_refuses_another_base_and_other_masks_with_both_hashes(tmp_path):
    a, b = task(tmp_path / "a"), task(tmp_path / "b", seed=1)
    with pytest.raises(UserError, match="must be of one base model") as caught:
        diff(a, b)
    assert a.base_sha256 in str(caught.value) and b.base_sha256 in str(caught.value)
    c = task(tmp_path / "c", mask=MaskConfig(targets=("attention",)))
    with pytest.raises(UserError, match=rf"{CONV} is \(64, 192\) and missing") as caught:
        diff(a, c)
    assert a.base_sha256 in str(caught.value) and c.base_sha256 in str(caught.value)
    with pytest.raises(UserError, match=rf"{CONV} is \(64, 192\) and \(96, 192\)"):
        diff(a, task(tmp_path / "d", width=96))


def test_tables_line_up(tmp_path):
    a, b = task(tmp_path / "a", range(1229)), task(tmp_path / "b", range(60, 300))
    lines = format_rows(inspect(a)).splitlines()
    assert lines[0].split() == ["key", "shape", "weights", "selected", "off", "bytes", "coded_bytes", "percent_off"]
    size = str(a.coded_bytes(CONV))
    assert lines[2].split() == [CONV, "64", "x", "192", "12,288", "12,288", "1,229", "1,536", size, "10.00"]
    assert lines[-1].split() == ["total", "-", "45,056", "45,056", "1,229", "5,632", str(int(size) + 4 * 36), "2.73"]
    assert lines[1] == lines[-2] == "-" * len(lines[0]) and {len(line) for line in lines} == {len(lines[0])}
    assert format_rows(diff(a, b)).splitlines()[-1].split()[-1] == f"{240 / 1229:.3f}"
    assert format_rows(diff(a, b)).splitlines()[3].split()[-1] == "-"
