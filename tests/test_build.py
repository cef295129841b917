"""setup.py's builds in a copy of the sources whose path is awkward, by a compiler that is none."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("pybind11", reason="a build needs pybind11")
pytest.importorskip("ninja", reason="a build needs ninja")
ROOT = Path(__file__).parents[1]
# Makes what stands behind -o, where every -I is a folder.
STUB = """\
for word in "$@"; do
  case $word in -I*) test -d "${word#-I}" || { echo "no folder ${word#-I}" >&2; exit 1; } ;; esac
  [ "$before" != -o ] || : >"$word"
  before=$word
done
"""


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "my $ources"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for package in ("rmt", "rmt_kernels"):
        (folder / package).mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "stub.sh").write_text(STUB)
    return folder


def build(folder, cxx):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", str(folder / "a build")]
    environment = os.environ | {"RMT_CUDA_ARCHS": "", "RMT_FORCE_BUILD": "0", "CXX": cxx}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    info = json.loads((folder / "rmt_kernels" / "_build_info.json").read_text())
    return info, list((folder / "rmt_kernels").glob("_C*")), done.stderr


@pytest.mark.skipif(shutil.which("sh") is None, reason="the stub is a shell script")
def test_a_compiler_of_several_words_and_paths_of_several(copy):
    info, extensions, told = build(copy, f"sh '{copy}/stub.sh' -DMINE")
    assert len(extensions) == 1 and info["cpu"]["isas"], told
    assert "-DMINE" in (copy / "a build" / "build.ninja").read_text()


@pytest.mark.parametrize("cxx, why", [("no-such-compiler", "not on the PATH"), ("false", "compilation failed")])
def test_a_build_that_fails_leaves_no_older_extension(copy, cxx, why):
    (copy / "rmt_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    info, extensions, told = build(copy, cxx)
    assert extensions == [] and why in info["cpu"] and f"pure Python, {info['cpu'].partition(': ')[2]}" in told
