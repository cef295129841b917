"""The task folder: which weights are off, and what they belong to. `mask.safetensors` is all of it; README.md tells it.

docs/format.md has every byte of the file, task_file.py reads and writes them. It holds no optimizer state and no
scores; loading sets a score to `init` where its bit is on and to 0 where off. The masks are those of all weights, so
that loading needs no selection. Equal tasks are equal files.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rmt_kernels as rk

from . import task_file
from .card import card
from .config import RunConfig, UserError
from .files import environment, sha256, write_folder, write_json, write_whole
from .masked import Mask
from .task_file import FORMAT_VERSION

__all__ = [
    "FORMAT_VERSION", "MASK_FILE", "Task", "apply_task", "base_sha256", "environment", "load_task", "save_task",
    "write_json", "write_task", "write_whole",
]  # fmt: skip

MASK_FILE, CARD_FILE = "mask.safetensors", "README.md"
_PRIVATE = ("data", "root", "device")


@dataclass(frozen=True, eq=False)
class Task:
    """A task file's content, checked in itself: the fields of its metadata and the words.

    bits: key -> (N, ceil(K / 32)) int32; shapes: key -> (N, K). path: of the file. text_features: (C, D) fp32, rows of
    length 1, of `classnames` in `template` by the base model's text tower; None where not stored.
    """

    path: Path
    bits: dict[str, Tensor]
    shapes: dict[str, tuple[int, int]]
    selected: dict[str, int]
    init: float
    threshold: float
    bits_sha256: str
    base_sha256: str
    model: str | None
    pretrained: str | None
    classnames: tuple[str, ...]
    template: str | None
    config: dict[str, Any]
    text_features: Tensor | None = None

    def off(self, key: str) -> int:
        """How many weights of a mask are off."""
        n, k = self.shapes[key]
        return n * k - count_on(self.bits[key])

    def coded_bytes(self, key: str) -> int:
        """How many bytes a mask takes in a file of the newest version."""
        return len(rk.encode_bits(self.bits[key], self.shapes[key][1]))


def count_on(words: Tensor) -> int:
    """Bits set in int32 words; pad bits are 0."""
    return int(np.unpackbits(words.contiguous().numpy().view(np.uint8)).sum(dtype=np.int64))


def base_sha256(masks: Sequence[Mask]) -> str:
    """Of the frozen weights that have masks, in fp32: equal for one model loaded from fp16 or from fp32 files."""
    return sha256({mask.key: mask.weight.float() for mask in masks})


def save_task(
    folder: str | Path, masks: Sequence[Mask], classnames: Sequence[str] = (), config: RunConfig | None = None,
    template: str | None = None, numbers: Mapping[str, float | str] | None = None,
    text_features: Tensor | None = None,
) -> Task:  # fmt: skip
    """Writes the task folder and returns what it holds. A task that was there is replaced, or stays whole.

    Args:
        config: of the run that tuned the masks. template: in place of the config's.
        numbers: what to say of the task on its card, by name; the mask file does not hold them.
        text_features: (C, D) fp32, rows of length 1: of the class names in the template, so that the task classifies
            with the image tower alone.

    Raises: OSError, naming the file, where it cannot be written; UserError for masks of two scales, or none, and for
        text features that are not those of C classes.
    """
    scales = {(mask.module.init, mask.module.threshold) for mask in masks}
    if len(scales) != 1:
        raise UserError(f"a task needs masks of one (init, threshold), got {sorted(scales) or 'no masks'}")
    init, threshold = scales.pop()
    bits = {mask.key: mask.bits.cpu().contiguous() for mask in masks}
    task = Task(
        path=Path(folder) / MASK_FILE, bits=bits, shapes={mask.key: tuple(mask.weight.shape) for mask in masks},
        selected={mask.key: mask.scores.numel() for mask in masks if mask.selected is not None},
        init=init, threshold=threshold, bits_sha256=sha256(bits), base_sha256=base_sha256(masks),
        model=config and config.model, pretrained=config and config.pretrained, classnames=tuple(classnames),
        template=template if template is not None or config is None else config.template,
        config=_shared(config) if config else {"mask": {"init": init, "threshold": threshold}},
        text_features=text_features,
    )  # fmt: skip
    return write_task(folder, task, numbers)


def write_task(folder: str | Path, task: Task, numbers: Mapping[str, float | str] | None = None) -> Task:
    """Writes the folder of a task, however that was made, and returns what it holds: with the path and its bits' hash.

    A task that was there is replaced, or stays whole. numbers: as of `save_task`.

    Raises: OSError, naming the file, where it cannot be written; UserError for a task that `load_task` would refuse.
    """
    bits = {key: words.detach().cpu().contiguous() for key, words in task.bits.items()}
    features = task.text_features
    task = dataclasses.replace(
        task, path=Path(folder) / MASK_FILE, bits=bits, bits_sha256=sha256(bits),
        text_features=None if features is None else features.detach().cpu().contiguous(),
    )  # fmt: skip
    data = task_file.encode(vars(task), bits, task.text_features)
    # The mask last: a folder without one is no task.
    write_folder(folder, {CARD_FILE: card(task, len(data), numbers or {}).encode(), MASK_FILE: data})
    return task


def _shared(config: RunConfig) -> dict[str, Any]:
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _PRIVATE}
    return json.loads(json.dumps(values))


def load_task(path: str | Path, *, limit: int = task_file.LIMIT) -> Task:
    """Reads and checks a task folder, or the mask file itself, of format version 2 or 3.

    Args:
        limit: bytes that the words of all masks, and the text features, may take: 1 GiB each, masks of eight billion
            weights. Checked before memory is asked for.

    Raises: UserError, naming file and tensor, where it is missing, damaged, too large or of another format version.
    """
    path = Path(path)
    path = path / MASK_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"expected a task folder, or its {MASK_FILE}, at {path}, got none")
    values, bits, features = task_file.decode(path, limit)
    values["classnames"] = tuple(values["classnames"])
    return Task(path=path, bits=bits, text_features=features, **values)


def apply_task(task: Task, masks: Sequence[Mask], allow_base_mismatch: bool = False) -> None:
    """Sets the bits of all `masks` from the file.

    Args:
        allow_base_mismatch: use them on other base weights of the same shapes, at one's own risk.

    Raises: UserError where keys, shapes or base weights are not those that the file was made for, or where it has a
        weight off that is not selected in the model; nothing is set then.
    """
    check_shapes(task.path, task.shapes, masks)
    if not allow_base_mismatch and (got := base_sha256(masks)) != task.base_sha256:
        name = f" ({task.model}, pretrained {task.pretrained})" if task.model else ""
        raise UserError(
            f"{task.path} is for another model: expected base weights with sha256 {task.base_sha256}{name}, got {got}. "
            "allow_base_mismatch uses it all the same"
        )
    set_all_bits(task.path, task.bits, masks)


def check_shapes(path: Path, shapes: Mapping[str, tuple[int, int]], masks: Sequence[Mask]) -> None:
    """Raises UserError where `path` has not exactly the masks of the model, by key and shape."""
    wanted = {mask.key: tuple(mask.weight.shape) for mask in masks}
    if set(wanted) != set(shapes):
        missing, odd = sorted(set(wanted) - set(shapes)), sorted(set(shapes) - set(wanted))
        raise UserError(f"{path} must have the model's {len(wanted)} masks: it lacks {missing}, and has besides {odd}")
    for key, shape in wanted.items():
        if shapes[key] != shape:
            raise UserError(f"{path} is for another model: {key} must be {shape}, got {shapes[key]}")


def set_all_bits(path: Path, bits: Mapping[str, Tensor], masks: Sequence[Mask]) -> None:
    """Sets all masks or none. Raises UserError where a weight is off that is not selected, and so always on."""
    for mask in masks:
        if mask.selected is not None:
            full = rk.pack_bits(torch.ones(mask.weight.shape, dtype=torch.bool))
            if (bits[mask.key] | mask.selected.cpu()).ne(full).any():
                raise UserError(f"{path} has weights of {mask.key} off that are not selected in the model")
    for mask in masks:
        mask.set_bits(bits[mask.key])
