"""Mutated task files: read whole or refused with a UserError. RMT_FUZZ=100000 runs that many of them."""

import json
import os
import random
import struct
import tracemalloc
import zlib
from collections import Counter

import pytest
import torch

import rmt_kernels as rk
from rmt import task_file
from rmt.checkpoint import Task, load_task, write_task
from rmt.config import UserError

COUNT, LIMIT = int(os.environ.get("RMT_FUZZ", 4000)), 1 << 16
JUNK = (
    None, True, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**300, 0.5, float("nan"), float("inf"), "", "x", "a" * 64, "\ud800",
    [], [0, 0], [5, 40], [40, 5], [2**40, 1], [1, 2, 3], [[]], {}, {"a": 1}, {"a": [1, 2]}, {"image_size": -3},
    ["x"] * 3,
)  # fmt: skip


def make(folder):
    bits = {
        key: rk.pack_bits(torch.rand(n, k, generator=torch.Generator().manual_seed(n)) >= off)
        for key, n, k, off in (("a.weight", 5, 40, 0.0), ("b.weight", 16, 70, 0.1), ("c", 9, 64, 0.5))
    }
    shapes = {"a.weight": (5, 40), "b.weight": (16, 70), "c": (9, 64)}
    features = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    task = Task(
        folder, bits, shapes, {"c": 9}, 0.01, 0.005, "", "0" * 64, "m", None, ("x", "y", "z"), "a {}.", {}, features
    )
    return write_task(folder, task).path.read_bytes()


def pack(header, body):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


class Mutations:
    def __init__(self, data, seed=0):
        self.random, self.data = random.Random(seed), data
        size = int.from_bytes(data[:8], "little")
        self.header, self.body = data[8 : 8 + size], data[8 + size :]

    def __iter__(self):
        kinds = (self.flip, self.cut, self.entry, self.metadata, self.metadata, self.text, self.stream, self.swap)
        for _ in range(COUNT):
            kind = self.random.choice(kinds)
            yield kind.__name__, kind()

    def flipped(self, data, most=4):
        changed = bytearray(data)
        for _ in range(self.random.randint(1, most)):
            changed[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        return bytes(changed)

    def flip(self):
        if self.random.random() < 0.3:
            return self.flipped(self.data[:8]) + self.data[8:]
        return self.flipped(self.data)

    def cut(self):
        short = self.data[: self.random.randrange(len(self.data) + 1)]
        return short + self.random.randbytes(self.random.choice((0, 0, 1, 200)))

    def entry(self):
        """What the container says of one tensor."""
        header = json.loads(self.header)
        name = self.random.choice(list(header))
        if name != "__metadata__" and self.random.random() < 0.8:
            field = self.random.choice(list(header[name]))
            header[name][field] = self.random.choice(
                (*JUNK, "I32", "U8", "F64", "BOOL", [0, 1], [3, 4], [0, len(self.body)])
            )
        elif self.random.random() < 0.5:
            header[self.random.choice(("new", "text_features", "c"))] = header.pop(name)
        else:
            header[name] = self.random.choice(JUNK)
        return pack(header, self.body)

    def edited(self, change):
        """With other metadata, and the hash that goes with them."""
        header = json.loads(self.header)
        values = json.loads(header["__metadata__"]["rmt"])
        change(values)
        values["sha256"] = task_file.metadata_sha256(values)
        return pack(header | {"__metadata__": {"rmt": json.dumps(values)}}, self.body)

    def metadata(self):
        def change(values):
            for name in self.random.sample(list(values), self.random.choice((1, 1, 2))):
                kind, value = self.random.random(), values[name]
                if isinstance(value, dict) and value and kind < 0.6:
                    value[self.random.choice((*value, "new"))] = self.random.choice(JUNK)
                elif isinstance(value, list) and value and kind < 0.6:
                    value[0] = self.random.choice(JUNK)
                elif kind < 0.8:
                    values[name] = self.random.choice((*JUNK, 2, "\u00e4" * 50))
                else:
                    del values[name]

        return self.edited(change)

    def text(self):
        """The metadata's own bytes."""
        header = json.loads(self.header)
        text = self.flipped(header["__metadata__"]["rmt"].encode()).decode("latin1")
        header["__metadata__"] = self.random.choice(({"rmt": text}, {"rmt": text[:50]}, {}, {"other": text}))
        return pack(header, self.body)

    def stream(self):
        """A mask's own bytes, with the checksum that goes with them."""
        header, body = json.loads(self.header), bytearray(self.body)
        begin, end = header[self.random.choice(("a.weight", "b.weight", "c"))]["data_offsets"]
        data = bytearray(self.flipped(body[begin:end], 2))
        if self.random.random() < 0.5:
            place, form = self.random.choice(
                ((5, "B"), (6, "B"), (7, "B"), (8, "<I"), (12, "<I"), (16, "<Q"), (24, "<Q"))
            )
            top = 1 << 8 * struct.calcsize(form)
            struct.pack_into(form, data, place, self.random.choice((0, 1, 5, 9, 64, 2**31, 2**63, top - 1)) % top)
        struct.pack_into("<I", data, 32, zlib.crc32(data[36:], zlib.crc32(data[:32])))
        body[begin:end] = data
        return pack(header, bytes(body))

    def swap(self):
        """Good streams in each other's places, and shapes to match."""
        header = json.loads(self.header)
        a, b = self.random.sample(("a.weight", "b.weight", "c", "text_features"), 2)
        header[a], header[b] = header[b], header[a]
        return pack(header, self.body)


def test_mutated_files_are_read_whole_or_refused(tmp_path):
    data, path = make(tmp_path / "task"), tmp_path / "mutated.safetensors"
    path.write_bytes(data)
    want, seen, file = load_task(path, limit=LIMIT), Counter(), open(path, "r+b", buffering=0)  # noqa: SIM115, closed below
    tracemalloc.start()
    try:
        for kind, changed in Mutations(data):
            # Opening for writing takes milliseconds on some file systems.
            file.seek(0)
            file.write(changed)
            file.truncate()
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                task = load_task(path, limit=LIMIT)
            except UserError as error:
                assert "mutated.safetensors is no task file, or is damaged: " in str(error) and len(str(error)) < 1000
                seen[kind, "refused"] += 1
            else:
                seen[kind, "read"] += 1
                assert all(torch.equal(task.bits[key], want.bits[key]) for key in want.bits) and len(task.bits) == 3
            assert tracemalloc.get_traced_memory()[1] - before < LIMIT + 200_000, changed
    finally:
        tracemalloc.stop()
        file.close()
    assert {kind for kind, result in seen if result == "refused"} == {
        "flip", "cut", "entry", "metadata", "text", "stream", "swap",
    }  # fmt: skip
    assert 0 < seen["metadata", "read"] < seen["metadata", "refused"]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
def test_refuses_short_noise(tmp_path, size):
    path = tmp_path / "noise"
    path.write_bytes(random.Random(size).randbytes(size))
    with pytest.raises(UserError, match="is no task file, or is damaged"):
        load_task(path)
