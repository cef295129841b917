"""The task folder: which weights are off, and what they belong to. `mask.safetensors` is all of it; README.md tells it.

For every mask `mask.safetensors` holds the int32 words of `rmt_kernels.pack_bits` under the state-dict name of the
weight, and one metadata string `rmt`, JSON with sorted keys, so that equal tasks are equal files:

    format_version   2
    shapes           {key: [N, K]}
    selected         {key: how many weights could be switched off}, for masks of which only some were selected
    init, threshold  of the scores: a weight is on where its score is above threshold
    bits_sha256      over the words, masks in the order of their keys
    base_sha256      over the base weights that the masks belong to, in fp32
    model, pretrained  the base model by name, as `rmt.clip.load` takes it; null where nobody said
    classnames       in label order
    template         text with one {} for the class name, or null
    config           the run's RunConfig, without `data`, `root` and `device`: a shared file names no data of ours;
                     of masks that no run made, {"mask": {init, threshold}}
    sha256           over the JSON of all the fields above

It holds no optimizer state and no scores; loading sets a score to `init` where its bit is on and to 0 where off. The
words are those of all weights, so that loading needs no selection.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import rmt_kernels as rk

from .card import card
from .config import RunConfig, UserError
from .files import environment, sha256, write_folder, write_json, write_whole
from .masked import Mask

__all__ = [
    "FORMAT_VERSION", "MASK_FILE", "Task", "apply_task", "base_sha256", "environment", "load_task", "save_task",
    "write_json", "write_whole",
]  # fmt: skip

FORMAT_VERSION = 2
MASK_FILE, CARD_FILE = "mask.safetensors", "README.md"
_PRIVATE = ("data", "root", "device")
_FIELDS = {
    "shapes": dict, "selected": dict, "init": float, "threshold": float, "bits_sha256": str, "base_sha256": str,
    "model": str | None, "pretrained": str | None, "classnames": list, "template": str | None, "config": dict,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Task:
    """A task file's content, checked in itself: the fields of its metadata and the words.

    bits: key -> (N, ceil(K / 32)) int32; shapes: key -> (N, K). path: of the file.
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

    def off(self, key: str) -> int:
        """How many weights of a mask are off."""
        n, k = self.shapes[key]
        return n * k - count_on(self.bits[key])


def count_on(words: Tensor) -> int:
    """Bits set in int32 words; pad bits are 0."""
    return int(np.unpackbits(words.contiguous().numpy().view(np.uint8)).sum(dtype=np.int64))


def base_sha256(masks: Sequence[Mask]) -> str:
    """Of the frozen weights that have masks, in fp32: equal for one model loaded from fp16 or from fp32 files."""
    return sha256({mask.key: mask.weight.float() for mask in masks})


def save_task(
    folder: str | Path, masks: Sequence[Mask], classnames: Sequence[str] = (), config: RunConfig | None = None,
    template: str | None = None, numbers: Mapping[str, float | str] | None = None,
) -> Task:  # fmt: skip
    """Writes the task folder and returns what it holds. A task that was there is replaced, or stays whole.

    Args:
        config: of the run that tuned the masks. template: in place of the config's.
        numbers: what to say of the task on its card, by name; the mask file does not hold them.

    Raises: OSError, naming the file, where it cannot be written; UserError for masks of two scales, or none.
    """
    scales = {(mask.module.init, mask.module.threshold) for mask in masks}
    if len(scales) != 1:
        raise UserError(f"a task needs masks of one (init, threshold), got {sorted(scales) or 'no masks'}")
    (init, threshold), path = scales.pop(), Path(folder) / MASK_FILE
    bits = {mask.key: mask.bits.cpu().contiguous() for mask in masks}
    task = Task(
        path=path, bits=bits, shapes={mask.key: tuple(mask.weight.shape) for mask in masks},
        selected={mask.key: mask.scores.numel() for mask in masks if mask.selected is not None},
        init=init, threshold=threshold, bits_sha256=sha256(bits), base_sha256=base_sha256(masks),
        model=config and config.model, pretrained=config and config.pretrained, classnames=tuple(classnames),
        template=template if template is not None or config is None else config.template,
        config=_shared(config) if config else {"mask": {"init": init, "threshold": threshold}},
    )  # fmt: skip
    data = save(bits, {"rmt": _metadata(task)})
    # The mask last: a folder without one is no task.
    write_folder(folder, {CARD_FILE: card(task, len(data), numbers or {}).encode(), MASK_FILE: data})
    return task


def _shared(config: RunConfig) -> dict[str, Any]:
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _PRIVATE}
    return json.loads(json.dumps(values))


def _metadata(task: Task) -> str:
    values = {"format_version": FORMAT_VERSION} | {name: getattr(task, name) for name in _FIELDS}
    return _dump(values | {"sha256": _hash(values)})


def _dump(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(_dump(values).encode()).hexdigest()


def load_task(path: str | Path) -> Task:
    """Reads and checks a task folder, or the mask file itself.

    Raises: UserError, naming file and tensor, where it is missing, damaged or of another format version.
    """
    path = Path(path)
    path = path / MASK_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"expected a task folder, or its {MASK_FILE}, at {path}, got none")
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {}).get("rmt", "null"))
            _check_fields(path, values)
            bits = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no task file, or is damaged: {error}") from error
    values |= {"shapes": {key: tuple(shape) for key, shape in values["shapes"].items()}}
    _check_bits(path, bits, values["shapes"])
    if (got := sha256(bits)) != values["bits_sha256"]:
        raise UserError(f"{path} is damaged: expected bits with sha256 {values['bits_sha256']}, got {got}")
    fields = {name: values[name] for name in _FIELDS} | {"classnames": tuple(values["classnames"])}
    return Task(path=path, bits=bits, **fields)


def _check_fields(path: Path, values: object) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{path} is no task file: its metadata must hold a JSON object `rmt`, got {values!r}")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{path} must have format version {FORMAT_VERSION}, got {version!r}: another rmt wrote it")
    for name, kind in _FIELDS.items():
        if name not in values or not isinstance(values[name], kind):
            expected = getattr(kind, "__name__", kind)
            raise UserError(f"{path} is damaged: {name} must be {expected}, got {values.get(name, 'none')!r}")
    for key, shape in values["shapes"].items():
        if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(v, int) and v > 0 for v in shape):
            raise UserError(f"{path} is damaged: the shape of {key} must be two sizes above 0, got {shape!r}")
    got = _hash({name: value for name, value in values.items() if name != "sha256"})
    if got != values.get("sha256"):
        raise UserError(f"{path} is damaged: expected metadata with sha256 {values.get('sha256')}, got {got}")


def _check_bits(path: Path, bits: dict[str, Tensor], shapes: dict[str, tuple]) -> None:
    if set(bits) != set(shapes):
        raise UserError(f"{path} is damaged: expected masks {sorted(shapes)}, got {sorted(bits)}")
    for key, words in bits.items():
        n, k = shapes[key]
        if words.dtype != torch.int32 or tuple(words.shape) != (n, -(-k // 32)):
            got = f"{words.dtype} {tuple(words.shape)}"
            raise UserError(f"{path} is damaged: {key} must hold the int32 words of a mask {n} x {k}, got {got}")
        # `-1 << n` sets bit n and all above it: the pad bits.
        if k % 32 and (words[:, -1] & (-1 << k % 32)).any():
            raise UserError(f"{path} is damaged: {key} has bits set beyond column {k}")


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
