"""The floor of a training step: its matrix products, convolutions and attention calls, with nothing in between.

One step runs under a dispatch mode that writes down every such call that reaches aten, forward and backward, in order:
operator, shapes, strides, dtypes and other arguments. `Floor` then calls the same operators in the same order, on
operands that were made beforehand. Operands with one signature are one tensor, to bound the memory: the floor finds its
weights in the caches more often than a step does, so it is a little too low, never too high. Products write into a
result that is there (`out=`); convolutions and attention have no such form and allocate theirs, as in the step. On CUDA
the whole replay is one graph, so that no launch counts.

The floor of the bench is that of the fixed eager step in the run's precision: both forwards, both passes back through
the student's tower, and a weight gradient of every masked weight in each. In bf16 all of them are bf16 products, the
weight gradients too, though the method needs theirs in fp32.

A step may beat this floor. rmt drops products that change no result: with the class token alone behind the last
attention, and with one forward for student and teacher while no bit has flipped. Its own floor is recorded from its own
step. What the operators of `torch.ops.rmt_kernels` do inside is hidden from a dispatch mode (it is off while one of its
calls runs), so their products are added by formula, as the aten products they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
WITH_OUT = {aten.mm: aten.mm.out, aten.addmm: aten.addmm.out, aten.bmm: aten.bmm.out, aten.baddbmm: aten.baddbmm.out}
OTHERS = {aten.convolution, aten.convolution_backward}
ATTENTION = "_scaled_dot_product"
WITHOUT_PRODUCT = {"pack_bits", "pack_scores", "unpack_bits", "masked_weight", "gradient_dropout", "mask_update_"}
# Integer and tiny operands (seeds, cumulative lengths) are kept: what a call does may depend on their values.
TINY = 16


class Like(NamedTuple):
    """A tensor's layout. Two that are equal share one tensor in the replay."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Call(NamedTuple):
    """One product: operator, its arguments with `Like` in place of tensors, and its result, None where not needed."""

    func: Any
    args: tuple
    kwargs: dict
    out: Like | None


def like(t: Tensor, dtype: torch.dtype | None = None) -> Like:
    return Like(tuple(t.shape), tuple(t.stride()), dtype or t.dtype, t.device)


class Recorder(TorchDispatchMode):
    """Inside, every product is appended to `calls`."""

    def __init__(self, low: torch.dtype | None = None) -> None:
        """low: the run's 16-bit dtype; fp32 convolutions that make nothing but a weight gradient are counted in it."""
        super().__init__()
        self.calls: list[Call] = []
        self.low = low

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if func.namespace == "rmt_kernels":
            self.calls += hidden_products(packet.__name__, args)
        elif packet in WITH_OUT or packet in OTHERS or packet.__name__.startswith(ATTENTION):
            low = self.low if packet is aten.convolution_backward and list(args[-1]) == [False, True, False] else None
            spec = tree_map(lambda v: _spec(v, low), (args, kwargs))
            # `out=` variants of a step's own become ours: one name for one product.
            spec[1].pop("out", None)
            made = like(out) if packet in WITH_OUT else None
            self.calls.append(Call(func if made is None else packet, *spec, made))
        return out


def _spec(value: Any, low: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.numel() <= TINY or not value.is_floating_point():
        return value.detach().clone()
    return like(value, low)


def _rows(t: Tensor) -> tuple[int, int]:
    return t.numel() // t.shape[-1], t.shape[-1]


def hidden_products(name: str, args: tuple) -> list[Call]:
    """What `rmt_kernels.<name>` costs at least, as calls of aten.mm on contiguous rows; [] where it has no product."""
    if name in WITHOUT_PRODUCT:
        return []
    if name in ("masked_linear", "masked_linear_dx"):
        rows, weight = args[0], args[1]
        m, inner = _rows(rows)
        n, k = weight.shape
        # The weight (N, K) is read transposed by the forward.
        right = Like((k, n), (1, k), rows.dtype, rows.device) if name == "masked_linear" else None
        return [_mm(m, inner, k if right is None else n, rows, right)]
    if name in ("mask_grad", "weight_grad_"):
        x, *cotangents = (args[0], args[1], args[2]) if name == "mask_grad" else (args[2], args[1])
        (m, k), n = _rows(x), cotangents[0].shape[-1]
        right = Like((m, k), (k, 1), x.dtype, x.device)
        left = Like((n, m), (1, n), x.dtype, x.device)
        out = Like((n, k), (k, 1), x.dtype, x.device)
        return [Call(aten.mm, (left, right), {}, out) for g in cotangents if g is not None]
    raise NotImplementedError(f"bench/floor.py has no formula for the products of rmt_kernels.{name}")


def _mm(m: int, inner: int, n: int, rows: Tensor, right: Like | None) -> Call:
    row_major = [Like(s, (s[1], 1), rows.dtype, rows.device) for s in ((m, inner), (inner, n), (m, n))]
    return Call(aten.mm, (row_major[0], right or row_major[1]), {}, row_major[2])


def record(step: Callable[[], object], low: torch.dtype | None = None) -> list[Call]:
    """The products of one `step()`, in order."""
    with Recorder(low) as recorder:
        step()
    return recorder.calls


class Floor:
    """Replays recorded products. `flops` are those that torch's FlopCounterMode knows (not a CPU's attention)."""

    def __init__(self, calls: list[Call], tf32: bool = False) -> None:
        if not calls:
            raise ValueError("expected a step with matrix products, got none")
        self.calls, self.tf32, self._made = calls, tf32, {}
        self._bound = [self._bind(call) for call in calls]
        with FlopCounterMode(display=False) as counter:
            self.replay()
        self.flops = counter.get_total_flops()
        self._graph = self._captured() if self._device().type == "cuda" else None

    def __call__(self) -> None:
        self._graph.replay() if self._graph is not None else self.replay()

    @torch.no_grad()
    def replay(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        for run, args, kwargs in self._bound:
            run(*args, **kwargs)

    def _device(self) -> torch.device:
        return next(iter(self._made.values())).device

    def _captured(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            self.replay()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.replay()
        return graph

    def _bind(self, call: Call) -> tuple[Callable, tuple, dict]:
        leaves, tree = tree_flatten((call.args, call.kwargs), is_leaf=lambda v: isinstance(v, Like))
        places = iter(range(len(leaves)))
        args, kwargs = tree_unflatten(
            [self._tensor(v, next(places)) if isinstance(v, Like) else v for v in leaves], tree
        )
        if call.out is None:
            return call.func, args, kwargs
        return WITH_OUT[call.func], args, kwargs | {"out": self._tensor(call.out, "out")}

    def _tensor(self, spec: Like, place: int | str) -> Tensor:
        """One tensor for each layout and place among a call's operands: an operand never is its own product's result.

        Filled through its storage, since an expanded tensor cannot be written elementwise.
        """
        if (spec, place) not in self._made:
            size = 1 + sum((n - 1) * s for n, s in zip(spec.shape, spec.stride))
            flat = torch.randn(size, device=spec.device).mul_(0.1).to(spec.dtype)
            self._made[spec, place] = flat.as_strided(spec.shape, spec.stride)
        return self._made[spec, place]
