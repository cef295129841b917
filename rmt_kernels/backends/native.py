"""The compiled extension, loaded once, or the reason why there is none."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

MOMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
DTYPES = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("rmt_kernels._C"), None
    except ImportError as error:
        recorded = Path(__file__).parents[1] / "_build_info.json"
        if not recorded.is_file():
            return None, f"the extension is not built ({error})"
        info = json.loads(recorded.read_text())
        part = info["cpu"] if isinstance(info["cpu"], str) else f"built, but does not load: {error}"
        return None, f"the extension is {part}"


extension, missing = _load()


def build_info() -> dict | None:
    """What the loaded extension was built from and for."""
    return None if extension is None else json.loads(extension.build_info)


def update_lacks(
    scores: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], dense: list[Tensor], grads: list[Tensor],
    weights: list[Tensor],
) -> str | None:  # fmt: skip
    """Why neither C++ nor CUDA `mask_update_` takes these layers, or None."""
    if any(t.dtype != torch.float32 for group in (scores, grads) for t in group):
        return "the native update takes fp32 scores and gradients only"
    stored = {t.dtype for group in (exp_avgs, exp_avg_sqs) for t in group}
    if len(stored) > 1 or not stored <= MOMENTS.keys():
        return f"moments in {', '.join(sorted(map(str, stored)))}"
    if any(
        d.dtype != w.dtype and (d.dtype, w.dtype) != (torch.bfloat16, torch.float32) for d, w in zip(dense, weights)
    ):
        return "dense and weight differ in dtype"
    return None
