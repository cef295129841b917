"""bench/gpu.sh rehearsed without a GPU: stages, their verdicts, the folder, the exit status; and bench/collect.py."""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bench/gpu.sh needs bash")


def gpu_sh(*options, python=sys.executable, path=None):
    environment = os.environ | {"PYTHON": str(python)} | ({} if path is None else {"PATH": str(path)})
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *map(str, options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def stages(folder):
    with (folder / "stages.csv").open() as file:
        return {row["stage"]: row for row in csv.DictReader(file)}


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_rehearsal_leaves_logs_rows_and_a_verdict_per_stage(tmp_path):
    done = gpu_sh("--dry-run", "--only", "doctor,dispatch,collect", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = stages(tmp_path)
    assert list(found) == ["doctor", "dispatch", "collect"]
    assert all(row["result"] == "PASS" and row["seconds"].isdigit() for row in found.values()), found
    assert "Which backend serves what" in (tmp_path / "logs" / "doctor.txt").read_text()
    rows = json.loads((tmp_path / "dispatch_rows.json").read_text())
    with (tmp_path / "rows.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) > 0
    assert [float(r["ms.made"]) for r in table] == [r["ms"]["made"] for r in rows]
    assert {r["commit"] for r in table} == {rows[0]["commit"]} and table[0]["file"] == "dispatch_rows.json"
    for name in found:
        assert f"  {name} " in done.stdout


def test_a_failing_stage_makes_the_exit_status_one_and_the_rest_goes_on(tmp_path):
    broken = script(tmp_path / "python", f'[ "$2" != rmt.cli ] || {{ echo "the doctor is ill"; exit 3; }}\n'
                                         f'exec {sys.executable} "$@"')  # fmt: skip
    done = gpu_sh("--dry-run", "--only", "doctor,collect", "--out", tmp_path, python=broken)
    assert done.returncode == 1
    found = stages(tmp_path)
    assert found["doctor"]["result"] == "FAIL" and "exit status 3" in found["doctor"]["why"]
    assert found["collect"]["result"] == "PASS"
    assert "the doctor is ill" in done.stdout, "the end of a failing log is shown"


@pytest.fixture
def pretend_gpu(tmp_path):
    """PATH of a machine with an `nvidia-smi`, an `nvcc` and a `compute-sanitizer` that does not know its device."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "nvidia-smi", 'case "$*" in *name,driver*) echo "name, driver";; *) echo "Pretend H1";; esac')
    script(folder / "nvcc", "exit 0")
    script(folder / "compute-sanitizer", 'echo "========= Error: Device not supported"; exit 1')
    return f"{folder}:{os.environ['PATH']}"


def test_nothing_wrong_is_timed_and_the_log_says_so(tmp_path, pretend_gpu):
    log = tmp_path / "calls.txt"
    fails = 'case "$*" in *"test_cuda.py tests/kernels/test_cuda_grouped.py "*) exit 1;; *) exit 0;; esac'
    python = script(tmp_path / "python", f'echo "$RMT_BACKEND $@" >>{log}\n{fails}')
    out = tmp_path / "out"
    done = gpu_sh("--out", out, python=python, path=pretend_gpu)
    assert done.returncode == 1, done.stdout + done.stderr
    found = stages(out)
    assert found["build"]["result"] == "PASS" and found["tests_cuda"]["result"] == "FAIL"
    for name, row in found.items():
        concerned = (
            name.endswith("_cuda")
            or name.startswith(("train_step", "swap"))
            or name in ("update", "weight_grad", "dispatch")
        )
        if concerned and name != "tests_cuda" and not row["why"].startswith(("no bench/", "bench/")):
            assert (row["result"], row["why"]) == ("SKIP", "tests_cuda failed, and nothing wrong is timed"), name
    passed = ("tests_triton", "tests_bank", "masked_linear_bf16_triton", "masked_linear_fp32_reference", "collect")
    for name in passed:
        assert found[name]["result"] == "PASS", name
    assert found["memcheck_triton"]["result"] == "SKIP" and "Device not supported" in found["memcheck_triton"]["why"]
    assert "cuda bench/" not in log.read_text() and "triton bench/masked_linear.py" in log.read_text()
    assert (out / "gpu.txt").read_text().startswith("name")


def test_everything_runs_where_all_passes(tmp_path, pretend_gpu):
    log = tmp_path / "calls.txt"
    python = script(tmp_path / "python", f'echo "$RMT_BACKEND $@" >>{log}')
    done = gpu_sh("--quick", "--out", tmp_path / "out", python=python, path=pretend_gpu)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    found = stages(tmp_path / "out")
    sanitizers = tuple(f"{check}check_" for check in ("mem", "race", "sync", "init"))
    assert not [name for name, row in found.items() if row["result"] == "SKIP" and not name.startswith(sanitizers)]
    calls = log.read_text()
    for call in ("cuda bench/masked_linear.py --device cuda --dtype bf16", " bench/dispatch.py --device cuda",
                 "cuda bench/swap.py --device cuda --dtype bf16", "-m pytest -m gpu tests/rmt/test_bank_gpu.py",
                 "-m pytest -m gpu", "setup.py -q build_ext", "rmt.cli doctor --json", "bench/collect.py"):  # fmt: skip
        assert call in calls, call


def test_the_budget_ends_a_stage_and_starts_no_other(tmp_path, pretend_gpu):
    python = script(tmp_path / "python", 'case "$*" in *collect*) exit 0;; -c*) exit 0;; *) exec sleep 60;; esac')
    start = time.monotonic()
    done = gpu_sh("--budget", 2, "--out", tmp_path / "out", python=python, path=pretend_gpu)
    assert time.monotonic() - start < 30 and done.returncode == 1
    found = stages(tmp_path / "out")
    assert found["build"]["result"] == "FAIL" and "ran past its limit" in found["build"]["why"]
    assert found["doctor"]["result"] == "SKIP" and found["masked_linear_bf16_cuda"]["result"] == "SKIP"
    assert found["masked_linear_bf16_cuda"]["why"] == "the 2 s are used up"
    assert found["collect"]["result"] == "PASS", "what there is is merged"


def test_what_is_missing_is_skipped_with_the_reason(tmp_path, pretend_gpu):
    python = script(tmp_path / "python", 'case "$*" in *open_clip*) exit 1;; *) exit 0;; esac')
    bare = tmp_path / "bin"
    (bare / "compute-sanitizer").unlink()
    done = gpu_sh("--out", tmp_path / "out", python=python, path=pretend_gpu)
    found = stages(tmp_path / "out")
    if shutil.which("compute-sanitizer", path=f"{pretend_gpu}:/usr/local/cuda/bin") is None:
        assert found["memcheck_cuda"]["why"] == "compute-sanitizer is not on the PATH"
    want = "open_clip is not installed" if (ROOT / "bench" / "train_step.py").is_file() else "no bench/train_step.py"
    assert found["train_step_bf16"]["result"] == "SKIP" and want in found["train_step_bf16"]["why"]
    assert (found["tests_rest"]["result"], found["tests_rmt"]["result"]) == ("PASS", "SKIP")
    assert done.returncode == 0


def test_without_a_gpu_only_the_rehearsal_runs(tmp_path):
    script(tmp_path / "nvidia-smi", "exit 9")
    done = gpu_sh("--out", tmp_path / "out", path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2 and "--dry-run" in done.stderr and not (tmp_path / "out").exists()
    assert gpu_sh("--nonsense").returncode == 2


def test_collect_merges_rows_of_different_columns(tmp_path, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("collect", ROOT / "bench" / "collect.py")
    collect = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(collect)
    (tmp_path / "a.json").write_text('[{"op": "x", "ms": {"rmt": {"median": 1.5}}}, {"op": "y", "list": [1, 2]}]')
    (tmp_path / "b.json").write_text('[{"other": null, "op": "a, \\"quoted\\""}]')
    (tmp_path / "doctor.json").write_text('{"versions": {}}')
    monkeypatch.setattr(sys, "argv", ["collect.py", str(tmp_path)])
    collect.main()
    assert "3 rows" in capsys.readouterr().out
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "op", "ms.rmt.median", "list", "other"]
    assert [r["op"] for r in rows] == ["x", "y", 'a, "quoted"'] and rows[0]["ms.rmt.median"] == "1.5"
    assert rows[1]["list"] == "[1, 2]" and rows[2]["other"] == "" and rows[2]["file"] == "b.json"
    (tmp_path / "half.json").write_text("[{")
    with pytest.raises(ValueError):
        collect.collect(tmp_path)
