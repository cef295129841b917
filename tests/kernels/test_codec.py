import itertools
import os
import random
import struct
import tracemalloc
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmt_kernels as rk
from rmt_kernels import codec
from rmt_kernels.backends import native

VIT_B16 = [(768, 768), *12 * [(2304, 768), (768, 768)]]
EDGES = [(1, 1), (1, 31), (1, 32), (1, 33), (7, 1), (3, 20), (5, 64), (4, 100), (33, 197), (1, 5000)]
EXTENSION = native.extension
OFF = [0.001, 0.005, 0.01, 0.0256, 0.05, 0.1, 0.2, 0.3, 0.382, 0.4, 0.5]


@pytest.fixture(params=["native", "plain"], autouse=True)
def where(request, monkeypatch):
    """Every test runs in C++ and in plain Python."""
    if request.param == "plain":
        monkeypatch.setattr(native, "extension", None)
    elif native.extension is None:
        pytest.skip(f"no C++: {native.missing}")
    return request.param


def random_bits(n, k, off, seed=0):
    return rk.pack_bits(torch.from_numpy(np.random.default_rng(seed).random((n, k), np.float32) >= off))


def entropy_bytes(n, k, bits):
    on = np.unpackbits(bits.numpy().view(np.uint8)).mean() * bits.numel() * 32 / (n * k)
    p = np.array([on, 1 - on])
    return float(-(p * np.log2(p, where=p > 0, out=np.zeros(2))).sum()) * n * k / 8


def edited(data, payload=None, **fields):
    """The stream with other header fields or payload, and the checksum that goes with them."""
    names = ("magic", "version", "codec", "parameter", "coded", "n", "k", "count", "unary_bytes")
    values = dict(zip(names, struct.unpack_from("<4sBBBBIIQQ", data))) | fields
    header, payload = struct.pack("<4sBBBBIIQQ", *values.values()), data[36:] if payload is None else payload
    return header + struct.pack("<I", zlib.crc32(header + payload)) + payload


def bits_of(text):
    """Bytes of a text of bits, in the order of the stream: LSB first."""
    return np.packbits([int(c) for c in text.replace(" ", "")], bitorder="little").tobytes()


@pytest.mark.parametrize("n, k", EDGES)
@pytest.mark.parametrize("off", [0, 0.02, 0.3, 0.5, 0.9, 1])
def test_round_trip(n, k, off):
    bits = random_bits(n, k, off)
    data = rk.encode_bits(bits, k)
    back, columns = rk.decode_bits(data)
    assert columns == k and torch.equal(back, bits) and len(data) <= -(-n * k // 8) + 36
    assert rk.encode_bits(back, k) == data


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 70), st.integers(1, 140), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_both_ways_make_the_same_bytes_and_read_them(n, k, off, seed):
    bits, before = random_bits(n, k, off, seed), native.extension
    data = rk.encode_bits(bits, k)
    try:
        native.extension = None
        assert rk.encode_bits(bits, k) == data and torch.equal(rk.decode_bits(data)[0], bits)
    finally:
        native.extension = before
    assert torch.equal(rk.decode_bits(memoryview(bytearray(data)))[0], bits)


def test_the_stream_is_what_the_format_says():
    # Off at 2, 3 and 39 of 2 x 30: gaps 2, 0, 35; p = 3 takes 16 bits, p = 2 takes 17.
    mask = torch.ones(60, dtype=torch.bool)
    mask[[2, 3, 39]] = False
    data = rk.encode_bits(rk.pack_bits(mask.view(2, 30)), 30)
    payload = bits_of("1 1 00001") + bits_of("010 000 110")
    assert data[:32] == struct.pack("<4sBBBBIIQQ", b"RMTB", 1, 1, 3, 0, 2, 30, 3, 1) and data[36:] == payload
    assert data[32:36] == zlib.crc32(data[:32] + payload).to_bytes(4, "little")


def test_without_a_good_code_the_bits_are_stored():
    bits = random_bits(3, 41, 0.5)
    data = rk.encode_bits(bits, 41)
    on = rk.unpack_bits(bits, 41).numpy()
    assert data[:32] == struct.pack("<4sBBBBIIQQ", b"RMTB", 1, 0, 0, 1, 3, 41, on.sum(), 0)
    assert data[36:] == np.packbits(on, bitorder="little").tobytes()


@pytest.mark.parametrize("off", OFF)
def test_the_size_is_near_the_entropy(off):
    for rate in (off, 1 - off):
        for n, k in [(768, 768), (192, 97)]:
            bits = random_bits(n, k, rate)
            assert len(rk.encode_bits(bits, k)) <= 1.05 * entropy_bytes(n, k, bits) + 200


def test_the_masks_of_a_vit_b16_are_small(where):
    data = [rk.encode_bits(random_bits(n, k, 0.0256, i), k) for i, (n, k) in enumerate(VIT_B16)]
    assert sum(n * k for n, k in VIT_B16) == 28_901_376 and sum(map(len, data)) < 630_000


@pytest.mark.parametrize("change, message", [
    (lambda d: d[:35], "at least 36 bytes, got 35"),
    (lambda d: b"RMTX" + d[4:], "must begin with b'RMTB', got b'RMTX'"),
    (lambda d: edited(d, version=2), "version 1, got 2"),
    (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "expected crc32"),
    (lambda d: d[:20] + bytes([d[20] ^ 1]) + d[21:], "expected crc32"),
    (lambda d: d[:-1], "expected crc32"),
    (lambda d: edited(d, codec=2), "codec must be 0 or 1, got 2"),
    (lambda d: edited(d, n=0), "1 to 2.32 - 1 weights, got 0 x 64"),
    (lambda d: edited(d, n=2**31, k=2**31), "1 to 2.32 - 1 weights, got 2147483648 x 2147483648"),
    (lambda d: edited(d, n=2**31, k=1), "at most 268,435,456 bytes, got 2147483648 x 1, which take 8,589,934,592"),
    (lambda d: edited(d, payload=d[36:] + b"\0"), "with its 74 bytes of payload"),
    (lambda d: edited(d, payload=d[36:-1]), "with its 72 bytes of payload"),
    (lambda d: edited(d, coded=2), "coded 2.* do not go together"),
    (lambda d: edited(d, parameter=13), "parameter 13.* do not go together"),
    (lambda d: edited(d, n=1, k=128, count=65), "count 65.* do not go together"),
    (lambda d: edited(d, count=2**63), "count 9223372036854775808.* do not go together"),
    (lambda d: edited(d, unary_bytes=2**63), "do not go together"),
    (lambda d: edited(d, n=1, k=64), "do not go together"),
    (lambda d: edited(d, n=1, k=180), "73 bytes of payload"),
    (lambda d: edited(d, n=32), "inside the mask of 32 x 64, got gaps past its end"),
    (lambda d: edited(d, payload=bytes(73)), "83 gaps in 21 unary bytes, got another number"),
    (lambda d: edited(d, payload=b"\xff" + d[37:]), "got another number"),
    (lambda d: edited(d, payload=d[36:-1] + bytes([d[-1] | 128])), "pad bits of 0"),
])  # fmt: skip
def test_refuses_damage(change, message):
    data = rk.encode_bits(random_bits(64, 64, 0.02, 3), 64)
    # What the edits count on: p = 5, 83 weights off, 21 + 52 bytes, of which the last has one pad bit.
    assert struct.unpack_from("<BBIIQQ", data, 6) == (5, 0, 64, 64, 83, 21) and len(data) == 36 + 73
    with pytest.raises(ValueError, match=message):
        rk.decode_bits(change(data))


@pytest.mark.parametrize("change, message", [
    (lambda d: edited(d, count=61), "expected 61 bits on, got 60"),
    (lambda d: edited(d, payload=d[36:-1] + bytes([d[-1] | 128])), "pad bits of 0"),
    (lambda d: edited(d, parameter=1), "do not go together"),
    (lambda d: edited(d, coded=0), "do not go together"),
    (lambda d: edited(d, unary_bytes=1), "do not go together"),
    (lambda d: edited(d, count=124), "do not go together"),
    (lambda d: edited(d, n=4), "do not go together"),
])  # fmt: skip
def test_refuses_damage_of_stored_bits(change, message):
    data = rk.encode_bits(random_bits(3, 41, 0.5, 3), 41)
    assert struct.unpack_from("<BBBIIQ", data, 5) == (0, 0, 1, 3, 41, 60) and data[-1] < 8
    with pytest.raises(ValueError, match=message):
        rk.decode_bits(change(data))


def test_refuses_what_is_no_mask_or_no_bytes():
    bits = random_bits(4, 40, 0.5)
    for args, kind, message in [
        ((bits.float(), 40), TypeError, "bits must be torch.int32"), (([1], 40), TypeError, "must be a tensor"),
        ((bits[:0], 40), ValueError, "non-empty"), ((bits, 64.0), ValueError, "33 to 64 for bits .* got 64.0"),
        ((bits, 65), ValueError, "must be 33 to 64"), ((bits, 32), ValueError, "must be 33 to 64"),
        ((bits.clone().fill_(-1), 40), ValueError, "pad bits of 0"),
        ((torch.zeros(1, 1, dtype=torch.int32).expand(2**32, 1), 1), ValueError, "1 to 2.32 - 1 weights"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=message):
            rk.encode_bits(*args)
    for odd in (None, "RMTB", [1], np.zeros(80, np.uint8)[::2]):
        with pytest.raises(TypeError, match="must be contiguous bytes"):
            rk.decode_bits(odd)


def test_a_slice_and_a_transposed_mask_are_taken():
    bits = random_bits(9, 64, 0.1).T
    assert torch.equal(rk.decode_bits(rk.encode_bits(bits, 9 * 32))[0], bits)
    assert torch.equal(rk.decode_bits(rk.encode_bits(bits[:, 2:4], 64))[0], bits[:, 2:4])


VALUES = (
    0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 127, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62,
    (1 << 64) - 1,
)  # fmt: skip
SIZES = {"version": 8, "codec": 8, "parameter": 8, "coded": 8, "n": 32, "k": 32, "count": 64, "unary_bytes": 64}


class Mutations:
    """Streams with flipped bits, cut, longer, random, of edited fields or payloads; most with a right checksum."""

    def __init__(self, kind, seed=0):
        self.random = random.Random(seed)
        stored = (0.45, 0.5, 0.55)
        coded = (0, 0.003, 0.02, 0.1, 0.3, 0.8, 1)
        cases = [(n, k, off) for n, k in EDGES for off in (stored if kind == codec.RAW else coded)]
        made = [rk.encode_bits(random_bits(n, k, off, i), k) for i, (n, k, off) in enumerate(cases)]
        self.streams = [data for data in made if data[5] == kind]
        assert len(self.streams) > 10

    def __iter__(self):
        while True:
            data = self.random.choice(self.streams)
            yield self.random.choice((self.flip, self.cut, self.extend, self.noise, self.field, self.field, self.body,
                                      self.body))(data)  # fmt: skip

    def flip(self, data):
        changed = bytearray(data)
        for _ in range(self.random.randint(1, 4)):
            changed[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        return bytes(changed)

    def cut(self, data):
        short = data[: self.random.randrange(len(data))]
        return edited(short) if len(short) >= 36 and self.random.random() < 0.7 else short

    def extend(self, data):
        more = self.random.randbytes(self.random.randint(1, 9)) if self.random.random() < 0.7 else b"\0"
        return edited(data, payload=data[36:] + more)

    def noise(self, data):
        return edited(data[:36] + self.random.randbytes(len(data) - 36))

    def field(self, data):
        values = dict(zip(SIZES, struct.unpack_from("<BBBBIIQQ", data, 4)))
        for name in self.random.sample(list(SIZES), self.random.choice((1, 1, 2, 3))):
            near = values[name] + self.random.randint(-2, 2)
            value = self.random.choice((near, near, self.random.choice(VALUES), self.random.getrandbits(64)))
            values[name] = value % (1 << SIZES[name])
        return edited(data, **values)

    def body(self, data):
        return edited(data, payload=self.flip(data[36:])) if len(data) > 36 else self.field(data)


def outcome(data, limit):
    """The mask, or which of the checks refused it."""
    try:
        words, columns = rk.decode_bits(data, limit=limit)
    except ValueError as error:
        return None, next((text for text in REASONS if text in str(error)), str(error))
    assert 4 * words.numel() <= limit
    return (words, columns), "read"


REASONS = (
    "at least 36 bytes", "must begin with", "have version", "expected crc32", "1 to 2^32 - 1 weights",
    "must take at most", "codec must be", "go together", "another number", "past its end", "pad bits",
    "bits on, got", "read",
)  # fmt: skip


@pytest.mark.parametrize("kind", [codec.RAW, codec.RICE])
def test_mutated_streams_are_read_or_refused(kind, where):
    """Plain Python is some ten times as slow: a tenth as many, each also against C++."""
    count = int(os.environ.get("RMT_FUZZ", 100_000)) // (1 if where == "native" else 10)
    seen = Counter()
    for data in itertools.islice(Mutations(kind), count):
        got, why = outcome(data, 1 << 16)
        seen[why] += 1
        if got is not None:
            # What is read is a mask: none of its pad bits is set.
            assert torch.equal(rk.decode_bits(rk.encode_bits(*got))[0], got[0])
        if where == "plain" and EXTENSION is not None:
            native.extension = EXTENSION
            other, _ = outcome(data, 1 << 16)
            native.extension = None
            assert (got is None) == (other is None) and (got is None or torch.equal(got[0], other[0])), data.hex()
    deep = {"bits on, got"} if kind == codec.RAW else {"another number", "past its end"}
    assert set(seen) <= set(REASONS) and deep | {"read", "pad bits", "go together", "must take at most"} <= set(seen), (
        seen
    )


@pytest.mark.parametrize("kind", [codec.RAW, codec.RICE])
def test_no_stream_takes_more_memory_than_the_limit(kind, where):
    """Peak of what Python and numpy ask for; C++ decodes into numpy's array and asks for nothing."""
    limit, streams = 1 << 20, list(itertools.islice(Mutations(kind, seed=1), 3000))
    # The most a stream may ask for, and what would take gigabytes.
    streams += [edited(streams[0][:4] + b"\1\1" + bytes(30), n=n, k=k, payload=b"") for n, k in
                [(1 << 18, 1), (1, 1 << 23), (1 << 19, 1), (1, 1 << 24), (1 << 31, 1), (1, (1 << 32) - 1)]]  # fmt: skip
    tracemalloc.start()
    try:
        peaks = []
        for data in streams:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            outcome(data, limit)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    longest = max(map(len, streams))
    assert limit <= max(peaks) < limit + (20_000 if where == "native" else 100 * longest + limit)
