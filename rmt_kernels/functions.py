"""The public functions: each validates its arguments once, and calls the op of its name.

Bad input raises ValueError or TypeError here. Formulas and shapes: `reference.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, checks, reference
from .ops import accurate_dtype, flat_rows

_ops = torch.ops.rmt_kernels


def _records_graph(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _as_autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def written(*tensors: Tensor | None) -> None:
    """Raises version counters, by which autograd and the layers go: a kernel that writes through a pointer does not."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in tensors if t is not None and not t.is_inference()])


def rng_state(seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """(2,) int64 [seed, step], the state that every draw depends on. Change it in place between CUDA graph replays."""
    for name, value in (("seed", seed), ("step", step)):
        if not isinstance(value, int) or not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} must be a 64-bit integer, got {value!r}")
    return torch.tensor([seed, step], dtype=torch.int64, device=device)


def pack_bits(mask: Tensor) -> Tensor:
    """(N, K) bool -> (N, ceil(K / 32)) int32 words, LSB first along K, pad bits 0. Raises TypeError, ValueError."""
    checks.need_matrix("mask", mask, floating=False)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be torch.bool, got {mask.dtype}")
    return _ops.pack_bits(mask)


def pack_scores(scores: Tensor, threshold: float) -> Tensor:
    """(N, K) scores -> bits of `scores > threshold`, as `pack_bits` lays them out.

    Raises: ValueError for a threshold that is not finite, and for NaN scores (on CUDA only with RMT_SYNC_ERRORS=1:
        the check waits for the device).
    """
    checks.need_matrix("scores", scores)
    threshold = checks.need_finite("threshold", threshold)
    bits = _ops.pack_scores(scores, threshold)
    if not torch.compiler.is_compiling():
        checks.need_no_nan("pack_scores", "scores", scores)
    return bits


def unpack_bits(bits: Tensor, in_features: int) -> Tensor:
    """(N, ceil(K / 32)) int32 -> (N, K) bool. Raises TypeError, ValueError."""
    checks.need_matrix("bits", bits, floating=False)
    if bits.dtype != torch.int32:
        raise TypeError(f"bits must be torch.int32, got {bits.dtype}")
    if not isinstance(in_features, int | torch.SymInt):
        raise TypeError(f"in_features must be an integer, got {in_features!r}")
    if bits.shape[1] != checks.words(in_features):
        want = checks.words(in_features)
        raise ValueError(f"bits must have {want} words a row for {in_features} columns, got {bits.shape[1]}")
    return _ops.unpack_bits(bits, in_features)


def masked_weight(weight: Tensor, bits: Tensor, scores: Tensor | None = None) -> Tensor:
    """(N, K) weight with off elements 0. `scores` (N, K) receive the straight-through gradient g * weight."""
    checks.need_matrix("weight", weight)
    checks.need_bits(weight, bits)
    if scores is not None:
        checks.need_like("scores", scores, weight.shape, weight.device)
    return _ops.masked_weight(weight, bits, scores)


def masked_linear(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None = None, *,
    dense: Tensor | None = None, scores: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = x @ (weight * bits).T + bias. Differentiable in x, weight, bias and, straight through the bits, in scores.

    Args:
        x: (..., K). Sets the dtype of the product; under autocast it is cast first, as `F.linear` does.
        weight: (N, K), any floating dtype.
        bits: (N, ceil(K / 32)) int32 from `pack_scores`.
        bias: (N,).
        dense: (N, K), `masked_weight(weight, bits)` if the caller keeps it. The product is then torch's own over it,
            equal bit for bit to a plain layer with the mask merged in, unless a backend is forced.
        scores: (N, K), only so that their gradient (g.T @ x) * weight has somewhere to go; the forward ignores them.

    Where a weight is off, x counts as 0 * x: NaN or inf there makes y NaN. fp32 products straight from the bits on a
    CPU with AVX-512 do not look at x there, and lose it.

    Raises: ValueError, TypeError on a wrong shape, dtype or device.
    """
    checks.need_linear("x", x, weight, bits, bias, dense, 1)
    if scores is not None:
        checks.need_like("scores", scores, weight.shape, weight.device)
    x = _as_autocast(x)
    if dense is not None and not backends.forced() and not _records_graph(x, weight, bias, scores):
        # Nothing to record: the op's way through the dispatcher would count beside a product of one row.
        return reference.masked_linear(x, weight, bits, bias, dense)
    return _ops.masked_linear(x, weight, bits, bias, dense, scores)


def masked_linear_dx(g: Tensor, weight: Tensor, bits: Tensor, *, dense: Tensor | None = None) -> Tensor:
    """dx = g @ (weight * bits), (..., N) -> (..., K). Raises ValueError, TypeError."""
    checks.need_linear("g", g, weight, bits, None, dense, 0)
    return _ops.masked_linear_dx(g, weight, bits, dense)


def masked_weight_(out: Tensor, weight: Tensor, bits: Tensor, *, old: Tensor | None = None) -> None:
    """Writes `masked_weight(weight, bits)` into `out` (N, K), of weight's dtype. Nothing is allocated.

    Args:
        old: (N, ceil(K / 32)) int32, the bits that `out` was made of before, from the same weight: only the words of 32
            weights that differ are then read and written.

    Raises: ValueError, TypeError on a wrong shape, dtype, device or layout.
    """
    checks.need_matrix("weight", weight)
    checks.need_bits(weight, bits)
    checks.need_like("out", out, weight.shape, weight.device, (weight.dtype,))
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if old is not None:
        checks.need_bits(weight, old)
    _ops.masked_weight_(out, weight, bits, old)
    written(out)


def grouped_masked_linear(
    x: Tensor, weight: Tensor, bits: Sequence[Tensor | None], offsets: Sequence[int], bias: Tensor | None = None, *,
    invariant: bool = False,
) -> Tensor:  # fmt: skip
    """Many tasks over one weight: rows offsets[g] .. offsets[g + 1] of x use bits[g].

    Args:
        x: (M, K), rows grouped by task. Sets the dtype, under autocast as in `masked_linear`.
        weight: (N, K), shared.
        bits: G tensors (N, ceil(K / 32)) int32; None: all of weight. One may stand for several groups.
        offsets: G + 1 integers, ascending from 0 to M.
        bias: (N,), shared.
        invariant: a row's result depends on that row and its mask alone, bit for bit, whatever else is in the batch:
            straight from the words at every size, which costs time where a GEMM would be faster. False: each group is
            computed as `masked_linear` computes it alone.

    Raises: ValueError, TypeError; ValueError where a gradient would be needed, since serving has no backward.
    """
    checks.need_matrix("weight", weight)
    if isinstance(bits, Tensor) or not len(bits):
        raise ValueError(f"bits must be a sequence of at least one tensor or None, got {checks.describe(bits)}")
    for words in bits:
        if words is not None:
            checks.need_bits(weight, words)
    checks.need_rows("x", x, weight.shape[1], weight.device)
    if x.dim() != 2:
        raise ValueError(f"x must be (M, {weight.shape[1]}), got {checks.describe(x)}")
    if bias is not None:
        checks.need_like("bias", bias, (weight.shape[0],), weight.device)
    if _records_graph(x, weight, bias):
        raise ValueError("grouped_masked_linear has no backward: call it under torch.no_grad()")
    ends = [int(end) for end in offsets]
    if len(ends) != len(bits) + 1 or ends[0] != 0 or ends[-1] != len(x) or ends != sorted(ends):
        raise ValueError(f"offsets must be {len(bits) + 1} numbers ascending from 0 to {len(x)}, got {ends}")
    return _ops.grouped_masked_linear(_as_autocast(x), weight, list(bits), bias, ends, invariant)


def weight_grad_(out: Tensor, g: Tensor, x: Tensor, *, accumulate: bool = False) -> None:
    """out = g.T @ x, or += where `accumulate`: the gradient of a linear layer's weight, with fp32 sums and result.

    Unlike `g.T @ x` it does not round to the 16 bits of its factors. For fp32 factors it is torch's own product.

    Args:
        out: (N, K) fp32, contiguous; float64 where a factor is.
        g: (..., N) cotangents. x: (..., K) inputs. Any floating dtypes.

    Raises: ValueError, TypeError; ValueError where a gradient would be needed, since this has no backward.
    """
    checks.need_matrix("out", out)
    checks.need_rows("x", x, out.shape[1], out.device)
    checks.need_like("g", g, (*x.shape[:-1], out.shape[0]), out.device)
    checks.need_like("out", out, out.shape, out.device, (accurate_dtype(g, x),))
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if _records_graph(out, g, x):
        raise ValueError("weight_grad_ has no backward: call it under torch.no_grad()")
    _ops.weight_grad_(out, flat_rows(g), flat_rows(x), accumulate)
    written(out)


def mask_grad(
    x: Tensor, g_task: Tensor, g_general: Tensor | None, weight: Tensor, scores: Tensor | None = None, *,
    penalty: Tensor | None = None, rng: Tensor | None = None, strength: float = 1.0, stream: int = 0,
) -> Tensor:  # fmt: skip
    """Gradient of the scores from one input and two output cotangents, with gradient dropout. Returns (N, K) fp32.

    Args:
        x: (..., K) input of the layer.
        g_task, g_general: (..., N) cotangents, not loss-scaled, because of GDR_EPS. g_general None: no dropout.
        weight: (N, K). scores: (N, K), read only for the L2 term.
        penalty: () coefficient / norm(scores).
        rng: (2,) int64 [seed, step]. stream: which layer this is; layers with one stream draw the same numbers.
        strength: in [0, 1], R-AMT's lambda. 1 zeroes a dropped element, 0 switches dropout off.

    Raises: ValueError, TypeError.
    """
    checks.need_matrix("weight", weight)
    strength = checks.need_strength(strength)
    n, k = weight.shape
    checks.need_rows("x", x, k, weight.device)
    checks.need_like("g_task", g_task, (*x.shape[:-1], n), weight.device)
    if g_general is not None:
        checks.need_like("g_general", g_general, g_task.shape, weight.device)
    checks.need_dropout(weight.shape, weight.device, g_general, scores, penalty, rng)
    rows = [None if t is None else flat_rows(t) for t in (x, g_task, g_general)]
    return _ops.mask_grad(*rows, weight, scores, penalty, rng, strength, stream)


def gradient_dropout(
    grad_task: Tensor, grad_general: Tensor | None, weight: Tensor | None = None, scores: Tensor | None = None, *,
    penalty: Tensor | None = None, rng: Tensor | None = None, strength: float = 1.0, stream: int = 0,
) -> Tensor:  # fmt: skip
    """`mask_grad` from two ready weight gradients (N, K), or, where weight is None, from two score gradients."""
    checks.need_matrix("grad_task", grad_task)
    strength = checks.need_strength(strength)
    for name, value in (("grad_general", grad_general), ("weight", weight)):
        if value is not None:
            checks.need_like(name, value, grad_task.shape, grad_task.device)
    checks.need_dropout(grad_task.shape, grad_task.device, grad_general, scores, penalty, rng)
    return _ops.gradient_dropout(grad_task, grad_general, weight, scores, penalty, rng, strength, stream)


def mask_update_(
    scores: list[Tensor], bits: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], grads: list[Tensor],
    factors: Tensor, *, generals: list[Tensor] = (), weights: list[Tensor] = (), chained: list[bool] = (),
    dense: list[Tensor] = (), scales: list[Tensor] = (), norms: Tensor | None = None, counts: Tensor | None = None,
    l2: float = 0.0, rng: Tensor | None = None, strength: float = 1.0, streams: list[int] = (),
    offsets: list[int] = (), beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, threshold: float = 5e-3,
) -> None:  # fmt: skip
    """All weight-sized work of a training step, for every layer at once, in place.

    Gradient dropout with the L2 term (formulas: `gradient_dropout`), Adam, threshold, repacking, the masked weight.
    Compact scores come as (1, S), with words of their own.

    Args:
        scores, grads: (N, K) fp32, contiguous as all matrices here, one each per layer.
        exp_avgs, exp_avg_sqs: (N, K), all fp32, all bf16 or all uint8. The last two are rounded stochastically;
            formats: `reference.load_moment`.
        bits: (N, ceil(K / 32)) int32.
        factors: (2,) fp32 from `reference.adam_factors`.
        generals: empty, or (N, K) fp32 per layer: the general loss's gradients. Without them nothing is dropped out.
        weights: empty, or (N, K) per layer.
        chained: empty (all False), or for each layer whether its gradients are those of the weight, g.T @ x, to be
            multiplied by `weights` here.
        dense: empty, or (N, K) per layer of the weight's dtype, or bf16 beside fp32. Must hold the masked weight of the
            old bits: only words that change are rewritten.
        scales: for uint8 moments 2 L uint8 tensors (ceil(N * K / 256),): of the first layer's exp_avg, its exp_avg_sq,
            and so on. Zeros with zeroed moments are a fresh state.
        norms: (L,) fp32, norms of the scores, read for the L2 term and overwritten with those of the new scores.
        counts: (L, 2) int64, written: bits that flipped, bits that are on.
        l2: coefficient of the per-tensor L2 norm (not squared) in the task's loss. Needs norms.
        rng: (2,) int64 [seed, step], for the dropout and for rounding moments.
        strength: in [0, 1], R-AMT's lambda.
        streams: random stream of each layer, below 2**31; empty: 0, 1, 2 and on.
        offsets: empty (all 0), or for each layer the flat index of its first element within a whole one, begin * K
            where only rows from `begin` on are given: they then draw what they draw as part of it. Multiples of 4,
            with uint8 moments of 256, so that the same elements share an exponent. norms are read as the whole layer's,
            and written as those of the rows given.

    Raises: ValueError, TypeError before anything is written; ValueError afterwards where scores became NaN (on CUDA
        only with RMT_SYNC_ERRORS=1: the check waits for the device).
    """
    if not 0 <= beta1 < 1 or not 0 <= beta2 < 1:
        raise ValueError(f"beta1 and beta2 must be in [0, 1), got {beta1!r} and {beta2!r}")
    l2, strength = checks.need_finite("l2", l2), checks.need_strength(strength)
    checks.need_update(
        scores, bits, exp_avgs, exp_avg_sqs, grads, generals, weights, chained, dense, scales, norms, counts, l2, rng,
        streams, offsets,
    )  # fmt: skip
    if scores:
        checks.need_like("factors", factors, (2,), scores[0].device, (torch.float32,))
        _ops.mask_update_(
            list(scores), list(bits), list(exp_avgs), list(exp_avg_sqs), list(dense), list(grads), list(weights),
            factors, beta1, beta2, checks.need_finite("eps", eps), checks.need_finite("threshold", threshold),
            list(generals), list(chained), list(scales), norms, counts, rng, l2, strength, list(streams), list(offsets),
        )  # fmt: skip
        written(*scores, *bits, *exp_avgs, *exp_avg_sqs, *dense, *scales, norms, counts)
        if torch.compiler.is_compiling():
            return
        for i, s in enumerate(scores):
            checks.need_no_nan("mask_update_", f"scores[{i}]", s)
