"""Where the CUDA kernels run in tests: on a GPU, or, compiled for it, in the CPU emulator of cuda_on_cpu."""

import shutil

import pytest
from helpers import need_gpu
from kernels import cuda_on_cpu

from rmt_kernels.backends import cpu, cuda, native


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    pytest.importorskip("pybind11")
    if shutil.which("c++") is None:
        pytest.skip("the emulator needs a C++ compiler")
    return cuda_on_cpu.build(tmp_path_factory.mktemp("emulated"))


def cuda_backend(where: str, request, monkeypatch) -> str:
    """Device of the tensors; `rmt_kernels.backends.cuda` runs there."""
    if where == "gpu":
        return need_gpu()
    module = request.getfixturevalue("emulated")
    monkeypatch.setattr(cuda, "extension", module)
    monkeypatch.setattr(cuda, "device_kind", lambda index=None: "sm_90")
    monkeypatch.setattr(cuda, "_launch", lambda name, _, *args: getattr(module, f"cuda_{name}")(*args, 0))
    # torch's part: its CPU has no out_dtype.
    monkeypatch.setattr(cuda, "_weight_grad", lambda g, x: g.float().T @ x.float())
    return "cpu"


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
