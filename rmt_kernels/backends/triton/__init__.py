"""Triton kernels for CUDA tensors, and in Triton's interpreter (TRITON_INTERPRET=1) for CPU tensors.

Same function names and arguments as `reference.py`. Triton is imported by the first call. No submodule is named like a
function: importing it would put the module in the function's place.
"""

import functools
import importlib
import importlib.util
import os

import torch
from torch import Tensor

_HOMES = {
    "masked_linear": "linear",
    "masked_linear_dx": "linear",
    "grouped_masked_linear": "linear",
    "mask_grad": "grad",
    "gradient_dropout": "grad",
    "mask_update_": "update",
    "pack_scores": "update",
    "masked_weight": "update",
    "masked_weight_": "update",
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unavailable(device: str) -> str | None:
    """Why no Triton kernel can run on `device`, or None."""
    if not _installed():
        return "triton is not installed"
    if device == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "on the CPU only in Triton's interpreter: set TRITON_INTERPRET=1 before start"
    return None if _has_device() else "no CUDA device"


# Asked on every call: the answers cost more than a small kernel, and do not change.
@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_device() -> bool:
    return torch.version.cuda is not None and torch.cuda.is_available()


def lacks(name: str, args: tuple) -> str | None:
    """Why this call is not served, or None. Any shape and strides are."""
    tensors = [t for arg in args for t in (arg if isinstance(arg, list | tuple) else (arg,)) if isinstance(t, Tensor)]
    floats = {t.dtype for t in tensors if t.is_floating_point()}
    if not floats <= set(_DTYPES):
        return f"no Triton kernel for {', '.join(sorted(str(d) for d in floats - set(_DTYPES)))}"
    if name == "mask_update_" and any(t.dtype != torch.float32 for i in (0, 2, 3, 5) for t in args[i]):
        return "Triton updates fp32 scores and moments only"
    if name == "mask_update_":
        generals, chained, scales, norms, counts = (*args[12:17], *[None] * 5)[:5]
        if generals or any(chained or ()) or scales or norms is not None or counts is not None:
            return "Triton updates from ready gradients, and takes no norms or counts"
    device = tensors[0].device
    if device.type == "cpu":
        return "Triton's interpreter computes bfloat16 wrongly" if torch.bfloat16 in floats else None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the Triton kernels need compute capability 8.0, this device has {major}.{minor}"


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
