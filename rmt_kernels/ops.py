"""The ops: schemas, fakes, autograd and vmap rules. The only file that calls torch.library.

A call runs: public function (`functions.py`, validates once) -> `torch.ops.rmt_kernels.<name>` -> `backends.run` -> the
first backend that has it. The fakes only describe outputs.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import backends, checks, reference

_SCHEMAS = {
    "pack_bits": "(Tensor mask) -> Tensor",
    "pack_scores": "(Tensor scores, float threshold) -> Tensor",
    "unpack_bits": "(Tensor bits, SymInt in_features) -> Tensor",
    "masked_weight": "(Tensor weight, Tensor bits, Tensor? scores) -> Tensor",
    "masked_linear": "(Tensor x, Tensor weight, Tensor bits, Tensor? bias, Tensor? dense, Tensor? scores) -> Tensor",
    "masked_linear_dx": "(Tensor g, Tensor weight, Tensor bits, Tensor? dense) -> Tensor",
    "masked_weight_": "(Tensor(a!) out, Tensor weight, Tensor bits, Tensor? old) -> ()",
    "grouped_masked_linear": "(Tensor x, Tensor weight, Tensor?[] bits, Tensor? bias, int[] offsets, bool invariant) "
    "-> Tensor",
    "weight_grad_": "(Tensor(a!) out, Tensor g, Tensor x, bool accumulate) -> ()",
    "mask_grad": "(Tensor x, Tensor g_task, Tensor? g_general, Tensor weight, Tensor? scores, Tensor? penalty, "
    "Tensor? rng, float strength, int stream) -> Tensor",
    "gradient_dropout": "(Tensor grad_task, Tensor? grad_general, Tensor? weight, Tensor? scores, Tensor? penalty, "
    "Tensor? rng, float strength, int stream) -> Tensor",
    "mask_update_": "(Tensor(a!)[] scores, Tensor(b!)[] bits, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    "Tensor(e!)[] dense, Tensor[] grads, Tensor[] weights, Tensor factors, float beta1, float beta2, float eps, "
    "float threshold, Tensor[] generals, bool[] chained, Tensor(f!)[] scales, Tensor(g!)? norms, Tensor(h!)? counts, "
    "Tensor? rng, float l2, float strength, int[] streams, int[] offsets) -> ()",
}


def flat_rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def accurate_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def pack_bits_fake(mask):
    return mask.new_empty((mask.shape[0], checks.words(mask.shape[1])), dtype=torch.int32)


def pack_scores_fake(scores, threshold):
    return pack_bits_fake(scores)


def unpack_bits_fake(bits, in_features):
    return bits.new_empty((bits.shape[0], in_features), dtype=torch.bool)


def masked_weight_fake(weight, bits, scores):
    return weight.new_empty(weight.shape)


def masked_linear_fake(x, weight, bits, bias, dense, scores):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def masked_linear_dx_fake(g, weight, bits, dense):
    return g.new_empty((*g.shape[:-1], weight.shape[1]))


def grouped_masked_linear_fake(x, weight, bits, bias, offsets, invariant):
    return x.new_empty((x.shape[0], weight.shape[0]))


def weight_grad_fake(out, g, x, accumulate):
    return None


def mask_grad_fake(x, g_task, g_general, weight, scores, penalty, rng, strength, stream):
    return weight.new_empty(weight.shape, dtype=accurate_dtype(x, g_task, weight))


def gradient_dropout_fake(grad_task, grad_general, weight, scores, penalty, rng, strength, stream):
    return grad_task.new_empty(grad_task.shape, dtype=accurate_dtype(grad_task))


def mask_update_fake(*args):
    return None


def masked_weight_out_fake(out, weight, bits, old):
    return None


# masked_weight has a fake of its own.
_FAKES = {"masked_weight_": masked_weight_out_fake}

for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"rmt_kernels::{_name}", _schema)
    _run = functools.partial(backends.run, _name)
    # scores only route the straight-through gradient: no kernel reads them.
    _kernel = (lambda *args, run=_run: run(*args[:-1])) if _name in ("masked_linear", "masked_weight") else _run
    torch.library.impl(f"rmt_kernels::{_name}", ("cpu", "cuda"), _kernel)
    torch.library.register_fake(f"rmt_kernels::{_name}", _FAKES.get(_name) or globals()[f"{_name.rstrip('_')}_fake"])

_ops = torch.ops.rmt_kernels


# {id of scores: where products over them bring what their weight gradient is made of}. Not per thread: autograd runs a
# device's backward in a thread of its own.
_sinks: dict[int, Callable[[Tensor, Tensor | None], None]] = {}


@contextlib.contextmanager
def weight_gradients_to(sinks: dict[Tensor, Callable[[Tensor, Tensor | None], None]]) -> Iterator[None]:
    """Inside, a backward pass makes no gradient of these scores: each product calls its scores' sink in place of it.

    sinks: {scores (N, K): sink}. `masked_linear` calls sink(g, x) with the rows g (M, N), x (M, K) of its weight
    gradient g.T @ x; `masked_weight` calls sink(g, None) with that gradient (N, K). No factor W is in either.
    Within another such block the inner sink of the same scores is called, and behind it the outer one again.
    Products compiled by torch.compile know no sinks and make gradients of the scores.
    """
    mine = {id(scores): sink for scores, sink in sinks.items()}
    outer = {key: _sinks[key] for key in mine if key in _sinks}
    _sinks.update(mine)
    try:
        yield
    finally:
        for key in mine:
            _sinks.pop(key, None)
        _sinks.update(outer)


def _masked_linear_setup(ctx, inputs, output):
    x, weight, bits, _bias, dense, scores = inputs
    ctx.save_for_backward(x, weight, bits, dense)
    # Not saved: their values are not read, and an update in between is no error.
    ctx.scores = scores


def _masked_linear_backward(ctx, g):
    x, weight, bits, dense = ctx.saved_tensors
    need_x, need_weight, _, need_bias, _, need_scores = ctx.needs_input_grad[:6]
    products = _ops
    if torch.is_grad_enabled():
        # create_graph=True: a kernel leaves no graph for second derivatives, plain PyTorch does; so must `dense`.
        products = reference
        dense = _ops.masked_weight(weight, bits, ctx.scores) if need_weight or need_scores else dense
    sink = _sinks.get(id(ctx.scores)) if need_scores else None
    if sink is not None:
        sink(flat_rows(g), flat_rows(x))
        need_scores = False
    rows = (flat_rows(x), flat_rows(g)) if need_weight or need_scores else None
    dx = d_weight = d_scores = None
    with backends.without_autocast(g.device.type) if products is reference else contextlib.nullcontext():
        if need_x:
            dx = products.masked_linear_dx(g, weight, bits, dense)
        if need_scores:
            d_scores = products.mask_grad(rows[0], rows[1], None, weight, None, None, None, 1.0, 0).to(ctx.scores.dtype)
    if need_weight:
        # scores for a second derivative: a weight's gradient depends on its bit.
        d_weight = _ops.masked_weight((rows[1].T @ rows[0]).to(weight.dtype), bits, ctx.scores)
    d_bias = flat_rows(g).sum(0) if need_bias else None
    return dx, d_weight, None, d_bias, None, d_scores


def _masked_weight_setup(ctx, inputs, output):
    weight, bits, scores = inputs
    ctx.save_for_backward(weight, bits)
    ctx.scores = scores


def _masked_weight_backward(ctx, g):
    weight, bits = ctx.saved_tensors
    d_weight = _ops.masked_weight(g.contiguous(), bits, ctx.scores) if ctx.needs_input_grad[0] else None
    sink = _sinks.get(id(ctx.scores)) if ctx.needs_input_grad[2] else None
    if sink is not None:
        sink(g, None)
        return d_weight, None, None
    d_scores = (g.to(ctx.scores.dtype) * weight).to(ctx.scores.dtype) if ctx.needs_input_grad[2] else None
    return d_weight, None, d_scores


torch.library.register_autograd(
    "rmt_kernels::masked_linear", _masked_linear_backward, setup_context=_masked_linear_setup
)
torch.library.register_autograd(
    "rmt_kernels::masked_weight", _masked_weight_backward, setup_context=_masked_weight_setup
)


def _batch_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _only_rows_may_be_batched(name: str, in_dims: tuple, allowed: tuple[int, ...]) -> None:
    if any(d is not None for i, d in enumerate(in_dims) if i not in allowed):
        raise NotImplementedError(f"vmap over {name} takes batched rows only, one weight and one mask for all")


def _masked_linear_vmap(info, in_dims, x, *rest):
    _only_rows_may_be_batched("masked_linear", in_dims, (0,))
    return _ops.masked_linear(x.movedim(in_dims[0], 0), *rest), 0


def _masked_linear_dx_vmap(info, in_dims, g, *rest):
    _only_rows_may_be_batched("masked_linear_dx", in_dims, (0,))
    return _ops.masked_linear_dx(g.movedim(in_dims[0], 0), *rest), 0


def _mask_grad_vmap(info, in_dims, x, g_task, g_general, weight, *rest):
    _only_rows_may_be_batched("mask_grad", in_dims, (0, 1, 2))
    tensors = zip((x, g_task, g_general), in_dims)
    parts = [None if t is None else _batch_first(t, d, info.batch_size) for t, d in tensors]
    rows = zip(parts[0], parts[1], parts[2] if parts[2] is not None else [None] * info.batch_size)
    return torch.stack([_ops.mask_grad(*row, weight, *rest) for row in rows]), 0


torch.library.register_vmap("rmt_kernels::masked_linear", _masked_linear_vmap)
torch.library.register_vmap("rmt_kernels::masked_linear_dx", _masked_linear_dx_vmap)
torch.library.register_vmap("rmt_kernels::mask_grad", _mask_grad_vmap)
