"""Every python block of the README runs as it stands there, alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(
    r"(?:^<!-- not run(?P<why>.*?)-->[ \t]*\n\s*)?^```python[ \t]*\n(?P<code>.*?)^```[ \t]*$", re.M | re.S
)


def blocks() -> list:
    """(code, reason not to run it or None) of every python block, named by its line."""
    text = README.read_text() if README.is_file() else ""
    return [
        pytest.param(m["code"], m["why"], id=f"line-{text.count(chr(10), 0, m.start('code'))}")
        for m in BLOCK.finditer(text)
    ]


def test_the_readme_has_python_blocks():
    assert blocks(), "the README must show how the package is used"
    assert len(blocks()) == README.read_text().count("```python"), "a block is not closed, or is indented"


@pytest.mark.parametrize(("code", "why"), blocks())
def test_a_readme_block_runs_on_its_own(code, why, tmp_path):
    if why is not None:
        assert re.fullmatch(r":\s*\S.*", why.strip(), re.S), "say why: <!-- not run: reason -->"
        pytest.skip(why.strip(": \n"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"


def test_the_pattern_finds_blocks_and_reasons():
    text = "a\n```python\nx = 1\n```\n\n<!-- not run: needs a GPU -->\n```python\ny = 2\n```\n```bash\nls\n```\n"
    assert [(m["code"], m["why"]) for m in BLOCK.finditer(text)] == [("x = 1\n", None), ("y = 2\n", ": needs a GPU ")]
