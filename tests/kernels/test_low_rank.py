"""`routed_low_rank`: the reference against the formula per sample, every order of products against it."""

import pytest
import torch
from helpers import assert_no_worse, need_gpu
from torch.utils.flop_counter import FlopCounterMode

import rmt_kernels as rk
from rmt_kernels import low_rank
from rmt_kernels import routing as reference
from rmt_kernels.routing import FUNCTIONS

# B, T, K, N, r, V: where the bottleneck is the shorter way, where it is not, and gram over x_v^T x_v.
WIDE, THIN, SQUARE = (2, 1, 7, 5, 3, 1), (3, 9, 8, 6, 5, 1), (2, 6, 8, 5, 2, 9)
CASES = [(f, s) for f in FUNCTIONS for s in (WIDE, THIN)] + [("gram", SQUARE), ("gram", (2, 20, 16, 12, 16, 3))]


def operands(shape, products=1, dtype=torch.float64, grad=False):
    batch, tokens, k, n, rank, images = shape
    random = torch.Generator().manual_seed(0)
    sizes = {
        "x": (batch, tokens, k), "a": (products * rank, k), "b": (products, n, rank),
        "x_v": (batch, images, products * rank), "out": (batch, tokens, products * n),
    }  # fmt: skip
    made = {name: torch.randn(size, generator=random, dtype=torch.float64) for name, size in sizes.items()}
    made["a"] /= k**0.5
    return {name: t.to(dtype).requires_grad_(grad) for name, t in made.items()}


def call(run, t, function, scale=0.7, out=True):
    return run(t["x"], t["a"], t["b"], t["x_v"], function, scale, t["out"] if out else None)


def with_gradients(run, t, function, scale=0.7, out=True):
    """The result and its cotangents of whatever it depends on."""
    y = call(run, t, function, scale, out)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    names = [n for n in t if not (n == "x_v" and function == "none") and not (n == "out" and not out)]
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, [t[n] for n in names], cotangent)))}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("products", [1, 2])
def test_the_reference_is_an_update_of_the_weight_per_image(function, products):
    batch, tokens, _, n, rank, _ = shape = (3, 4, 6, 5, 2, 3 if function == "gram" else 1)
    t = operands(shape, products)
    got = call(reference.routed_low_rank, t, function)
    for i in range(batch):
        x_v, b = t["x_v"][i], torch.block_diag(*t["b"])
        ones = torch.ones(products * rank, dtype=x_v.dtype)
        matrix = {
            "none": torch.eye(products * rank, dtype=x_v.dtype), "add": torch.eye(products * rank, dtype=x_v.dtype),
            "mul": torch.diag(x_v[0]), "expand": torch.outer(x_v[0], ones), "gram": sum(torch.outer(v, v) for v in x_v),
        }[function]  # fmt: skip
        shift = b @ x_v[0] if function == "add" else 0
        for j in range(tokens):
            want = t["out"][i, j] + 0.7 * (b @ matrix @ t["a"] @ t["x"][i, j] + shift)
            torch.testing.assert_close(got[i, j], want, rtol=0, atol=1e-12)
    assert got.shape == (batch, tokens, products * n)


@pytest.mark.parametrize(("function", "shape"), CASES)
@pytest.mark.parametrize("products", [1, 2])
@pytest.mark.parametrize(("scale", "out"), [(0.7, True), (1.0, True), (-3.0, False)])
def test_every_order_is_the_reference(function, shape, products, scale, out):
    t = operands(shape, products, grad=True)
    want = with_gradients(reference.routed_low_rank, t, function, scale, out)
    for name, got in with_gradients(rk.routed_low_rank, t, function, scale, out).items():
        torch.testing.assert_close(got, want[name], rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("function", "shape"), CASES)
def test_gradcheck(function, shape):
    t = operands((2, min(shape[1], 6), *shape[2:]), grad=True)
    assert torch.autograd.gradcheck(lambda *args: call(rk.routed_low_rank, dict(zip(t, args)), function), [*t.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("function", "shape"), [*((f, (4, 50, 96, 80, 16, 1)) for f in FUNCTIONS), ("gram", (2, 30, 64, 48, 4, 40))]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_order_is_less_accurate(function, dtype, shape, device):
    device = need_gpu() if device == "cuda" else device
    t = {name: p.detach().to(device).requires_grad_() for name, p in operands(shape, dtype=dtype).items()}
    exact = {name: p.detach().double().requires_grad_() for name, p in t.items()}
    truth = with_gradients(reference.routed_low_rank, exact, function)
    plain = with_gradients(reference.routed_low_rank, t, function)
    for name, got in with_gradients(rk.routed_low_rank, t, function).items():
        assert_no_worse(got, plain[name], truth[name])


@pytest.mark.parametrize(
    ("function", "shape", "want"),
    [(f, THIN, (f in ("expand", "gram"), False)) for f in FUNCTIONS]
    + [("expand", WIDE, (False, False)), ("gram", WIDE, (False, False)), ("gram", SQUARE, (False, True)),
       ("gram", (32, 76, 512, 512, 8, 255), (False, True)), ("gram", (32, 76, 512, 512, 128, 255), (False, False)),
       ("gram", (32, 76, 512, 512, 128, 16), (True, False)), ("gram", (32, 76, 512, 512, 8, 8), (False, False)),
       ("gram", (32, 76, 512, 512, 8, 4), (False, False)),
       ("expand", (32, 76, 512, 512, 8, 1), (True, False)), ("expand", (32, 1, 512, 512, 128, 1), (False, False))],
)  # fmt: skip
def test_the_order_follows_from_the_shapes(function, shape, want):
    batch, tokens, k, n, rank, images = shape
    x, a, b, x_v = (
        torch.empty(s, device="meta") for s in ((batch, tokens, k), (rank, k), (n, rank), (batch, images, rank))
    )
    thin = low_rank.thin(function, x, a, b, x_v)
    assert (thin, not thin and low_rank.square(function, x, a, x_v)) == want


@pytest.mark.parametrize("function", ["expand", "gram"])
def test_without_a_bottleneck_a_step_takes_a_few_products_of_a_vector(function):
    t = operands((2, 40, 64, 48, 32, 1), dtype=torch.float32, grad=True)
    flops = []
    for run in (rk.routed_low_rank, reference.routed_low_rank):
        with FlopCounterMode(display=False) as counter:
            with_gradients(run, t, function)
        flops.append(counter.get_total_flops())
    assert flops[0] < 0.15 * flops[1]


def test_a_wider_out_stays_wide_under_autocast():
    t = operands(THIN, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for function in FUNCTIONS:
            y = call(rk.routed_low_rank, t | {"b": torch.zeros_like(t["b"])}, function)
            assert torch.equal(y, t["out"]), function


@pytest.mark.parametrize(("function", "shape"), [("mul", THIN), ("expand", THIN), ("gram", THIN), ("gram", SQUARE)])
def test_it_compiles_into_one_graph_and_maps(function, shape):
    t = operands(shape, grad=True)
    compiled = torch.compile(rk.routed_low_rank, backend="aot_eager", fullgraph=True)
    want = with_gradients(rk.routed_low_rank, t, function)
    for name, got in with_gradients(compiled, t, function).items():
        torch.testing.assert_close(got, want[name], rtol=0, atol=1e-12)
    scales = torch.tensor([1.0, -2.0], dtype=torch.float64)
    many = torch.func.vmap(lambda s: call(rk.routed_low_rank, t | {"b": t["b"] * s}, function, out=False))(scales)
    torch.testing.assert_close(many[1], -2 * many[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"function": "outer"}, "function must be one of none, add, mul, expand, gram, got 'outer'"),
        ({"x": torch.ones(9, 8)}, r"x must be \(B, T, 8\)"),
        ({"a": torch.ones(4, 8)}, r"a must have 5 rows for b \(1, 6, 5\)"),
        ({"b": torch.ones(5)}, r"b must be a non-empty \(N, r\) or \(P, N, r\)"),
        ({"x_v": None}, r"mul needs x_v \(3, V, 5\), got None"),
        ({"x_v": torch.ones(1, 1, 5)}, r"mul needs x_v \(3, V, 5\)"),
        ({"x_v": torch.ones(3, 2, 5)}, "mul takes one visual token, got 2: take their mean, or gram"),
        ({"out": torch.ones(3, 9, 5)}, r"out must be \(3, 9, 6\)"),
        ({"scale": float("nan")}, "scale must be a finite number"),
    ],
)
def test_what_is_wrong_is_said(change, message):
    arguments = {"function": "mul", "scale": 1.0, **operands(THIN, dtype=torch.float32), **change}
    with pytest.raises(ValueError, match=message):
        rk.routed_low_rank(**arguments)
