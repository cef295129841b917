"""How a block is bound to its image: by hooks, or, where checkpointing leaves hooks out, by its class."""

from collections.abc import Callable

from torch import Tensor, nn

from .attention import Rebuilt, routed
from .context import Enter, Leave, VisualContext

_ENTERS = "_rmt_enters"


class Watched(Rebuilt):
    """What a layer of transformers becomes: from version 5 on its `forward` is what is checkpointed, so that hooks do
    not run in the recomputation. It checkpoints the forward of any subclass, this one's too."""

    def forward(self, *args, **kwargs):
        """As the host's."""
        enters = self.__dict__[_ENTERS]
        try:
            for enter in enters:
                enter(self, args, kwargs)
            return super().forward(*args, **kwargs)
        finally:
            for enter in enters:
                enter.context.pop(self)


class _Handle:
    def __init__(self, block: nn.Module, enter: Enter) -> None:
        self.block, self.enter = block, enter

    def remove(self) -> None:
        enters = self.block.__dict__[_ENTERS]
        enters.remove(self.enter)
        if not enters:
            del self.block.__dict__[_ENTERS]
            self.block.__class__ = self.block._made_of[0]


def watch_block(
    block: nn.Module, context: VisualContext, own: Callable[[tuple, dict], Tensor] | None = None
) -> list:  # fmt: skip
    """Binds a block's runs to their context, or to `own` of its arguments. Returns handles that undo it."""
    enter = Enter(context, own)
    # What transformers' checkpointing switches on.
    if not hasattr(type(block), "gradient_checkpointing"):
        leave = block.register_forward_hook(Leave(context), with_kwargs=True, always_call=True)
        return [block.register_forward_pre_hook(enter, with_kwargs=True), leave]
    if not isinstance(block, Watched):
        block.__class__ = routed(type(block), Watched)
    block.__dict__.setdefault(_ENTERS, []).append(enter)
    return [_Handle(block, enter)]
