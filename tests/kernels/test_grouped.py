"""Groups of rows over one weight, and a masked weight rewritten in place: the C++ kernels to the last bit.

Every instruction set that this processor has runs this file: test_narrower_instruction_sets of test_cpu.py.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse, layer
from hypothesis import given, settings
from hypothesis import strategies as st

import rmt_kernels as rk
from rmt_kernels import reference
from rmt_kernels.backends import cpu, native

pytestmark = pytest.mark.skipif(native.extension is None, reason=f"no C++ kernels: {native.missing}")
DTYPES = [torch.float32, torch.bfloat16]
# Ragged words, less than a tile of weight rows, more than a block of columns (768 in fp32, 1536 in bf16).
LAYERS = [(1, 1), (9, 37), (17, 800), (8, 1600), (64, 96)]


@pytest.fixture(autouse=True)
def on_cpu_backend():
    with rk.use_backend("cpu"):
        yield


def masks(count: int, n: int, k: int, seed: int = 0) -> list:
    """Random masks, the last of them None: the plain weight."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(n, k, generator=generator) > 0.1 * (i + 1) for i in range(count - 1)]
    return [*map(reference.pack_bits, drawn), None]


def ends(sizes) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes) + 1)]


def alone(t: dict, words, i: int, j: int, invariant: bool = True) -> torch.Tensor:
    """Rows i .. j - 1 as a batch of their own."""
    return rk.grouped_masked_linear(
        t["x"][i:j], t["weight"], [words], [0, j - i], t["bias"], invariant=invariant
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=7), n=st.integers(1, 19), k=st.integers(1, 100),
    seed=st.integers(0, 99), data=st.data(),
)  # fmt: skip
def test_an_invariant_row_depends_on_itself_and_its_mask_alone(dtype, sizes, n, k, seed, data):
    t = layer((sum(sizes), n, k), dtype, seed=seed)
    drawn = masks(3, n, k, seed)
    # Masks repeat: several groups may be of one task.
    groups = [drawn[data.draw(st.integers(0, 2))] for _ in sizes]
    y = rk.grouped_masked_linear(t["x"], t["weight"], groups, ends(sizes), t["bias"], invariant=True)
    for words, i, j in zip(groups, ends(sizes), ends(sizes)[1:]):
        for row in range(i, j):
            assert torch.equal(y[row : row + 1], alone(t, words, row, row + 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), LAYERS)
def test_invariant_over_blocks_chunks_and_threads(n, k, dtype):
    """More rows than stay in the second cache at once, in one group and in many."""
    m = 200
    t = layer((m, n, k), dtype)
    words, before = masks(2, n, k)[0], torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [alone(t, words, 0, m)]
        split = [0, 1, 1, 3, 6, 13, 110, m]
        results += [
            rk.grouped_masked_linear(t["x"], t["weight"], [words] * 7, split, t["bias"], invariant=True)
        ]  # fmt: skip
        results += [
            rk.grouped_masked_linear(t["x"], t["weight"], [words] * m, range(m + 1), t["bias"], invariant=True)
        ]  # fmt: skip
    torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)
    for row in (0, 5, 84, 85, 170, m - 1):
        assert torch.equal(alone(t, words, row, row + 1), results[0][row : row + 1])
    dense = reference.masked_weight(t["weight"], words)
    truth = t["x"].double() @ dense.double().T + t["bias"].double()
    scale = t["x"].double().abs() @ dense.double().abs().T
    assert_no_worse(results[0], F.linear(t["x"], dense, t["bias"]), truth, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_of_the_weight_is_a_mask_with_every_bit_on(dtype):
    t = layer((11, 20, 45), dtype)
    full = rk.pack_bits(torch.ones(20, 45, dtype=torch.bool))
    assert torch.equal(alone(t, None, 0, 11), alone(t, full, 0, 11))


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_each_group_is_to_the_last_bit_what_it_is_alone(dtype, strided):
    """Some groups straight from the words, some over a made weight: rows on both sides of the table's limit."""
    sizes = (1, 2, 0, 70, 5, 40, 3)
    t = layer((sum(sizes), 48, 200), dtype)
    t["x"] = t["x"].T.contiguous().T if strided else t["x"]
    groups = masks(len(sizes), 48, 200)
    groups[1] = None
    y = rk.grouped_masked_linear(t["x"], t["weight"], groups, ends(sizes), t["bias"])
    for words, i, j in zip(groups, ends(sizes), ends(sizes)[1:]):
        x = t["x"][i:j]
        if words is None:
            want = F.linear(x, t["weight"], t["bias"])
        else:
            want = rk.masked_linear(x, t["weight"], words, t["bias"])
        assert torch.equal(y[i:j], want)
        assert torch.equal(alone(t, words, i, j, invariant=False), want)


def test_an_off_weight_that_is_nan_or_infinite_takes_no_part():
    t = layer((9, 16, 40))
    words = masks(2, 16, 40)[0]
    off = ~reference.unpack_bits(words, 40)
    want = alone(t, words, 0, 9)
    t["weight"][off] = float("nan")
    assert torch.equal(alone(t, words, 0, 9), want)


def test_the_weight_made_for_a_group_is_made_in_memory_that_is_kept(monkeypatch):
    row = cpu.decide("masked_linear", torch.float16, 64, 64, 8)
    assert row.path == "made"
    t = layer((16, 64, 64), torch.float16)
    groups, rows = masks(3, 64, 64)[:2], [0, 8, 16]
    rk.grouped_masked_linear(t["x"], t["weight"], groups, rows)
    kept = cpu._scratch.memory.data_ptr()
    small = layer((16, 8, 8), torch.float16)
    rk.grouped_masked_linear(small["x"], small["weight"], masks(3, 8, 8)[:2], rows)
    rk.grouped_masked_linear(t["x"], t["weight"], groups, rows)
    assert cpu._scratch.memory.data_ptr() == kept and cpu._scratch.memory.nbytes >= t["weight"].nbytes


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), [*LAYERS, (40, 1024)])
def test_a_masked_weight_is_rewritten_in_place(n, k, dtype):
    t = layer((1, n, k), dtype)
    old, new = (reference.pack_bits(torch.rand(n, k) > p) for p in (0.3, 0.5))
    similar = reference.pack_bits(reference.unpack_bits(old, k) ^ (torch.rand(n, k) < 0.01))
    out = torch.full_like(t["weight"], float("nan"))
    where = out.data_ptr()
    rk.masked_weight_(out, t["weight"], old)
    assert torch.equal(out, reference.masked_weight(t["weight"], old))
    for before, after in ((old, new), (new, old), (old, similar), (similar, similar)):
        rk.masked_weight_(out, t["weight"], after, old=before)
        assert torch.equal(out, reference.masked_weight(t["weight"], after)) and out.data_ptr() == where


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_words_that_are_equal_are_not_touched(dtype):
    t = layer((1, 6, 100), dtype)
    old = masks(2, 6, 100)[0]
    new = old.clone()
    new[2, 1] ^= 0x10001
    new[5, 3] ^= 1
    out = torch.full_like(t["weight"], 7)
    rk.masked_weight_(out, t["weight"], new, old=old)
    changed = reference.unpack_bits(new ^ old, 100)
    assert int(changed.sum()) == 3
    assert torch.equal(out[changed], reference.masked_weight(t["weight"], new)[changed])
    untouched = out[~changed]
    same_word = (new != old).repeat_interleave(32, 1)[:, :100][~changed]
    assert untouched[~same_word].eq(7).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("k", [1, 37, 800])
def test_pad_bits_of_old_change_nothing_behind_a_row(k, dtype):
    t = layer((1, 9, k), dtype)
    new, old = masks(2, 9, k)[0], torch.full_like(t["bits"], -1)
    guarded = torch.full((t["weight"].numel() + 64,), 7, dtype=dtype)
    out = guarded[: t["weight"].numel()].view(9, k)
    out.copy_(t["weight"])
    rk.masked_weight_(out, t["weight"], new, old=old)
    assert guarded[t["weight"].numel() :].eq(7).all(), "written behind the last row"
    want = t["weight"].clone()
    reference.masked_weight_(want, t["weight"], new, old)
    assert torch.equal(out, want) and torch.equal(out, reference.masked_weight(t["weight"], new))


def test_a_rewrite_allocates_no_tensor():
    t = layer((1, 64, 256))
    old, new = masks(3, 64, 256)[:2]
    out = reference.masked_weight(t["weight"], old)
    for before in (None, old):
        with torch.profiler.profile(profile_memory=True) as seen:
            rk.masked_weight_(out, t["weight"], new, old=before)
        assert sum(max(0, event.self_cpu_memory_usage) for event in seen.key_averages()) == 0


def test_float16_and_mixed_invariant_rows_go_one_by_one_through_the_reference():
    t = layer((7, 20, 45), torch.float16)
    groups, rows = masks(2, 20, 45), [0, 3, 7]
    y = rk.grouped_masked_linear(t["x"], t["weight"], groups, rows, t["bias"], invariant=True)
    assert torch.equal(y, reference.grouped_masked_linear(t["x"], t["weight"], groups, t["bias"], rows, True))
    mixed = rk.grouped_masked_linear(t["x"].float(), t["weight"], groups, rows, t["bias"], invariant=True)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed[4:5], rk.grouped_masked_linear(
        t["x"][4:5].float(), t["weight"], [None], [0, 1], t["bias"], invariant=True))  # fmt: skip
