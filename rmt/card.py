"""The README.md of a task folder, for people: what it is, how to load it, which base model it needs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import Task

_TEXT = """\
---
library_name: rmt
tags:
- clip
- mask-tuning
---

# Masks of a CLIP model, tuned on one task

Which weights of a frozen model are switched off. The model itself is not in here; {count} tensors are masked.

| | |
|---|---|
{rows}

## How to load it

```python
{code}
```

Loading refuses other base weights than these masks were tuned on.
"""
_SHOWN = 20


def card(task: "Task", size: int, numbers: Mapping[str, float | str]) -> str:
    """Markdown. size: of the mask file in bytes. numbers: rows of their own, by name; floats with two decimals."""
    weights = sum(n * k for n, k in task.shapes.values())
    off = sum(task.off(key) for key in task.shapes)
    coded, raw = sum(map(task.coded_bytes, task.bits)), sum(-(-n * k // 8) for n, k in task.shapes.values())
    names = task.classnames
    rows = {
        "base model": _base(task),
        "masked weights": f"{weights:,}",
        "switched off": f"{off:,} ({100 * off / weights:.2f} %)",
        "mask file": f"{size:,} bytes, with masks of {coded:,} bytes ({raw:,} as plain bits)",
        "prompt": task.template or "not recorded",
        f"{len(names)} classes": ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else ""),
        **{name: f"{value:.2f}" if isinstance(value, float) else str(value) for name, value in numbers.items()},
        "sha256 of the bits": task.bits_sha256,
        "sha256 of the base weights": task.base_sha256,
    }
    text = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())
    return _TEXT.format(count=len(task.shapes), rows=text, code=_code(task))


def _base(task: "Task") -> str:
    if task.model is None:
        return "not recorded"
    return task.model if task.pretrained is None else f"{task.model}, pretrained {task.pretrained}"


def _cell(text: str) -> str:
    """One line, no end of the cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _code(task: "Task") -> str:
    name = "MODEL" if task.model is None else task.model
    given = [repr(name)] + ([f"pretrained={task.pretrained!r}"] if task.pretrained else [])
    if task.config.get("image_size"):
        given.append(f"force_image_size={task.config['image_size']}")
    return (
        "import open_clip, rmt\n\n"
        f"base, _, preprocess = open_clip.create_model_and_transforms({', '.join(given)})\n"
        'model = rmt.MaskModel.from_pretrained(base, "THIS_FOLDER")'
    )
