"""Shapes, tolerances and ready-made inputs that every kernel test shares."""

import math

import pytest
import torch
from torch import Tensor

import rmt_kernels as rk
from rmt_kernels import reference
from rmt_kernels.backends import cuda

# (M, N, K): one element, ragged words, a prime-sized layer, CLIP-like.
SHAPES = [(1, 1, 1), (0, 5, 33), (1, 7, 20), (3, 1, 64), (5, 9, 31), (16, 33, 32), (17, 40, 197), (50, 48, 771)]
THRESHOLD = 5e-3


def shape_id(shape) -> str:
    return "M{}-N{}-K{}".format(*shape)


def need_gpu() -> str:
    reason = cuda.unavailable("cuda")
    if reason is not None:
        pytest.skip(reason)
    return "cuda"


def assert_no_worse(
    got: Tensor, plain: Tensor, truth: Tensor, factor: float = 2.0, scale: Tensor | None = None
) -> None:
    """`got` may be `factor` times as far from the float64 truth as `plain`, the reference run in the kernel's dtype.

    One ulp of the output's scale in got's dtype is added, for where the reference happens to be exact. For a product
    of few outputs give the largest sum of absolute terms as `scale`: summation order alone moves a result by an ulp of
    it, and the reference's own error over a handful of outputs is luck.
    """
    assert got.shape == truth.shape, f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.dtype == plain.dtype, f"dtype {got.dtype}, expected {plain.dtype}"
    if got.numel() == 0:
        return
    assert not got.isnan().any(), f"{int(got.isnan().sum())} elements were left unwritten or are NaN"
    error, allowed = (got.double() - truth).abs().max(), (plain.double() - truth).abs().max()
    ulp = torch.finfo(got.dtype).eps * (truth.abs().max() if scale is None else scale.max())
    assert error <= factor * allowed + ulp, f"error {error:.3e}, reference's {allowed:.3e}, one ulp {ulp:.3e}"


def assert_same_dropout(got: Tensor, a: Tensor, b: Tensor, uniform: Tensor, strength: float) -> None:
    """Exact keep decisions wherever |P - U| > 1e-4; a, b, uniform from the reference in float64."""
    probability = reference.keep_probability(a, b)
    clear = (probability - uniform).abs() > 1e-4
    want = torch.where(probability > uniform, a, (1 - strength) * a)
    scale = 1e-4 * a.abs() + 1e-6 * a.abs().max()
    wrong = clear & ((got.double() - want).abs() > scale)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} elements differ where |P - U| > 1e-4"
    assert (~clear).sum() <= 2 + 0.01 * clear.numel(), "the test data must leave nearly all decisions clear"


def layer(shape, dtype=torch.float32, device="cpu", seed=0) -> dict[str, Tensor]:
    """Random input, weight, scores (half of them off), bits, bias and two cotangents of one layer."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).to(device)

    tensors = {
        "x": normal(m, k).to(dtype),
        "weight": normal(n, k, scale=1 / math.sqrt(k)).to(dtype),
        "bias": normal(n).to(dtype),
        "scores": THRESHOLD + normal(n, k, scale=1e-2),
        "g_task": normal(m, n).to(dtype),
        "g_general": normal(m, n).to(dtype),
    }
    tensors["bits"] = reference.pack_scores(tensors["scores"], THRESHOLD)
    tensors["rng"] = rk.rng_state(1234567890123, 42, device)
    tensors["penalty"] = 1e-4 / tensors["scores"].norm()
    return tensors
