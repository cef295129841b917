"""Checkpoints of the official R-AMT code, `shared/model.pth.tar-E`: read into a model's masks, written from them.

A checkpoint is torch.save's {"state_dict": {key: bytes}, "epoch": E, "optimizer", "scheduler", "val_result"}. A key is
the name of a mask in the official image encoder:

    visual.conv1.weight                                  conv1.mask_real
    visual.transformer.resblocks.0.attn.in_proj_weight   transformer.resblocks.0.attn.mask_real
    visual.transformer.resblocks.0.attn.out_proj.weight  transformer.resblocks.0.attn.out_proj.mask_real

and likewise `mlp.c_fc`, `mlp.c_proj` and, for ResNets, the convolutions and `attnpool.q_proj`. The bytes are those of
`numpy.packbits` over the whole mask, row after row, most significant bit first; no row is padded. It names no base
model and no threshold: names and sizes are all that can be checked. Source: wuw2019/R-AMT at 6187d31,
trainers/masktuning.py (MaskTuning.save_model, load_model) and modules/.
"""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rmt_kernels as rk

from .checkpoint import set_all_bits
from .config import UserError
from .files import write_whole
from .masked import Mask

_SUFFIX, _PACKED, _TOWER = "mask_real", "in_proj_weight", "visual."


def from_official(flat: Tensor | bytes, in_features: int, out_features: int) -> Tensor:
    """A mask of R-AMT's `model.pth.tar-E` -> (N, ceil(K / 32)) int32 words.

    flat: ceil(N * K / 8) bytes, the whole mask row after row, most significant bit first, as `numpy.packbits` makes
    them; no row is padded, so a row may start inside a byte. Raises UserError for another number of bytes, or where a
    bit beyond the mask is set.
    """
    data = np.frombuffer(flat, np.uint8) if isinstance(flat, bytes) else flat.cpu().numpy().astype(np.uint8).ravel()
    n, k = out_features, in_features
    if data.size != -(-n * k // 8):
        raise UserError(f"a mask of {n} x {k} must come as {-(-n * k // 8)} bytes, got {data.size}")
    bits = np.unpackbits(data)
    if bits[n * k :].any():
        raise UserError(f"a mask of {n} x {k} must end in bits of 0, got {bits[n * k :].tolist()}")
    return rk.pack_bits(torch.from_numpy(bits[: n * k].reshape(n, k).astype(bool)))


def to_official(bits: Tensor, in_features: int) -> Tensor:
    """(N, ceil(K / 32)) int32 words -> (ceil(N * K / 8),) uint8, as the official code saves a mask."""
    return torch.from_numpy(np.packbits(rk.unpack_bits(bits.cpu(), in_features).numpy()))


def official_key(key: str) -> str | None:
    """The official name of the mask of our `key`; None where the official code has no such mask."""
    name, _, leaf = key.removeprefix(_TOWER).rpartition(".")
    known = (leaf == "weight" and not name.endswith(".attn")) or (leaf == _PACKED and name.endswith(".attn"))
    return f"{name}.{_SUFFIX}" if key.startswith(_TOWER) and known else None


def read_official(path: str | Path, masks: Sequence[Mask]) -> int:
    """Sets the bits of all `masks` from an official checkpoint. Returns the epochs it was trained for.

    Raises: UserError where the file is missing, damaged or none of theirs, where its masks are not the model's by name
        and size, or have weights off that are not selected in the model; nothing is set then.
    """
    path = Path(path)
    checkpoint = _load(path)
    state, names = checkpoint["state_dict"], _names(masks)
    if set(state) != set(names):
        missing, odd = [n for n in names if n not in state], [n for n in state if n not in names]
        raise UserError(f"{path} must have the model's {len(names)} masks: it lacks {missing}, and has besides {odd}")
    bits = {}
    for name, mask in names.items():
        rows, columns = mask.weight.shape
        if not isinstance(state[name], bytes) and getattr(state[name], "dtype", None) != torch.uint8:
            raise UserError(f"{path}: {name} must be bytes, got {type(state[name]).__name__}")
        try:
            bits[mask.key] = from_official(state[name], columns, rows)
        except UserError as error:
            raise UserError(f"{path}: {name}: {error}") from error
    set_all_bits(path, bits, masks)
    return checkpoint["epoch"]


def write_official(path: str | Path, masks: Sequence[Mask], epoch: int = 30) -> None:
    """Writes an official checkpoint, whole or not at all, for the official code to evaluate.

    It looks for FOLDER/shared/model.pth.tar-EPOCH. There is no optimizer in the file: that code cannot resume from one
    anyway. Raises UserError for masks that it has no name for, OSError where the file cannot be written.
    """
    names = _names(masks)
    state = {name: to_official(mask.bits, mask.weight.shape[1]).numpy().tobytes() for name, mask in names.items()}
    buffer = io.BytesIO()
    rest = {"epoch": epoch, "optimizer": None, "scheduler": None, "val_result": None}
    torch.save({"state_dict": state} | rest, buffer)
    write_whole(path, buffer.getbuffer())


def _names(masks: Sequence[Mask]) -> dict[str, Mask]:
    names = {mask.key: official_key(mask.key) for mask in masks}
    if unknown := [key for key, name in names.items() if name is None]:
        raise UserError(f"the official code only masks native image towers, it has no name for {unknown}")
    return {names[mask.key]: mask for mask in masks}


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"expected an official checkpoint (model.pth.tar-E) at {path}, got none")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # What torch.load raises on a file that is cut short or is none of its own: zip, unpickling, missing keys.
    except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is no official checkpoint, or is damaged: {error}") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    epoch = checkpoint.get("epoch") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not isinstance(epoch, int):
        raise UserError(f"{path} is no official checkpoint: it must hold a state_dict and an epoch, got neither or one")
    return checkpoint
