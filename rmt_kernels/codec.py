"""Masks as few bytes: gaps between the rarer bits as Golomb-Rice codes, or the bits as they are, whichever is smaller.

A stream, all little-endian; docs/format.md says the same at more length and has a reader of twenty lines:

    0   4s  magic           b"RMTB"
    4   u8  version         1
    5   u8  codec           0 bits as they are, 1 gaps
    6   u8  parameter       p: bits of a remainder; 0 for codec 0
    7   u8  coded           1: the bits that are on, 0: those that are off
    8   u32 rows N
    12  u32 columns K       N K < 2^32
    16  u64 count           of the coded bits
    24  u64 unary_bytes     0 for codec 0
    32  u32 crc32           of the 32 bytes above and all below
    36      payload

Codec 0: all N K bits, row after row, LSB first, pad bits 0; coded is 1. Codec 1: bits are numbered row after row, a gap
is how many lie between a coded bit and the one before it. First, in `unary_bytes`, gap >> p zeros and a one for each
gap, LSB first, then the p low bits of each gap, LSB first; both end in pad bits of 0. The rarer bits are coded (off
where both are as many), p is the smallest that needs the fewest bits: equal masks are equal bytes. Two streams, because
either is then read without a loop.

C++ does it (csrc/cpu/codec.cpp); without the extension the plain Python here does, with the same bytes.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checks

MAGIC, VERSION = b"RMTB", 1
RAW, RICE = 0, 1
LIMIT = 1 << 28
_FIELDS, _CRC = struct.Struct("<4sBBBBIIQQ"), struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CRC.size
_MOST_WEIGHTS = 1 << 32
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


class _Code(NamedTuple):
    """Fields of csrc/cpu/codec.h's RiceCode."""

    parameter: int
    on: bool
    count: int
    unary_bytes: int
    remainder_bytes: int


def encode_bits(bits: Tensor, in_features: int) -> bytes:
    """A mask as a stream: 1 to 4 % and 36 bytes more than its zero-order entropy, at most its bits and 36 bytes.

    Args:
        bits: (N, ceil(in_features / 32)) int32 words of `pack_bits`, on any device. N * in_features below 2^32.

    Raises: TypeError, ValueError, also for pad bits that are not 0.
    """
    words, n, k = _words(bits, in_features)
    raw_bytes = -(-n * k // 8)
    extension = _extension()
    if extension is None:
        code, payload = _rice(words, k)
    else:
        buffer = np.empty(raw_bytes, np.uint8)
        code = _Code(*extension.cpu_rice_encode(words.ctypes.data, n, k, buffer.ctypes.data, raw_bytes))
        payload = buffer[: code.unary_bytes + code.remainder_bytes]
    if code.unary_bytes + code.remainder_bytes < raw_bytes:
        return _stream(RICE, code, n, k, payload.tobytes())
    count = code.count if code.on else n * k - code.count
    return _stream(RAW, _Code(0, True, count, 0, 0), n, k, _flat(words, k))


def decode_bits(data: bytes | bytearray | memoryview, *, limit: int = LIMIT) -> tuple[Tensor, int]:
    """The mask of a stream: ((N, ceil(in_features / 32)) int32 words, in_features).

    Args:
        limit: bytes that the words may take at most (default 256 MiB), checked before any memory is asked for. C++
            needs none besides; the plain Python version up to some hundred times the stream's length.

    Raises: TypeError for what is no contiguous bytes; ValueError for a stream that `encode_bits` did not make.
    """
    view = _bytes(data)
    codec, code, n, k = _header(view, limit)
    payload = np.frombuffer(view, np.uint8, offset=HEADER_BYTES)
    if codec == RAW:
        words = _from_flat(payload, code.count, n, k)
    elif (extension := _extension()) is None:
        words = _from_rice(payload, code, n, k)
    else:
        words = np.empty((n, checks.words(k)), np.uint32)
        # An empty array may have any address.
        wrong = extension.cpu_rice_decode(payload.ctypes.data, *code, n, k, words.ctypes.data)
        if wrong:
            raise _wrong(wrong, code, n, k)
    return torch.from_numpy(words.view(np.int32)), k


def _extension():
    # Loaded with the first mask, not with the package.
    from .backends import native

    return native.extension


def _stream(codec: int, code: _Code, n: int, k: int, payload: bytes) -> bytes:
    fields = (MAGIC, VERSION, codec, code.parameter, code.on, n, k, code.count, code.unary_bytes)
    header = _FIELDS.pack(*fields)
    return b"".join((header, _CRC.pack(zlib.crc32(payload, zlib.crc32(header))), payload))


def _bytes(data) -> memoryview:
    try:
        return memoryview(data).cast("B")
    except TypeError:
        raise TypeError(f"data must be contiguous bytes, got {type(data).__name__}") from None


def _header(view: memoryview, limit: int) -> tuple[int, _Code, int, int]:
    """(codec, code, N, K), each checked against the others and the length of the stream."""
    if len(view) < HEADER_BYTES:
        raise ValueError(f"a mask stream must have at least {HEADER_BYTES} bytes, got {len(view)}")
    magic, version, codec, parameter, coded, n, k, count, unary_bytes = _FIELDS.unpack_from(view)
    if magic != MAGIC:
        raise ValueError(f"a mask stream must begin with {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise ValueError(f"a mask stream must have version {VERSION}, got {version}: a newer rmt wrote it")
    (want,) = _CRC.unpack_from(view, _FIELDS.size)
    if (got := zlib.crc32(view[HEADER_BYTES:], zlib.crc32(view[: _FIELDS.size]))) != want:
        raise ValueError(f"a mask stream is damaged: expected crc32 {want:08x}, got {got:08x}")
    weights, size = n * k, len(view) - HEADER_BYTES
    if not 0 < weights < _MOST_WEIGHTS:
        raise ValueError(f"a mask must have 1 to 2^32 - 1 weights, got {n} x {k}")
    if (words := 4 * n * checks.words(k)) > limit:
        raise ValueError(f"a mask's words must take at most {limit:,} bytes, got {n} x {k}, which take {words:,}")
    raw_bytes = -(-weights // 8)
    if codec == RAW:
        good = (parameter, coded, unary_bytes) == (0, 1, 0) and count <= weights
        expected = raw_bytes
    elif codec == RICE:
        # The rarer bits, fewer bytes than RAW has: what encode_bits makes.
        good = coded <= 1 and 2 * count <= weights - coded and parameter < weights.bit_length()
        expected = unary_bytes + -(-count * parameter // 8)
        good = good and expected < raw_bytes
    else:
        raise ValueError(f"a mask stream's codec must be {RAW} or {RICE}, got {codec}")
    if not good or size != expected:
        raise ValueError(
            f"a mask stream's header is damaged: codec {codec}, parameter {parameter}, coded {coded}, {n} x {k}, count "
            f"{count}, {unary_bytes} unary bytes do not go together, or not with its {size} bytes of payload"
        )
    return codec, _Code(parameter, bool(coded), count, unary_bytes, size - unary_bytes), n, k


def _wrong(error: int, code: _Code, n: int, k: int) -> ValueError:
    """Of csrc/cpu/codec.h's RiceError."""
    expected = {
        1: f"{code.count} gaps in {code.unary_bytes} unary bytes, got another number",
        2: f"all bits inside the mask of {n} x {k}, got gaps past its end",
        3: "pad bits of 0, got others",
    }[error]
    return ValueError(f"a mask stream is damaged: expected {expected}")


def _words(bits, in_features) -> tuple[np.ndarray, int, int]:
    checks.need_matrix("bits", bits, floating=False)
    if bits.dtype != torch.int32:
        raise TypeError(f"bits must be torch.int32, got {bits.dtype}")
    if not isinstance(in_features, int) or checks.words(in_features) != bits.shape[1]:
        top = 32 * bits.shape[1]
        raise ValueError(f"in_features must be {top - 31} to {top} for bits {tuple(bits.shape)}, got {in_features!r}")
    n = bits.shape[0]
    if n * in_features >= _MOST_WEIGHTS:
        raise ValueError(f"a mask must have 1 to 2^32 - 1 weights, got {n} x {in_features}")
    words = bits.detach().cpu().contiguous().numpy().view(np.uint32)
    if (words[:, -1] & ~_last_word(in_features)).any():
        raise ValueError(f"bits must have pad bits of 0, got others beyond column {in_features}")
    return words, n, in_features


def _last_word(k: int) -> np.uint32:
    return np.uint32((1 << k % 32) - 1 if k % 32 else 0xFFFFFFFF)


def _unpacked(words: np.ndarray, k: int) -> np.ndarray:
    """(N, K) uint8 of 0 and 1."""
    return np.unpackbits(words.astype("<u4", copy=False).view(np.uint8), axis=1, bitorder="little")[:, :k]


def _flat(words: np.ndarray, k: int) -> bytes:
    if k % 32 == 0:
        return words.astype("<u4", copy=False).tobytes()
    return np.packbits(_unpacked(words, k), bitorder="little").tobytes()


def _from_flat(payload: np.ndarray, count: int, n: int, k: int) -> np.ndarray:
    if n * k % 8 and payload[-1] >> n * k % 8:
        raise _wrong(3, _Code(0, True, count, 0, 0), n, k)
    if (got := int(_ONES[payload].sum(dtype=np.int64))) != count:
        raise ValueError(f"a mask stream is damaged: expected {count} bits on, got {got}")
    if k % 32 == 0:
        return payload.view("<u4").reshape(n, -1).astype(np.uint32)
    padded = np.zeros((n, 32 * checks.words(k)), np.uint8)
    padded[:, :k] = np.unpackbits(payload, count=n * k, bitorder="little").reshape(n, k)
    return np.packbits(padded, axis=1, bitorder="little").view("<u4").astype(np.uint32)


def _rice(words: np.ndarray, k: int) -> tuple[_Code, np.ndarray]:
    """rice_encode of csrc/cpu/codec.cpp, whatever the size."""
    flat = _unpacked(words, k).ravel()
    on = 2 * int(flat.sum(dtype=np.int64)) < flat.size
    gaps = np.diff(np.flatnonzero(flat if on else flat == 0), prepend=-1) - 1
    sizes = [int((gaps >> p).sum()) + gaps.size * (1 + p) for p in range(flat.size.bit_length())]
    parameter = int(np.argmin(sizes))
    unary = np.zeros(sizes[parameter] - gaps.size * parameter, np.uint8)
    unary[np.cumsum((gaps >> parameter) + 1) - 1] = 1
    remainders = (gaps[:, None] >> np.arange(parameter) & 1).astype(np.uint8)
    parts = [np.packbits(part, bitorder="little") for part in (unary, remainders)]
    return _Code(parameter, on, gaps.size, *(part.size for part in parts)), np.concatenate(parts)


def _from_rice(payload: np.ndarray, code: _Code, n: int, k: int) -> np.ndarray:
    """rice_decode of csrc/cpu/codec.cpp."""
    p, bits = code.parameter, np.unpackbits(payload, bitorder="little")
    ends = np.flatnonzero(bits[: 8 * code.unary_bytes])
    if ends.size != code.count or (ends[-1] // 8 + 1 if ends.size else 0) != code.unary_bytes:
        raise _wrong(1, code, n, k)
    remainders = bits[8 * code.unary_bytes :]
    if remainders[code.count * p :].any():
        raise _wrong(3, code, n, k)
    quotients = np.diff(ends, prepend=-1) - 1
    if (quotients > n * k >> p).any():
        raise _wrong(2, code, n, k)
    places = (
        np.cumsum((quotients << p) + remainders[: code.count * p].reshape(code.count, p) @ (1 << np.arange(p)) + 1) - 1
    )
    # A sum that wraps around is negative somewhere: no gap is above 2^33.
    if ((places < 0) | (places >= n * k)).any():
        raise _wrong(2, code, n, k)
    words = np.full((n, checks.words(k)), 0 if code.on else 0xFFFFFFFF, np.uint32)
    words[:, -1] &= _last_word(k)
    rows, columns = np.divmod(places, k)
    words_at = rows * words.shape[1] + columns // 32
    first = np.flatnonzero(np.diff(words_at, prepend=-1))
    if first.size:
        words.ravel()[words_at[first]] ^= np.bitwise_or.reduceat(
            np.uint32(1) << (columns % 32).astype(np.uint32), first
        )
    return words
