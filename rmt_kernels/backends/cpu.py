"""C++ kernels for CPU tensors (csrc/cpu): one build for all instruction sets, chosen when loaded.

Weight-sized work is fused and runs on torch's OpenMP threads. Where the caller keeps the masked weight in `dense`, a
product is torch's own GEMM over it, bit for bit as in a plain layer; where it keeps the bits alone, few rows run
straight from the words, and more make the masked weight first: how many, dispatch.json says.
"""

import functools
import threading
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from .. import reference
from . import dispatch
from .native import DTYPES, MOMENTS, extension, missing, update_lacks

# bf16 rows are multiplied as they are where that instruction is this many times as fast as fp32's. AMX is; vdpbf16ps is
# half as fast on Sapphire Rapids, and was not measured elsewhere. `python bench/weight_grad.py` shows both ways.
MIN_RATE = 1.4
NOTES = {
    "masked_linear": "first choice; torch's GEMM over `dense`; without it by the table",
    "grouped_masked_linear": "first choice; each group by masked_linear's table, those from the bits in one read of "
    "the weight; invariant rows from the bits at any size, fp16 and mixed dtypes row by row through the reference",
    "masked_weight_": "first choice; with `old` only the words that differ",
    "weight_grad_": "first choice; bf16 factors as they are by AMX, or by vdpbf16ps where it is faster than fp32; "
    "fp16, mixed and other factors are widened for torch's fp32 GEMM",
}
_scratch = threading.local()
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ISA = None if extension is None else extension.cpu_isa()


def unavailable(device: str) -> str | None:
    if device != "cpu":
        return "CPU kernels only"
    return missing


def lacks(name: str, args: tuple) -> str | None:
    tensors = [t for group in args for t in (group if isinstance(group, list) else [group])]
    if any(isinstance(t, Tensor) and t.is_floating_point() and t.dtype not in FLOATS for t in tensors):
        return "float64 runs the reference"
    if name == "mask_update_":
        scores, _, exp_avgs, exp_avg_sqs, dense, grads, weights = args[:7]
        return update_lacks(scores, exp_avgs, exp_avg_sqs, dense, grads, weights)
    return None


@functools.cache
def device_kind() -> str:
    """What dispatch.json calls this CPU: its kernels' instruction set, and whether the GEMM beside them has AMX."""
    if ISA is None:
        return "cpu"
    # Linux alone says it; elsewhere none is assumed, which costs time at most.
    cpuinfo = Path("/proc/cpuinfo")
    amx = ISA == "avx512" and cpuinfo.is_file() and "amx_bf16" in cpuinfo.read_text()
    return f"cpu {ISA}{' amx' if amx else ''}"


def decide(op: str, dtype: torch.dtype, n: int, k: int, m: int, kept: bool = False) -> dispatch.Row:
    """The row of the table that decides for a product of M contiguous rows."""
    row = dispatch.row(device_kind(), op, dtype, n, k, m, kept)
    if row.path == "bits" and not _reads_bits(dtype):
        return row._replace(path="made", ms={}, note=f"no kernel for {dtype} on {device_kind()}")
    return row


def _reads_bits(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and extension is not None and extension.cpu_has_bf16())


def _threads(numel: int) -> int:
    # Below some 16k elements starting a second thread costs more than it brings.
    return torch.get_num_threads() if numel >= 16384 else 1


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _words(k: int) -> int:
    return (k + 31) // 32


def pack_bits(mask: Tensor) -> Tensor:
    mask = mask.contiguous()
    n, k = mask.shape
    bits = torch.empty((n, _words(k)), dtype=torch.int32)
    extension.cpu_pack_bits(mask.data_ptr(), n, k, bits.data_ptr(), _threads(n * k))
    return bits


def pack_scores(scores: Tensor, threshold: float) -> Tensor:
    scores = scores.float().contiguous()
    n, k = scores.shape
    bits = torch.empty((n, _words(k)), dtype=torch.int32)
    if extension.cpu_pack_scores(scores.data_ptr(), n, k, threshold, bits.data_ptr(), _threads(n * k)):
        raise ValueError(f"scores must not be NaN, got {int(scores.isnan().sum())} NaN of {scores.numel()}")
    return bits


def unpack_bits(bits: Tensor, in_features: int) -> Tensor:
    bits = bits.contiguous()
    mask = torch.empty((bits.shape[0], in_features), dtype=torch.bool)
    extension.cpu_unpack_bits(
        bits.data_ptr(), bits.shape[0], in_features, mask.data_ptr(), _threads(bits.shape[0] * in_features)
    )
    return mask


def masked_weight(weight: Tensor, bits: Tensor) -> Tensor:
    weight = weight.contiguous()
    n, k = weight.shape
    out = torch.empty_like(weight)
    extension.cpu_masked_weight(
        weight.data_ptr(), bits.data_ptr(), n, k, weight.element_size(), out.data_ptr(), _threads(n * k)
    )
    return out


def has_bits_kernel(op: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a C++ product here takes these operands straight from the bits."""
    return (
        op == "masked_linear"
        and _reads_bits(x.dtype)
        and weight.dtype == x.dtype
        and (bias is None or bias.dtype == x.dtype)
        and weight.is_contiguous()
    )


def masked_linear(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, dense: Tensor | None) -> Tensor:
    if dense is None and x.numel() and has_bits_kernel("masked_linear", x, weight, bias):
        n, k = weight.shape
        if decide("masked_linear", x.dtype, n, k, x.numel() // k).path == "bits":
            rows = x.reshape(-1, k)
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            bias = None if bias is None else bias.contiguous()
            y = torch.empty((rows.shape[0], n), dtype=x.dtype)
            extension.cpu_masked_linear_single(
                rows.data_ptr(), weight.data_ptr(), bits.data_ptr(), _ptr(bias), rows.shape[0], y.data_ptr(),
                DTYPES[str(x.dtype)], n, k, rows.stride(0), _threads(n * k),
            )  # fmt: skip
            return y.view(*x.shape[:-1], n)
    return reference.masked_linear(x, weight, bits, bias, masked_weight(weight, bits) if dense is None else dense)


def masked_linear_dx(g: Tensor, weight: Tensor, bits: Tensor, dense: Tensor | None) -> Tensor:
    return reference.masked_linear_dx(g, weight, bits, masked_weight(weight, bits) if dense is None else dense)


def masked_weight_(out: Tensor, weight: Tensor, bits: Tensor, old: Tensor | None) -> None:
    weight, (n, k) = weight.contiguous(), weight.shape
    rest = n, k, weight.element_size(), out.data_ptr(), _threads(n * k)
    if old is None:
        extension.cpu_masked_weight(weight.data_ptr(), bits.data_ptr(), *rest)
    else:
        extension.cpu_swap_mask(weight.data_ptr(), bits.data_ptr(), old.data_ptr(), *rest)


def grouped_masked_linear(
    x: Tensor, weight: Tensor, bits: list[Tensor | None], bias: Tensor | None, offsets: list[int], invariant: bool
) -> Tensor:
    groups = [(words, i, j) for words, (i, j) in zip(bits, pairwise(offsets)) if j > i]
    native, (n, k) = has_bits_kernel("masked_linear", x, weight, bias), weight.shape
    if invariant and not native:
        return reference.grouped_masked_linear(x, weight, bits, bias, offsets, invariant)
    y = torch.empty((x.shape[0], n), dtype=x.dtype)
    straight = groups if invariant else []
    for words, i, j in () if invariant else groups:
        if words is None:
            y[i:j] = reference.linear(x[i:j], weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        elif native and decide("masked_linear", x.dtype, n, k, j - i).path == "bits":
            straight.append((words, i, j))
        else:
            dense = _scratch_like(weight)
            masked_weight_(dense, weight, words, None)
            y[i:j] = reference.masked_linear(x[i:j], weight, words, bias, dense)
    if straight:
        # One read of weight for all of them.
        x = x if x.stride(1) == 1 else x.contiguous()
        bias = None if bias is None else bias.contiguous()
        words, first, last = zip(*straight)
        extension.cpu_masked_linear(
            x.data_ptr(), weight.data_ptr(), [_ptr(w) for w in words], first, last, _ptr(bias), y.data_ptr(),
            DTYPES[str(x.dtype)], n, k, x.stride(0), _threads(n * k),
        )  # fmt: skip
    return y


def _scratch_like(weight: Tensor) -> Tensor:
    """Contiguous memory like weight's, which the calling thread keeps for its next call: its largest layer."""
    if len(getattr(_scratch, "memory", ())) < weight.nbytes:
        _scratch.memory = torch.empty(weight.nbytes, dtype=torch.uint8)
    return _scratch.memory[: weight.nbytes].view(weight.dtype).view(weight.shape)


@functools.cache
def multiplies_bf16() -> bool:
    """Whether `weight_grad_` takes bf16 factors as they are. The processor is asked once."""
    return extension.cpu_weight_grad_rate() >= MIN_RATE


def weight_grad_(out: Tensor, g: Tensor, x: Tensor, accumulate: bool) -> None:
    if len(x) and g.dtype == x.dtype == torch.bfloat16 and multiplies_bf16():
        g, x = (t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in (g, x))
        (m, k), n = x.shape, g.shape[1]
        extension.cpu_weight_grad(
            g.data_ptr(), x.data_ptr(), out.data_ptr(), m, n, k, g.stride(0), x.stride(0), accumulate, _threads(n * k)
        )
    else:
        reference.weight_grad_(out, g, x, accumulate)


def _weight_grad(g: Tensor, x: Tensor) -> Tensor:
    out = torch.empty((g.shape[1], x.shape[1]), dtype=torch.float32)
    weight_grad_(out, g, x, False)
    return out


def mask_grad(
    x: Tensor, g_task: Tensor, g_general: Tensor | None, weight: Tensor, scores: Tensor | None,
    penalty: Tensor | None, rng: Tensor | None, strength: float, stream: int,
) -> Tensor:  # fmt: skip
    grads = [None if g is None else _weight_grad(g, x) for g in (g_task, g_general)]
    return gradient_dropout(*grads, weight, scores, penalty, rng, strength, stream)


def gradient_dropout(
    grad_task: Tensor, grad_general: Tensor | None, weight: Tensor | None, scores: Tensor | None,
    penalty: Tensor | None, rng: Tensor | None, strength: float, stream: int,
) -> Tensor:  # fmt: skip
    task, general, scores = (None if t is None else t.float().contiguous() for t in (grad_task, grad_general, scores))
    if weight is not None:
        weight = (weight.float() if weight.dtype == torch.float16 else weight).contiguous()
    grad = torch.empty_like(task)
    seed, step = (0, 0) if general is None else rng.tolist()
    extension.cpu_gradient_dropout(
        task.data_ptr(), _ptr(general), _ptr(weight), 0 if weight is None else DTYPES[str(weight.dtype)],
        0 if penalty is None else scores.data_ptr(), 0.0 if penalty is None else float(penalty), 1 - strength, seed,
        step, stream, grad.data_ptr(), task.numel(), _threads(task.numel()),
    )  # fmt: skip
    return grad


def mask_update_(
    scores: list[Tensor], bits: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], dense: list[Tensor],
    grads: list[Tensor], weights: list[Tensor], factors: Tensor, beta1: float, beta2: float, eps: float,
    threshold: float, generals: list[Tensor] = (), chained: list[bool] = (), scales: list[Tensor] = (),
    norms: Tensor | None = None, counts: Tensor | None = None, rng: Tensor | None = None, l2: float = 0.0,
    strength: float = 1.0, streams: list[int] = (), offsets: list[int] = (),
) -> None:  # fmt: skip
    def addresses(group: list[Tensor]) -> list[int]:
        return [t.data_ptr() for t in group]

    streams, offsets = list(streams) or list(range(len(scores))), list(offsets) or [0] * len(scores)
    dtypes = [[DTYPES[str(t.dtype)] for t in group or scores] for group in (weights, dense)]
    seed, step = (0, 0) if rng is None else rng.tolist()
    nans = extension.cpu_mask_update(
        *map(addresses, (scores, bits, exp_avgs, exp_avg_sqs, dense, grads, weights, generals, scales)),
        [s.shape[0] for s in scores], [s.shape[1] for s in scores], list(chained), streams, offsets, *dtypes,
        MOMENTS[exp_avgs[0].dtype], factors.tolist(), _ptr(norms), _ptr(counts), seed, step, l2, strength, beta1, beta2,
        eps, threshold, _threads(sum(s.numel() for s in scores)),
    )  # fmt: skip
    for i, words in enumerate(nans):
        if words:
            raise ValueError(f"scores[{i}] must not be NaN, got NaN in {words} words of 32: is a gradient NaN?")


def philox_uniform(rng: Tensor, stream: int, shape: tuple[int, ...], offset: int = 0) -> Tensor:
    out = torch.empty(shape, dtype=torch.float32)
    extension.cpu_uniform(*rng.tolist(), stream, offset, out.data_ptr(), out.numel(), _threads(out.numel()))
    return out
