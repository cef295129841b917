"""Builds csrc/cuda for the CPU emulator as a pybind11 module with the functions that the real extension has."""

import importlib.util
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc" / "cuda"
STAND_INS = {
    "cuda_runtime.h": "emulator.h",
    "cuda_fp16.h": "emulator.h",
    "cuda_bf16.h": "emulator.h",
    "cuda.h": "emulator.h",
}
STAND_INS |= {"mma.cuh": "emulated_ptx.h", "sm90.cuh": "emulated_ptx.h"}
MODULE = """
#include <pybind11/pybind11.h>
void bind_cuda(pybind11::module_& m);
PYBIND11_MODULE(emulated_cuda, m) { bind_cuda(m); }
"""


def translate(source: str) -> str:
    """A .cu as plain C++: launches become calls, dynamic shared memory the emulator's."""
    source = source.replace("extern __shared__ uint8_t shared[];", "uint8_t* shared = emulator::dynamic_shared();")
    source = re.sub(
        r"(\w+(?:<sizeof\(T\)>)?)\s*<<<(.*?)>>>\(",
        r"emulator::launcher([&](auto... a) { \1(a...); }, \2)(",
        source,
        flags=re.DOTALL,
    )
    return source.replace("__trap();", "")


def build(folder: Path):
    """The module, compiled in `folder`. Needs a C++ compiler and pybind11."""
    import pybind11

    for path in [*CSRC.glob("*.h"), *CSRC.glob("*.cuh"), CSRC / "bindings.cpp"]:
        (folder / path.name).write_text(path.read_text())
    for name, stand_in in STAND_INS.items():
        (folder / name).write_text(f'#pragma once\n#include "{HERE / stand_in}"\n')
    for path in CSRC.glob("*.cu"):
        (folder / f"{path.stem}.cpp").write_text(translate(path.read_text()))
    (folder / "module.cpp").write_text(MODULE)
    includes = [f"-I{folder}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

    def compile_one(path: Path) -> str:
        target = f"{path.with_suffix('.o')}"
        command = [
            "c++",
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-ffp-contract=off",
            "-U_FORTIFY_SOURCE",
            *includes,
            "-c",
            str(path),
            "-o",
            target,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted(folder.glob("*.cpp"))))
    library = folder / f"emulated_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["c++", "-shared", *objects, "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("emulated_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
