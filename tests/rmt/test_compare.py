import functools
import json
import math

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import hypergeom

import rmt_kernels as rk
from rmt.chance import holm, log10_at_least, log10_sum_at_least
from rmt.checkpoint import load_task, save_task
from rmt.cli import main
from rmt.compare_tasks import diff, distinct_names, facts, format_matrix, format_rows, inspect, matrix, task_name
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
        "key": CONV, "weights": 12288, "selected": 12288, "both": 40, "only_a": 60, "only_b": 200,
        "by_chance": 100 * 240 / 12288, "lift": 40 * 12288 / 24000, "jaccard": 40 / 300,
        "log10_p": pytest.approx(hypergeom.logsf(39, 12288, 100, 240) / math.log(10), rel=1e-8),
        "holm": pytest.approx(hypergeom.logsf(39, 12288, 100, 240) / math.log(10) + math.log10(5), rel=1e-8),
    }  # fmt: skip
    assert all(o["both"] == o["only_a"] == o["by_chance"] == 0 and o["jaccard"] is o["lift"] is None for o in others)
    assert all(o["log10_p"] == o["holm"] == 0 for o in others), "what cannot be otherwise is certain"
    sizes = {"key": "total", "weights": 45056, "selected": 45056, "holm": None}
    assert total == row | sizes, "one layer alone differs, and is all of the total"
    assert diff(a, a)[0]["jaccard"] == 1 and diff(a, a)[0]["lift"] == pytest.approx(12288 / 100)


def test_chance_is_over_what_was_selected(tmp_path):
    """With a population of all weights two draws from one selection would seem to agree far beyond chance."""
    chosen = torch.zeros(64, 192, dtype=torch.bool)
    chosen[:10] = True
    tasks = []
    for name, rows in (("a", 10), ("b", 10), ("c", 20)):
        found = apply_masks(tiny.model(), MaskConfig())
        chosen[:rows] = True
        found[0].module.select("", rk.pack_bits(chosen))
        off = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(len(tasks))) < 0.3
        found[0].set_bits(rk.pack_bits(~(off & chosen)))
        save_task(tmp_path / name, found)
        tasks.append(load_task(tmp_path / name))
    row = diff(tasks[0], tasks[1])[0]
    off_a, off_b = (t.off(CONV) for t in tasks[:2])
    assert row["selected"] == 1920 and row["by_chance"] == off_a * off_b / 1920 and 0.8 < row["lift"] < 1.2
    assert row["log10_p"] == pytest.approx(hypergeom.logsf(row["both"] - 1, 1920, off_a, off_b) / math.log(10))
    assert row["log10_p"] > -2 > hypergeom.logsf(row["both"] - 1, 12288, off_a, off_b)
    assert diff(tasks[0], tasks[2])[0]["selected"] == diff(tasks[2], tasks[0])[0]["selected"] == 3840


def test_one_layers_tail_is_that_of_scipy_far_out_too():
    rng = np.random.default_rng(0)
    for _ in range(400):
        n = int(rng.integers(1, 4000))
        a, b = (int(v) for v in rng.integers(0, n + 1, 2))
        both = int(rng.integers(max(0, a + b - n), min(a, b) + 1))
        want = hypergeom.logsf(both - 1, n, a, b) / math.log(10)
        assert log10_at_least(n, a, b, both) == pytest.approx(want, rel=1e-7, abs=1e-9), (n, a, b, both)
    # A layer of ViT-B at 2.5 % off: p far below what a float holds, and the wide middle.
    for both in (1, 1400, 1526, 1530, 1700, 5000, 60000):
        want = hypergeom.logsf(both - 1, 2359296, 60000, 60000) / math.log(10)
        assert log10_at_least(2359296, 60000, 60000, both) == pytest.approx(want, rel=1e-6, abs=1e-9), both
    assert log10_at_least(10, 4, 5, 6) == -math.inf and log10_at_least(10, 8, 8, 6) == 0 == log10_at_least(0, 0, 0, 0)
    with pytest.raises(ValueError, match="need 0 <= a, b <= n"):
        log10_at_least(10, 11, 3, 2)


def test_the_totals_tail_is_near_the_exact_convolution():
    rng = np.random.default_rng(1)
    seen = 0
    for trial in range(400):
        sizes = rng.integers(20, 600, rng.integers(2, 6))
        layers = [(int(n), int(rng.integers(1, n)), int(rng.integers(1, n))) for n in sizes]
        low = sum(max(0, a + b - n) for n, a, b in layers)
        high = sum(min(a, b) for n, a, b in layers)
        p = functools.reduce(np.convolve, [
            hypergeom.pmf(np.arange(max(0, a + b - n), min(a, b) + 1), n, a, b) for n, a, b in layers
        ])  # fmt: skip
        near = round(float(np.arange(low, high + 1) @ p)) + int(rng.integers(-4, 5))
        both = min(max(near, low + 1), high) if trial % 2 else int(rng.integers(low, high)) + 1
        exact = p[both - low :].sum()
        if exact > 1e-290:
            seen += 1
            assert log10_sum_at_least(layers, both) == pytest.approx(math.log10(exact), abs=0.05), (layers, both)
    assert seen > 300
    assert log10_sum_at_least([(9, 3, 3), (5, 2, 2)], 6) == -math.inf and log10_sum_at_least([(9, 3, 3)] * 2, 0) == 0
    # A layer without freedom only shifts the sum.
    assert log10_sum_at_least([(9, 4, 3), (7, 7, 5)], 7) == log10_at_least(9, 4, 3, 2)
    # Far beyond a float's range, above and near the exact sum of its most likely split.
    layer, both = (2359296, 60000, 60000), 5000
    assert 0 < log10_sum_at_least([layer] * 49, 49 * both) / (49 * log10_at_least(*layer, both)) < 1


def test_holm_is_a_step_down():
    want = [-1 + math.log10(2), -5 + math.log10(4), -3 + math.log10(3), 0]
    assert holm([-1.0, -5.0, -3.0, 0.0]) == pytest.approx(want)
    assert holm([-2.0, -2.05]) == pytest.approx([-2.05 + math.log10(2)] * 2), "never below an earlier one"
    assert holm([-0.1]) == [-0.1] and holm([]) == []


def test_chance_finds_what_is_shared_and_nothing_else(tmp_path):
    def off(seed, shared):
        own = torch.randperm(12288, generator=torch.Generator().manual_seed(seed))[:900]
        return sorted({*own.tolist(), *range(shared)})

    a, b, c = (task(tmp_path / str(seed), off(seed, shared)) for seed, shared in ((1, 200), (2, 200), (3, 0)))
    assert diff(a, b)[-1]["log10_p"] < -20 and diff(a, c)[-1]["log10_p"] > -3
    found = matrix([a, b, c])
    assert found["names"] == ["1", "2", "3"]
    for name in ("jaccard", "lift", "log10_p"):
        table = found[name]
        assert table[0][1] == table[1][0] == diff(a, b)[-1][name] and table[2][1] == diff(b, c)[-1][name]
        assert all(table[i][i] == (1 if name == "jaccard" else None) for i in range(3))
    assert found["lift"][0][1] > 2 and 0.7 < found["lift"][0][2] < 1.3
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(UserError, match="two tasks or more, got 1"):
        matrix([a])
    text = format_matrix(found["names"], found["lift"], 2)
    assert text.splitlines()[1].split() == ["1", "-", f"{found['lift'][0][1]:.2f}", f"{found['lift'][0][2]:.2f}"]


def test_tasks_are_called_by_their_folders(tmp_path):
    assert task_name(tmp_path / "runs" / "pets" / "task" / "mask.safetensors") == "pets"
    assert task_name(tmp_path / "pets" / "mask.safetensors") == "pets"
    same = [task(tmp_path / part / "pets") for part in "ab"]
    assert distinct_names([*same, task(tmp_path / "c")]) == ["pets (1)", "pets (2)", "c"]


def test_the_command_prints_two_by_layer_and_more_as_a_matrix(tmp_path, capsys):
    for i in range(3):
        task(tmp_path / f"t{i}", range(40 * i, 40 * i + 100))
    paths = [str(tmp_path / f"t{i}") for i in range(3)]
    assert main(["diff", *paths[:2]]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[-4:] == ["lift", "jaccard", "log10_p", "holm"] and "one-sided" in out
    assert main(["diff", *paths, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["jaccard"][0][1] == 60 / 140
    assert main(["diff", *paths]) == 0
    assert {"jaccard:", "lift:", "log10_p:"} <= set(capsys.readouterr().out.split())
    assert main(["diff", paths[0]]) == 2 and "two tasks or more" in capsys.readouterr().err


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
    assert format_rows(diff(a, b)).splitlines()[-1].split()[-3] == f"{240 / 1229:.3f}"
    assert format_rows(diff(a, b)).splitlines()[3].split()[-4:] == ["-", "-", "0.00", "0.00"]
