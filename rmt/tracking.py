"""What a piece of torch code needs: bytes alive at its peak by kind, FLOPs of its products, weight-sized bytes moved.

A dispatch mode sees every op that runs inside it, on real tensors or on fake ones. Storages are followed by weak
references, so that whatever the code keeps, drops or writes in place is what counts. What a kernel takes for itself
and gives back before it returns is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

WEIGHT_SIZED = frozenset({"weights", "masked weight", "weight copies", "scores", "moments", "bits", "gradients"})
# Numbers, tables of a few of them, and norms are no weight-sized pass whatever op they are in.
SMALL = 1024
_OVERWRITTEN = ("copy_", "zero_", "fill_")
_MADE_ONLY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


def _rows(t: Tensor) -> int:
    return t.numel() // t.shape[-1]


def _linear(x: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * _rows(x) * weight.numel()


def _mask_grad(x: Tensor, g_task: Tensor, g_general: Tensor | None, *_: Any) -> int:
    return 2 * x.numel() * g_task.shape[-1] * (1 if g_general is None else 2)


def _weight_grad(out: Tensor, g: Tensor, *_: Any) -> int:
    return 2 * _rows(g) * out.numel()


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)


# FLOPs of our own ops and of the CPU's attention, which torch's registry lacks: name -> (role, formula of its
# arguments). Role None: forward or teacher, whichever runs.
OURS: dict[str, tuple[str | None, Callable[..., int]]] = {
    "rmt_kernels::masked_linear": (None, _linear),
    "rmt_kernels::masked_linear_dx": ("input cotangents", _linear),
    "rmt_kernels::mask_grad": ("weight gradients", _mask_grad),
    "rmt_kernels::weight_grad_": ("weight gradients", _weight_grad),
    "aten::_scaled_dot_product_flash_attention_for_cpu": ("attention", _attention),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": ("attention", _attention_backward),
}
# The products among our ops that make a weight-sized pass as well; the argument where that pass's operands start.
FUSED = {"rmt_kernels::mask_grad": 3}


class Block:
    """One storage. kind: None for what the code makes; it is then an activation where autograd saves it."""

    __slots__ = ("kind", "nbytes", "ref", "saved")

    def __init__(self, nbytes: int, kind: str | None, ref: weakref.ref) -> None:
        self.nbytes, self.kind, self.saved, self.ref = nbytes, kind, False, ref

    @property
    def name(self) -> str:
        return self.kind or ("activations" if self.saved else "temporaries")


class Tracker(TorchDispatchMode):
    """Follows the code that runs inside `with tracker:`.

    Args:
        phase: says what runs now: "forward" or "teacher". The backward pass is seen from autograd itself.
        sizes: numbers of elements of the masked weights, by which gradients of weights are known.

    flops, moved: FLOPs by role and bytes of weight-sized passes by op since the last `restart`.
    """

    def __init__(self, phase: Callable[[], str], sizes: Iterable[int]) -> None:
        super().__init__()
        self.phase, self.sizes = phase, frozenset(sizes)
        self.blocks: dict[int, Block] = {}
        self.restart()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._save, lambda t: t)

    def __enter__(self) -> "Tracker":
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def restart(self) -> None:
        """Forgets what was, but for what is alive."""
        self.start = list(self.blocks.values())
        self.events: list[tuple[int, Block, str]] = []
        self.flops, self.moved = Counter(), Counter()

    def track(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Names the storages of `tensors`, seen before or not."""
        for t in tensors:
            self._block(t).kind = kind

    def peak(self) -> tuple[dict[str, int], str]:
        """{kind: bytes} where most is alive since the last `restart`, and the op that made it so."""
        live, best, at, where = sum(b.nbytes for b in self.start), -1, 0, ""
        for i, (sign, block, op) in enumerate(self.events):
            live += sign * block.nbytes
            if live > best:
                best, at, where = live, i, op
        found = Counter()
        for block in self.start:
            found[block.name] += block.nbytes
        for sign, block, _ in self.events[: at + 1]:
            found[block.name] += sign * block.nbytes
        return dict(found), where

    def _block(self, t: Tensor, op: str = "") -> Block:
        storage = t.untyped_storage()
        key = storage._cdata
        block = self.blocks.get(key)
        if block is None:
            ref = weakref.ref(storage, lambda _: self._free(key))
            block = self.blocks[key] = Block(storage.nbytes(), None, ref)
            self.events.append((1, block, op))
        return block

    def _free(self, key: int) -> None:
        self.events.append((-1, self.blocks.pop(key), ""))

    def _save(self, t: Tensor) -> Tensor:
        self._block(t).saved = True
        return t.detach()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        ins = [self._block(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outs = [self._block(t, f"{self._part(name)}: {name}") for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name == "aten::native_layer_norm" and args[2] is not None and args[2].dtype == torch.float32:
            # torch's fakes give bf16 rows a mean and a scale in bf16; its kernels keep both in the weight's fp32.
            for block, t in zip(outs[1:], out[1:]):
                block.nbytes = 4 * t.numel()
        flops = self._count(func, args, kwargs, out, ins)
        if flops is None or name in FUSED:
            self._move(func, args, kwargs, ins, outs)
        return out

    def _phase(self) -> str:
        return "backward" if torch._C._current_graph_task_id() != -1 else self.phase()

    def _part(self, name: str) -> str:
        """The part of the step that an op belongs to; what runs without a graph after the forward is the update."""
        recorded = torch.is_grad_enabled() or (name in OURS and OURS[name][0] is None)
        phase = self._phase()
        return phase if recorded or phase != "forward" else "update"

    def _count(self, func: Any, args: tuple, kwargs: dict, out: Any, ins: list[Block]) -> dict[str, int] | None:
        """Adds a product's FLOPs and marks what is a gradient of weights; None for other ops."""
        name, packet = func._schema.name, func._overloadpacket
        if name in OURS:
            role, formula = OURS[name]
            parts = {role or self._phase(): formula(*args, **kwargs)}
        elif packet in flop_registry:
            parts = self._roles(name, args, out, flop_registry[packet](*args, **kwargs, out_val=out), ins)
        else:
            return None
        self.flops.update(parts)
        if "weight gradients" in parts:
            made = out[1] if name == "aten::convolution_backward" else args[0] if out is None else out
            self.track([made], "gradients")
        return parts

    def _roles(self, name: str, args: tuple, out: Any, flops: int, ins: list[Block]) -> dict[str, int]:
        """Whose FLOPs they are. A product without any weight, of a masked weight's size, is its gradient; a batch of
        products is attention; every other one is of the forward, the teacher or the input cotangents."""
        if "attention" in name or name in ("aten::bmm", "aten::baddbmm"):
            return {"attention": flops}
        if name == "aten::convolution_backward":
            wanted = [role for role, need in zip(("input cotangents", "weight gradients"), args[-1]) if need]
            return {role: flops // len(wanted) for role in wanted}
        if out.numel() in self.sizes and not any(block.kind in WEIGHT_SIZED for block in ins):
            return {"weight gradients": flops}
        phase = self._phase()
        return {"input cotangents" if phase == "backward" else phase: flops}

    def _move(self, func: Any, args: tuple, kwargs: dict, ins: list[Block], outs: list[Block]) -> None:
        """Adds the bytes of a pass over weight-sized tensors only, and names what it makes."""
        name = func._schema.name.rpartition("::")[2]
        if all(block in ins for block in outs) and not func._schema.is_mutable:
            return  # a view
        if func._schema.name in FUSED:
            args = args[FUSED[func._schema.name] :]
            ins = [self._block(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        large = [block for block in ins if block.nbytes >= SMALL]
        if not large or any(block.kind not in WEIGHT_SIZED for block in large):
            return
        for block in outs:
            if block.kind is None and block.nbytes >= SMALL:
                states = {"gradients", "scores"} & {b.kind for b in large}
                block.kind = "gradients" if states else "weight copies"
        if name not in _MADE_ONLY:
            new = sum(block.nbytes for block in outs if block not in ins)
            used = _arguments(func, args, kwargs, name)
            self.moved[name] += new + sum(times * t.numel() * t.element_size() for t, times in used)


def _arguments(func: Any, args: tuple, kwargs: dict, name: str) -> list[tuple[Tensor, int]]:
    """(tensor, how often its bytes are moved): 2 where it is updated in place."""
    arguments = func._schema.arguments
    named = dict(zip((a.name for a in arguments[FUSED.get(func._schema.name, 0) :]), args)) | kwargs
    if name == "mask_update_":
        # `dense` is written where bits flip, which is next to nowhere; `weights` are read there, and by the chain rule.
        chained = named.get("chained", [False] * len(named["weights"]))
        named |= {"dense": [], "weights": [w for w, is_read in zip(named["weights"], chained) if is_read]}
    found = []
    for argument in arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        times = 2 if written and name not in _OVERWRITTEN else 1
        found += [(t, times) for t in tree_leaves(named.get(argument.name)) if isinstance(t, Tensor)]
    return found
