"""CUDA C++ kernels (csrc/cuda), compute capability 8.0 and up. Same functions and arguments as `reference.py`.

Everything runs on the current stream and nothing waits for the device, so that all of it can be captured in a CUDA
graph. Weight-sized work is fused. A product over a ready `dense` is torch's GEMM, bit for bit as in a plain layer;
without one dispatch.json says whether it runs straight from the words (few rows in one pass over W, more in Hopper's
wgmma kernel) or makes the masked weight first. Groups of few rows share one launch of the first kernel, whose result
for a row does not depend on what else is in it; larger groups are computed as alone. What is not served says `lacks`.
"""

import functools

import torch
from torch import Tensor

from .. import reference
from . import dispatch
from .native import DTYPES, MOMENTS, build_info, extension, missing, update_lacks

# Up to this many rows one pass over W serves the whole product: kMmaTiles * kTileRows in masked_linear_small.cu. No
# choice: which of the paths a shape takes says dispatch.json. Only invariant products go on in that kernel.
SMALL_M = 64
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ADDS_WIDER = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def unavailable(device: str) -> str | None:
    """Why no CUDA C++ kernel can run on `device`, or None."""
    if device != "cuda":
        return "CUDA kernels only"
    if extension is None:
        return missing
    if not hasattr(extension, "cuda_pack_bits"):
        return f"the extension has no CUDA code ({build_info()['cuda']})"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no CUDA device"
    best = max(_capability(i) for i in range(torch.cuda.device_count()))
    return None if best >= (8, 0) else f"no GPU of compute capability >= 8.0, the best here has {best[0]}.{best[1]}"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def device_kind(index: int | None = None) -> str:
    """What dispatch.json calls the GPU."""
    return "sm_{}{}".format(*_capability(index))


def decide(op: str, dtype: torch.dtype, n: int, k: int, m: int, kept: bool = False) -> dispatch.Row:
    """The row of the table that decides for a product of M rows on the current GPU."""
    kind = device_kind() if torch.version.cuda is not None and torch.cuda.is_available() else "cuda"
    return dispatch.row(kind, op, dtype, n, k, m, kept)


def _from_bits(x: Tensor, weight: Tensor, rows: int) -> bool:
    return dispatch.row(device_kind(x.device.index), "masked_linear", x.dtype, *weight.shape, rows).path == "bits"


def has_bits_kernel(op: str, x: Tensor, weight: Tensor) -> bool:
    """Whether a kernel here takes these operands straight from the bits."""
    fits = _rows(x) <= SMALL_M or _gemm_lacks(x, _capability(x.device.index)) is None
    return op == "masked_linear" and x.dtype == weight.dtype and fits


def lacks(name: str, args: tuple) -> str | None:
    """Why this call is not served, or None."""
    tensors = [t for arg in args for t in (arg if isinstance(arg, list | tuple) else (arg,)) if isinstance(t, Tensor)]
    capability = _capability(tensors[0].device.index)
    if capability < (8, 0):
        return f"the CUDA kernels need compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    if name in ("masked_weight", "masked_weight_"):
        return None if args[0].element_size() in (2, 4, 8) else f"no CUDA kernel for {args[0].dtype}"
    other = {str(t.dtype) for t in tensors if t.is_floating_point()} - {str(d) for d in _FLOATS}
    if other:
        return f"no CUDA kernel for {', '.join(sorted(other))}"
    if name == "mask_update_":
        return _update_lacks(*args[:7])
    if name == "masked_linear" and args[4] is not None:
        return None  # torch's product over `dense`: under autocast `weight` is of another dtype, and not looked at
    if name in ("masked_linear", "grouped_masked_linear") and args[0].dtype != args[1].dtype:
        return f"x is {args[0].dtype} and weight {args[1].dtype}: the CUDA products take one dtype"
    rows = ()
    if name == "masked_linear" and args[4] is None:
        rows = (_rows(args[0]),)
    elif name == "grouped_masked_linear" and not args[5]:
        rows = (j - i for words, i, j in zip(args[2], args[4], args[4][1:]) if words is not None)
    if any(m > SMALL_M and _from_bits(*args[:2], m) for m in rows):
        return _gemm_lacks(args[0], capability)
    return None


def _update_lacks(scores, bits, exp_avgs, exp_avg_sqs, dense, grads, weights) -> str | None:
    if exp_avgs[0].dtype == torch.uint8 and any(s.shape[0] > 1 and s.shape[1] % 32 for s in scores):
        return "8-bit moments need K to be a multiple of 32"
    if any(len({t.dtype for t in group}) > 1 for group in (weights, dense)):
        return "weights of several dtypes in one call"
    return update_lacks(scores, exp_avgs, exp_avg_sqs, dense, grads, weights)


def _gemm_lacks(x: Tensor, capability: tuple[int, int]) -> str | None:
    if capability[0] != 9:
        return f"more than {SMALL_M} rows without `dense` need compute capability 9.0"
    if "sm_90a" not in str(build_info()["cuda"]):  # elsewhere the wgmma kernel is an empty shell
        return "the extension was not built for sm_90a"
    if x.dtype == torch.float32:
        return f"more than {SMALL_M} rows without `dense` need fp16 or bf16"
    return None if x.shape[-1] % 8 == 0 else f"more than {SMALL_M} rows without `dense` need K to be a multiple of 8"


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _dtype(t: Tensor) -> int:
    return DTYPES[str(t.dtype)]


def _matrix(t: Tensor) -> Tensor:
    """(M, K) whose rows are contiguous, `stride(0)` apart."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _tma_matrix(t: Tensor) -> Tensor:
    """(M, K) as the copy engine takes it: 16-byte aligned, rows a multiple of 16 bytes apart, not overlapping."""
    t = _matrix(t)
    good = t.stride(0) % 8 == 0 and t.stride(0) >= t.shape[1] and t.data_ptr() % 16 == 0
    return t if good else t.clone(memory_format=torch.contiguous_format)


def _launch(name: str, device: torch.device, *args) -> None:
    with torch.cuda.device(device):
        getattr(extension, f"cuda_{name}")(*args, torch.cuda.current_stream(device).cuda_stream)


def pack_bits(mask: Tensor) -> Tensor:
    mask = _matrix(mask)
    n, k = mask.shape
    bits = torch.empty((n, (k + 31) // 32), dtype=torch.int32, device=mask.device)
    _launch("pack_bits", mask.device, mask.data_ptr(), n, k, mask.stride(0), bits.data_ptr())
    return bits


def pack_scores(scores: Tensor, threshold: float) -> Tensor:
    scores = _matrix(scores)
    n, k = scores.shape
    bits = torch.empty((n, (k + 31) // 32), dtype=torch.int32, device=scores.device)
    _launch(
        "pack_scores", scores.device, scores.data_ptr(), _dtype(scores), n, k, scores.stride(0), threshold,
        bits.data_ptr(),
    )  # fmt: skip
    return bits


def unpack_bits(bits: Tensor, in_features: int) -> Tensor:
    bits = bits.contiguous()
    mask = torch.empty((bits.shape[0], in_features), dtype=torch.bool, device=bits.device)
    _launch("unpack_bits", bits.device, bits.data_ptr(), bits.shape[0], in_features, mask.data_ptr())
    return mask


def masked_weight(weight: Tensor, bits: Tensor) -> Tensor:
    weight = _matrix(weight)
    n, k = weight.shape
    out = torch.empty((n, k), dtype=weight.dtype, device=weight.device)
    _launch(
        "masked_weight", weight.device, weight.data_ptr(), weight.element_size(), n, k, weight.stride(0),
        bits.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def masked_weight_(out: Tensor, weight: Tensor, bits: Tensor, old: Tensor | None) -> None:
    masked_weights_([out], [weight], [bits], [old])


def masked_weights_(outs: list[Tensor], weights: list[Tensor], bits: list[Tensor], olds: list[Tensor | None]) -> None:
    """`masked_weight_` of every layer, all of one dtype and device; up to 48 of them in one launch."""
    weights = [_matrix(w) for w in weights]
    addresses = ([_ptr(t) for t in group] for group in (outs, weights, bits, olds))
    rows, columns = zip(*(w.shape for w in weights))
    strides = [w.stride(0) for w in weights]
    _launch("masked_weights", outs[0].device, *addresses, rows, columns, strides, outs[0].element_size())


def masked_linear(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, dense: Tensor | None) -> Tensor:
    if dense is not None:
        return reference.masked_linear(x, weight, bits, bias, dense)
    m = _rows(x)
    if not _from_bits(x, weight, m):
        return reference.masked_linear(x, weight, bits, bias, masked_weight(weight, bits))
    rows = x.reshape(-1, x.shape[-1])
    y = _small(rows, weight, [(bits, 0, m)], bias) if m <= SMALL_M else masked_gemm(rows, weight, bits, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def grouped_masked_linear(
    x: Tensor, weight: Tensor, bits: list[Tensor | None], bias: Tensor | None, offsets: list[int], invariant: bool
) -> Tensor:
    groups = [(w, i, j, _path(x, weight, w, j - i, invariant)) for w, i, j in zip(bits, offsets, offsets[1:]) if j > i]
    y, scratch = _small(x, weight, [group[:3] for group in groups if group[3] == "few"], bias), None
    for words, i, j, path in groups:
        if path == "gemm":
            y[i:j] = masked_gemm(x[i:j], weight, words, bias)
        elif path == "made":
            dense = weight
            if words is not None:
                # One buffer for all groups: the stream orders what is done with it.
                scratch = torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if scratch is None else scratch
                masked_weight_(scratch, weight, words, None)
                dense = scratch
            y[i:j] = reference.masked_linear(x[i:j], weight, words, bias, dense)
    return y


def _path(x: Tensor, weight: Tensor, words: Tensor | None, m: int, invariant: bool) -> str:
    """How a group of m rows is computed: "few", by masked_linear_small.cu; "gemm", by the wgmma kernel; "made"."""
    if invariant:
        return "few"
    if not _from_bits(x, weight, m):
        return "made"
    return "few" if m <= SMALL_M else "made" if words is None else "gemm"


def _small(x: Tensor, weight: Tensor, groups: list[tuple[Tensor | None, int, int]], bias: Tensor | None) -> Tensor:
    """(M, N) by masked_linear_small.cu; groups: (bits or None for the plain weight, first row, row behind the last)."""
    x, weight = _matrix(x), _matrix(weight)
    (m, k), n = x.shape, weight.shape[0]
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    bits, starts, ends = zip(*groups) if groups else ((), (), ())
    _launch(
        "masked_linear_small", x.device, x.data_ptr(), _dtype(x), x.stride(0), weight.data_ptr(), weight.stride(0),
        [_ptr(words) for words in bits], starts, ends, _ptr(bias), n, k, y.data_ptr(),
    )  # fmt: skip
    return y


def masked_gemm(x: Tensor, weight: Tensor, bits: Tensor | None, bias: Tensor | None) -> Tensor:
    """(M, K) -> (M, N) by the wgmma kernel. bits None: `weight` is masked already, the same kernel masks nothing."""
    x, weight = _tma_matrix(x), _tma_matrix(weight)
    (m, k), n = x.shape, weight.shape[0]
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    fragments = None
    if bits is not None:
        fragments = torch.empty(extension.cuda_fragment_words(n, k), dtype=torch.int32, device=x.device)
        _launch("fragment_bits", x.device, bits.data_ptr(), n, k, fragments.data_ptr())
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    _launch(
        "masked_gemm", x.device, x.data_ptr(), _dtype(x), x.stride(0), weight.data_ptr(), weight.stride(0),
        _ptr(fragments), _ptr(bias), m, n, k, y.data_ptr(),
    )  # fmt: skip
    return y


def masked_linear_dx(g: Tensor, weight: Tensor, bits: Tensor, dense: Tensor | None) -> Tensor:
    return reference.masked_linear_dx(g, weight, bits, masked_weight(weight, bits) if dense is None else dense)


def weight_grad_(out: Tensor, g: Tensor, x: Tensor, accumulate: bool) -> None:
    # 16-bit factors in one GEMM where torch has it (2.8 on), without widening them first; 2.8 and 2.9 do not add its
    # result to a wider matrix.
    if not len(x) or x.dtype != g.dtype or x.dtype == torch.float32 or "dtype" not in torch.ops.aten.mm.overloads():
        reference.weight_grad_(out, g, x, accumulate)
    elif accumulate and _ADDS_WIDER:
        torch.addmm(out, g.T, x, out_dtype=torch.float32, out=out)
    elif accumulate:
        out += torch.mm(g.T, x, out_dtype=torch.float32)
    else:
        torch.mm(g.T, x, out_dtype=torch.float32, out=out)


def _weight_grad(g: Tensor, x: Tensor) -> Tensor:
    out = torch.empty((g.shape[1], x.shape[1]), dtype=torch.float32, device=x.device)
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
    task, general, scores, penalty = (
        None if t is None else t.float().contiguous() for t in (grad_task, grad_general, scores, penalty)
    )
    weight = None if weight is None else weight.contiguous()
    rng = None if rng is None else rng.contiguous()
    out = torch.empty(task.shape, dtype=torch.float32, device=task.device)
    _launch(
        "gradient_dropout", task.device, task.data_ptr(), _ptr(general), _ptr(weight),
        0 if weight is None else _dtype(weight), _ptr(scores), _ptr(penalty), _ptr(rng), task.numel(), strength,
        stream, out.data_ptr(),
    )  # fmt: skip
    return out


def mask_update_(
    scores: list[Tensor], bits: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], dense: list[Tensor],
    grads: list[Tensor], weights: list[Tensor], factors: Tensor, beta1: float, beta2: float, eps: float,
    threshold: float, generals: list[Tensor] = (), chained: list[bool] = (), scales: list[Tensor] = (),
    norms: Tensor | None = None, counts: Tensor | None = None, rng: Tensor | None = None, l2: float = 0.0,
    strength: float = 1.0, streams: list[int] = (), offsets: list[int] = (),
) -> None:  # fmt: skip
    lists = (scores, bits, exp_avgs, exp_avg_sqs, dense, grads, weights, generals, scales)
    shape = [s.shape[0] for s in scores], [s.shape[1] for s in scores]
    factors, rng = factors.contiguous(), None if rng is None else rng.contiguous()
    device, partials = scores[0].device, None
    if norms is not None or counts is not None:
        # 16 bytes each: a sum of squares and two counts.
        partials = torch.empty(2 * extension.cuda_mask_update_partials(*shape), dtype=torch.float64, device=device)
    _launch(
        "mask_update", device, *([t.data_ptr() for t in group] for group in lists), *shape, list(chained),
        list(streams) or list(range(len(scores))), list(offsets) or [0] * len(scores), MOMENTS[exp_avgs[0].dtype],
        _dtype((weights or scores)[0]), _dtype((dense or weights or scores)[0]), factors.data_ptr(), _ptr(norms),
        _ptr(counts), _ptr(rng), _ptr(partials), l2, strength, beta1, beta2, eps, threshold,
    )  # fmt: skip
