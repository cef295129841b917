"""bench/real: its tables by hand, docs/results.md against the committed rows, and its experiments from end to end."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[2]
REAL, RESULTS = ROOT / "bench" / "real", ROOT / "bench" / "results" / "real"
_spec = importlib.util.spec_from_file_location("real_table", REAL / "table.py")
table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(table)


def printed(bundle, *options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table.py", str(bundle), *map(str, options)])
    capsys.readouterr()
    table.main()
    return capsys.readouterr().out.splitlines()


def test_a_table_by_hand(tmp_path, monkeypatch, capsys):
    """Means and sample deviations over seeds, averages over data sets, the order, and what a pair gains."""
    values = {("lora", "a"): [70, 74], ("lora", "b"): [50], ("ramt", "a"): [60, 60], ("ramt", "b"): [64, 60],
              ("lora+ramt", "a"): [75, 75], ("lora+ramt", "b"): [40, 42], ("tip", "a"): [90]}  # fmt: skip
    cells = [
        {"method": m, "dataset": d, "shots": 4, "stored_bytes": 1000 * seed, "metrics": {"acc1": float(acc1)}}
        for (m, d), accuracies in values.items() for seed, acc1 in enumerate(accuracies, 1)
    ]  # fmt: skip
    (tmp_path / "bundle.json").write_text(json.dumps({"cells": [*cells, cells[0] | {"shots": 1}]}))
    lines = printed(tmp_path / "bundle.json", "--shots", 4, monkeypatch=monkeypatch, capsys=capsys)
    assert lines[2:] == [
        "| lora | 2 | 72.0 ± 2.8 | 50.0 | 61.0 |",
        "| ramt | 2 | 60.0 ± 0.0 | 62.0 ± 2.8 | 61.0 |",
        "| lora+ramt | 2 | 75.0 ± 0.0 | 41.0 ± 1.4 | 58.0 |",
        "| tip | 1 | 90.0 | - | - |",
    ]
    lines = printed(tmp_path / "bundle.json", "--shots", 4, "--pairs", monkeypatch=monkeypatch, capsys=capsys)
    assert lines[2:] == [
        "| lora+ramt over lora | +3.0 | -9.0 | -3.0 |",
        "| lora+ramt over ramt | +15.0 | -21.0 | -3.0 |",
    ]
    cells[0]["last_row"] = {"step": 9, "task": 0.0125}
    for n, cell in enumerate(cells):
        cell["seed"] = 1 + n % 2
    (tmp_path / "bundle.json").write_text(json.dumps({"cells": cells}))
    lines = printed(tmp_path / "bundle.json", "--shots", 4, "--method", "lora", monkeypatch=monkeypatch, capsys=capsys)
    assert lines == ["| seed | a | b |", "|---|---|---|", "| 1 | 70.0 (0.013) | 50.0 |", "| 2 | 74.0 | - |"]


def sections():
    """Heading -> the lines of its tables, rules left out."""
    found = {}
    for part in re.split(r"^## ", (ROOT / "docs" / "results.md").read_text(), flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        found[head] = [line for line in body.splitlines() if line.startswith("| ")]
    return found


@pytest.mark.parametrize("head, shots", [("16 shots", 16), ("4 shots", 4), ("1 shot", 1)])
def test_results_are_what_the_table_prints(head, shots, monkeypatch, capsys):
    """docs/results.md has every row of every number of shots, and no pair that the committed cells do not give."""
    written, bundle = sections(), RESULTS / "compare.json"
    rows = printed(bundle, "--shots", shots, monkeypatch=monkeypatch, capsys=capsys)
    pairs = printed(bundle, "--shots", shots, "--pairs", monkeypatch=monkeypatch, capsys=capsys)
    rows, pairs = ([line for line in lines if line.startswith("| ")] for lines in (rows, pairs))
    mine = written[head] + (written["Pairs"] if shots == 16 else [])
    assert mine[: len(rows)] == rows
    # All pairs at 16 shots; at fewer what each gains over the method that masks were put under.
    assert mine[len(rows) :] == [p for p in pairs if shots == 16 or not re.search(r" over ramt(_spread)? ", p)]


def test_masks_under_lora_are_the_committed_rows():
    cells = {}
    for file in ("mask_first.json", "mask_first_control.json"):
        for row in json.loads((RESULTS / file).read_text())["rows"]:
            key = row.get("mask_steps", "chance")
            cells[row["dataset"], key] = f" {row['masks_train_loss']:.2f}, {row['acc1']:.1f} "
    steps = [0, 5, 15, 30, 60, 120, "chance"]
    names = sorted({name for name, _ in cells})
    lines = [f"| {name} |" + "|".join(cells.get((name, step), " ") for step in steps) + "|" for name in names]
    assert len(names) == 3 and sections()["Masks under LoRA"][1:] == lines


def experiment(name, *arguments):
    command = [sys.executable, str(REAL / name), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    data = tiny.splits(folder / "data")
    return ["--model", tiny.model_folder(folder / "model", context=24), "--data", data, "--image-size", 64]


def test_masks_before_lora(place, tmp_path):
    """A row for each number of steps, and for masks by chance: three states before LoRA."""
    (tmp_path / "rates.json").write_text(json.dumps({"chosen": {"lora": 1e-3, "ramt_spread": 1e-3}}))
    done = experiment(
        "mask_first.py", *place, "--rates", tmp_path / "rates.json", "--mask-steps", 0, 2, "--random-off", 20,
        "--lora-steps", 3, "--shots", 2, "--batch", 4, "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    plain, masked, chance = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (plain["mask_steps"], masked["mask_steps"]) == (0, 2)
    assert "percent_off" not in plain and masked["percent_off"] > 0
    assert len({row["masks_train_loss"] for row in (plain, masked, chance)}) == 3 and chance["random_off"] == 20


def test_a_cascade_is_written_down(place, tmp_path):
    """From the spread start bits flip with the first steps; from one value they cannot yet."""
    done = experiment(
        "cascade.py", *place, "--rates", 1e-3, "--shots", 2, "--steps", 4, "--batch", 4, "--log-every", 1,
        "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, spread = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (one["spread"], spread["spread"]) == (0, 1)
    assert one["first_flip"] is None and one["percent_off"] == 0
    assert spread["first_flip"] == 1 and spread["percent_off"] > 0
