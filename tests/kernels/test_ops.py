"""The public functions: what torch.library promises, what autocast and compile do, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import THRESHOLD, assert_no_worse, assert_same_dropout, layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import rmt_kernels as rk
from rmt_kernels import backends, reference

OPS = torch.ops.rmt_kernels
M, N, K = 6, 9, 37


def update_arguments(dense: bool = True, layers: int = 2) -> dict[str, object]:
    """Keyword arguments of `mask_update_` for a few layers of different shapes."""
    shapes = [(N, K), (3, 64), (5, 5)][:layers]
    scores = [THRESHOLD + torch.randn(s) * 1e-3 for s in shapes]
    bits = [reference.pack_scores(s, THRESHOLD) for s in scores]
    weights = [torch.randn(s) for s in shapes] if dense else []
    return {
        "scores": scores,
        "bits": bits,
        "exp_avgs": [torch.zeros(s) for s in shapes],
        "exp_avg_sqs": [torch.zeros(s) for s in shapes],
        "grads": [torch.randn(s) for s in shapes],
        "factors": rk.adam_factors(torch.tensor(1), 1e-3, 0.9, 0.999),
        "dense": [reference.masked_weight(w, b) for w, b in zip(weights, bits)],
        "weights": weights,
    }


def whole_step(u: dict, chained: bool = True) -> dict[str, object]:
    """What `mask_update_` takes beyond ready gradients."""
    return {
        "generals": [g.flip(0) for g in u["grads"]], "chained": [chained] * len(u["scores"]), "scales": [],
        "norms": torch.stack([s.norm() for s in u["scores"]]),
        "counts": torch.zeros(len(u["scores"]), 2, dtype=torch.int64), "rng": rk.rng_state(1, 2), "l2": 1e-4,
        "strength": 0.3, "streams": [0, 5, 9][: len(u["scores"])], "offsets": [512, 0, 2**40][: len(u["scores"])],
    }  # fmt: skip


def narrow(u: dict) -> dict[str, object]:
    """The same layers with 8-bit moments."""
    moments = {name: [torch.zeros_like(t, dtype=torch.uint8) for t in u[name]] for name in ("exp_avgs", "exp_avg_sqs")}
    scales = [torch.zeros(-(-s.numel() // 256), dtype=torch.uint8) for s in u["scores"] for _ in range(2)]
    return u | moments | {"scales": scales, "rng": rk.rng_state(1, 2)}


# --- torch.library ----------------------------------------------------------------------------------------------------


def op_calls() -> dict[str, tuple]:
    t = layer((M, N, K))
    x, w, s = (t[name].clone().requires_grad_() for name in ("x", "weight", "scores"))
    dense = reference.masked_weight(t["weight"], t["bits"])
    g = torch.randn(N, K)
    u = update_arguments()
    lists = [u[name] for name in ("scores", "bits", "exp_avgs", "exp_avg_sqs", "dense", "grads", "weights")]
    rest = (u["factors"], 0.9, 0.999, 1e-8, THRESHOLD)
    return {
        "pack_bits": (OPS.pack_bits, (t["scores"] > 0,)),
        "pack_scores": (OPS.pack_scores, (t["scores"], THRESHOLD)),
        "unpack_bits": (OPS.unpack_bits, (t["bits"], K)),
        "masked_weight": (OPS.masked_weight, (w, t["bits"], s)),
        "masked_linear": (OPS.masked_linear, (x, w, t["bits"], t["bias"].requires_grad_(), None, s)),
        "masked_linear-dense": (OPS.masked_linear, (x, t["weight"], t["bits"], None, dense, s)),
        "masked_linear-3d": (OPS.masked_linear, (x.view(2, 3, K), t["weight"], t["bits"], None, None, s)),
        "masked_linear_dx": (OPS.masked_linear_dx, (t["g_task"], t["weight"], t["bits"], None)),
        "grouped_masked_linear": (
            OPS.grouped_masked_linear,
            (t["x"], t["weight"], [t["bits"], None, t["bits"]], None, [0, 1, 1, M], False),
        ),
        "grouped_masked_linear-invariant": (
            OPS.grouped_masked_linear,
            (t["x"], t["weight"], [None, t["bits"]], torch.randn(N), [0, 2, M], True),
        ),
        "masked_weight_": (OPS.masked_weight_, (torch.randn(N, K), t["weight"], t["bits"], None)),
        "masked_weight_-old": (OPS.masked_weight_, (dense.clone(), t["weight"], t["bits"].flip(0), t["bits"])),
        "weight_grad_": (OPS.weight_grad_, (torch.randn(N, K), t["g_task"], t["x"], False)),
        "weight_grad_-accumulate": (
            OPS.weight_grad_,
            (torch.randn(N, K), t["g_task"].bfloat16(), t["x"].bfloat16(), True),
        ),
        "mask_grad": (
            OPS.mask_grad,
            (t["x"], t["g_task"], t["g_general"], t["weight"], t["scores"], t["penalty"], t["rng"], 0.3, 2),
        ),
        "mask_grad-one": (OPS.mask_grad, (t["x"], t["g_task"], None, t["weight"], None, None, None, 1.0, 0)),
        "gradient_dropout": (
            OPS.gradient_dropout,
            (g, g.flip(0), t["weight"], t["scores"], t["penalty"], t["rng"], 1.0, 0),
        ),
        "gradient_dropout-ready": (OPS.gradient_dropout, (g, g.flip(0), None, None, None, t["rng"], 1.0, 0)),
        "mask_update_": (OPS.mask_update_, (*lists, *rest, *whole_step(u).values())),
        "mask_update_-no-dense": (
            OPS.mask_update_,
            (*lists[:4], [], lists[5], [], *rest, [], [], [], None, None, None, 0.0, 1.0, [], []),
        ),
    }


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name):
    op, args = op_calls()[name]
    torch.library.opcheck(op.default, args)


def test_every_op_is_checked():
    from rmt_kernels.backends import OPS as names

    assert {name.partition("-")[0] for name in op_calls()} == set(names)


def test_mask_update_tells_autograd_that_it_has_written():
    u = update_arguments()
    u = narrow(u | whole_step(u))
    written = [t for name in ("scores", "bits", "exp_avgs", "exp_avg_sqs", "dense", "scales") for t in u[name]]
    written += [u["norms"], u["counts"]]
    before = [t._version for t in written]
    rk.mask_update_(**u)
    assert all(t._version > v for t, v in zip(written, before))


def test_stacked_cotangents_under_vmap_equal_a_loop():
    t = layer((M, N, K))
    stack, x = torch.randn(3, M, N), t["x"]
    calls = {
        "masked_linear_dx": lambda g: rk.masked_linear_dx(g, t["weight"], t["bits"]),
        "mask_grad": lambda g: rk.mask_grad(x, g, None, t["weight"]),
        "mask_grad-dropout": lambda g: rk.mask_grad(x, g, t["g_general"], t["weight"], rng=t["rng"]),
    }
    for name, call in calls.items():
        got, want = torch.vmap(call)(stack), torch.stack([call(g) for g in stack])
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6), name
        middle = torch.vmap(call, in_dims=1)(stack.transpose(0, 1))
        assert torch.allclose(middle, want, rtol=1e-5, atol=1e-6), f"{name}, stacked along dimension 1"
    got = torch.vmap(lambda rows: rk.masked_linear(rows, t["weight"], t["bits"], t["bias"]))(torch.stack([x, 2 * x]))
    want = torch.stack([rk.masked_linear(r, t["weight"], t["bits"], t["bias"]) for r in (x, 2 * x)])
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_both_cotangents_go_back_in_one_batched_call():
    t = layer((M, N, K))
    x, s = t["x"].requires_grad_(), t["scores"].requires_grad_()
    both = torch.stack([t["g_task"], t["g_general"]])
    y = rk.masked_linear(x, t["weight"], t["bits"], t["bias"], scores=s)
    got = torch.autograd.grad(y, (x, s), both, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(both):
        for stacked, alone in zip(got, torch.autograd.grad(y, (x, s), g, retain_graph=True)):
            assert torch.allclose(stacked[i], alone, rtol=1e-5, atol=1e-6)


def test_a_sink_within_a_sink_gives_its_place_back():
    t = layer((M, N, K))
    s, calls = t["scores"].requires_grad_(), []

    def sink(name):
        return {s: lambda g, x: calls.append(name)}

    def product():
        rk.masked_linear(t["x"], t["weight"], t["bits"], scores=s).sum().backward()

    with rk.weight_gradients_to(sink("outer")):
        with rk.weight_gradients_to(sink("inner")):
            product()
        assert calls == ["inner"]
        product()
    assert calls == ["inner", "outer"] and s.grad is None
    product()
    assert len(calls) == 2 and s.grad is not None


def test_vmap_over_weights_or_masks_is_refused():
    t = layer((M, N, K))
    with pytest.raises(NotImplementedError, match="batched rows only"):
        torch.vmap(lambda w: rk.masked_linear(t["x"], w, t["bits"]))(torch.stack([t["weight"]] * 2))


def test_compiles_without_a_graph_break():
    t = layer((M, N, K))

    def step(x, w, s, g_task, g_general):
        bits = rk.pack_scores(s.detach(), THRESHOLD)
        y = rk.masked_linear(x, w, bits, t["bias"], scores=s)
        dropped = rk.mask_grad(x, g_task, g_general, w, s.detach(), penalty=t["penalty"], rng=t["rng"], strength=0.3)
        return y, dropped, rk.unpack_bits(bits, K), rk.masked_weight(w, bits), rk.masked_linear_dx(g_task, w, bits)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = t["x"], t["weight"], t["scores"], t["g_task"], t["g_general"]
    for got, want in zip(compiled(*inputs), step(*inputs)):
        assert torch.equal(got, want)
    s = t["scores"].clone().requires_grad_()
    (got,) = torch.autograd.grad(compiled(inputs[0], inputs[1], s, *inputs[3:])[0].sum(), s)
    (want,) = torch.autograd.grad(step(inputs[0], inputs[1], s, *inputs[3:])[0].sum(), s)
    assert torch.equal(got, want)


def test_a_compiled_update_writes_in_place():
    u = update_arguments()
    u = narrow(u | whole_step(u))
    eager = copy.deepcopy(u)
    torch.compile(lambda **kw: rk.mask_update_(**kw), fullgraph=True, backend="aot_eager")(**u)
    rk.mask_update_(**eager)
    for name in ("scores", "bits", "exp_avgs", "exp_avg_sqs", "dense", "scales", "norms", "counts"):
        assert all(torch.equal(a, b) for a, b in zip(u[name], eager[name])), name


@pytest.mark.parametrize("kept", [False, True], ids=["bits", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_second_derivative_in_x_is_right(dtype, kept):
    t = layer((M, N, K), dtype)
    x, dense = t["x"].requires_grad_(), reference.masked_weight(t["weight"], t["bits"])
    y = rk.masked_linear(x, t["weight"], t["bits"], None, dense=dense if kept else None)
    (g,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(g.pow(2).sum(), x)
    (want,) = torch.autograd.grad((2 * (x @ dense.T) @ dense).pow(2).sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("product", ["masked_linear", "masked_weight"])
@pytest.mark.parametrize("trained", ["scores", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_second_derivative_in_weight_or_scores_is_right(dtype, trained, product):
    t = layer((M, N, K), dtype)
    x, bits, mask = t["x"].requires_grad_(), t["bits"], reference.unpack_bits(t["bits"], K)
    w, s = t["weight"], t["scores"].to(dtype)
    leaf = {"scores": s, "weight": w}[trained].requires_grad_()
    # Straight through: the scores' gradient is the bits'.
    through = mask.to(dtype) + (s - s.detach())

    def penalty(y):
        (g,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), leaf)[0]

    want = penalty(x @ (w * through).T)
    if product == "masked_linear":
        got = penalty(rk.masked_linear(x, w, bits, scores=s))
    else:
        got = penalty(x @ rk.masked_weight(w, bits, s).T)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("product", ["masked_linear", "masked_weight"])
def test_second_derivatives_pass_through_every_first_one(product):
    t = layer((M, N, K), torch.float64)
    bits, mask = t["bits"], reference.unpack_bits(t["bits"], K).double()
    leaves = [t[name].double().requires_grad_() for name in ("x", "weight", "bias", "scores")]
    x, w, b, s = leaves

    def second(y):
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    through = mask + (s - s.detach())
    want = second(x @ (w * through).T + b)
    y = x @ rk.masked_weight(w, bits, s).T + b
    if product == "masked_linear":
        y = rk.masked_linear(x, w, bits, b, scores=s)
    for got, right in zip(second(y), want):
        torch.testing.assert_close(got, right)


# --- autocast and mixed dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_linear(x_dtype):
    t = layer((16, 24, 96))
    x, dense = t["x"].to(x_dtype), reference.masked_weight(t["weight"], t["bits"])
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = rk.masked_linear(x, t["weight"], t["bits"], t["bias"]), F.linear(x, dense, t["bias"])
    assert got.dtype == plain.dtype == torch.bfloat16
    assert_no_worse(got, plain, x.double() @ dense.double().T + t["bias"].double())


def test_autocast_leaves_float64_alone_as_linear_does():
    t = layer((4, 5, 6), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert rk.masked_linear(t["x"], t["weight"], t["bits"]).dtype == torch.float64


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_kernels_compute_under_autocast_as_outside(name):
    t = layer((16, 24, 96))
    calls = {
        "mask_grad": lambda: rk.mask_grad(t["x"], t["g_task"], None, t["weight"]),
        "masked_linear_dx": lambda: rk.masked_linear_dx(t["g_task"], t["weight"], t["bits"]),
    }
    if reason := backends.why_not(name, "mask_grad", "cpu"):
        pytest.skip(reason)
    with rk.use_backend(name):
        for op, call in calls.items():
            want = call()
            with torch.autocast("cpu", torch.bfloat16):
                got = call()
            assert got.dtype == want.dtype and torch.equal(got, want), op


@pytest.mark.parametrize("name", [None, "reference"])
@pytest.mark.parametrize("m", [4, 200])
def test_grouped_under_autocast_is_each_group_alone(m, name):
    t = layer((m, 64, 64))
    bits, offsets = [t["bits"], t["bits"].flip(0)], [0, m // 2, m]
    with rk.use_backend(name), torch.autocast("cpu", torch.bfloat16):
        got = rk.grouped_masked_linear(t["x"], t["weight"], bits, offsets, t["bias"])
        halves = zip(bits, t["x"].split(m // 2))
        alone = torch.cat([rk.masked_linear(x, t["weight"], words, t["bias"]) for words, x in halves])
    assert got.dtype == alone.dtype == torch.bfloat16 and torch.equal(got, alone)
    with torch.autocast("cpu", torch.bfloat16):
        assert rk.grouped_masked_linear(t["x"].double(), t["weight"], bits, offsets).dtype == torch.float64


def test_compiles_under_autocast_without_a_graph_break():
    t = layer((M, N, K))

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            y = rk.grouped_masked_linear(x, t["weight"], [t["bits"]], [0, M])
            return y, rk.masked_linear(x, t["weight"], t["bits"]), rk.mask_grad(x, t["g_task"], None, t["weight"])

    for got, want in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(t["x"]), run(t["x"])):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_gradients_under_autocast_keep_their_tensors_dtypes():
    t = layer((16, 24, 96))
    x, s = t["x"].requires_grad_(), t["scores"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = rk.masked_linear(x, t["weight"], t["bits"], t["bias"], scores=s)
    y.backward(t["g_task"].bfloat16())
    g = t["g_task"].bfloat16().double()
    dense = reference.masked_weight(t["weight"], t["bits"])
    plain_dx = (t["g_task"].bfloat16() @ dense.bfloat16()).float()
    assert_no_worse(x.grad, plain_dx, g @ dense.double(), scale=g.abs() @ dense.double().abs())
    assert s.grad.dtype == torch.float32
    truth = (g.T @ x.detach().bfloat16().double()) * t["weight"].double()
    plain = (t["g_task"].bfloat16().float().T @ x.detach().bfloat16().float()) * t["weight"]
    assert_no_worse(s.grad, plain, truth)


@pytest.mark.parametrize("kept", [False, True], ids=["bits", "dense"])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_products_dtype_is_that_of_its_rows(x_dtype, w_dtype, kept):
    t = layer((M, N, K), w_dtype)
    x, g = t["x"].to(x_dtype), t["g_task"].to(x_dtype)
    dense = reference.masked_weight(t["weight"], t["bits"])
    y = rk.masked_linear(x, t["weight"], t["bits"], t["bias"], dense=dense if kept else None)
    plain = F.linear(x, dense.to(x_dtype), t["bias"].to(x_dtype))
    scale = x.double().abs() @ dense.double().abs().T
    assert_no_worse(y, plain, x.double() @ dense.to(x_dtype).double().T + t["bias"].double(), scale=scale)
    dx = rk.masked_linear_dx(g, t["weight"], t["bits"], dense=dense if kept else None)
    scale = g.double().abs() @ dense.double().abs()
    assert_no_worse(dx, g @ dense.to(x_dtype), g.double() @ dense.to(x_dtype).double(), scale=scale)


@pytest.mark.parametrize("grouped", [False, True])
def test_products_of_meta_tensors_have_shape_and_dtype(grouped):
    t = {name: value.to("meta") for name, value in layer((M, N, K), torch.bfloat16).items()}
    if grouped:
        y = rk.grouped_masked_linear(t["x"], t["weight"], [t["bits"]], [0, M], t["bias"])
    else:
        y = rk.masked_linear(t["x"], t["weight"], t["bits"], t["bias"])
    assert y.device.type == "meta" and y.shape == (M, N) and y.dtype == torch.bfloat16


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_rows_give_no_rows_and_zero_gradients(lead):
    t = layer((M, N, K))
    x = torch.empty(*lead, K).requires_grad_()
    s = t["scores"].requires_grad_()
    y = rk.masked_linear(x, t["weight"], t["bits"], t["bias"], scores=s)
    assert y.shape == (*lead, N)
    y.sum().backward()
    assert x.grad.shape == x.shape and s.grad.eq(0).all()
    g = torch.empty(*lead, N)
    assert rk.masked_linear_dx(g, t["weight"], t["bits"]).shape == (*lead, K)
    got = rk.mask_grad(x.detach(), g, g, t["weight"], s.detach(), penalty=t["penalty"], rng=t["rng"], strength=0.0)
    assert torch.allclose(got, t["penalty"] * s.detach())


def test_grouped_with_no_rows_at_all():
    t = layer((M, N, K))
    for invariant in (False, True):
        y = rk.grouped_masked_linear(
            torch.empty(0, K), t["weight"], [t["bits"]], [0, 0], t["bias"], invariant=invariant
        )
        assert y.shape == (0, N)


@pytest.mark.parametrize("invariant", [False, True], ids=["as-alone", "invariant"])
@pytest.mark.parametrize("sizes", [(1, 0, 2, 1, 2), (1, 1, 80, 0, 8)], ids=["few-rows", "many-rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_grouped_rows_meet_their_own_tasks_bits(dtype, sizes, invariant):
    t = layer((sum(sizes), 50, 100), dtype)
    bits = [rk.pack_bits(torch.rand(50, 100) > 0.15 * i) for i in range(len(sizes) - 1)] + [None]
    offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    got = rk.grouped_masked_linear(t["x"], t["weight"], bits, offsets, t["bias"], invariant=invariant)
    plain = reference.grouped_masked_linear(t["x"], t["weight"], bits, t["bias"], offsets, invariant)
    for words, a, b in zip(bits, offsets, offsets[1:]):
        dense = t["weight"] if words is None else reference.masked_weight(t["weight"], words)
        dense, x = dense.double(), t["x"][a:b].double()
        scale = x.abs() @ dense.abs().T
        assert_no_worse(got[a:b], plain[a:b], x @ dense.T + t["bias"].double(), scale=scale if b > a else None)


def test_one_row_without_leading_dimensions_goes_forward_and_back():
    t = layer((1, N, K))
    x, s = t["x"][0].requires_grad_(), t["scores"].requires_grad_()
    y = rk.masked_linear(x, t["weight"], t["bits"], t["bias"], scores=s)
    y.backward(t["g_task"][0])
    assert y.shape == (N,) and x.grad.shape == (K,)
    assert torch.allclose(s.grad, torch.outer(t["g_task"][0], x.detach()) * t["weight"], rtol=1e-5, atol=1e-7)
    got = rk.mask_grad(x.detach(), t["g_task"][0], None, t["weight"])
    assert torch.allclose(got, s.grad, rtol=1e-5, atol=1e-7)


def test_a_score_at_the_threshold_is_off_when_packed_and_after_an_update():
    at = torch.tensor(THRESHOLD)
    scores = at.expand(3, 70).clone()
    scores[:, ::3], scores[:, 1::3] = torch.nextafter(at, torch.tensor(1.0)), torch.nextafter(at, torch.tensor(0.0))
    want = reference.pack_bits(torch.arange(70).expand(3, -1) % 3 == 0)
    assert torch.equal(rk.pack_scores(scores, THRESHOLD), want)
    bits, zeros = torch.full_like(want, -1), [torch.zeros(3, 70) for _ in range(3)]
    # No gradient and no momentum: the scores stay where they are.
    rk.mask_update_([scores], [bits], zeros[:1], zeros[1:2], zeros[2:], torch.ones(2), threshold=THRESHOLD)
    assert torch.equal(bits, want)


# Each past 2**31 elements, where an int32 product of sizes would wrap.
@pytest.mark.parametrize(
    "shape", [(3, 70_000, 40_000), (70_000, 40_000, 64), (2**31 + 3, 1, 1)], ids=["weight", "output", "rows"]
)
def test_shapes_past_2_31_elements_are_described_in_64_bits(shape):
    m, n, k = shape
    words = -(-k // 32)
    with FakeTensorMode():
        x, w, g = torch.empty(m, k), torch.empty(n, k), torch.empty(m, n)
        bits = rk.pack_scores(w, 0.0)
        assert bits.shape == (n, words) and rk.unpack_bits(bits, k).numel() == n * k
        assert rk.masked_linear(x, w, bits).numel() == m * n
        assert rk.masked_linear_dx(g, w, bits).numel() == m * k
        assert rk.mask_grad(x, g, None, w).numel() == rk.masked_weight(w, bits).numel() == n * k


@st.composite
def products(draw):
    m, n, k = draw(st.integers(0, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 100))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    layouts = st.sampled_from(["contiguous", "transposed", "stepped", "offset", "expanded"])
    return (m, n, k), draw(dtypes), draw(layouts), draw(layouts), draw(st.integers(0, 99)), draw(st.booleans())


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of `t` in other strides; expanded repeats its first row."""
    if layout == "transposed":
        return t.T.contiguous().T
    if layout == "stepped":
        return t.repeat_interleave(2, 1)[:, ::2]
    if layout == "offset":
        return F.pad(t, (3, 2, 1, 1))[1:-1, 3:-2]
    if layout == "expanded" and len(t):
        return t[:1].expand(len(t), -1)
    return t


@settings(max_examples=50, deadline=None, derandomize=True)
@given(products())
def test_the_default_backend_is_no_worse_than_the_reference_on_any_layout(case):
    shape, dtype, x_layout, w_layout, seed, mixed = case
    _, _, k = shape
    t = layer(shape, dtype, seed=seed)
    x, g = laid_out(t["x"], x_layout), laid_out(t["g_task"], x_layout)
    w = laid_out(t["weight"].float() if mixed else t["weight"], w_layout)
    mask = laid_out(t["scores"], w_layout) > THRESHOLD
    bits = rk.pack_bits(mask)
    assert torch.equal(bits, reference.pack_bits(mask))
    assert torch.equal(rk.pack_scores(laid_out(t["scores"], w_layout), THRESHOLD), bits)
    assert torch.equal(rk.unpack_bits(bits, k), mask)
    dense = rk.masked_weight(w, bits)
    assert torch.equal(dense, torch.where(mask, w, 0))

    # bf16 x over fp32 W rounds W first, in the reference as in F.linear under autocast.
    rounded = dense.to(dtype).double()
    y, plain = rk.masked_linear(x, w, bits, t["bias"]), reference.masked_linear(x, w, bits, t["bias"], None)
    scale = x.double().abs() @ rounded.abs().T + t["bias"].double().abs()
    assert_no_worse(y, plain, x.double() @ rounded.T + t["bias"].double(), scale=scale)
    dx, plain = rk.masked_linear_dx(g, w, bits), reference.masked_linear_dx(g, w, bits, None)
    assert_no_worse(dx, plain, g.double() @ rounded, scale=g.double().abs() @ rounded.abs())

    options = {"rng": t["rng"], "strength": 0.3, "stream": seed}
    got = rk.mask_grad(x, g, t["g_general"], w, **options)
    a, b = ((c.double().T @ x.double()) * w.double() for c in (g, t["g_general"]))
    assert_same_dropout(got, a, b, reference.philox_uniform(t["rng"], seed, w.shape).double(), 0.3)


# --- bad input --------------------------------------------------------------------------------------------------------


def meta(t):
    return t.to("meta")


def last_replaced(change):
    """A change to the last tensor of a list: the ones before it are fine."""
    return lambda tensors: [*tensors[:-1], change(tensors[-1])]


# Per function: what is wrong -> (how to change the good arguments, error, what the message must say).
ERRORS = (TypeError, ValueError)
COMMON = {
    "weight-int": ({"weight": lambda t: t.int()}, TypeError, "weight must be floating point, got torch.int32"),
    "weight-1d": ({"weight": lambda t: t[0]}, ValueError, r"weight must be a non-empty matrix, got shape \(37,\)"),
    "weight-empty": (
        {"weight": lambda t: t[:, :0]}, ValueError, r"weight must be a non-empty matrix, got shape \(9, 0\)",
    ),
    "weight-not-a-tensor": ({"weight": lambda t: t.tolist()}, TypeError, "weight must be a tensor, got list"),
}  # fmt: skip
BITS = {
    "bits-dtype": ({"bits": lambda t: t.long()}, ERRORS, r"int32 \(.*9, 2\).*got torch.int64"),
    "bits-width": ({"bits": lambda t: t[..., :1].contiguous()}, ValueError, r"int32 \(.*9, 2\).*got .*9, 1\)"),
    "bits-rows": ({"bits": lambda t: t[..., :8, :].contiguous()}, ValueError, r"int32 \(.*9, 2\).*got .*8, 2\)"),
    "bits-strided": (
        {"bits": lambda t: t.repeat_interleave(2, -1)[..., ::2]}, ValueError, "contiguous.*got.*strides",
    ),
    "bits-device": ({"bits": meta}, ValueError, "cpu, got.*meta"),
    "bits-none": ({"bits": lambda t: None}, ERRORS, "bits must be.*got None"),
}  # fmt: skip
ROWS = {
    "rows-width": ({"x": lambda t: t[:, :-1]}, ValueError, r"\(\.\.\.|M, 37\).*got"),
    "rows-int": ({"x": lambda t: t.int()}, TypeError, "floating point.*got torch.int32"),
    "rows-device": ({"x": meta}, ValueError, "cpu, got.*meta"),
    "rows-none": ({"x": lambda t: None}, ERRORS, "got (None|NoneType)"),
}
BIAS = {
    "bias-shape": ({"bias": lambda t: t[:-1]}, ValueError, r"bias must have shape \(9,\), got \(8,\)"),
    "bias-int": ({"bias": lambda t: t.int()}, TypeError, "bias.*got torch.int32"),
    "bias-device": ({"bias": meta}, ValueError, "bias must be on cpu, got meta"),
}
DROPOUT = {
    "strength-above-one": ({"strength": lambda v: 1.5}, ValueError, r"strength must be in \[0, 1\], got 1.5"),
    "strength-negative": ({"strength": lambda v: -0.1}, ValueError, r"strength must be in \[0, 1\], got -0.1"),
    "strength-nan": ({"strength": lambda v: float("nan")}, ValueError, "strength must be.*got nan"),
    "strength-text": ({"strength": lambda v: "1"}, ERRORS, "strength must be.*got '1'"),
    "rng-missing": ({"rng": lambda t: None}, ValueError, "needs rng"),
    "rng-dtype": ({"rng": lambda t: t.int()}, TypeError, "rng must be torch.int64, got torch.int32"),
    "rng-shape": ({"rng": lambda t: t[:1]}, ValueError, r"rng must have shape \(2,\), got \(1,\)"),
    "penalty-without-scores": ({"scores": lambda t: None}, ValueError, "penalty needs scores"),
    "penalty-shape": ({"penalty": lambda t: t[None]}, ValueError, r"penalty must have shape \(\), got \(1,\)"),
    "penalty-int": ({"penalty": lambda t: t.int()}, TypeError, "penalty.*got torch.int32"),
    "scores-shape": ({"scores": lambda t: t[:-1]}, ValueError, r"scores must have shape \(9, 37\), got \(8, 37\)"),
    "scores-int": ({"scores": lambda t: t.int()}, TypeError, "scores.*got torch.int32"),
    "scores-device": ({"scores": meta}, ValueError, "scores must be on cpu, got meta"),
}
BAD = {
    "pack_bits": {
        "float": ({"mask": lambda t: t.float()}, TypeError, "mask must be torch.bool, got torch.float32"),
        "empty": ({"mask": lambda t: t[:0]}, ValueError, r"non-empty matrix, got shape \(0, 37\)"),
        "3d": ({"mask": lambda t: t[None]}, ValueError, r"non-empty matrix, got shape \(1, 9, 37\)"),
        "list": ({"mask": lambda t: t.tolist()}, TypeError, "mask must be a tensor, got list"),
    },
    "pack_scores": {
        "nan": ({"scores": lambda t: t.index_fill(1, torch.tensor([3]), float("nan"))}, ValueError, "NaN, got 9 NaN"),
        "int": ({"scores": lambda t: t.int()}, TypeError, "scores must be floating point, got torch.int32"),
        "threshold-nan": ({"threshold": lambda v: float("nan")}, ValueError, "threshold must be a finite.*got nan"),
        "threshold-inf": ({"threshold": lambda v: float("inf")}, ValueError, "threshold must be a finite.*got inf"),
        "threshold-none": ({"threshold": lambda v: None}, ERRORS, "threshold must be a finite.*got None"),
    },
    "unpack_bits": {
        "dtype": ({"bits": lambda t: t.long()}, TypeError, "bits must be torch.int32, got torch.int64"),
        "width": ({"in_features": lambda v: 65}, ValueError, "3 words a row for 65 columns, got 2"),
        "narrow": ({"in_features": lambda v: 32}, ValueError, "1 words a row for 32 columns, got 2"),
        "zero": ({"in_features": lambda v: 0}, ValueError, "0 columns, got 2"),
        "float": ({"in_features": lambda v: 37.0}, TypeError, "in_features must be.*got 37.0"),
    },
    "masked_weight": COMMON | BITS,
    "masked_linear": COMMON | BITS | ROWS | BIAS | {
        "dense-shape": ({"dense": lambda t: t[:-1]}, ValueError, r"dense must have shape \(9, 37\), got \(8, 37\)"),
        "dense-int": ({"dense": lambda t: t.int()}, TypeError, "dense.*got torch.int32"),
        "scores-shape": ({"scores": lambda t: t.T}, ValueError, r"scores must have shape \(9, 37\), got \(37, 9\)"),
        "scores-int": ({"scores": lambda t: t.int()}, TypeError, "scores.*got torch.int32"),
    },
    "masked_linear_dx": COMMON | BITS | {
        "rows-width": ({"g": lambda t: t[:, :-1]}, ValueError, r"\(\.\.\., 9\) on cpu, got .*\(6, 8\)"),
        "rows-int": ({"g": lambda t: t.int()}, TypeError, "floating point.*got torch.int32"),
        "scalar": ({"g": lambda t: t.sum()}, ValueError, r"\(\.\.\., 9\) on cpu, got .*\(\)"),
    },
    "masked_weight_": COMMON | BITS | {
        "out-shape": ({"out": lambda t: t[:-1]}, ValueError, r"out must have shape \(9, 37\), got \(8, 37\)"),
        "out-dtype": ({"out": torch.Tensor.half}, TypeError, "out must be torch.float32, got torch.float16"),
        "out-strided": ({"out": lambda t: t.T.contiguous().T}, ValueError, "out must be contiguous, got strides"),
        "out-device": ({"out": meta}, ValueError, "out must be on cpu, got meta"),
        "old-dtype": ({"old": torch.Tensor.long}, ValueError, r"int32 \(9, 2\).*got torch.int64"),
        "old-width": ({"old": lambda t: t[:, :1].contiguous()}, ValueError, r"int32 \(9, 2\).*got .*9, 1\)"),
        "old-strided": (
            {"old": lambda t: t.repeat_interleave(2, -1)[..., ::2]}, ValueError, "contiguous.*got.*strides",
        ),
    },
    "grouped_masked_linear": COMMON | BIAS
    | {f"last-{name}": ({key: last_replaced(change) for key, change in changes.items()}, error, message)
       for name, (changes, error, message) in BITS.items() if name != "bits-none"}
    | ROWS | {
        "rows-3d": ({"x": lambda t: t[None]}, ValueError, r"x must be \(M, 37\), got .*\(1, 6, 37\)"),
        "offsets-end": ({"offsets": lambda v: [0, 2, 5]}, ValueError, r"3 numbers .* 0 to 6, got \[0, 2, 5\]"),
        "offsets-start": ({"offsets": lambda v: [1, 2, 6]}, ValueError, r"from 0 to 6, got \[1, 2, 6\]"),
        "offsets-descend": ({"offsets": lambda v: [0, 7, 6]}, ValueError, r"from 0 to 6, got \[0, 7, 6\]"),
        "offsets-length": ({"offsets": lambda v: [0, 6]}, ValueError, r"offsets must be 3 numbers.*got \[0, 6\]"),
        "needs-gradient": ({"x": lambda t: t.requires_grad_()}, ValueError, "no backward: call it under torch.no_grad"),
        "bits-stacked": ({"bits": lambda v: torch.stack(v[1:])}, ValueError, "at least one.*got torch.int32"),
        "no-groups": (
            {"bits": lambda v: [], "x": lambda t: t[:0], "offsets": lambda v: [0]}, ValueError, "at least one.*got",
        ),
    },
    "mask_grad": COMMON | ROWS | DROPOUT | {
        "cotangent-shape": (
            {"g_task": lambda t: t[:-1]}, ValueError, r"g_task must have shape \(6, 9\), got \(5, 9\)",
        ),
        "cotangent-int": ({"g_task": lambda t: t.int()}, TypeError, "g_task.*got torch.int32"),
        "cotangent-none": ({"g_task": lambda t: None}, ERRORS, "g_task must be a tensor, got None"),
        "general-shape": (
            {"g_general": lambda t: t[:, 1:]}, ValueError, r"g_general must have shape \(6, 9\), got \(6, 8\)",
        ),
        "general-device": ({"g_general": meta}, ValueError, "g_general must be on cpu, got meta"),
    },
    "gradient_dropout": DROPOUT | {
        "grad-int": ({"grad_task": lambda t: t.int()}, TypeError, "grad_task must be floating point, got torch.int32"),
        "general-shape": (
            {"grad_general": lambda t: t[1:]}, ValueError, r"grad_general must have shape \(9, 37\), got \(8, 37\)",
        ),
        "general-int": ({"grad_general": lambda t: t.int()}, TypeError, "grad_general.*got torch.int32"),
        "weight-shape": (
            {"weight": lambda t: t[:, 1:]}, ValueError, r"weight must have shape \(9, 37\), got \(9, 36\)",
        ),
        "weight-int": ({"weight": lambda t: t.int()}, TypeError, "weight.*got torch.int32"),
    },
}  # fmt: skip


def good_arguments(function: str) -> dict[str, object]:
    t = layer((M, N, K))
    dropout = {"scores": t["scores"], "penalty": t["penalty"], "rng": t["rng"], "strength": 0.5}
    linear = {"weight": t["weight"], "bits": t["bits"]}
    dense = reference.masked_weight(t["weight"], t["bits"])
    return {
        "pack_bits": {"mask": t["scores"] > 0},
        "pack_scores": {"scores": t["scores"], "threshold": THRESHOLD},
        "unpack_bits": {"bits": t["bits"], "in_features": K},
        "masked_weight": linear,
        "masked_linear": linear | {"x": t["x"], "bias": t["bias"], "dense": dense, "scores": t["scores"]},
        "masked_linear_dx": linear | {"g": t["g_task"]},
        "masked_weight_": linear | {"out": dense, "old": t["bits"].clone()},
        "grouped_masked_linear": {
            "x": t["x"],
            "weight": t["weight"],
            "bits": [None, t["bits"]],
            "offsets": [0, 2, M],
            "bias": t["bias"],
        },
        "mask_grad": dropout | {"x": t["x"], "g_task": t["g_task"], "g_general": t["g_general"], "weight": t["weight"]},
        "gradient_dropout": dropout
        | {"grad_task": torch.randn(N, K), "grad_general": torch.randn(N, K), "weight": t["weight"]},
    }[function]


@pytest.mark.parametrize("function", BAD)
def test_good_arguments_are_taken(function):
    getattr(rk, function)(**good_arguments(function))


@pytest.mark.parametrize(
    ("function", "case"), [pytest.param(f, c, id=f"{f}-{c}") for f, cases in BAD.items() for c in cases]
)
def test_bad_input_is_refused_with_what_was_expected_and_what_came(function, case):
    changes, error, message = BAD[function][case]
    arguments = good_arguments(function)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    with pytest.raises(error, match=message):
        getattr(rk, function)(**arguments)


BAD_UPDATE = {
    "too-few-bits": ({"bits": lambda v: v[:-1]}, ValueError, "bits must have one tensor for each of 2 scores, got 1"),
    "too-many-grads": ({"grads": lambda v: [*v, v[0]]}, ValueError, "grads must have one .* of 2 scores, got 3"),
    "dense-without-weights": ({"weights": lambda v: []}, ValueError, "weights must have one .* of 2 scores, got 0"),
    "scores-bf16": ({"scores": last_replaced(torch.Tensor.bfloat16)}, TypeError, "scores.*float32.*got torch.bfloat16"),
    "scores-strided": (
        {"scores": last_replaced(lambda t: t.T.contiguous().T)}, ValueError, r"scores\[1\].* must be contiguous",
    ),
    "scores-empty": ({"scores": last_replaced(lambda t: t[:0])}, ValueError, r"non-empty matrix, got shape \(0, 64\)"),
    "bits-width": (
        {"bits": last_replaced(lambda t: t[:, :1].contiguous())}, ValueError, r"int32 \(3, 2\).*got .*\(3, 1\)",
    ),
    "bits-dtype": ({"bits": last_replaced(torch.Tensor.long)}, ERRORS, r"int32 \(3, 2\).*got torch.int64"),
    "grads-shape": (
        {"grads": last_replaced(torch.Tensor.t)}, ValueError, r"grads\[1\] must have shape \(3, 64\), got \(64, 3\)",
    ),
    "grads-half": ({"grads": last_replaced(torch.Tensor.half)}, TypeError, r"grads\[1\] must be.*got torch.float16"),
    "grads-double": ({"grads": last_replaced(torch.Tensor.double)}, TypeError, r"grads\[1\].*got torch.float64"),
    "grads-device": ({"grads": last_replaced(meta)}, ValueError, r"grads\[1\] must be on cpu, got meta"),
    "grads-strided": (
        {"grads": last_replaced(lambda t: t.T.contiguous().T)}, ValueError, r"grads\[1\] must be contiguous",
    ),
    "a-layer-elsewhere": (
        {name: last_replaced(meta) for name in update_arguments() if name != "factors"},
        ValueError, "must be on cpu, got.*meta",
    ),
    "dense-of-another-dtype": (
        {"dense": last_replaced(torch.Tensor.double)}, TypeError, r"dense\[1\].*got torch.float64",
    ),
    "factors-shape": ({"factors": lambda t: t[:1]}, ValueError, r"factors must have shape \(2,\), got \(1,\)"),
    "factors-dtype": ({"factors": torch.Tensor.double}, TypeError, "factors must be torch.float32, got torch.float64"),
    "beta": ({"beta1": lambda v: 1.0}, ValueError, r"\[0, 1\), got 1.0"),
    "too-few-generals": ({"generals": lambda v: v[:1]}, ValueError, "generals must have one .* of 2 scores, got 1"),
    "generals-half": (
        {"generals": last_replaced(torch.Tensor.half)}, TypeError, r"generals\[1\] must be.*got torch.float16",
    ),
    "chained-without-weights": (
        {"weights": lambda v: [], "dense": lambda v: []}, ValueError, "weights must have one .* of 2 scores, got 0",
    ),
    "too-few-chained": ({"chained": lambda v: v[:1]}, ValueError, "chained must have one .* of 2 scores, got 1"),
    "too-few-streams": ({"streams": lambda v: v[:1]}, ValueError, "streams must have one .* of 2 scores, got 1"),
    "streams-too-large": ({"streams": lambda v: [0, 2**31]}, ValueError, r"streams must be integers from 0 to 2\*\*31"),
    "too-few-offsets": (
        {"offsets": lambda v: v[:1]}, ValueError, "offsets must have one entry for each of 2 scores, got 1",
    ),
    "offsets-negative": (
        {"offsets": lambda v: [0, -4]}, ValueError, r"offsets must be integers from 0 to .*got \[0, -4\]",
    ),
    "offsets-float": ({"offsets": lambda v: [0, 4.0]}, ValueError, r"offsets must be integers.*got \[0, 4.0\]"),
    "offsets-too-large": ({"offsets": lambda v: [0, 2**63]}, ValueError, r"offsets must be integers .* 2\*\*63 - 1"),
    "offsets-within-a-draw": (
        {"offsets": lambda v: [4, 6]}, ValueError, r"offsets must be .* multiples of 4, .* the draw, got \[4, 6\]",
    ),
    "offsets-within-an-exponent": (
        {**dict.fromkeys(("exp_avgs", "exp_avg_sqs"), lambda v: [torch.zeros_like(t, dtype=torch.uint8) for t in v]),
         "scales": lambda v: [torch.zeros(blocks, dtype=torch.uint8) for blocks in (2, 2, 1, 1)],
         "offsets": lambda v: [256, 128]},
        ValueError, r"offsets must be .* multiples of 256, .* exponent of uint8 moments, got \[256, 128\]",
    ),
    "dropout-without-rng": ({"rng": lambda v: None}, ValueError, "dropout needs rng"),
    "rng-int32": ({"rng": torch.Tensor.int}, TypeError, "rng must be torch.int64, got torch.int32"),
    "l2-without-norms": ({"norms": lambda v: None}, ValueError, "l2 needs norms.*got l2 0.0001 and none"),
    "l2-nan": ({"l2": lambda v: float("nan")}, ValueError, "l2 must be a finite number, got nan"),
    "norms-shape": ({"norms": lambda v: v[:1]}, ValueError, r"norms must have shape \(2,\), got \(1,\)"),
    "norms-double": ({"norms": torch.Tensor.double}, TypeError, "norms must be torch.float32, got torch.float64"),
    "counts-shape": ({"counts": lambda v: v[:, 0]}, ValueError, r"counts must have shape \(2, 2\), got \(2,\)"),
    "counts-int32": ({"counts": torch.Tensor.int}, TypeError, "counts must be torch.int64, got torch.int32"),
    "strength": ({"strength": lambda v: 1.5}, ValueError, r"strength must be in \[0, 1\], got 1.5"),
    "moments-of-two-dtypes": (
        {"exp_avg_sqs": last_replaced(torch.Tensor.bfloat16)}, TypeError,
        r"exp_avg_sqs\[1\] must be torch.float32, got torch.bfloat16",
    ),
    "moments-half": (
        {"exp_avgs": lambda v: [t.half() for t in v]}, TypeError, "exp_avgs.*float32 or.*bfloat16 or.*uint8.*float16",
    ),
    "8-bit-without-scales": (
        {n: lambda v: [t.byte() for t in v] for n in ("exp_avgs", "exp_avg_sqs")}, ValueError,
        "scales must have 4 tensors for 2 torch.uint8 moments, got 0",
    ),
    "scales-of-fp32": (
        {"scales": lambda v: [torch.zeros(1)]}, ValueError, "scales must have 0 tensors for 2 torch.float32 .*got 1",
    ),
    "eps-nan": ({"eps": lambda v: float("nan")}, ValueError, "eps must be a finite number, got nan"),
    "threshold-inf": ({"threshold": lambda v: float("-inf")}, ValueError, "threshold must be a finite.*got -inf"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_UPDATE)
def test_an_update_that_is_refused_has_written_nothing(case):
    changes, error, message = BAD_UPDATE[case]
    arguments = update_arguments() | {"beta1": 0.9, "eps": 1e-8, "threshold": THRESHOLD}
    arguments |= whole_step(arguments)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    names = ("scores", "bits", "exp_avgs", "exp_avg_sqs", "dense")
    real = [t for name in names for t in arguments[name] if t.device.type == "cpu"]
    before = [t.clone() for t in real]
    with pytest.raises(error, match=message):
        rk.mask_update_(**arguments)
    for t, old in zip(real, before):
        assert torch.equal(t.nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize("name", ["scores", "grads"])
def test_scores_that_became_nan_are_reported(name):
    """The kernel meets them on its way, so this one refusal comes after the writing."""
    arguments = update_arguments()
    arguments[name][1][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"scores\[1\] must not be NaN, got"):
        rk.mask_update_(**arguments)


def test_an_update_of_no_layers_does_nothing():
    rk.mask_update_([], [], [], [], [], torch.ones(2))


@pytest.mark.parametrize(("seed", "step"), [(1.5, 0), (0, "1"), (2**63, 0)], ids=["float", "text", "too-large"])
def test_a_seed_that_is_no_int64_is_refused(seed, step):
    with pytest.raises((*ERRORS, OverflowError, RuntimeError)):
        rk.rng_state(seed, step)
