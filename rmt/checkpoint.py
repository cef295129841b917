"""Files: the task file (packed bits and what they belong to), whole writing, provenance, the official flat bytes.

A task file is safetensors. For every mask it holds the int32 words of `rmt_kernels.pack_bits` under the state-dict name
of the weight, and one metadata string `rmt`, JSON with sorted keys, so that equal tasks are equal files:

    format_version   1
    shapes           {key: [N, K]}
    bits_sha256      over the words, masks in the order of their keys
    base_sha256      over the base weights that the masks belong to, in fp32
    classnames       in label order
    config           the run's RunConfig, without `data` and `device`: a shared file names no folder of ours

It holds no optimizer state and no scores; loading sets a score to `init` where its bit is on and to 0 where off.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import rmt_kernels as rk

from .config import RunConfig, UserError
from .masked import Mask

FORMAT_VERSION = 1
_FIELDS = {
    "format_version": int, "shapes": dict, "bits_sha256": str, "base_sha256": str, "classnames": list, "config": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A task file's content, checked in itself. bits: key -> (N, ceil(K / 32)) int32; shapes: key -> (N, K)."""

    path: Path
    bits: dict[str, Tensor]
    shapes: dict[str, tuple[int, int]]
    bits_sha256: str
    base_sha256: str
    classnames: tuple[str, ...]
    config: dict[str, Any]


def write_whole(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path` whole or not at all: after any crash `path` holds its old content or the new."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: object) -> None:
    """`value` as indented JSON, whole or not at all."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def _sha256(tensors: dict[str, Tensor]) -> str:
    """Over key, shape and little-endian bytes of every tensor, in the order of their keys."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        array = tensors[key].detach().cpu().contiguous().numpy()
        digest.update(f"{key} {array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return digest.hexdigest()


def base_sha256(masks: list[Mask]) -> str:
    """Of the frozen weights that have masks, in fp32: equal for one model loaded from fp16 or from fp32 files."""
    return _sha256({mask.key: mask.weight.float() for mask in masks})


def save_task(path: str | Path, masks: list[Mask], classnames: tuple[str, ...], config: RunConfig) -> Task:
    """Writes the task file and returns what it holds. Raises OSError where it cannot be written; nothing is left."""
    bits = {mask.key: mask.bits.cpu().contiguous() for mask in masks}
    shared = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("data", "device")}
    shapes = {mask.key: tuple(mask.weight.shape) for mask in masks}
    task = Task(Path(path), bits, shapes, _sha256(bits), base_sha256(masks), tuple(classnames), shared)
    values = {name: getattr(task, name) for name in _FIELDS if name != "format_version"}
    text = json.dumps({"format_version": FORMAT_VERSION} | values, sort_keys=True)
    write_whole(path, save(bits, {"rmt": text}))
    return task


def load_task(path: str | Path) -> Task:
    """Reads and checks a task file. Raises UserError where it is missing, damaged or of another format version."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"expected a task file at {path}, got none")
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {}).get("rmt", "null"))
            _check_fields(path, values)
            bits = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no task file, or is damaged: {error}") from error
    shapes = {key: tuple(shape) for key, shape in values["shapes"].items()}
    _check_bits(path, bits, shapes)
    if _sha256(bits) != values["bits_sha256"]:
        raise UserError(f"{path} is damaged: expected bits with sha256 {values['bits_sha256']}, got {_sha256(bits)}")
    names = tuple(values["classnames"])
    return Task(path, bits, shapes, values["bits_sha256"], values["base_sha256"], names, values["config"])


def _check_fields(path: Path, values: object) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{path} is no task file: its metadata must hold a JSON object `rmt`, got {values!r}")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{path} must have format version {FORMAT_VERSION}, got {version!r}: another rmt wrote it")
    for name, kind in _FIELDS.items():
        if not isinstance(values.get(name), kind):
            raise UserError(f"{path} is damaged: {name} must be {kind.__name__}, got {values.get(name)!r}")


def _check_bits(path: Path, bits: dict[str, Tensor], shapes: dict[str, tuple]) -> None:
    if set(bits) != set(shapes):
        raise UserError(f"{path} is damaged: expected masks {sorted(shapes)}, got {sorted(bits)}")
    for key, words in bits.items():
        n, k = (
            shapes[key] if len(shapes[key]) == 2 and all(isinstance(v, int) and v > 0 for v in shapes[key]) else (0, 0)
        )
        if words.dtype != torch.int32 or not n or tuple(words.shape) != (n, -(-k // 32)):
            got = f"{words.dtype} {tuple(words.shape)}"
            raise UserError(f"{path} is damaged: {key} must hold the int32 words of a mask {shapes[key]}, got {got}")
        # `-1 << n` sets bit n and all above it: the pad bits.
        if k % 32 and (words[:, -1] & (-1 << k % 32)).any():
            raise UserError(f"{path} is damaged: {key} has bits set beyond column {k}")


def apply_task(task: Task, masks: list[Mask]) -> None:
    """Sets the bits of all `masks` from the file.

    Raises: UserError where keys, shapes or base weights are not those that the file was made for; nothing is set then.
    """
    shapes = {mask.key: tuple(mask.weight.shape) for mask in masks}
    if set(shapes) != set(task.shapes):
        missing, odd = sorted(set(shapes) - set(task.shapes)), sorted(set(task.shapes) - set(shapes))
        raise UserError(
            f"{task.path} must have the model's {len(shapes)} masks: it lacks {missing}, and has besides {odd}"
        )
    for key, shape in shapes.items():
        if task.shapes[key] != shape:
            raise UserError(f"{task.path} is for another model: {key} must be {shape}, got {task.shapes[key]}")
    if base_sha256(masks) != task.base_sha256:
        model = task.config.get("model")
        raise UserError(
            f"{task.path} is for another model: expected base weights with sha256 {task.base_sha256} ({model}), got "
            f"{base_sha256(masks)}"
        )
    for mask in masks:
        mask.set_bits(task.bits[mask.key])


def environment(device: torch.device) -> dict[str, str | None]:
    """Versions, commit, date and machine: what a result needs beside its config to be understood later."""
    packages = ("rmt", "torch", "open_clip_torch", "numpy", "torchvision")
    return {
        **{name: _version(name) for name in packages},
        "python": platform.python_version(), "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "backends": ", ".join(sorted({row["last"] for row in rk.explain()} - {""})),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this code runs from, with `+` where it is changed; None for an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def from_official(flat: Tensor | bytes, in_features: int, out_features: int) -> Tensor:
    """A mask of R-AMT's `model.pth.tar-E` -> (N, ceil(K / 32)) int32 words.

    flat: ceil(N * K / 8) bytes, the whole mask row after row, most significant bit first, as `numpy.packbits` makes
    them; no row is padded, so a row may start inside a byte. Raises UserError for another number of bytes.
    """
    data = np.frombuffer(flat, np.uint8) if isinstance(flat, bytes) else flat.cpu().numpy().astype(np.uint8).ravel()
    n, k = out_features, in_features
    if data.size != -(-n * k // 8):
        raise UserError(f"a mask of {n} x {k} must come as {-(-n * k // 8)} bytes, got {data.size}")
    return rk.pack_bits(torch.from_numpy(np.unpackbits(data, count=n * k).reshape(n, k).astype(bool)))


def to_official(bits: Tensor, in_features: int) -> Tensor:
    """(N, ceil(K / 32)) int32 words -> (ceil(N * K / 8),) uint8, as the official code saves a mask."""
    return torch.from_numpy(np.packbits(rk.unpack_bits(bits.cpu(), in_features).numpy()))
