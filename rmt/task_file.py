"""The bytes of a task file, checked in themselves: a safetensors container of masks and one JSON string of metadata.

Layout and fields: docs/format.md. Everything declared is held against a limit before memory is asked for: the length of
the header, the words of all masks together, each tensor against what its mask may need.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rmt_kernels as rk
from rmt_kernels.codec import HEADER_BYTES

from .config import UserError
from .files import sha256

FORMAT_VERSION = 3
LIMIT = 1 << 30
FEATURES = "text_features"
# Of JSON, which takes some 20 times as much once it is read. ImageNet-21k's class names are a quarter of it.
_HEADER_LIMIT = 2 << 20
# Off 1 by this much: rounded to 16 bits and back.
_NORM_ERROR = 2e-3
FIELDS = {
    "shapes": dict, "selected": dict, "init": float, "threshold": float, "bits_sha256": str, "base_sha256": str,
    "model": str | None, "pretrained": str | None, "classnames": list, "template": str | None, "config": dict,
}  # fmt: skip
_FIELDS_OF = {2: FIELDS, 3: FIELDS | {"text_features_sha256": str | None}}


def encode(values: Mapping[str, Any], bits: Mapping[str, Tensor], features: Tensor | None) -> bytes:
    """A task file of version 3. Equal contents are equal bytes.

    Args:
        values: by the names of FIELDS, all but bits_sha256, which is that of `bits` here.
        bits: key -> (N, ceil(K / 32)) int32 words on the CPU. features: (C, D) fp32, or None.

    Raises: UserError where `decode` would refuse the file.
    """
    values = json.loads(json.dumps({name: values[name] for name in FIELDS if name != "bits_sha256"}))
    # A config may say 1 for 1.0; the file has numbers of one kind.
    values |= {name: float(values[name]) for name in ("init", "threshold")}
    values |= {"format_version": FORMAT_VERSION, "bits_sha256": sha256(bits), "text_features_sha256": None}
    if features is not None:
        values["text_features_sha256"] = sha256({FEATURES: features})
    values["sha256"] = metadata_sha256(values)
    _check(values, LIMIT)
    tensors = {}
    for key, words in bits.items():
        _check_words(key, words, values["shapes"].get(key))
        tensors[key] = np.frombuffer(rk.encode_bits(words, values["shapes"][key][1]), np.uint8)
    if features is not None:
        check_features(features, len(values["classnames"]))
        tensors[FEATURES] = features.numpy()
    _check_names(set(tensors), values)

    from safetensors.numpy import save

    data = save(tensors, {"rmt": _dump(values)})
    if (size := int.from_bytes(data[:8], "little")) > _HEADER_LIMIT:
        raise UserError(f"names and metadata of a task file must take at most {_HEADER_LIMIT:,} bytes, got {size:,}")
    return data


def decode(path: Path, limit: int = LIMIT) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """(values by the names of FIELDS, with shapes as tuples; bits; text features) of a task file of version 2 or 3.

    Args:
        limit: bytes that the words of all masks together, and the text features, may take.

    Raises: UserError, naming file and tensor. OSError.
    """
    from safetensors import SafetensorError, safe_open

    try:
        _check_size(path, limit)
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {}).get("rmt", "null"))
            _check(values, limit)
            _check_names(set(file.keys()), values)
            read = _read_words if values["format_version"] == 2 else _read_stream
            bits = {key: read(file.get_slice(key), key, shape) for key, shape in values["shapes"].items()}
            features = _read_features(file.get_slice(FEATURES), values, limit) if _has_features(values) else None
        if (got := sha256(bits)) != values["bits_sha256"]:
            raise UserError(f"expected bits with sha256 {values['bits_sha256']}, got {got}")
    # RecursionError: JSON of very many brackets. ValueError: of JSON, of the codec, and UserError.
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no task file, or is damaged: {error}") from error
    values["shapes"] = {key: tuple(shape) for key, shape in values["shapes"].items()}
    return {name: values[name] for name in FIELDS}, bits, features


def check_features(features: Tensor, classes: int) -> None:
    """Raises UserError for other than finite fp32 rows of length 1, one a class."""
    good = features.dtype == torch.float32 and features.dim() == 2 and features.shape[0] == classes > 0
    if not good or not features.shape[1]:
        got = f"{features.dtype} {tuple(features.shape)}"
        raise UserError(f"text_features must be fp32 rows, one for each of {classes} classes, got {got}")
    # NaN and infinity are no length of 1 either.
    norms = torch.linalg.vector_norm(features, dim=1)
    if not bool(((norms - 1).abs() <= _NORM_ERROR).all()):
        odd = float(norms[(norms - 1).abs().nan_to_num(1).argmax()])
        raise UserError(f"text_features must be rows of length 1, got one of length {odd:.6g}")


def metadata_sha256(values: Mapping[str, Any]) -> str:
    """Over the JSON of all fields but `sha256` itself."""
    return hashlib.sha256(_dump({k: v for k, v in values.items() if k != "sha256"}).encode()).hexdigest()


def _dump(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _has_features(values: Mapping[str, Any]) -> bool:
    return values.get("text_features_sha256") is not None


def _check_size(path: Path, limit: int) -> None:
    """Before a reader parses the header or maps the file."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        size = file.seek(0, 2)
    # Twice: masks, and text features.
    if size > (most := 2 * limit + _HEADER_LIMIT):
        raise UserError(f"a task file must have at most {most:,} bytes, got {size:,}")
    if header > _HEADER_LIMIT:
        raise UserError(f"names and metadata of a task file must take at most {_HEADER_LIMIT:,} bytes, got {header:,}")


def _check(values: object, limit: int) -> None:
    """Of the metadata alone."""
    if not isinstance(values, dict):
        raise UserError(f"its metadata must hold a JSON object `rmt`, got {type(values).__name__}")
    version = values.get("format_version")
    fields = _FIELDS_OF.get(version) if type(version) is int else None
    if fields is None:
        raise UserError(f"expected format version 2 or {FORMAT_VERSION}, got {version!r}: another rmt wrote it")
    for name, kind in fields.items():
        if name not in values or not isinstance(values[name], kind):
            expected = getattr(kind, "__name__", kind)
            raise UserError(f"{name} must be {expected}, got {_short(values.get(name, 'none'))}")
    if (got := metadata_sha256(values)) != values.get("sha256"):
        raise UserError(f"expected metadata with sha256 {_short(values.get('sha256'))}, got {got}")
    # Half a surrogate pair is JSON, but no text that can be written anywhere.
    json.dumps(values, ensure_ascii=False).encode()
    _check_shapes(values["shapes"], limit)
    for key, count in values["selected"].items():
        most = math.prod(values["shapes"].get(key, (0,)))
        if not _is_size(count) or count > most:
            raise UserError(f"selected of {key} must be one of its {most} weights or more, got {_short(count)}")
    if not all(isinstance(name, str) for name in values["classnames"]):
        raise UserError("classnames must be texts")
    if not all(map(math.isfinite, (values["init"], values["threshold"]))):
        raise UserError(f"init and threshold must be finite, got {values['init']} and {values['threshold']}")
    side = values["config"].get("image_size")
    if side is not None and not _is_size(side):
        raise UserError(f"image_size of the config must be a number of pixels, got {_short(side)}")


def _check_shapes(shapes: Mapping[str, Any], limit: int) -> None:
    if not shapes:
        raise UserError("a task needs masks, got none")
    total = 0
    for key, shape in shapes.items():
        if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_size, shape)):
            raise UserError(f"the shape of {key} must be two sizes above 0, got {_short(shape)}")
        total += 4 * shape[0] * _words(shape[1])
    if total > limit:
        raise UserError(f"words of all masks must take at most {limit:,} bytes, got shapes that take {total:,}")


def _check_names(names: set[str], values: Mapping[str, Any]) -> None:
    expected = set(values["shapes"]) | ({FEATURES} if _has_features(values) else set())
    if names != expected or (_has_features(values) and FEATURES in values["shapes"]):
        lacks, besides = sorted(expected - names), sorted(names - expected)
        raise UserError(
            f"expected {len(expected)} tensors: it lacks {_short(lacks)}, and has besides {_short(besides)}"
        )


def _read_stream(found, key: str, shape: list[int]) -> Tensor:
    """A mask of version 3. found: of safe_open's get_slice, which has read nothing yet."""
    n, k = shape
    size, most = found.get_shape(), -(-n * k // 8) + HEADER_BYTES
    if found.get_dtype() != "U8" or len(size) != 1 or not 0 < size[0] <= most:
        got = f"{found.get_dtype()} {size}"
        raise UserError(f"{key} must hold 1 to {most} bytes of a mask {n} x {k}, got {got}")
    try:
        words, columns = rk.decode_bits(found[:].numpy(), limit=4 * n * _words(k))
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error
    if (len(words), columns) != (n, k):
        raise UserError(f"{key} must hold a mask {n} x {k}, got {len(words)} x {columns}")
    return words


def _read_words(found, key: str, shape: list[int]) -> Tensor:
    """A mask of version 2."""
    if found.get_dtype() != "I32" or found.get_shape() != [shape[0], _words(shape[1])]:
        got = f"{found.get_dtype()} {found.get_shape()}"
        raise UserError(f"{key} must hold the int32 words of a mask {shape[0]} x {shape[1]}, got {got}")
    words = found[:]
    _check_words(key, words, shape)
    return words


def _check_words(key: str, words: Tensor, shape: list[int] | None) -> None:
    if shape is None or words.dtype != torch.int32 or tuple(words.shape) != (shape[0], _words(shape[1])):
        got = f"{words.dtype} {tuple(words.shape)}"
        raise UserError(f"{key} must hold the int32 words of a mask {shape}, got {got}")
    # `-1 << n` sets bit n and all above it: the pad bits.
    if shape[1] % 32 and (words[:, -1] & (-1 << shape[1] % 32)).any():
        raise UserError(f"{key} has bits set beyond column {shape[1]}")


def _read_features(found, values: Mapping[str, Any], limit: int) -> Tensor:
    size = found.get_shape()
    if found.get_dtype() != "F32" or len(size) != 2 or 4 * math.prod(size) > limit:
        got = f"{found.get_dtype()} {size}"
        raise UserError(f"{FEATURES} must be an fp32 matrix of at most {limit:,} bytes, got {got}")
    features = found[:]
    check_features(features, len(values["classnames"]))
    if (got := sha256({FEATURES: features})) != values["text_features_sha256"]:
        raise UserError(f"expected {FEATURES} with sha256 {_short(values['text_features_sha256'])}, got {got}")
    return features


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _words(columns: int) -> int:
    return -(-columns // 32)


def _short(value: object) -> str:
    """For a message: what came may be megabytes."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
