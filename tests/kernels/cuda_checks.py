"""What the tests of CUDA kernels ask of every one: nothing but the output written, runs that repeat, any layout; and
where they run."""

import contextlib

import torch
from helpers import assert_no_worse, need_gpu

from rmt_kernels import reference
from rmt_kernels.backends import cuda


@contextlib.contextmanager
def unchanged(*tensors):
    before = [None if t is None else t.clone() for t in tensors]
    yield
    assert all(t is None or torch.equal(t, b) for t, b in zip(tensors, before)), "an input was written to"


def twice(call):
    """The result of `call`, which must repeat bit for bit."""
    first, second = call(), call()
    assert torch.equal(first, second), "two runs differ"
    return first


def inside(t: torch.Tensor) -> torch.Tensor:
    """The same matrix as a view into a larger one: odd row stride, first element not on 16 bytes."""
    n, k = t.shape
    wide = torch.zeros(n + 1, k + 3, dtype=t.dtype, device=t.device)
    wide[1:, 1 : k + 1] = t
    return wide[1:, 1 : k + 1]


def layouts(t: torch.Tensor) -> list[torch.Tensor]:
    return [t, inside(t), t.T.contiguous().T]


def check_product(call, x, weight, bits, bias):
    """`call()` against the float64 truth, twice, with the inputs unchanged."""
    with unchanged(x, weight, bits, bias):
        got = twice(call)
    double = [None if t is None else t.double() for t in (x, weight, bias)]
    truth = reference.masked_linear(double[0], double[1], bits, double[2], None)
    assert_no_worse(got, reference.masked_linear(x, weight, bits, bias, None), truth)
    return got


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
