"""CUDA C++ kernels that serve many tasks: rows grouped by task, and masked weights rewritten in place.

On a GPU and in the CPU emulator of cuda_on_cpu, as test_cuda.py; what waits and what a graph holds, on a GPU alone.
"""

import itertools

import pytest
import torch
from helpers import SHAPES, THRESHOLD, assert_no_worse, layer, need_gpu, shape_id
from kernels.cuda_checks import check_product, inside, layouts, twice, unchanged

import rmt_kernels as rk
from rmt_kernels import reference
from rmt_kernels.backends import cuda, dispatch

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
HALVES = FLOATS[1:]
gpu = pytest.mark.gpu


def masks(count: int, n: int, k: int, device: str) -> list[torch.Tensor | None]:
    """Bits of `count` tasks; every third is the plain weight, and the last two are one tensor."""
    found = [reference.pack_scores(layer((1, n, k), seed=i)["scores"], THRESHOLD).to(device) for i in range(count)]
    found[2::3] = [None] * len(found[2::3])
    return [*found[:-1], found[-2]] if count > 3 else found


def all_on(weight: torch.Tensor) -> torch.Tensor:
    return reference.pack_bits(torch.ones(weight.shape, dtype=torch.bool)).to(weight.device)


def ends(sizes) -> list[int]:
    return [0, *itertools.accumulate(sizes)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n, k", [(33, 197), (16, 64), (1, 5)])
@pytest.mark.parametrize("sizes", [(0, 3, 1, 8, 9, 0, 17), (1,) * 20, (64,), (0, 0)], ids=str)
def test_grouped(device, sizes, n, k, dtype):
    """Bitwise what each task gives alone, and as near the truth as the reference."""
    t = layer((sum(sizes), n, k), dtype, device)
    x, weight, bits, offsets = t["x"], t["weight"], masks(len(sizes), n, k, device), ends(sizes)
    with unchanged(x, weight, *bits):
        got = twice(lambda: cuda.grouped_masked_linear(x, weight, bits, t["bias"], offsets, False))
    for words, (i, j) in zip(bits, itertools.pairwise(offsets)):
        words = all_on(weight) if words is None else words
        call = lambda i=i, j=j, words=words: cuda.masked_linear(x[i:j], weight, words, t["bias"], None)  # noqa: E731
        assert torch.equal(got[i:j], check_product(call, x[i:j], weight, words, t["bias"]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n, k", [(37, 104), (40, 197)])
def test_an_invariant_row_depends_on_its_mask_alone(device, n, k, dtype):
    """Every row of a large mixed batch, bit for bit what it is alone, in other company, and in another place."""
    sizes = (70, 1, 0, 9, 200, 3)
    m = sum(sizes)
    t = layer((m, n, k), dtype, device)
    x, weight, bias, bits, offsets = t["x"], t["weight"], t["bias"], masks(6, n, k, device), ends(sizes)
    whole = twice(lambda: cuda.grouped_masked_linear(x, weight, bits, bias, offsets, True))
    truth = [v.double() for v in (x, weight, bias)]
    for i, j, words in zip(offsets, offsets[1:], bits):
        if j == i:
            continue
        exact = reference.grouped_masked_linear(truth[0][i:j], truth[1], [words], truth[2], [0, j - i], False)
        plain = reference.grouped_masked_linear(x[i:j], weight, [words], bias, [0, j - i], False)
        assert_no_worse(whole[i:j], plain, exact)
        for row in {i, j - 1, (i + j) // 2}:
            alone = cuda.grouped_masked_linear(x[row : row + 1], weight, [words], bias, [0, 1], True)
            assert torch.equal(alone[0], whole[row])
            if words is not None and j - i <= cuda.SMALL_M:
                assert torch.equal(cuda.masked_linear(x[row : row + 1], weight, words, bias, None), alone)
    order = torch.arange(m - 1, -1, -1, device=device)
    back = [0, *itertools.accumulate(reversed(sizes))]
    turned = cuda.grouped_masked_linear(x[order], weight, bits[::-1], bias, back, True)
    assert torch.equal(turned[order], whole)


@pytest.mark.parametrize("dtype, m", [(torch.float32, 1400), (torch.bfloat16, 1400)], ids=str)
def test_invariant_with_more_tiles_than_one_launch_takes(device, dtype, m):
    t = layer((m, 20, 40), dtype, device)
    got = cuda.grouped_masked_linear(t["x"], t["weight"], [t["bits"]], None, [0, m], True)
    check_product(lambda: got, t["x"], t["weight"], t["bits"], None)
    assert torch.equal(got[-3:], cuda.masked_linear(t["x"][-3:], t["weight"], t["bits"], None, None))


@pytest.mark.parametrize("dtype, m", [(torch.float32, 17), (torch.bfloat16, 61)], ids=str)
def test_grouped_over_a_weight_of_many_rows(device, dtype, m):
    """N so large that a block takes as many tiles as it can."""
    t = layer((m, 4100, 8), dtype, device)
    call = lambda: cuda.grouped_masked_linear(t["x"], t["weight"], [t["bits"]], None, [0, m], False)  # noqa: E731
    check_product(call, t["x"], t["weight"], t["bits"], None)


def test_grouped_takes_views_and_one_bits_tensor_twice(device):
    t = layer((9, 20, 64), torch.float16, device)
    bits, offsets = [t["bits"], t["bits"], None], [0, 4, 5, 9]
    want = cuda.grouped_masked_linear(t["x"], t["weight"], bits, t["bias"], offsets, False)
    for x, weight in zip(layouts(t["x"]), layouts(t["weight"])):
        assert torch.equal(cuda.grouped_masked_linear(x, weight, bits, t["bias"], offsets, False), want)
    assert torch.equal(want[:5], cuda.masked_linear(t["x"][:5], t["weight"], t["bits"], t["bias"], None))


@pytest.mark.parametrize("made", [False, True], ids=["bits", "made"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_large_groups_are_computed_as_alone(device, dtype, made, monkeypatch):
    """By the wgmma kernel, or over a masked weight in one scratch buffer, beside small ones in one launch."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma needs compute capability 9.0")
    if made:
        limit = dispatch.table()["cpu default", "masked_linear", "float32"][None, None]
        monkeypatch.setattr(dispatch, "row", lambda *key: limit[key[-1] > 32])
    launched, launch = [], cuda._launch
    monkeypatch.setattr(cuda, "_launch", lambda name, *args: (launched.append(name), launch(name, *args))[1])
    sizes, n, k = (70, 2, 80, 3, 66), 48, 72
    t = layer((sum(sizes), n, k), dtype, device)
    bits, offsets = masks(5, n, k, device), ends(sizes)
    bits[2] = None
    got = cuda.grouped_masked_linear(t["x"], t["weight"], bits, t["bias"], offsets, False)
    assert launched.count("masked_linear_small") == 1 and launched.count("masked_gemm") == (0 if made else 2)
    assert launched.count("masked_weights") == (2 if made else 0)
    for words, (i, j) in zip(bits, itertools.pairwise(offsets)):
        dense = t["weight"] if words is None else None
        alone = cuda.masked_linear(t["x"][i:j], t["weight"], words, t["bias"], dense)
        assert torch.equal(got[i:j], alone)


def test_bad_rows_are_refused_before_the_launch(device):
    t = layer((9, 16, 64), device=device)
    for groups in ([(t["bits"], -5, 3)], [(t["bits"], 0, 2**31)]):
        with pytest.raises(RuntimeError, match="rows must be counted from 0"):
            cuda._small(t["x"], t["weight"], groups, None)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 11, 256), (1, 70, 1024)], ids=shape_id)
def test_masked_weight_in_place(device, shape, dtype):
    t, other = layer(shape, device=device), layer(shape, seed=1, device=device)["bits"]
    weight, bits = t["weight"].to(dtype), t["bits"]
    weight[~reference.unpack_bits(bits, shape[2])] = float("inf")
    want = reference.masked_weight(weight, bits)
    some = other.clone()
    some[:, ::2] = bits[:, ::2]  # words in common
    for view in layouts(weight):
        out = torch.full_like(weight, 7)
        with unchanged(view, bits):
            cuda.masked_weight_(out, view, bits, None)
        assert torch.equal(out, want) and not out[~reference.unpack_bits(bits, shape[2])].signbit().any()
        for old in (other, some, bits):
            out = reference.masked_weight(weight, old)
            start, touched = out.clone(), reference.unpack_bits(bits ^ old, shape[2])
            with unchanged(view, bits, old):
                cuda.masked_weight_(out, view, bits, old)
            assert torch.equal(out[touched], want[touched])
            words = torch.repeat_interleave(bits == old, 32, 1)[:, : shape[2]]
            assert torch.equal(out[words], start[words]), "a word that does not differ was written"


def test_masked_weights_of_a_model_in_one_launch(device, monkeypatch):
    """More layers than one launch takes, of several shapes, one of them a view; and only what differs with `olds`."""
    launched, launch = [], cuda._launch
    monkeypatch.setattr(cuda, "_launch", lambda name, *args: (launched.append(name), launch(name, *args))[1])
    shapes = [(1, 5, 33), (1, 16, 64), (0, 40, 256), (1, 3, 768), (1, 1, 8)] * 12
    layers = [layer(shape, torch.bfloat16, device, seed=i) for i, shape in enumerate(shapes)]
    weights, bits = [t["weight"] for t in layers], [t["bits"] for t in layers]
    olds = [b if i % 2 else b ^ (1 << i % 5) for i, b in enumerate(bits)]
    weights[3] = inside(weights[3])
    want = [reference.masked_weight(w, b) for w, b in zip(weights, bits)]
    outs = [torch.full_like(w, 7) for w in want]
    cuda.masked_weights_(outs, weights, bits, [None] * len(outs))
    assert all(torch.equal(o, w) for o, w in zip(outs, want)) and launched == ["masked_weights"]
    # Where nothing differs nothing is written.
    outs = [torch.full_like(w, 7) if i % 2 else reference.masked_weight(weights[i], olds[i])
            for i, w in enumerate(want)]  # fmt: skip
    cuda.masked_weights_(outs, weights, bits, olds)
    for i, (out, w) in enumerate(zip(outs, want)):
        assert torch.equal(out, torch.full_like(w, 7) if i % 2 else w), i


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", [(1,) * 16, (50,) * 4, (1, 0, 63, 2), (1,) * 200], ids=lambda s: f"{len(s)}x{s[0]}")
@pytest.mark.parametrize("n, k", [(768, 3072), (3072, 768), (2304, 768)])
def test_grouped_at_clip_shapes_repeats_bit_for_bit(n, k, sizes, dtype):
    device = need_gpu()
    t, bits, offsets = layer((sum(sizes), n, k), dtype, device), masks(min(len(sizes), 16), n, k, device), ends(sizes)
    bits = [bits[i % len(bits)] for i in range(len(sizes))]
    for invariant in (False, True):
        args = (t["x"], t["weight"], bits, t["bias"], offsets, invariant)
        got = cuda.grouped_masked_linear(*args)
        truth = reference.grouped_masked_linear(*(v.double() if torch.is_tensor(v) else v for v in args))
        assert_no_worse(got, reference.grouped_masked_linear(*args), truth)
        for _ in range(50):
            assert torch.equal(cuda.grouped_masked_linear(*args), got)


@gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_invariant_row_is_the_same_in_every_batch_of_a_gpu(dtype):
    device = need_gpu()
    t, bits = layer((1300, 768, 768), dtype, device), masks(3, 768, 768, device)
    x, weight = t["x"], t["weight"]
    whole = cuda.grouped_masked_linear(x, weight, bits, t["bias"], [0, 500, 1200, 1300], True)
    for i, words in enumerate(bits):
        first = (0, 500, 1200)[i]
        for count in range(1, 66):
            part = cuda.grouped_masked_linear(x[first : first + count], weight, [words], t["bias"], [0, count], True)
            assert torch.equal(part, whole[first : first + count]), count


def _serving(device):
    """A mixed batch through the public op, groups above and below the crossover, and a swap of three layers."""
    t, bits = layer((300, 768, 768), torch.bfloat16, device), masks(5, 768, 768, device)
    kept = [torch.empty_like(t["weight"]) for _ in range(3)]

    def step():
        offsets = [0, 1, 100, 101, 164, 300]
        y = [rk.grouped_masked_linear(t["x"], t["weight"], bits, offsets, t["bias"], invariant=i) for i in (0, 1)]
        rk.masked_weights_(kept, [t["weight"]] * 3, [bits[0], bits[1], bits[3]])
        rk.masked_weight_(kept[0], t["weight"], bits[1], old=bits[0])
        return [*y, *kept]

    return t, bits, step


@gpu
def test_nothing_waits_for_the_device():
    _, _, step = _serving(need_gpu())
    with rk.use_backend("cuda" if torch.cuda.get_device_capability()[0] == 9 else "triton"):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_captured_graph_reads_rows_and_bits_anew(backend):
    """Offsets and addresses are the graph's; what stands at the addresses may change between replays."""
    device = need_gpu()
    if backend == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("groups of more than 64 rows need wgmma")
    t, bits, step = _serving(device)
    with rk.use_backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        junk = [torch.full((4096,), -1, dtype=torch.int64).pin_memory() for _ in range(64)]  # would take freed tables
        for seed in (1, 2):
            t["x"].copy_(layer((300, 768, 768), torch.bfloat16, device, seed)["x"])
            bits[0].copy_(layer((1, 768, 768), device=device, seed=7 + seed)["bits"])
            graph.replay()
            replayed = [c.clone() for c in captured]
            assert all(torch.equal(a, b) for a, b in zip(replayed, step()))
        del junk
