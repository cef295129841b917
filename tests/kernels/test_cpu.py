"""The C++ kernels against the reference and the float64 truth, on every instruction set this processor has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import SHAPES, THRESHOLD, assert_no_worse, assert_same_dropout, layer, shape_id

import rmt_kernels as rk
from rmt_kernels import reference
from rmt_kernels.backends import cpu, dispatch, native

pytestmark = pytest.mark.skipif(native.extension is None, reason=f"no C++ kernels: {native.missing}")
CPU_SHAPES = [*SHAPES, (2, 130, 96), (16, 288, 768)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def on_cpu_backend():
    with rk.use_backend("cpu"):
        yield


@pytest.fixture
def take(monkeypatch):
    """take(path): every product takes that path, whatever the table says of its shape here."""
    row = dispatch.row("cpu", "masked_linear", torch.float32, 1, 1, 1)
    return lambda path: monkeypatch.setattr(dispatch, "row", lambda *key: row._replace(path=path))


@pytest.mark.parametrize("shape", CPU_SHAPES, ids=shape_id)
def test_bits_are_exact(shape):
    t = layer(shape)
    mask = t["scores"] > THRESHOLD
    assert torch.equal(rk.pack_bits(mask), t["bits"])
    assert torch.equal(rk.pack_scores(t["scores"], THRESHOLD), t["bits"])
    assert torch.equal(rk.pack_scores(t["scores"].T, THRESHOLD), reference.pack_bits(mask.T))
    assert torch.equal(rk.unpack_bits(t["bits"], shape[2]), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_weight_is_exact_and_off_is_plus_zero(dtype):
    t = layer((1, 40, 197), dtype)
    t["weight"][0, 0], t["weight"][0, 1], t["weight"][0, 2] = float("nan"), float("inf"), -1.0
    mask = torch.rand(40, 197) > 0.5
    mask[0, :3] = False
    got = rk.masked_weight(t["weight"], rk.pack_bits(mask))
    assert torch.equal(got[mask], t["weight"][mask])
    assert got[~mask].view(torch.int16 if dtype.itemsize == 2 else torch.int32).eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=shape_id)
@pytest.mark.parametrize("path", dispatch.PATHS)
def test_masked_linear_is_no_worse_than_the_reference(shape, dtype, path, take):
    take(path)
    t, kept = layer(shape, dtype), path == "dense"
    dense = reference.masked_weight(t["weight"], t["bits"])
    plain = reference.masked_linear(t["x"], t["weight"], t["bits"], t["bias"], None)
    truth = t["x"].double() @ dense.double().T + t["bias"].double()
    got = rk.masked_linear(t["x"], t["weight"], t["bits"], t["bias"], dense=dense if kept else None)
    assert_no_worse(got, plain, truth)
    dx = rk.masked_linear_dx(t["g_task"], t["weight"], t["bits"], dense=dense if kept else None)
    assert_no_worse(dx, t["g_task"] @ dense, t["g_task"].double() @ dense.double())


def test_small_products_take_any_strides_and_leading_dimensions(take):
    take("bits")
    t = layer((4, 33, 45))
    wide = torch.randn(4, 90)[:, ::2].copy_(t["x"])
    strided = torch.randn(8, 60)[::2, 5:50].copy_(t["x"])
    want = rk.masked_linear(t["x"], t["weight"], t["bits"])
    for x in (wide, strided, t["x"].T.contiguous().T, t["x"].view(2, 2, 45), t["x"][0]):
        # The same sums in the same order, whatever the layout.
        expected = want[0] if x.dim() == 1 else want.view(*x.shape[:-1], 33)
        assert torch.equal(rk.masked_linear(x, t["weight"], t["bits"]), expected)


@pytest.mark.parametrize("strided", ["stepped", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_take_a_bias_of_any_stride(dtype, strided, take):
    take("bits")
    t = layer((4, 64, 64), dtype)
    bias = torch.randn(128).to(dtype)[::2] if strided == "stepped" else torch.tensor([3.0], dtype=dtype).expand(64)

    def products(bias):
        yield rk.masked_linear(t["x"], t["weight"], t["bits"], bias)
        for invariant in (False, True):
            yield rk.grouped_masked_linear(t["x"], t["weight"], [t["bits"], None], [0, 3, 4], bias, invariant=invariant)

    for got, want in zip(products(bias), products(bias.clone(memory_format=torch.contiguous_format))):
        assert torch.equal(got, want)


def test_float64_is_left_to_the_reference_and_not_forced_upon_these_kernels():
    t = layer((4, 33, 45), torch.float64)
    with pytest.raises(rk.BackendUnavailable, match="float64"):
        rk.masked_linear(t["x"], t["weight"], t["bits"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_equals_each_task_alone_bit_for_bit(dtype):
    t = layer((23, 50, 100), dtype)
    bits = [None, *(rk.pack_bits(torch.rand(50, 100) > 0.1 * i) for i in range(5))]
    offsets = [0, 1, 1, 6, 10, 17, 23]
    got = rk.grouped_masked_linear(t["x"], t["weight"], bits, offsets, t["bias"])
    for words, a, b in zip(bits, offsets, offsets[1:]):
        x = t["x"][a:b]
        alone = (
            F.linear(x, t["weight"], t["bias"]) if words is None else rk.masked_linear(x, t["weight"], words, t["bias"])
        )
        assert torch.equal(got[a:b], alone)


@pytest.mark.parametrize("weight_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=shape_id)
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_gradient_dropout_drops_the_same_elements(shape, weight_dtype, strength):
    _, n, k = shape
    t = layer((4, n, k), weight_dtype or torch.float32)
    torch.manual_seed(0)
    ga, gb = torch.randn(n, k) * 1e-4, torch.randn(n, k) * 1e-4
    weight = None if weight_dtype is None else t["weight"]
    got = rk.gradient_dropout(
        ga, gb, weight, t["scores"], penalty=t["penalty"], rng=t["rng"], strength=strength, stream=3
    )
    w = 1 if weight is None else weight.double()
    a, b = ga.double() * w + t["penalty"].double() * t["scores"].double(), gb.double() * w
    uniform = reference.philox_uniform(t["rng"], 3, (n, k))
    assert_same_dropout(got, a, b, uniform.double(), strength)
    plain = rk.gradient_dropout(ga, None, weight, t["scores"], penalty=t["penalty"])
    by_reference = reference.gradient_dropout(ga, None, weight, t["scores"], t["penalty"], None, strength, 3)
    assert_no_worse(plain, by_reference, a)


def test_draws_equal_the_reference_bit_for_bit():
    for seed, step, stream in ((0, 0, 0), (2**63 - 1, 2**40 + 7, 5), (-3, 1, 2**31)):
        rng = rk.rng_state(seed, step)
        for shape in ((1, 1), (7, 33), (64, 1000)):
            for offset in (0, 4, 2**34 - 4, 2**40):
                got = cpu.philox_uniform(rng, stream, shape, offset)
                assert torch.equal(got, reference.philox_uniform(rng, stream, shape, offset))


@pytest.mark.parametrize("dense_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=shape_id)
def test_update_follows_the_reference(shape, dense_dtype):
    _, n, k = shape
    torch.manual_seed(0)

    scores = [THRESHOLD + torch.randn(n, k) * 1e-3, THRESHOLD + torch.randn(3, 5) * 1e-3]
    weights = [torch.randn_like(s).to(dense_dtype or torch.float32) for s in scores]
    bits = [reference.pack_scores(s, THRESHOLD) for s in scores]
    old_bits = [b.clone() for b in bits]
    m, grads = ([torch.randn_like(s) * 1e-3 for s in scores] for _ in range(2))
    v = [torch.rand_like(s) * 1e-6 for s in scores]
    dense = [] if dense_dtype is None else [reference.masked_weight(w, b) for w, b in zip(weights, bits)]
    factors = rk.adam_factors(torch.tensor(3), 1e-3, 0.9, 0.999)

    def by_reference(dtype):
        copies = [[t.to(dtype, copy=True) for t in group] for group in (scores, m, v)]
        args = ([b.clone() for b in bits], copies[1], copies[2], [], [g.to(dtype) for g in grads], [])
        reference.mask_update_(copies[0], *args, factors.to(dtype), 0.9, 0.999, 1e-8, THRESHOLD)
        return [t for group in copies for t in group]

    plain, truth = by_reference(torch.float32), by_reference(torch.float64)
    rk.mask_update_(scores, bits, m, v, grads, factors, dense=dense, weights=weights if dense else [])
    for got, p, t in zip((*scores, *m, *v), plain, truth):
        assert_no_worse(got, p, t)
    for i, s in enumerate(scores):
        assert torch.equal(bits[i], reference.pack_scores(s, THRESHOLD))
        assert not dense or torch.equal(dense[i], reference.masked_weight(weights[i], bits[i]))
    assert n * k < 1000 or not torch.equal(bits[0], old_bits[0]), "some bits should have flipped"


def test_results_do_not_depend_on_the_number_of_threads(take):
    take("bits")
    t = layer((8, 300, 400))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        grad = rk.gradient_dropout(t["weight"], t["scores"], t["weight"], rng=t["rng"])
        results.append((rk.masked_linear(t["x"], t["weight"], t["bits"], t["bias"]), grad))
    torch.set_num_threads(before)
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(grad, results[0][1])


def test_inputs_are_left_alone():
    t = layer((5, 48, 100))
    before = {name: value.clone() for name, value in t.items()}
    rk.masked_linear(t["x"], t["weight"], t["bits"], t["bias"])
    rk.mask_grad(t["x"], t["g_task"], t["g_general"], t["weight"], t["scores"], penalty=t["penalty"], rng=t["rng"])
    for name, value in t.items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_narrower_instruction_sets_pass_the_same_tests(isa):
    order = ("baseline", "avx2", "avx512", "amx")
    if order.index(isa) >= order.index(cpu.ISA):
        pytest.skip(f"this processor runs {cpu.ISA}: nothing narrower, or nothing else")
    # The largest shapes exercise nothing that ragged and whole words do not.
    small = "not M16 and not M50 and not narrower and not emulator and not drift"
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in ("test_grouped.py", "test_update.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", small, *files]
    done = subprocess.run(command, env=os.environ | {"RMT_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_requested_instruction_set_is_used():
    asked = os.environ.get("RMT_CPU_ISA")
    assert asked is None or asked == cpu.ISA
