"""Checks of the public functions: what was expected, and what came. ValueError and TypeError only."""

import math
import os

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import backends
from .reference import MOMENT_BLOCK

# What mask_update_ keeps Adam's moments in.
MOMENTS = (torch.float32, torch.bfloat16, torch.uint8)


def has_values(t: Tensor) -> bool:
    """False for a fake tensor: it has shape, dtype and device, but no memory to look into."""
    return not isinstance(t, FakeTensor)


def address(t: Tensor) -> int | None:
    """Where its values are; None for a fake tensor."""
    return t.data_ptr() if has_values(t) else None


def words(in_features: int) -> int:
    """int32 words of bits for a row."""
    return (in_features + 31) // 32


def describe(value) -> str:
    return f"{value.dtype} {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else repr(value)


def need_matrix(name: str, value, *, floating: bool = True) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dim() != 2 or value.numel() == 0:
        raise ValueError(f"{name} must be a non-empty matrix, got shape {tuple(value.shape)}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")


def need_like(name: str, value, shape: tuple, device: torch.device, dtypes: tuple = ()) -> None:
    """dtypes empty: any floating dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {value!r}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    if value.dtype not in dtypes if dtypes else not value.is_floating_point():
        want = " or ".join(map(str, dtypes)) or "floating point"
        raise TypeError(f"{name} must be {want}, got {value.dtype}")


def need_bits(weight: Tensor, bits, tasks: tuple = ()) -> None:
    want = (*tasks, weight.shape[0], words(weight.shape[1]))
    if not isinstance(bits, Tensor) or bits.dtype != torch.int32 or tuple(bits.shape) != want:
        raise ValueError(f"bits must be int32 {want} for weight {tuple(weight.shape)}, got {describe(bits)}")
    if bits.device != weight.device or not bits.is_contiguous():
        raise ValueError(f"bits must be contiguous on {weight.device}, got {describe(bits)}, strides {bits.stride()}")


def need_rows(name: str, value, columns: int, device: torch.device) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {describe(value)}")
    if value.dim() < 1 or value.shape[-1] != columns or value.device != device:
        raise ValueError(f"{name} must be (..., {columns}) on {device}, got {describe(value)}")


def need_linear(name, x, weight, bits, bias, dense, side: int) -> None:
    need_matrix("weight", weight)
    need_bits(weight, bits)
    device = weight.device
    need_rows(name, x, weight.shape[side], device)
    if bias is not None:
        need_like("bias", bias, weight.shape[:1], device)
    if dense is not None:
        need_like("dense", dense, weight.shape, device)


def need_finite(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def need_strength(value: float) -> float:
    if not 0 <= need_finite("strength", value) <= 1:
        raise ValueError(f"strength must be in [0, 1], got {value!r}")
    return float(value)


def need_dropout(shape, device, grad_general, scores, penalty, rng) -> None:
    if penalty is not None and scores is None:
        raise ValueError("penalty needs scores: the L2 term is penalty * scores")
    if scores is not None:
        need_like("scores", scores, shape, device)
    if penalty is not None:
        need_like("penalty", penalty, (), device)
    if grad_general is not None:
        if rng is None:
            raise ValueError("gradient dropout needs rng, an int64 tensor [seed, step]: see rmt_kernels.rng_state")
        need_like("rng", rng, (2,), device, (torch.int64,))


def need_update(
    scores, bits, exp_avgs, exp_avg_sqs, grads, generals, weights, chained, dense, scales, norms, counts, l2, rng,
    streams, offsets,
) -> None:  # fmt: skip
    """Lists, dtypes and layouts of `mask_update_`."""
    moments = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists = {"bits": bits, **moments, "grads": grads}
    numbers = {"chained": chained, "streams": streams, "offsets": offsets}
    optional = {"generals": generals, "weights": weights, "dense": dense, **numbers}
    lists |= {name: values for name, values in optional.items() if values}
    lists |= {"weights": weights} if dense or any(chained) else {}
    for name, values in lists.items():
        if len(values) != len(scores):
            what = "entry" if name in numbers else "tensor"
            raise ValueError(f"{name} must have one {what} for each of {len(scores)} scores, got {len(values)}")
    for i, s in enumerate(scores):
        need_matrix(f"scores[{i}]", s)
        need_like(f"scores[{i}]", s, s.shape, scores[0].device, (torch.float32,))
        need_bits(s, bits[i])
        for name, values in lists.items():
            if name == "bits" or name in numbers:
                continue
            elif name in moments:
                dtypes = (exp_avgs[0].dtype,) if exp_avgs[0].dtype in MOMENTS else MOMENTS
            elif name == "dense":
                dtypes = (torch.float32, torch.bfloat16)
                dtypes = dtypes if weights[i].dtype == torch.float32 else (weights[i].dtype,)
            else:
                dtypes = () if name == "weights" else (torch.float32,)
            need_like(f"{name}[{i}]", values[i], s.shape, s.device, dtypes)
            if not values[i].is_contiguous() or not s.is_contiguous():
                raise ValueError(f"scores[{i}] and {name}[{i}] must be contiguous, got strides {values[i].stride()}")
    if scores:
        _need_extras(scores, exp_avgs[0].dtype, generals, scales, norms, counts, l2, rng, streams, offsets)


def _need_extras(scores, stored, generals, scales, norms, counts, l2, rng, streams, offsets) -> None:
    device = scores[0].device
    want = 2 * len(scores) if stored == torch.uint8 else 0
    if len(scales) != want:
        raise ValueError(f"scales must have {want} tensors for {len(scores)} {stored} moments, got {len(scales)}")
    for i, scale in enumerate(scales):
        blocks = -(-scores[i // 2].numel() // MOMENT_BLOCK)
        need_like(f"scales[{i}]", scale, (blocks,), device, (torch.uint8,))
    if norms is not None:
        need_like("norms", norms, (len(scores),), device, (torch.float32,))
    elif l2:
        raise ValueError(f"l2 needs norms, the norms of the scores, got l2 {l2!r} and none")
    if counts is not None:
        need_like("counts", counts, (len(scores), 2), device, (torch.int64,))
    for name, value in {"norms": norms, "counts": counts, **{f"scales[{i}]": t for i, t in enumerate(scales)}}.items():
        if value is not None and not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {value.stride()}")
    if generals or stored != torch.float32:
        if rng is None:
            why = "gradient dropout" if generals else f"rounding moments to {stored}"
            raise ValueError(f"{why} needs rng, an int64 tensor [seed, step]: see rmt_kernels.rng_state")
        need_like("rng", rng, (2,), device, (torch.int64,))
    if any(not isinstance(v, int) or not 0 <= v < 2**31 for v in streams):
        raise ValueError(f"streams must be integers from 0 to 2**31 - 1, got {streams!r}")
    unit, what = (MOMENT_BLOCK, "an exponent of uint8 moments") if stored == torch.uint8 else (4, "a block of the draw")
    if any(not isinstance(v, int) or not 0 <= v < 2**63 or v % unit for v in offsets):
        raise ValueError(
            f"offsets must be integers from 0 to 2**63 - 1 and multiples of {unit}, the elements that share {what}, "
            f"got {offsets!r}"
        )


def need_no_nan(op: str, name: str, scores: Tensor) -> None:
    """Looks for NaN after `op`, but not where that would wait for the device, nor where the kernel has looked."""
    if not has_values(scores):
        look = False
    elif scores.device.type == "cpu":
        look = backends.last(op, "cpu") != "cpu"
    else:
        look = os.environ.get("RMT_SYNC_ERRORS") == "1"
    if look and scores.isnan().any():
        raise ValueError(f"{name} must not be NaN, got {int(scores.isnan().sum())} NaN of {scores.numel()}")
