"""The compiled extension, loaded once, or the reason why there is none."""

import importlib
import json
from pathlib import Path
from types import ModuleType

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
