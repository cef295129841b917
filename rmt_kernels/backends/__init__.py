"""Picks a backend for every op and device, and says why.

A backend is a module with functions named as in `reference.py`, with the same arguments. Besides, it has
    unavailable() -> str | None     why it cannot run here at all
    lacks(name, args) -> str | None why it cannot run this call (a dtype, a layout); the next backend then does
and where it chooses between ways to compute a product
    decide(op, dtype, n, k, m, kept) -> dispatch.Row    the row of the dispatch table that decides
"""

import contextlib
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

ORDER = {"cpu": ("cpu", "triton", "reference"), "cuda": ("cuda", "triton", "reference")}
NAMES = ("cpu", "cuda", "triton", "reference")
OPS = (
    "pack_bits", "pack_scores", "unpack_bits", "masked_weight", "masked_weight_", "masked_linear",
    "masked_linear_dx", "grouped_masked_linear", "weight_grad_", "mask_grad", "gradient_dropout", "mask_update_",
)  # fmt: skip
# The products that choose a path by dispatch.json, and the op whose rows they read.
PRODUCTS = {
    "masked_linear": "masked_linear", "masked_linear_dx": "masked_linear_dx", "grouped_masked_linear": "masked_linear",
}  # fmt: skip
# What explain() and `rmt doctor` show: 16 rows over the in-projection of ViT-B.
SHAPE = (16, 2304, 768)
# Kernels that a GPU run has proved, as "backend.op": a GPU kernel outside this list is never a default.
CONFIRMED = frozenset(json.loads(Path(__file__).with_name("confirmed.json").read_text())["confirmed"])

_modules: dict[str, object] = {}
_last: dict[tuple[str, str], str] = {}
_forced: str | None = os.environ.get("RMT_BACKEND") or None
if _forced not in (None, *NAMES):
    raise ValueError(f"RMT_BACKEND must be one of {', '.join(NAMES)}, got {_forced!r}")


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run here."""


def load(name: str):
    """The backend module `name`. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    if name not in _modules:
        _modules[name] = importlib.import_module(
            "rmt_kernels.reference" if name == "reference" else f"rmt_kernels.backends.{name}"
        )
    return _modules[name]


def why_not(name: str, op: str, device: str, args: tuple | None = None) -> str | None:
    """Why backend `name` does not serve `op` on `device`, or None if it does. args None: any call."""
    if name == "reference":
        return None
    if name not in ORDER[device]:
        return f"no {device} kernels"
    module = load(name)
    reason = module.unavailable(device)
    if reason is None and not hasattr(module, op):
        reason = "not implemented"
    if reason is None and args is not None:
        reason = module.lacks(op, args)
    return reason


def unconfirmed(name: str, op: str, device: str) -> str | None:
    """Why `name` is not a default even where it runs."""
    if device == "cuda" and name != "reference" and f"{name}.{op}" not in CONFIRMED:
        return "no GPU run has confirmed it yet: opt in with RMT_BACKEND or use_backend"
    if device == "cpu" and name == "triton":
        return "Triton's interpreter, for tests only"
    return None


def forced() -> str | None:
    """The backend that every op is served from, if one was asked for."""
    return _forced


def last(op: str, device: str) -> str | None:
    """The backend that served `op` on `device` most recently."""
    return _last.get((op, device))


def forced_on(device: str) -> str | None:
    """The backend that was asked for, where it has a say: what a run on a GPU keeps on the host is served as usual."""
    if device == "cpu" and _forced in ("cuda", "triton") and load(_forced).unavailable("cuda") is None:
        return None
    return _forced


def choose(op: str, device: str, args: tuple) -> str:
    """Name of the backend for one call. Raises BackendUnavailable where a forced one cannot serve it."""
    if (asked := forced_on(device)) is not None:
        reason = why_not(asked, op, device, args)
        if reason is None:
            return asked
        raise BackendUnavailable(f"backend {asked!r} was requested, but for {op} on {device}: {reason}")
    for name in ORDER[device]:
        if unconfirmed(name, op, device) is None and why_not(name, op, device, args) is None:
            return name
    raise AssertionError("the reference serves every op")


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Inside, autocast rounds no product whose dtype an op has promised."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def run(op: str, *args):
    """Runs `op` on the chosen backend: the kernel behind every `torch.ops.rmt_kernels` op.

    RMT_SYNC_ERRORS=1: waits for the device, so that a CUDA error surfaces in the call that caused it.
    """
    first = args[0] if isinstance(args[0], Tensor) else args[0][0]
    device = first.device.type
    name = choose(op, device, args)
    _last[op, device] = name
    with without_autocast(device):
        result = getattr(load(name), op)(*args)
    if device == "cuda" and os.environ.get("RMT_SYNC_ERRORS") == "1":
        torch.cuda.synchronize(first.device)
    return result


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Serve every op from backend `name`, or raise BackendUnavailable. None: choose as usual.

    RMT_BACKEND=name does the same for a whole process. The choice is process-wide, not per thread. Where there is a GPU
    for "cuda" or "triton", tensors on the host are served as usual.
    """
    global _forced
    if name is not None:
        load(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def explain(
    op: str | None = None, *, shape: tuple[int, int, int] = SHAPE, dtype: torch.dtype = torch.float32
) -> list[dict[str, str]]:
    """A row for every op and device: the backend that serves it, why no earlier one does, and which ran last.

    Args:
        op: one op; None: all.
        shape: (M, N, K) of a product, M rows over an (N, K) weight: `row` is then the row of the dispatch table that
            decides how it is computed, with and without a kept masked weight. For `grouped_masked_linear` M is the
            longest task's. Operands contiguous and of one dtype. Empty for ops that are no products.
        dtype: of x and weight.

    Raises: ValueError, TypeError.
    """
    if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"shape must be (M, N, K), three positive integers, got {shape!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating torch.dtype, got {dtype!r}")
    rows = []
    for name in OPS if op is None else (op,):
        for device in ORDER:
            skipped, chosen, asked = [], "reference", forced_on(device)
            for backend in (asked,) if asked else ORDER[device]:
                reason = why_not(backend, name, device) or (None if asked else unconfirmed(backend, name, device))
                if reason is None:
                    chosen = backend
                    break
                skipped.append(f"{backend}: {reason}")
            else:
                chosen = "none"
            notes = getattr(load(chosen), "NOTES", {}) if chosen != "none" else {}
            why = "; ".join(skipped) or ("requested" if asked else notes.get(name, "first choice"))
            row = _decided(name, device, chosen, shape, dtype) if name in PRODUCTS else ""
            last_ran = _last.get((name, device), "")
            rows.append({"op": name, "device": device, "backend": chosen, "why": why, "last": last_ran, "row": row})
    return rows


def _decided(op: str, device: str, chosen: str, shape: tuple[int, int, int], dtype: torch.dtype) -> str:
    """What the dispatch table says about a product; of one that another backend serves, what it would say."""
    owner, (m, n, k) = ORDER[device][0], shape
    if dtype == torch.float64:
        return "float64 runs the reference: the masked weight is made"
    decide = getattr(load(owner), "decide", None)
    if decide is None:
        return ""
    texts = [decide(PRODUCTS[op], dtype, n, k, m).text()]
    if op != "grouped_masked_linear":
        texts.append("kept: " + decide(PRODUCTS[op], dtype, n, k, m, kept=True).text())
    served = "" if chosen == owner else f"were it served by {owner}: "
    return f"{served}{'; '.join(texts)}"
