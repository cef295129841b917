"""Where the CUDA kernels run in tests: on a GPU, or, compiled for it, in the CPU emulator of cuda_on_cpu."""

import shutil

import pytest
from kernels import cuda_on_cpu
from kernels.cuda_checks import cuda_backend

from rmt_kernels.backends import cpu, cuda, native


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    pytest.importorskip("pybind11")
    if shutil.which("c++") is None:
        pytest.skip("the emulator needs a C++ compiler")
    return cuda_on_cpu.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    return cuda_backend(request.param, request, monkeypatch)


@pytest.fixture(params=["cpu", "emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request, monkeypatch):
    """(module of C++ or CUDA kernels, device)."""
    if request.param != "cpu":
        return cuda, cuda_backend(request.param, request, monkeypatch)
    if native.extension is None:
        pytest.skip(f"no C++ kernels: {native.missing}")
    return cpu, "cpu"
