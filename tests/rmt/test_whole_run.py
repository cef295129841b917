"""bench/whole_run.py from end to end, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, str(ROOT / "bench" / "whole_run.py"), "--quick", "--device", "cpu", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_quick_run_is_timed_to_its_report(tmp_path):
    model = tiny.model_folder(tmp_path / "model", context=24)
    done = run("--model", model, "--precision", "fp32", "--json", tmp_path / "row.json")
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "row.json").read_text())
    assert row["images"] == {"train": 20, "val": 10, "test": 30} and row["steps"] == 2 and row["quick"]
    assert row["seconds"] == row["train_seconds"] + row["report_seconds"] > row["tuning_seconds"] > 0
    assert {"commit", "torch", "date", "device_name"} <= row.keys()


def test_a_failing_command_ends_it_without_a_row(tmp_path):
    done = run("--model", "no-such-model", "--json", tmp_path / "row.json")
    assert done.returncode != 0 and "no-such-model" in done.stderr
    assert not (tmp_path / "row.json").exists()
