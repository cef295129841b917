"""The image that routed layers see: set for one call of the decoder, and bound to the tensors of that call.

A layer needs x_R, the visual feature, besides its own input. It is current, per thread, while the decoder runs: a
pre-hook sets it and the end of the call, an error too, clears it. Gradient checkpointing runs a block again, in the
backward pass, when the call is over and another may have begun: so the first run of a block marks its input with the
context, and the second finds the mark on that same tensor. Nothing else is ever taken: a layer without one raises.

Under torch.compile the same frames are traced, and the image is a tensor of the graph like any other: a new image is
no new graph. Blocks are not marked there, since a compiled checkpoint keeps its tensors itself.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..config import UserError

_MARK = "_rmt_visual"
_AMBIGUOUS = object()
# The mark of an input whose block takes x_R from its own arguments.
_OWN = object()


class Visual:
    """x (B, V, d); fixed: the user has given it; again: it belongs to a call made within a backward pass."""

    def __init__(self, x: Tensor, fixed: bool, again: bool) -> None:
        self.x, self.fixed, self.again = x, fixed, again


class Frame:
    """What is current since `owner`, a module or a `with`, began, and what was before."""

    def __init__(self, visual: Visual | None, owner: object, before: "Frame | None") -> None:
        self.visual, self.owner, self.before = visual, owner, before


class _Marks(dict):
    """Contexts' visuals on a block's input. They are of one process and its tensors: copies and files have none."""

    def __deepcopy__(self, memo: dict) -> "_Marks":
        return _Marks()

    def __reduce__(self) -> tuple:
        return _Marks, ()


class VisualContext:
    """What is current, for the layers of one injection. width: d, that of the layers' inputs; many: whether V may be
    above 1."""

    def __init__(self, width: int, many: bool) -> None:
        self.width, self.many = width, many
        self._local = threading.local()
        # torch.compile's graphs are of a thread that has the attribute, or has it not.
        self._local.frame = None

    def __reduce__(self) -> tuple:
        return VisualContext, (self.width, self.many)

    @property
    def frame(self) -> Frame | None:
        """What is current in this thread."""
        # Of the instance: torch.compile takes a class's default for what a thread has set.
        return getattr(self._local, "frame", None)

    def check(self, x: Tensor) -> Tensor:
        """(B, V, d), of a (B, d) or (B, V, d) tensor. Raises UserError for another shape."""
        good = isinstance(x, Tensor) and x.is_floating_point() and x.dim() in (2, 3)
        if not good or x.shape[-1] != self.width:
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise UserError(f"the visual context must be floating (B, {self.width}) or (B, V, {self.width}), got {got}")
        x = x[:, None] if x.dim() == 2 else x
        if x.shape[1] != 1 and not self.many:
            raise UserError(f"this routing function takes one visual token, got {x.shape[1]}: take their mean, or gram")
        return x

    @contextlib.contextmanager
    def set(self, x: Tensor) -> Iterator[None]:
        """Inside, x is current in this thread, and calls of the host do not change it."""
        before = self.frame
        self._local.frame = Frame(Visual(self.check(x), True, False), self, before)
        try:
            yield
        finally:
            self._local.frame = before

    def push(self, owner: object, x: Callable[[], Tensor | None]) -> None:
        """Begins a call of the host, `owner`; x gives its image. To be followed by `pop`, whatever happens."""
        before = self.frame
        if before is not None and before.visual is not None and before.visual.fixed:
            self._local.frame = Frame(before.visual, owner, before)
            return
        # Should x raise, no earlier call's image is left to be taken for this one's.
        self._local.frame = Frame(None, owner, before)
        found = x()
        if found is not None:
            self._local.frame = Frame(Visual(self.check(found), False, _in_backward()), owner, before)

    def pop(self, owner: object) -> None:
        """Ends what the last `push` of `owner` began. Nothing, where an error came before that `push`."""
        frame = self.frame
        if frame is not None and frame.owner is owner:
            self._local.frame = frame.before

    def enter_block(self, owner: object, x: Tensor, own: Callable[[], Tensor] | None = None) -> None:
        """Called with a block's input: the mark that is on it, in a recomputation; else marks it with what is current.

        own: gives the x_R of a block that has its own, which stands behind what the user has given. It is asked in
        both runs, for its gradient. To be followed by `pop`, whatever happens.
        """
        compiling = torch.compiler.is_compiling()
        if compiling and own is None:
            return
        before = self.frame
        visual = before.visual if before is not None else None
        # The whole call may be what is checkpointed: then it began in the backward pass, and has its image.
        if _in_backward() and not (visual is not None and visual.again):
            visual = self._marked(x)
        elif own is not None and (visual is None or not visual.fixed):
            visual = _OWN
        if not _in_backward() and not compiling and visual is not None and torch.is_grad_enabled():
            marks = x.__dict__.setdefault(_MARK, _Marks())
            # One tensor, two calls: harmless, unless a recomputation asks which one it is.
            marks[self] = visual if marks.get(self) in (None, visual) else _AMBIGUOUS
        if visual is _OWN:
            visual = Visual(self.check(own()), False, False)
        self._local.frame = Frame(visual, owner, before)

    def _marked(self, x: Tensor) -> Visual:
        marked = getattr(x, _MARK, {}).get(self)
        if marked is None:
            raise UserError(
                "a block is computed again in the backward pass and its input does not know its image: "
                "checkpointing must be the kind that keeps tensors, use_reentrant=False, and not lie within another"
            )
        if marked is _AMBIGUOUS:
            raise UserError(
                "a block is computed again in the backward pass, and its input went with two images: give each "
                "call a tensor of its own (x.clone()), or do not checkpoint"
            )
        return marked

    def get(self, x: Tensor) -> Tensor:
        """The current context (B, V, d), for an input x (B, T, d).

        Raises: UserError where there is none, or one of another batch or device.
        """
        frame = self.frame
        if frame is None or frame.visual is None:
            raise UserError(
                "a routed layer ran without a visual context: call the whole model, or use `with routed.context(x)`"
            )
        visual = frame.visual.x
        if len(visual) != len(x) or visual.device != x.device:
            raise UserError(
                f"the visual context must have the input's batch and device, {len(x)} on {x.device}, got "
                f"{len(visual)} on {visual.device}"
            )
        return visual


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


# Hooks are objects, not closures, so that a copy of a model has hooks of its own.
class Enter:
    """A forward pre-hook of a block. own: of its arguments -> its own x_R; None: it takes that of the call."""

    def __init__(self, context: VisualContext, own: Callable[[tuple, dict], Tensor] | None = None) -> None:
        self.context, self.own = context, own

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        self.context.enter_block(module, x, None if self.own is None else lambda: self.own(args, kwargs))


class Leave:
    """A forward hook that ends what a pre-hook of the same module began."""

    def __init__(self, context: VisualContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        self.context.pop(module)
