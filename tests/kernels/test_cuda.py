"""The CUDA C++ kernels against the reference: on a GPU, and, at small sizes, in the CPU emulator of cuda_on_cpu.

The emulator runs the kernels' own source (csrc/cuda/*.cu), so these tests mean something without a GPU too.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import SHAPES, THRESHOLD, assert_no_worse, assert_same_dropout, layer, need_gpu, shape_id
from kernels import sanitizer_driver
from kernels.cuda_checks import check_product, cuda_backend, inside, layouts, twice, unchanged

import rmt_kernels as rk
from rmt.config import TrainConfig
from rmt_kernels import backends, reference
from rmt_kernels.backends import cuda, dispatch, native

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
HALVES = FLOATS[1:]
CLIP_SHAPES = [(1, 768, 768), (16, 2304, 768), (50, 3072, 768), (64, 768, 3072)]
gpu = pytest.mark.gpu


# --- bits and masked weight -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 1024), (1, 9, 2500)], ids=shape_id)
def test_bits(device, shape, dtype):
    scores = layer(shape, device=device)["scores"].to(dtype)
    threshold = float(scores.flatten()[0])  # a score equal to the threshold is off
    want = reference.pack_scores(scores, threshold)
    mask = scores.float() > threshold
    for view in layouts(scores):
        assert torch.equal(cuda.pack_scores(view, threshold), want)
    for view in layouts(mask):
        with unchanged(mask):
            assert torch.equal(cuda.pack_bits(view), want)
    assert torch.equal(cuda.unpack_bits(want, shape[2]), mask)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 11, 256)], ids=shape_id)
def test_masked_weight(device, shape, dtype):
    t = layer(shape, device=device)
    weight, mask = t["weight"].to(dtype), reference.unpack_bits(t["bits"], shape[2])
    weight[~mask] = (
        torch.tensor([float("nan"), float("inf"), -1.0], dtype=dtype)
        .repeat(weight.numel())[: int((~mask).sum())]
        .to(device)
    )
    want = reference.masked_weight(weight, t["bits"])
    assert not want.isnan().any()
    for view in layouts(weight):
        got = cuda.masked_weight(view, t["bits"])
        assert got.is_contiguous() and torch.equal(got, want)
        assert not got[~mask].signbit().any(), "off elements are +0"


@gpu
def test_more_than_2_31_elements():
    device = need_gpu()
    n, k = 70000, 32769
    scores = torch.zeros(n, k, dtype=torch.float16, device=device)
    scores[-1, -40:] = 1
    bits = cuda.pack_scores(scores, 0.5)
    assert torch.equal(bits[-2:], reference.pack_scores(scores[-2:], 0.5)) and int(bits[:-1].count_nonzero()) == 0
    assert torch.equal(cuda.unpack_bits(bits, k)[-1], scores[-1] > 0.5)
    weight = scores.fill_(2)
    masked = cuda.masked_weight(weight, bits)
    assert int(masked.count_nonzero()) == 40 and bool((masked[-1, -40:] == 2).all())


# --- gradient dropout and update --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("general", [True, False], ids=["two", "one"])
@pytest.mark.parametrize("penalty", [True, False], ids=["l2", "plain"])
@pytest.mark.parametrize("dtype", [None, *FLOATS], ids=str)
def test_gradient_dropout_is_the_reference_bit_for_bit(device, dtype, penalty, general, strength):
    for shape in ((1, 1, 1), (17, 40, 197), (16, 32, 64)):
        t = layer(shape)
        ga, gb = t["g_task"].T @ t["x"], t["g_general"].T @ t["x"]
        weight = None if dtype is None else t["weight"].to(dtype)
        l2 = (t["scores"], t["penalty"]) if penalty else (None, None)
        args = (ga, gb if general else None, weight, *l2, t["rng"] if general else None)
        want = reference.gradient_dropout(*args, strength, 5)
        for move in (lambda x: x, lambda x: inside(x) if x.dim() == 2 else x):
            there = [None if a is None else move(a.to(device)) for a in args]
            with unchanged(*there):
                got = twice(lambda there=there: cuda.gradient_dropout(*there, strength, 5))
            assert got.dtype == torch.float32 and torch.equal(got.cpu(), want)


def test_layers_draw_apart(device):
    ones = torch.ones(8, 32, device=device)
    args = (ones, -2 * ones, None, None, None, rk.rng_state(1, 2, device), 1.0)
    assert not torch.equal(cuda.gradient_dropout(*args, 0), cuda.gradient_dropout(*args, 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_mask_grad(device, shape, dtype):
    t = layer(shape, dtype, device)
    args = (t["x"], t["g_task"], t["g_general"], t["weight"], t["scores"], t["penalty"], t["rng"])
    got = twice(lambda: cuda.mask_grad(*args, 1.0, 3))
    x, g_task, g_general, weight, scores, penalty, _ = (a.double() for a in args)
    a = (g_task.T @ x) * weight + penalty * scores
    uniform = reference.philox_uniform(t["rng"], 3, weight.shape).double()
    assert_same_dropout(got, a, (g_general.T @ x) * weight, uniform, 1.0)
    one = cuda.mask_grad(t["x"], t["g_task"], None, t["weight"], None, None, None, 1.0, 0)
    plain = reference.mask_grad(t["x"], t["g_task"], None, t["weight"], None, None, None, 1.0, 0)
    assert_no_worse(one, plain, (g_task.T @ x) * weight)


@gpu
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_weight_gradients_of_16_bit_factors_are_not_rounded(shape, dtype, accumulate):
    t = layer(shape, dtype, need_gpu())
    g, x, start = t["g_task"], t["x"], t["scores"]
    got, plain = (start.clone() if accumulate else torch.full_like(start, float("nan")) for _ in range(2))
    cuda.weight_grad_(got, g, x, accumulate)
    reference.weight_grad_(plain, g, x, accumulate)
    truth = g.double().T @ x.double() + (start.double() if accumulate else 0)
    assert_no_worse(got, plain, truth, scale=g.double().abs().T @ x.double().abs() + start.double().abs())


def test_weight_gradients_of_16_bit_factors_are_added_by_hand_where_torch_does_not(monkeypatch):
    """torch 2.8 and 2.9: addmm refuses a sum that is wider than the factors."""
    t = layer((50, 48, 64), torch.bfloat16)
    got, plain = t["scores"].clone(), t["scores"].clone()
    reference.weight_grad_(plain, t["g_task"], t["x"], True)
    monkeypatch.setattr(cuda, "_ADDS_WIDER", False)
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: pytest.fail("asked torch to add"))
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    cuda.weight_grad_(got, t["g_task"], t["x"], True)
    torch.testing.assert_close(got, plain)


def test_mask_update_leaves_pad_bits_off(device):
    t = layer((1, 3, 40), device=device)
    zeros, bits = [torch.zeros_like(t["scores"]) for _ in range(3)], t["bits"].clone()
    factors = reference.adam_factors(torch.tensor(1, device=device), 0.0, 0.9, 0.999)
    rest = (factors, 0.9, 0.999, 1e-8, -1.0)  # every score is above it, and so would be the zeros past K
    cuda.mask_update_([t["scores"]], [bits], [zeros[0]], [zeros[1]], [], [zeros[2]], [], *rest)
    assert torch.equal(bits, reference.pack_scores(t["scores"], -1.0)) and (bits[:, 0] == -1).all()


@pytest.mark.parametrize("dtype", [None, *FLOATS], ids=str)
def test_mask_update(device, dtype):
    shapes = [shape for shape in SHAPES if shape[0]] + [(1, 130, 64), (1, 3, 1000)]
    layers = [layer(shape, device=device, seed=i) for i, shape in enumerate(shapes)]
    scores, grads = [t["scores"] for t in layers], [t["weight"] * 1e-3 for t in layers]
    weights = [] if dtype is None else [t["weight"].to(dtype) for t in layers]
    bits = [reference.pack_scores(s, THRESHOLD) for s in scores]
    dense = [reference.masked_weight(w, b) for w, b in zip(weights, bits)]
    first, second = [torch.zeros_like(s) for s in scores], [torch.zeros_like(s) for s in scores]
    plain = [[x.clone() for x in group] for group in (scores, bits, first, second)]
    truth = [[x.double() if x.is_floating_point() else x.clone() for x in group] for group in plain]
    before = [b.clone() for b in bits]
    for step in (1, 2, 3):
        factors = reference.adam_factors(torch.tensor(step, device=device), 4e-3, 0.9, 0.999)
        rest = (factors, 0.9, 0.999, 1e-8, THRESHOLD)
        with unchanged(*grads, *weights, factors):
            cuda.mask_update_(scores, bits, first, second, dense, grads, weights, *rest)
        reference.mask_update_(*plain, [], grads, [], *rest)
        reference.mask_update_(*truth, [], [g.double() for g in grads], [], *rest)
        for got, near, exact in zip((scores, first, second), (plain[0], *plain[2:]), (truth[0], *truth[2:])):
            for i in range(len(layers)):
                assert_no_worse(got[i], near[i], exact[i])
        for i in range(len(layers)):
            assert torch.equal(bits[i], reference.pack_scores(scores[i], THRESHOLD))
            if weights:
                assert torch.equal(dense[i], reference.masked_weight(weights[i], bits[i]))
    assert any(not torch.equal(b, old) for b, old in zip(bits, before)), "the data must flip bits"


def test_mask_update_of_more_layers_than_one_launch_takes(device):
    count = 600
    tiny = [layer((1, 2, 33), device=device, seed=i) for i in range(count)]
    scores, grads = [t["scores"] for t in tiny], [t["weight"] for t in tiny]
    bits = [t["bits"].clone() for t in tiny]
    zeros = [[torch.zeros_like(s) for s in scores] for _ in range(2)]
    want = [[x.clone() for x in group] for group in (scores, bits, *zeros)]
    factors = reference.adam_factors(torch.tensor(1, device=device), 1e-2, 0.9, 0.999)
    rest = ([], grads, [], factors, 0.9, 0.999, 1e-8, THRESHOLD)
    cuda.mask_update_(scores, bits, *zeros, *rest)
    reference.mask_update_(*want, *rest)
    for s, w, b in zip(scores, want[0], bits):
        assert torch.allclose(s, w, atol=1e-7, rtol=1e-5)
        assert torch.equal(b, reference.pack_scores(s, THRESHOLD))


# --- products ---------------------------------------------------------------------------------------------------------


SMALL = [shape for shape in SHAPES if shape[0]] + [(33, 20, 256), (64, 17, 72)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=shape_id)
def test_masked_linear_small(device, shape, dtype):
    t = layer(shape, dtype, device)
    x, weight, bits = t["x"], t["weight"], t["bits"]
    check_product(lambda: cuda.masked_linear(x, weight, bits, t["bias"], None), x, weight, bits, t["bias"])
    for x_view, weight_view in zip(layouts(x), layouts(weight)):
        got = cuda.masked_linear(x_view, weight_view, bits, None, None)
        assert torch.equal(got, cuda.masked_linear(x, weight, bits, None, None)), (
            "a view must not change the sum's order"
        )
    batch = x[None, :, None]
    assert cuda.masked_linear(batch, weight, bits, None, None).shape == (1, shape[0], 1, shape[1])


@gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", CLIP_SHAPES, ids=shape_id)
def test_masked_linear_small_at_clip_shapes(shape, dtype):
    t = layer(shape, dtype, need_gpu())
    call = lambda: cuda.masked_linear(t["x"], t["weight"], t["bits"], t["bias"], None)  # noqa: E731
    check_product(call, t["x"], t["weight"], t["bits"], t["bias"])


def test_no_rows(device):
    t = layer((0, 5, 33), device=device)
    assert cuda.masked_linear(t["x"], t["weight"], t["bits"], t["bias"], None).shape == (0, 5)


GEMM_SHAPES = [(1, 1, 8), (70, 130, 72), (300, 48, 200), (129, 257, 600)]


@pytest.mark.parametrize("tile", ["wide", "narrow"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", GEMM_SHAPES, ids=shape_id)
def test_masked_gemm(device, shape, dtype, tile, monkeypatch):
    """The wgmma kernel: near the truth, and bitwise itself on a weight that is masked already."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma needs compute capability 9.0")
    monkeypatch.setenv("RMT_EMULATED_SMS", "1" if tile == "wide" else "1000")  # a GPU has its own number
    t = layer(shape, dtype, device)
    x, weight, bits, bias = t["x"], t["weight"], t["bits"], t["bias"]
    got = check_product(lambda: cuda.masked_gemm(x, weight, bits, bias), x, weight, bits, bias)
    assert torch.equal(got, cuda.masked_gemm(x, reference.masked_weight(weight, bits), None, bias))
    assert torch.equal(got, cuda.masked_gemm(inside(x), inside(weight), bits, bias))


@gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(65, 768, 768), (1600, 2304, 768), (6304, 3072, 1024)], ids=shape_id)
def test_wgmma_hazard_gate(shape, dtype):
    """Integers sum exactly in any order: a register overwritten in flight in one of 10,000 runs shows."""
    device = need_gpu()
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma needs compute capability 9.0")
    m, n, k = shape
    generator = torch.Generator(device).manual_seed(0)
    for run in range(40):
        x = torch.randint(-4, 5, (m, k), device=device, generator=generator).to(dtype)
        weight = torch.randint(-4, 5, (n, k), device=device, generator=generator).to(dtype)
        bits = cuda.pack_bits(torch.rand(n, k, device=device, generator=generator) < (0.05, 0.5, 0.95)[run % 3])
        dense = reference.masked_weight(weight, bits)
        want = (x.float() @ dense.float().T).to(dtype)
        assert torch.equal(cuda.masked_gemm(x, dense, None, None), want)
        bad = torch.zeros((), dtype=torch.bool, device=device)
        for _ in range(250):
            bad |= (cuda.masked_gemm(x, weight, bits, None) != want).any()
        assert not bad


def test_masked_linear_dx_and_large_products(device):
    t = layer((100, 24, 40), device=device)
    dense = reference.masked_weight(t["weight"], t["bits"])
    for ready in (None, dense):
        got = cuda.masked_linear_dx(t["g_task"], t["weight"], t["bits"], ready)
        assert torch.equal(got, reference.masked_linear_dx(t["g_task"], t["weight"], t["bits"], dense))
    y = cuda.masked_linear(t["x"], t["weight"], t["bits"], t["bias"], dense)
    assert torch.equal(y, reference.masked_linear(t["x"], t["weight"], t["bits"], t["bias"], dense))


# --- the backend ------------------------------------------------------------------------------------------------------


def test_says_why_not(monkeypatch):
    monkeypatch.setattr(cuda, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(cuda, "build_info", lambda: {"cuda": {"archs": ["code=sm_90a"]}})
    assert cuda.unavailable("cpu") == "CUDA kernels only"
    t = layer((100, 9, 33))
    x, weight, bits = t["x"], t["weight"], t["bits"]
    wide, half = x.double(), [v.half() for v in (x, weight)]
    assert cuda.lacks("masked_weight", (weight.double(), bits)) is None
    assert cuda.lacks("masked_linear", (x[:64], weight, bits, None, None)) is None
    assert cuda.lacks("masked_linear", (x, weight, bits, None, weight)) is None
    # Autocast: x and the kept masked weight in 16 bits, the weight itself in 32.
    assert cuda.lacks("masked_linear", (half[0], weight, bits, None, half[1])) is None
    assert cuda.lacks("masked_linear", (half[0][:, :32], half[1][:, :32], bits[:, :1], None, None)) is None
    for args, word in [
        ((wide, weight.double(), bits, None, None), "float64"),
        ((half[0], weight, bits, None, None), "one dtype"),
        ((x, weight, bits, None, None), "fp16 or bf16"),
        ((*half, bits, None, None), "multiple of 8"),
    ]:
        assert word in cuda.lacks("masked_linear", args)
    update = ([weight], [bits], [weight], [weight], [half[1]], [weight], [weight])
    assert "differ in dtype" in cuda.lacks("mask_update_", update)
    mixed = [weight, half[1]]
    assert "several dtypes" in cuda.lacks("mask_update_", (*update[:4], mixed, [weight], mixed))
    assert "fp32 scores" in cuda.lacks("mask_update_", ([half[1]], *update[1:]))
    codes = [torch.zeros(weight.shape, dtype=torch.uint8)]
    assert "moments in torch.float32, torch.uint8" in cuda.lacks("mask_update_", (*update[:3], codes, [], *update[5:]))
    ragged = ([weight[:, :33]], [bits], codes, codes, [], [weight[:, :33]], [])
    assert "multiple of 32" in cuda.lacks("mask_update_", ragged)
    monkeypatch.setattr(cuda, "build_info", lambda: {"cuda": {"archs": ["code=sm_90"]}})
    assert "not built for sm_90a" in cuda.lacks("masked_linear", (*half, bits, None, None))
    monkeypatch.setattr(cuda, "_capability", lambda index: (8, 0))
    assert "9.0" in cuda.lacks("masked_linear", (*half, bits, None, None))
    monkeypatch.setattr(cuda, "_capability", lambda index: (7, 5))
    assert "8.0" in cuda.lacks("pack_scores", (weight, 0.5))


def test_the_sanitizers_see_every_kernel_and_their_driver_checks_results(device, monkeypatch):
    launched, updates, launch = set(), set(), cuda._launch

    def noted(name, *args):
        launched.add(f"cuda_{name}")
        if name == "mask_update":  # generals, format of the moments, sums over a block
            updates.add((bool(args[8]), args[15], bool(args[22])))
        return launch(name, *args)

    monkeypatch.setattr(cuda, "_launch", noted)
    monkeypatch.setattr(dispatch, "row", sanitizer_driver.from_bits)
    assert sanitizer_driver.run("cuda", cuda, device) == []
    sizes = {"cuda_fragment_words", "cuda_mask_update_partials"}  # they launch nothing
    bound = {name for name in dir(cuda.extension) if name.startswith("cuda_")} - sizes
    assert launched == bound or (device == "cuda" and not sanitizer_driver.has_wgmma(device))
    assert updates == {(False, native.MOMENTS[torch.float32], False)} | {
        (True, m, True) for m in native.MOMENTS.values()
    }
    ops = {op for op, _ in sanitizer_driver.calls((5, 9, 31), torch.float32)}
    assert set(backends.OPS) <= ops | sanitizer_driver.NO_KERNEL["triton"], "every op of a kernel has a call"
    for name, broken in (("pack_bits", lambda m: reference.pack_bits(~m)), ("mask_update_", lambda *args: None)):
        with monkeypatch.context() as patch:
            patch.setattr(cuda, name, broken)
            assert any(f"cuda.{name} in" in line for line in sanitizer_driver.run("cuda", cuda, device))


def test_import_leaves_cuda_alone():
    code = "import torch, rmt_kernels.backends.cuda as c; c.unavailable('cpu'); assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


@gpu
def test_through_the_public_ops():
    device = need_gpu()
    t = layer((17, 40, 200), torch.bfloat16, device)
    with rk.use_backend("cuda"):
        bits = rk.pack_scores(t["scores"], THRESHOLD)
        assert torch.equal(bits, t["bits"])
        y = rk.masked_linear(t["x"], t["weight"], bits, t["bias"])
        hopper = torch.cuda.get_device_capability()[0] == 9
        large = rk.masked_linear(t["x"].repeat(10, 1), t["weight"], bits, t["bias"]) if hopper else None
        rk.masked_linear_dx(t["g_task"], t["weight"], bits)
        rk.mask_grad(t["x"], t["g_task"], t["g_general"], t["weight"], t["scores"], penalty=t["penalty"], rng=t["rng"])
        assert all(row["backend"] == "cuda" for row in rk.explain() if row["device"] == "cuda")
    truth = reference.masked_linear(t["x"].double(), t["weight"].double(), bits, t["bias"].double(), None)
    plain = reference.masked_linear(t["x"], t["weight"], bits, t["bias"], None)
    assert_no_worse(y, plain, truth)
    if hopper:
        assert_no_worse(large, plain.repeat(10, 1), truth.repeat(10, 1))


@gpu
def test_in_a_graph_with_a_new_step():
    """Replays read rng, penalty and factors anew: each equals the eager call with that state."""
    device = need_gpu()
    t = layer((40, 64, 200), torch.bfloat16, device)
    scores, bits = t["scores"], t["bits"].clone()
    first, second = torch.zeros_like(scores), torch.zeros_like(scores)
    dense, factors = reference.masked_weight(t["weight"], bits), torch.ones(2, device=device)
    state = (scores, bits, first, second, dense)
    start = [s.clone() for s in state]

    def step():
        y = cuda.masked_linear(t["x"], t["weight"], bits, t["bias"], None)
        args = (t["x"], t["g_task"], t["g_general"], t["weight"], scores, t["penalty"], t["rng"], 1.0, 2)
        grad = cuda.mask_grad(*args)
        cuda.mask_update_(*([s] for s in state), [grad], [t["weight"]], factors, 0.9, 0.999, 1e-8, THRESHOLD)
        return y, grad

    def restore():
        for s, value in zip(state, start):
            s.copy_(value)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = []
    for number in range(1, 4):
        t["rng"].copy_(torch.tensor([99, number]))
        factors.copy_(reference.adam_factors(torch.tensor(number), 1e-3, 0.9, 0.999))
        t["penalty"].fill_(1e-4 * number)
        before = [s.clone() for s in state]
        graph.replay()
        replayed = [s.clone() for s in (*captured, *state)]
        for s, value in zip(state, before):
            s.copy_(value)
        eager = [*step(), *state]
        assert all(torch.equal(a, b) for a, b in zip(replayed, eager))
        seen.append(replayed[1])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_steps_ask_for_nothing_that_cuda_lacks(precision, request, monkeypatch):
    """Forced, as by RMT_BACKEND=cuda: what is lacking raises. Under autocast x and the weight are of two dtypes."""
    pytest.importorskip("open_clip")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "rmt")
    from test_train import RATES, scores, tuned

    cuda_backend("emulator", request, monkeypatch)
    monkeypatch.setitem(backends.ORDER, "cpu", ("cuda", "reference"))
    monkeypatch.setattr(cuda, "unavailable", lambda device: None if device == "cpu" else "emulated")
    monkeypatch.setattr(cuda, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(cuda, "weight_grad_", reference.weight_grad_)  # torch's product, which its CPU has not
    config = TrainConfig(strength=1.0, precision=precision)
    want = scores(tuned(config, RATES[:2], partly_off=True)[0])
    with rk.use_backend("cuda"):
        got = scores(tuned(config, RATES[:2], partly_off=True)[0])
        assert {backends.last(op, "cpu") for op in ("masked_linear", "mask_update_", "masked_linear_dx")} == {"cuda"}
    assert ((got - want).abs() < 1e-6).float().mean() > 0.99
