"""Masks and other methods in the one order that is exact: the mask first, the other over it.

LoRA over a masked layer is (W * m) x + B A x, whether the mask is live or merged. The other order is another function:
a mask over a merged adapter is (W + B A) * m, which is not W * m + B A. What would compute that is refused: here an
adapter of peft's that writes into a live masked layer's weight, or reads it past the mask; in `rmt.masking` the masking
of what an adapter wraps.

What cannot be seen is a write through `weight.data` by other code than peft's: it leaves no trace. The hash of the base
weights in a task file shows it when the task is loaded next. An adapter that was merged and unloaded before masking is
no wrong order: its model is a base model of its own.
"""

import sys
from types import FrameType

import torch
from torch import nn

_PEFT = "peft"


def guarded(prefix: str) -> property:
    """The parameter `{prefix}weight` of a masked layer, for everyone but an adapter that would go wrong with it.

    Our own products read `_parameters` and do not come here.
    """
    name = prefix + "weight"

    def read(self: nn.Module) -> nn.Parameter | None:
        refuse_adapters(name)
        try:
            return self.__dict__["_parameters"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name} yet") from None

    return property(read)


def refuse_adapters(name: str) -> None:
    """Raises ValueError where peft asks for a masked weight to write it, or to compute with it past the mask."""
    # Dynamo cannot trace frames, and peft merges nothing while it traces.
    if torch.compiler.is_compiling():
        return
    # The caller of the property that called this.
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PEFT:
        function, module = frame.f_code.co_name, frame.f_globals["__name__"]
        if function.startswith(("merge", "unmerge", "set_base_weight")) or function.endswith("_init"):
            raise ValueError(
                f"peft's {function} would change the {name} under a live mask, and (W + BA) * m is not W * m + BA: "
                "merge the mask first (merge_and_unload of the MaskModel), then the adapter"
            )
        if function == "forward" or "dora" in function or module.rpartition(".")[2] == "dora":
            raise ValueError(
                f"{module} computes with the {name} of a masked layer past its mask: merge the mask first "
                "(merge_and_unload of the MaskModel), then apply the adapter; LoRA itself runs over live masks"
            )
        frame = frame.f_back
