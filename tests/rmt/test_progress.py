import os
import subprocess
import sys
from pathlib import Path

import pytest

import rmt
from rmt.progress import progress

CODE = """
from rmt.progress import progress
with progress("step", 4, 1) as advance:
    for done in range(2, 5):
        advance(done, f"loss {done / 8:.3f}")
"""


def test_plain_lines_where_there_is_no_terminal(capsys):
    with progress("step", 4) as advance:
        advance(1)
        advance(2, "loss 0.250")
    assert capsys.readouterr().out == "step 2/4  loss 0.250\n"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal, which this system lacks")
def test_a_terminal_gets_one_bar_that_ends_full():
    master, slave = os.openpty()
    environment = os.environ | {
        "PYTHONPATH": str(Path(rmt.__file__).parents[1]), "TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CODE], stdout=slave, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert done.returncode == 0, done.stderr
    last = [line for line in shown.splitlines() if "step" in line][-1]
    assert "4/4" in last and "loss 0.500" in last and "\x1b" in shown
