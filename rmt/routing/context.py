"""The image that routed layers see: set for one call of the decoder, and bound to the tensors of that call.

A layer needs x_R, the visual feature, besides its own input. It is current, per thread, while the decoder runs: a
pre-hook sets it and the end of the call, an error too, clears it. Gradient checkpointing runs a block again, in the
backward pass, when the call is over and another may have begun: so the first run of a block marks its input with the
context, and the second finds the mark on that same tensor. Nothing else is ever taken: a layer without one raises.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import UserError

_MARK = "_rmt_visual"
_AMBIGUOUS = object()
_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Visual:
    """x (B, V, d), the number of the call that it belongs to, and whether the user has given it."""

    x: Tensor
    call: int
    fixed: bool


class VisualContext:
    """What is current, for the layers of one injection. width: d, that of the layers' inputs; many: whether V may be
    above 1."""

    def __init__(self, width: int, many: bool) -> None:
        self.width, self.many = width, many
        self._local = threading.local()

    def __deepcopy__(self, memo: dict) -> "VisualContext":
        return VisualContext(self.width, self.many)

    def __reduce__(self) -> tuple:
        return VisualContext, (self.width, self.many)

    def check(self, x: Tensor) -> Tensor:
        """(B, V, d), of a (B, d) or (B, V, d) tensor. Raises UserError for another shape."""
        x = x[:, None] if isinstance(x, Tensor) and x.dim() == 2 else x
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != self.width or not x.is_floating_point():
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise UserError(f"the visual context must be floating (B, {self.width}) or (B, V, {self.width}), got {got}")
        if x.shape[1] != 1 and not self.many:
            raise UserError(f"this routing function takes one visual token, got {x.shape[1]}: take their mean, or gram")
        return x

    @contextlib.contextmanager
    def set(self, x: Tensor, fixed: bool = False) -> Iterator[None]:
        """Inside, x is current in this thread. fixed: calls of the host inside do not change it."""
        before = self._current()
        self._local.visual = Visual(self.check(x), next(_numbers), fixed)
        try:
            yield
        finally:
            self._local.visual = before

    def push(self, x: Callable[[], Tensor | None]) -> None:
        """Begins a call of the host; x gives its image. To be followed by `pop`, whatever happens."""
        before = self._current()
        self._local.__dict__.setdefault("stack", []).append(before)
        if before is None or not before.fixed:
            # Should x raise, no earlier call's image is left to be taken for this one's.
            self._local.visual = None
            found = x()
            self._local.visual = None if found is None else Visual(self.check(found), next(_numbers), False)

    def pop(self) -> None:
        """Ends what the last `push` began."""
        self._local.visual = self._local.stack.pop()

    def enter_block(self, x: Tensor) -> Visual | None:
        """Called with a block's input: the mark that is on it, in a recomputation; else marks it with what is current.

        Returns what was current before, for `leave_block`.
        """
        before = self._current()
        marked = getattr(x, _MARK, {}).get(id(self))
        if _in_backward():
            if marked is None:
                raise UserError(
                    "a block is computed again in the backward pass and its input does not know its image: "
                    "checkpointing must be the kind that keeps tensors, use_reentrant=False"
                )
            if marked is _AMBIGUOUS:
                raise UserError(
                    "a block is computed again in the backward pass, and its input went with two images: give each "
                    "call a tensor of its own (x.clone()), or do not checkpoint"
                )
            self._local.visual = marked
        elif before is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            marks = x.__dict__.setdefault(_MARK, {})
            # One tensor, two calls: harmless, unless a recomputation asks which one it is.
            marks[id(self)] = before if marked in (None, before) else _AMBIGUOUS
        return before

    def leave_block(self, before: Visual | None) -> None:
        """What was current before the block is so again."""
        self._local.visual = before

    def get(self, x: Tensor) -> Tensor:
        """The current context (B, V, d), for an input x (B, T, d).

        Raises: UserError where there is none, or one of another batch or device.
        """
        visual = self._current()
        if visual is None:
            raise UserError(
                "a routed layer ran without a visual context: call the whole model, or use `with routed.context(x)`"
            )
        if len(visual.x) != len(x) or visual.x.device != x.device:
            raise UserError(
                f"the visual context must have the input's batch and device, {len(x)} on {x.device}, got "
                f"{len(visual.x)} on {visual.x.device}"
            )
        return visual.x

    def _current(self) -> Visual | None:
        return getattr(self._local, "visual", None)


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def watch_block(block: nn.Module, context: VisualContext) -> list:
    """Hooks that bind a block's runs to their context. Returns their handles."""
    local = threading.local()

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        local.__dict__.setdefault("stack", []).append(context.enter_block(x))

    def after(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        context.leave_block(local.stack.pop())

    return [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]
