"""The Triton kernels on a GPU: accuracy at odd and CLIP's shapes, determinism, CUDA graphs, large indices."""

import contextlib
import itertools

import helpers
import pytest
import torch
from helpers import THRESHOLD, assert_no_worse, assert_same_dropout, layer, shape_id

import rmt_kernels as rk
from rmt_kernels import reference

pytestmark = pytest.mark.gpu

# ViT-B/32 attention, MLP, a batch of ViT-B/16, and a 14 x 14 patch embedding, whose rows are not 16-byte aligned.
CLIP = [(50, 2304, 768), (1600, 768, 3072), (6304, 768, 768), (512, 1024, 588)]
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# fp32 sums of tensor cores are truncated, not rounded, at every step, and cuBLAS may take fewer steps by splitting K.
TENSOR_CORE_FACTOR = 4.0
for_shapes = pytest.mark.parametrize("shape", [*helpers.SHAPES, *CLIP], ids=shape_id)


@pytest.fixture(autouse=True)
def triton_backend():
    with rk.use_backend("triton"), allow_tf32(False):
        yield


@contextlib.contextmanager
def allow_tf32(allowed):
    # No monkeypatch: it cannot put this property back.
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=PRECISIONS)
def precision(request):
    with allow_tf32(request.param == "tf32"):
        yield request.param


def inputs(shape, precision="fp32"):
    """`helpers.layer` on the GPU. For tf32 the values have 10 bits, so that hardware has nothing to round or cut."""
    t = layer(shape, PRECISIONS[precision], "cuda")
    if precision == "tf32":
        for name in ("x", "weight", "g_task", "g_general"):
            t[name] = (t[name].view(torch.int32) & ~0x1FFF).view(torch.float32)
    return t


def exact(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def factor(precision):
    return TENSOR_CORE_FACTOR if precision == "tf32" else 2.0


@for_shapes
def test_linear_matches_reference(shape, precision):
    t = inputs(shape, precision)
    args = (t["x"], t["weight"], t["bits"], t["bias"])
    truth = reference.masked_linear(*exact(*args), None)
    assert_no_worse(rk.masked_linear(*args), reference.masked_linear(*args, None), truth, factor(precision))
    args = (t["g_task"], t["weight"], t["bits"])
    truth = reference.masked_linear_dx(*exact(*args), None)
    assert_no_worse(rk.masked_linear_dx(*args), reference.masked_linear_dx(*args, None), truth, factor(precision))


@pytest.mark.parametrize("x_dtype, weight_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_linear_mixes_dtypes_and_takes_strides(x_dtype, weight_dtype):
    t = layer((600, 768, 640), x_dtype, "cuda")
    t["weight"] = t["weight"].to(weight_dtype).T.contiguous().T
    t["x"] = torch.cat([t["x"], t["x"]], 1)[:, 5:645]
    args = (t["x"], t["weight"], t["bits"], t["bias"])
    assert_no_worse(
        rk.masked_linear(*args), reference.masked_linear(*args, None), reference.masked_linear(*exact(*args), None)
    )


def grouped(split, n, k, precision):
    """Tensors, bits by group (every third the plain weight) and offsets of a mixed batch."""
    bits = [None if i % 3 == 2 else layer((1, n, k), device="cuda", seed=i)["bits"] for i in range(len(split))]
    return inputs((sum(split), n, k), precision), bits, [0, *itertools.accumulate(split)]


@pytest.mark.parametrize("k", [768, 772])
@pytest.mark.parametrize("split", [[7], [0, 40, 0, 3, 1], [1, 2, 300, 900], [16] * 32], ids=lambda s: f"{len(s)}-tasks")
def test_grouped_matches_reference(split, precision, k):
    t, bits, offsets = grouped(split, 768, k, precision)
    args = (t["x"], t["weight"], bits, t["bias"], offsets, False)
    got = rk.grouped_masked_linear(t["x"], t["weight"], bits, offsets, t["bias"])
    truth = reference.grouped_masked_linear(*exact(*args[:2]), bits, t["bias"].double(), offsets, False)
    assert_no_worse(got, reference.grouped_masked_linear(*args), truth, factor(precision))
    for words, i, j in zip(bits, offsets, offsets[1:]):
        words = torch.full_like(t["bits"], -1) if words is None else words
        assert torch.equal(got[i:j], rk.masked_linear(t["x"][i:j], t["weight"], words, t["bias"]))


def test_an_invariant_row_depends_on_its_mask_alone(precision):
    t, bits, offsets = grouped([1, 2, 300, 900], 768, 772, precision)
    whole = rk.grouped_masked_linear(t["x"], t["weight"], bits, offsets, t["bias"], invariant=True)
    for words, i, j in zip(bits, offsets, offsets[1:]):
        for rows in {min(rows, j - i) for rows in (1, 2, 17, 64, j - i)}:
            x = t["x"][i : i + rows]
            part = rk.grouped_masked_linear(x, t["weight"], [words], [0, rows], t["bias"], invariant=True)
            assert torch.equal(part, whole[i : i + rows])


@for_shapes
def test_masked_weight_in_place(shape):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        t, other = layer(shape, dtype, "cuda"), layer(shape, device="cuda", seed=1)["bits"]
        other[:, ::2] = t["bits"][:, ::2]
        want, out = reference.masked_weight(t["weight"], t["bits"]), torch.full_like(t["weight"], 7)
        rk.masked_weight_(out, t["weight"], t["bits"])
        assert torch.equal(out, want)
        equal = torch.repeat_interleave(t["bits"] == other, 32, 1)[:, : shape[2]]
        out = torch.where(equal, 7, reference.masked_weight(t["weight"], other))
        rk.masked_weight_(out, t["weight"], t["bits"], old=other)
        assert torch.equal(out, torch.where(equal, 7, want)), "words that differ, and no others, are written"


@for_shapes
def test_mask_grad_matches_reference(shape, precision):
    t = inputs(shape, precision)
    d = dict(zip(t, exact(*t.values())))
    a = reference.mask_grad(d["x"], d["g_task"], None, d["weight"], d["scores"], d["penalty"], None, 1.0, 0)
    one = rk.mask_grad(t["x"], t["g_task"], None, t["weight"], t["scores"], penalty=t["penalty"])
    plain = product(t["g_task"].T, t["x"]) * t["weight"].float() + t["penalty"] * t["scores"]
    assert_no_worse(one, plain, a, 2.0 if precision == "fp32" else TENSOR_CORE_FACTOR)


@for_shapes
def test_gradient_dropout_follows_the_products(shape, precision):
    """Small integers, whose sums are exact in fp32: the rounding of a long sum alone moves P by more than 1e-4."""
    t = inputs(shape, precision)
    for name in ("x", "g_task", "g_general"):
        t[name] = t[name].round().clamp(-2, 2)
    d = dict(zip(t, exact(*t.values())))
    a = reference.mask_grad(d["x"], d["g_task"], None, d["weight"], d["scores"], d["penalty"], None, 1.0, 0)
    b = reference.mask_grad(d["x"], d["g_general"], None, d["weight"], None, None, None, 1.0, 0)
    kwargs = {"penalty": t["penalty"], "rng": t["rng"], "strength": 0.7, "stream": 3}
    got = rk.mask_grad(t["x"], t["g_task"], t["g_general"], t["weight"], t["scores"], **kwargs)
    assert_same_dropout(got, a, b, reference.philox_uniform(t["rng"], 3, a.shape), 0.7)


def product(a, b):
    """torch's product of `a` and `b` on the units that a kernel of this dtype uses, in fp32."""
    half = a.dtype != torch.float32
    return torch.mm(a, b, out_dtype=torch.float32) if half and b.shape[0] > 0 else a.float() @ b.float()


@for_shapes
def test_gradient_dropout_matches_reference(shape):
    t = inputs(shape)
    grads = [layer(shape, device="cuda", seed=i)["weight"] for i in (1, 2)]
    a, b, weight, scores, penalty = exact(*grads, t["weight"], t["scores"], t["penalty"])
    got = rk.gradient_dropout(*grads, t["weight"], t["scores"], penalty=t["penalty"], rng=t["rng"], stream=7)
    uniform = reference.philox_uniform(t["rng"], 7, a.shape)
    assert_same_dropout(got, a * weight + penalty * scores, b * weight, uniform, 1.0)


@pytest.mark.parametrize("k", [768, 771])
def test_draw_is_the_references_bit_for_bit(k):
    """Gradients 1 and 1 - 1 / c are kept with probability c: 19 levels of c bracket every uniform."""
    rng, ones = rk.rng_state(-5, 2**33 + 1, "cuda"), torch.ones(64, k, device="cuda")
    uniform = reference.philox_uniform(rng, 11, (64, k))
    for c in torch.linspace(0.05, 0.95, 19).tolist():
        b = torch.full_like(ones, 1 - 1 / c)
        kept = rk.gradient_dropout(ones, b, rng=rng, stream=11) > 0
        probability = reference.keep_probability(ones.double(), b.double())
        clear = (probability - uniform).abs() > 1e-6
        assert torch.equal(kept[clear], (probability > uniform)[clear])


@for_shapes
def test_bits_are_exact(shape):
    t = inputs(shape)
    t["scores"].view(-1)[::3] = THRESHOLD
    for scores in (t["scores"], t["scores"].half(), t["scores"].bfloat16(), t["scores"].T.contiguous().T):
        assert torch.equal(rk.pack_scores(scores, THRESHOLD), reference.pack_scores(scores, THRESHOLD))
    t["weight"].view(-1)[::5] = float("inf")
    for weight in (t["weight"], t["weight"].half(), t["weight"].bfloat16()):
        assert torch.equal(rk.masked_weight(weight, t["bits"]), reference.masked_weight(weight, t["bits"]))


def update_state(shapes, dtype=torch.float32, dense_dtype=torch.bfloat16):
    layers = [layer(shape, device="cuda", seed=i) for i, shape in enumerate(shapes)]
    scores = [t["scores"].to(dtype, copy=True) for t in layers]
    weights = [t["weight"].to(dense_dtype) for t in layers]
    dense = [reference.masked_weight(w, t["bits"]) for w, t in zip(weights, layers)]
    grads = [layer(shape, device="cuda", seed=99)["weight"].to(dtype) * 1e-2 for shape in shapes]
    m, v = ([torch.full_like(s, value) for s in scores] for value in (1e-3, 1e-6))
    return scores, [t["bits"].clone() for t in layers], m, v, dense, grads, weights


def test_mask_update_matches_reference():
    shapes = [*helpers.SHAPES, *CLIP]
    got, plain, truth = update_state(shapes), update_state(shapes), update_state(shapes, torch.float64)
    factors = reference.adam_factors(torch.tensor(3, device="cuda"), 4e-3, 0.9, 0.999)
    scores, bits, m, v, dense, grads, weights = got
    rk.mask_update_(scores, bits, m, v, grads, factors, dense=dense, weights=weights)
    reference.mask_update_(*plain, factors, 0.9, 0.999, 1e-8, THRESHOLD)
    reference.mask_update_(*truth, factors.double(), 0.9, 0.999, 1e-8, THRESHOLD)
    for part in (0, 2, 3):
        for triple in zip(got[part], plain[part], truth[part]):
            assert_no_worse(*triple)
    for i, s in enumerate(scores):
        assert torch.equal(bits[i], reference.pack_scores(s, THRESHOLD))
        assert torch.equal(dense[i], reference.masked_weight(weights[i], bits[i]))


# --- the same every time ----------------------------------------------------------------------------------------------


def test_runs_agree_bitwise(precision):
    t = inputs((1600, 768, 768), precision)
    offsets, bits = [0, 300, 1600], [t["bits"], ~t["bits"]]
    kwargs = {"penalty": t["penalty"], "rng": t["rng"], "strength": 0.5, "stream": 1}
    calls = (
        lambda: rk.masked_linear(t["x"], t["weight"], t["bits"], t["bias"]),
        lambda: rk.masked_linear_dx(t["g_task"], t["weight"], t["bits"]),
        lambda: rk.grouped_masked_linear(t["x"], t["weight"], bits, offsets),
        lambda: rk.mask_grad(t["x"], t["g_task"], t["g_general"], t["weight"], t["scores"], **kwargs),
    )
    for call in calls:
        first = call()
        for _ in range(50):
            assert torch.equal(call(), first)


def test_masking_in_the_kernel_equals_masking_before_it(precision):
    """Bitwise, many times: a masked operand that is overwritten while the tensor cores read it would show here."""
    t = inputs((1600, 768, 768), precision)
    masked, all_on = reference.masked_weight(t["weight"], t["bits"]), torch.full_like(t["bits"], -1)
    for _ in range(200):
        assert torch.equal(rk.masked_linear(t["x"], t["weight"], t["bits"]), rk.masked_linear(t["x"], masked, all_on))
        dx = rk.masked_linear_dx(t["g_task"], t["weight"], t["bits"])
        assert torch.equal(dx, rk.masked_linear_dx(t["g_task"], masked, all_on))


def test_tf32_is_used_where_torch_allows_it():
    t = inputs((1600, 768, 768))
    ieee = rk.masked_linear(t["x"], t["weight"], t["bits"])
    with allow_tf32(True):
        tf32 = rk.masked_linear(t["x"], t["weight"], t["bits"])
    assert not torch.equal(ieee, tf32)
    assert (ieee - tf32).abs().max() < 1e-2 * ieee.abs().max()


def test_nothing_waits_for_the_device():
    t = inputs((600, 768, 768), "bf16")
    offsets, bits, out = [0, 300, 301, 600], [t["bits"], None, t["bits"]], torch.empty_like(t["weight"])
    scores, packed, m, v, dense, grads, weights = update_state([(1, 768, 768)])
    factors = torch.ones(2, device="cuda")

    def step():
        rk.grouped_masked_linear(t["x"], t["weight"], bits, offsets)
        rk.grouped_masked_linear(t["x"], t["weight"], bits, offsets, invariant=True)
        rk.masked_weight_(out, t["weight"], t["bits"])
        rk.mask_grad(t["x"], t["g_task"], t["g_general"], t["weight"], t["scores"], penalty=t["penalty"], rng=t["rng"])
        rk.mask_update_(scores, packed, m, v, grads, factors, dense=dense, weights=weights)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_draws_anew():
    t = inputs((600, 768, 768), "bf16")
    args = (t["x"], t["g_task"], t["g_general"], t["weight"], t["scores"])

    def step():
        return rk.mask_grad(*args, penalty=t["penalty"], rng=t["rng"], stream=2)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    results = []
    for number in (1, 2, 1):
        t["rng"].copy_(rk.rng_state(77, number, "cuda"))
        graph.replay()
        assert torch.equal(captured, step())
        results.append(captured.clone())
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


# --- more than 2^31 elements ------------------------------------------------------------------------------------------


def need_memory(gib):
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


def test_rows_beyond_2_to_the_31(monkeypatch):
    need_memory(16)
    monkeypatch.undo()  # poisoning would only write these gigabytes twice
    m, n, k = 2**21 + 3, 64, 1024
    t = layer((1, n, k), torch.float16, "cuda")
    x = torch.zeros(m, k, dtype=torch.float16, device="cuda")
    x[-100:] = layer((100, n, k), torch.float16, "cuda")["x"]
    y = rk.masked_linear(x, t["weight"], t["bits"])
    assert torch.equal(y[-100:], rk.masked_linear(torch.cat([x[-100:]] * 6), t["weight"], t["bits"])[:100])
    assert not y[:-100].any()


def test_weights_beyond_2_to_the_31(monkeypatch):
    need_memory(40)
    monkeypatch.undo()
    n, k = 2**17 + 5, 2**14 + 32
    weight = torch.zeros(n, k, dtype=torch.float16, device="cuda")
    weight[-3:] = torch.randn(3, k, device="cuda").half()
    bits = rk.pack_scores(weight, 0.1)
    assert torch.equal(bits[-3:], reference.pack_scores(weight[-3:], 0.1)) and not bits[:-3].any()
    masked = rk.masked_weight(weight, bits)
    assert torch.equal(masked[-3:], reference.masked_weight(weight[-3:], bits[-3:]))
    y = rk.masked_linear(torch.ones(1, k, dtype=torch.float16, device="cuda"), weight, bits)
    want = masked[-3:].double().sum(1)
    assert ((y[0, -3:].double() - want).abs() <= 1e-3 * want.abs() + 0.5).all() and not y[0, :-3].any()
