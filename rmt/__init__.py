"""Regularized mask tuning of CLIP: adapt a frozen model by learning which weights to switch off."""

from .attention import FusedMaskedMultiheadAttention
from .backward import backward
from .config import MaskConfig, RunConfig, SelectConfig, TrainConfig, UserError
from .masked import Mask, MaskedModule, disabled, masks
from .memory import keep_freed_memory
from .model import MaskModel, get_mask_model
from .modules import FusedMaskedConv2d, FusedMaskedLinear
from .optim import MaskAdam
from .select import Selection, clip_loss, select

__version__ = "0.1.0"
_LAZY = ("Answer", "TaskBank", "load")  # of rmt.bank, which training does not need
__all__ = [
    "Answer",
    "FusedMaskedConv2d",
    "FusedMaskedLinear",
    "FusedMaskedMultiheadAttention",
    "Mask",
    "MaskAdam",
    "MaskConfig",
    "MaskModel",
    "MaskedModule",
    "RunConfig",
    "SelectConfig",
    "Selection",
    "TaskBank",
    "TrainConfig",
    "UserError",
    "backward",
    "clip_loss",
    "disabled",
    "get_mask_model",
    "keep_freed_memory",
    "load",
    "masks",
    "select",
]


def __getattr__(name: str):
    if name in _LAZY:
        from . import bank

        return getattr(bank, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
