"""Races: every op again and again, and on two streams at once; each run must give the first one's bytes.

On a GPU 10,000 times. The CUDA emulator runs threads in turn: its few runs show that the tests themselves work.
"""

import itertools

import pytest
import torch
from helpers import layer, shape_id
from kernels import sanitizer_driver
from kernels.cuda_checks import cuda_backend
from kernels.sanitizer_driver import moved, tensors

from rmt_kernels import backends
from rmt_kernels.backends import cuda, dispatch

gpu = pytest.mark.gpu
RUNS = {"cuda": 10_000, "cpu": 3}
# A ragged layer; few rows, and more than one pass over W takes, of a CLIP layer.
SHAPES = [(17, 40, 197), (50, 768, 768), (300, 768, 768)]
# One for each stream: of few rows, so that every GPU serves the same ops of both.
TWO = [(50, 768, 768), (64, 1536, 1024)]
SMALL = [(17, 40, 200), (5, 9, 40)]


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=gpu), pytest.param("triton", marks=gpu)])
def place(request, monkeypatch):
    """(backend, its module, device). Products run straight from the bits."""
    monkeypatch.setattr(dispatch, "row", sanitizer_driver.from_bits)
    if request.param != "triton":
        where = "gpu" if request.param == "cuda" else request.param
        return "cuda", cuda, cuda_backend(where, request, monkeypatch)
    module = backends.load("triton")
    if reason := module.unavailable("cuda"):
        pytest.skip(reason)
    return "triton", module, "cuda"


def jobs(place, shape, dtype):
    """(op, arguments on the device) of every op that a kernel of the backend serves."""
    name, module, device = place
    found = list(sanitizer_driver.calls(shape, dtype))
    if name == "cuda" and dtype != torch.float32 and shape[2] % 8 == 0 and sanitizer_driver.has_wgmma(device):
        t = layer(shape, dtype)
        found.append(("masked_gemm", (t["x"], t["weight"], t["bits"], t["bias"])))
    for op, args in found:
        args = moved(args, device)
        served = hasattr(module, op) and op not in sanitizer_driver.NO_KERNEL[name]
        if served and not (device == "cuda" and op in backends.OPS and module.lacks(op, args)):
            yield op, args


def outcome(place, op, args):
    """Of one run: its result, or what an op that writes into its arguments leaves in them."""
    _, module, device = place
    args = moved(args, device) if op.endswith("_") else args
    result = getattr(module, op)(*args)
    return tensors(args) if result is None else [result]


def differ(got, want):
    """() bool on the device, so that nothing waits: whether any byte differs."""
    return torch.stack([(g.view(torch.uint8) != w.view(torch.uint8)).any() for g, w in zip(got, want)]).any()


def unsteady(place, shapes, dtype, streams):
    """Ops of which some run differs from the first; each shape runs on its stream, beside the other's."""
    device, found = place[2], []
    for same in zip(*(jobs(place, shape, dtype) for shape in shapes), strict=True):
        (op,) = {op for op, _ in same}
        first = [outcome(place, op, args) for _, args in same]
        bad = [torch.zeros((), dtype=torch.bool, device=device) for _ in same]
        if device == "cuda":
            torch.cuda.synchronize()
        for _ in range(RUNS[device]):
            for i, (_, args) in enumerate(same):
                with torch.cuda.stream(streams[i]):  # None: the one that is current
                    bad[i] |= differ(outcome(place, op, args), first[i])
        if device == "cuda":
            torch.cuda.synchronize()
        found += [op] if any(bad) else []
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_run_gives_the_bytes_of_the_first(place, shape, dtype):
    if place[2] == "cpu" and shape != SHAPES[0]:
        pytest.skip("the emulator is too slow for a CLIP layer")
    assert unsteady(place, [shape], dtype, [None]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_streams_keep_apart(place, dtype):
    on_gpu = place[2] == "cuda"
    streams = [torch.cuda.Stream() if on_gpu else None for _ in TWO]
    assert unsteady(place, TWO if on_gpu else SMALL, dtype, streams) == []


def test_one_run_that_differs_is_seen(place, monkeypatch):
    _, module, device = place
    runs, plain = itertools.count(), module.pack_bits

    def races(mask):
        bits = plain(mask)
        bits[-1, -1] ^= next(runs) == RUNS[device] // 2
        return bits

    monkeypatch.setattr(module, "pack_bits", races)
    assert unsteady(place, [SHAPES[0]], torch.float32, [None]) == ["pack_bits"]
