"""Regularized mask tuning of CLIP: adapt a frozen model by learning which weights to switch off."""

from .attention import FusedMaskedMultiheadAttention
from .backward import backward
from .masked import Mask, MaskedModule, disabled, masks
from .modules import FusedMaskedConv2d, FusedMaskedLinear
from .optim import MaskAdam

__version__ = "0.1.0"
__all__ = [
    "FusedMaskedConv2d",
    "FusedMaskedLinear",
    "FusedMaskedMultiheadAttention",
    "Mask",
    "MaskAdam",
    "MaskedModule",
    "backward",
    "disabled",
    "masks",
]
