"""Every Triton kernel against the reference in Triton's interpreter: tests/kernels/triton_interpret_*.py.

In a process of its own, because Triton reads TRITON_INTERPRET once, when it is imported, and then compiles nothing.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = [Path(__file__).with_name(f"triton_interpret_{part}.py") for part in ("cases", "draw")]


def versions() -> tuple[tuple[int, ...], tuple[int, ...]]:
    numpy, triton = pytest.importorskip("numpy"), pytest.importorskip("triton")
    return tuple(tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, numpy))


def test_every_kernel_matches_the_reference_in_the_interpreter(capsys):
    triton, numpy = versions()
    if triton <= (3, 6) and numpy >= (2, 4):
        pytest.skip("Triton 3.6's interpreter fails with NumPy 2.4 and later")
    command = [sys.executable, "-m", "pytest", *map(str, CASES), "--tb=short", "--maxfail=10", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if k != "RMT_BACKEND"} | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = run.stdout.strip().splitlines()
    with capsys.disabled():
        print(f"\ntriton_interpret_*.py in Triton's interpreter: {lines[-1].strip('= ') if lines else 'no output'}")
    if run.returncode != 0:
        pytest.fail(run.stdout[-10000:] + run.stderr[-2000:], pytrace=False)
    assert " passed" in lines[-1] and "skipped" not in lines[-1]


def test_a_training_run_agrees_with_the_reference_in_the_interpreter():
    triton, numpy = versions()
    if triton <= (3, 6) and numpy >= (2, 4):
        pytest.skip("Triton 3.6's interpreter fails with NumPy 2.4 and later")
    test = Path(__file__).parents[1] / "rmt" / "test_train.py"
    name = "test_five_steps_agree_with_the_reference[triton-cpu]"
    command = [sys.executable, "-m", "pytest", f"{test}::{name}", "-q", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if k != "RMT_BACKEND"} | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0 and "skipped" not in run.stdout, run.stdout[-5000:] + run.stderr[-2000:]
