"""Run by test_triton_interpret.py in a process with TRITON_INTERPRET=1. Not collected by name."""

import itertools

import helpers
import pytest
import torch
from helpers import THRESHOLD, assert_no_worse, assert_same_dropout, layer, shape_id

import rmt_kernels as rk
from rmt_kernels import reference

# The shared shapes, and one for each aligned tile of the table. bfloat16 is no case: the interpreter multiplies bits.
SHAPES = [*helpers.SHAPES, (20, 32, 64), (40, 80, 96), (520, 32, 64)]
DTYPES = [torch.float32, torch.float16]
for_shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
for_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])


@pytest.fixture(autouse=True)
def triton_backend():
    with rk.use_backend("triton"):
        yield


def double(tensors):
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def leaves_alone(tensors, call):
    """The result of `call`, which must not write its inputs."""
    before = {name: t.clone() for name, t in tensors.items()}
    result = call()
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), f"{name} was written"
    return result


def check_linear(t):
    n = t["weight"].shape[0]
    for bias in (None, t["bias"]):
        args = (t["x"], t["weight"], t["bits"], bias)
        exact = [a if a is None or a.dtype == torch.int32 else a.double() for a in args]
        got = leaves_alone(t, lambda args=args: rk.masked_linear(*args))
        assert_no_worse(got, reference.masked_linear(*args, None), reference.masked_linear(*exact, None))
    args = (t["g_task"], t["weight"], t["bits"])
    got = leaves_alone(t, lambda: rk.masked_linear_dx(*args))
    truth = reference.masked_linear_dx(t["g_task"].double(), t["weight"].double(), t["bits"], None)
    assert_no_worse(got, reference.masked_linear_dx(*args, None), truth)
    assert got.shape == t["x"].shape and n == t["g_task"].shape[1]


@for_dtypes
@for_shapes
def test_linear_matches_reference(shape, dtype):
    check_linear(layer(shape, dtype))


@for_dtypes
def test_linear_takes_strides(dtype):
    t = layer((17, 40, 64), dtype)
    t["x"] = torch.cat([t["x"], t["x"]], 1)[:, 5:69]
    t["weight"] = t["weight"].T.contiguous().T
    t["g_task"] = t["g_task"].T.contiguous().T
    t["bias"] = torch.stack([t["bias"], t["bias"]], 1)[:, 0]
    check_linear(t)


@pytest.mark.parametrize("x_dtype, weight_dtype", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_linear_mixes_dtypes(x_dtype, weight_dtype):
    t = layer((17, 40, 197), x_dtype)
    t["weight"], t["bias"] = t["weight"].to(weight_dtype), t["bias"].to(weight_dtype)
    check_linear(t)


def test_linear_takes_leading_dimensions():
    t = layer((24, 9, 40))
    x, g = t["x"].view(2, 3, 4, 40), t["g_task"].view(2, 3, 4, 9)
    assert torch.equal(rk.masked_linear(x, t["weight"], t["bits"]).flatten(0, 2), linear_of(t))
    assert rk.masked_linear_dx(g, t["weight"], t["bits"]).shape == x.shape
    assert torch.equal(
        rk.masked_linear(t["x"][0], t["weight"], t["bits"]), rk.masked_linear(t["x"][:1], *mask_of(t))[0]
    )


def linear_of(t):
    return rk.masked_linear(t["x"], *mask_of(t))


def mask_of(t):
    return t["weight"], t["bits"]


@for_dtypes
def test_off_weights_are_zero_even_if_not_finite(dtype):
    t = layer((5, 9, 37), dtype)
    off = ~reference.unpack_bits(t["bits"], 37)
    want = linear_of(t), rk.masked_linear_dx(t["g_task"], *mask_of(t)), rk.masked_weight(*mask_of(t))
    t["weight"][off] = torch.tensor([float("inf"), float("nan"), -float("inf")], dtype=dtype).repeat(99)[: off.sum()]
    got = linear_of(t), rk.masked_linear_dx(t["g_task"], *mask_of(t)), rk.masked_weight(*mask_of(t))
    for a, b in zip(got, want):
        assert torch.equal(a, b)
    # +0, not -0.
    assert not torch.signbit(got[2][off]).any()


def grouped(split, n, k, dtype=torch.float32):
    """Tensors, bits by group (every third the plain weight) and offsets of a mixed batch."""
    t = layer((sum(split), n, k), dtype)
    bits = [None if i % 3 == 2 else layer((1, n, k), seed=i)["bits"] for i in range(len(split))]
    return t, bits, [0, *itertools.accumulate(split)]


@for_dtypes
@pytest.mark.parametrize(
    "split", [[17], [0, 17, 0], [5, 0, 12], [1, 2, 14], [16, 1], [40, 0, 33, 1]], ids=lambda s: "+".join(map(str, s))
)
def test_grouped_matches_reference(split, dtype):
    """As near the truth as the reference, and each group bit for bit what it is alone, in one tile or another."""
    t, bits, offsets = grouped(split, 40, 67, dtype)
    args = (t["x"], t["weight"], bits, t["bias"], offsets, False)
    got = leaves_alone(t, lambda: rk.grouped_masked_linear(t["x"], t["weight"], bits, offsets, t["bias"]))
    exact = (t["x"].double(), t["weight"].double(), bits, t["bias"].double(), offsets, False)
    assert_no_worse(got, reference.grouped_masked_linear(*args), reference.grouped_masked_linear(*exact))
    all_on = reference.pack_bits(torch.ones(40, 67, dtype=torch.bool))
    for words, i, j in zip(bits, offsets, offsets[1:]):
        alone = rk.masked_linear(t["x"][i:j], t["weight"], all_on if words is None else words, t["bias"])
        assert torch.equal(got[i:j], alone)


@for_dtypes
def test_an_invariant_row_depends_on_its_mask_alone(dtype):
    t, bits, offsets = grouped([70, 1, 0, 9, 40], 24, 64, dtype)
    x, weight, bias = t["x"], t["weight"], t["bias"]
    whole = rk.grouped_masked_linear(x, weight, bits, offsets, bias, invariant=True)
    plain = reference.grouped_masked_linear(x, weight, bits, bias, offsets, True)
    truth = reference.grouped_masked_linear(x.double(), weight.double(), bits, bias.double(), offsets, True)
    assert_no_worse(whole, plain, truth)
    for words, i, j in zip(bits, offsets, offsets[1:]):
        for row in {i, (i + j) // 2, max(i, j - 1)} if j > i else ():
            view = torch.cat([x, x], 1)[row : row + 1, :64]
            alone = rk.grouped_masked_linear(view, weight, [words], [0, 1], bias, invariant=True)
            assert torch.equal(alone[0], whole[row])


def test_grouped_takes_strides():
    t, bits, offsets = grouped([3, 1, 13], 40, 64)
    want = rk.grouped_masked_linear(t["x"], t["weight"], bits, offsets, t["bias"])
    t["x"] = torch.cat([t["x"], t["x"]], 1)[:, 5:69].copy_(t["x"])
    t["weight"] = t["weight"].T.contiguous().T
    got = leaves_alone(t, lambda: rk.grouped_masked_linear(t["x"], t["weight"], bits, offsets, t["bias"]))
    assert torch.allclose(got, want, atol=1e-5)


def test_grouped_takes_no_rows():
    t = layer((0, 9, 40))
    assert rk.grouped_masked_linear(t["x"], t["weight"], [t["bits"], None], [0, 0, 0]).shape == (0, 9)


@for_dtypes
@for_shapes
def test_masked_weight_in_place(shape, dtype):
    t, other = layer(shape, dtype), layer(shape, seed=1)["bits"]
    other[:, ::2] = t["bits"][:, ::2]  # words in common
    want = reference.masked_weight(t["weight"], t["bits"])
    for weight in (t["weight"], t["weight"].T.contiguous().T):
        out = torch.full_like(want, 7)
        leaves_alone(t, lambda weight=weight, out=out: rk.masked_weight_(out, weight, t["bits"]))
        assert torch.equal(out, want)
        equal = torch.repeat_interleave(t["bits"] == other, 32, 1)[:, : shape[2]]
        out = torch.where(equal, 7, reference.masked_weight(t["weight"], other))
        rk.masked_weight_(out, weight, t["bits"], old=other)
        assert torch.equal(out, torch.where(equal, 7, want)), "words that differ, and no others, are written"


def check_mask_grad(t, strength=0.7, stream=3):
    exact = double(t)

    def arguments(t, general):
        return t["x"], t["g_task"], t["g_general"] if general else None, t["weight"], t["scores"]

    got = leaves_alone(t, lambda: rk.mask_grad(*arguments(t, False), penalty=t["penalty"]))
    plain = reference.mask_grad(*arguments(t, False), t["penalty"], None, 1.0, 0)
    a = reference.mask_grad(*arguments(exact, False), exact["penalty"], None, 1.0, 0)
    assert_no_worse(got, plain, a)
    kwargs = {"penalty": t["penalty"], "rng": t["rng"], "strength": strength, "stream": stream}
    got = leaves_alone(t, lambda: rk.mask_grad(*arguments(t, True), **kwargs))
    b = reference.mask_grad(exact["x"], exact["g_general"], None, exact["weight"], None, None, None, 1.0, 0)
    assert_same_dropout(got, a, b, reference.philox_uniform(t["rng"], stream, a.shape), strength)


@for_dtypes
@for_shapes
def test_mask_grad_matches_reference(shape, dtype):
    check_mask_grad(layer(shape, dtype))


@for_dtypes
def test_mask_grad_takes_strides_and_mixed_dtypes(dtype):
    t = layer((17, 40, 64), dtype)
    t["x"] = torch.cat([t["x"], t["x"]], 1)[:, 5:69]
    t["g_task"] = t["g_task"].T.contiguous().T
    t["weight"] = t["weight"].T.contiguous().T.float()
    t["scores"] = torch.stack([t["scores"], t["scores"]], 2)[:, :, 0]
    t["g_general"] = t["g_general"].float()
    check_mask_grad(t)


@for_dtypes
@for_shapes
def test_gradient_dropout_matches_reference(shape, dtype):
    t = layer(shape)
    grads = [layer(shape, seed=i)["weight"].to(dtype) for i in (1, 2)]
    grads[1] = grads[1].T.contiguous().T
    for weight in (None, t["weight"].to(dtype)):
        args = (weight, t["scores"])
        exact = [None if v is None else v.double() for v in args]
        got = rk.gradient_dropout(grads[0], None, *args, penalty=t["penalty"])
        plain = reference.gradient_dropout(grads[0], None, *args, t["penalty"], None, 1.0, 0)
        a = reference.gradient_dropout(grads[0].double(), None, *exact, t["penalty"].double(), None, 1.0, 0)
        assert_no_worse(got, plain, a)
        got = leaves_alone(
            t, lambda args=args: rk.gradient_dropout(*grads, *args, penalty=t["penalty"], rng=t["rng"], stream=7)
        )
        b = grads[1].double() * (1 if weight is None else exact[0])
        assert_same_dropout(got, a, b, reference.philox_uniform(t["rng"], 7, a.shape), 1.0)


@for_shapes
def test_pack_scores_is_exact(shape):
    t = layer(shape)
    t["scores"].view(-1)[::3] = THRESHOLD
    for scores in (t["scores"], t["scores"].half(), t["scores"].T.contiguous().T):
        for threshold in (THRESHOLD, -1.0):
            assert torch.equal(rk.pack_scores(scores, threshold), reference.pack_scores(scores, threshold))


@for_dtypes
@for_shapes
def test_masked_weight_is_exact(shape, dtype):
    t = layer(shape, dtype)
    for weight in (t["weight"], t["weight"].T.contiguous().T):
        got = leaves_alone(t, lambda weight=weight: rk.masked_weight(weight, t["bits"]))
        assert torch.equal(got, reference.masked_weight(weight, t["bits"]))


@pytest.mark.parametrize("dense_dtype", [None, torch.float32, torch.float16], ids=["bits", "fp32", "fp16"])
def test_mask_update_matches_reference(dense_dtype):
    layers = [layer(shape, seed=i) for i, shape in enumerate(helpers.SHAPES)]
    grads = [layer(shape, seed=99 + i)["weight"] * 1e-2 for i, shape in enumerate(helpers.SHAPES)]
    for t, g in zip(layers, grads):
        # Every seventh score is on the threshold and stays there.
        t["scores"].view(-1)[::7], g.view(-1)[::7] = THRESHOLD, 0

    def state(dtype):
        scores = [t["scores"].to(dtype, copy=True) for t in layers]
        moments = [[torch.full_like(s, 1e-3) for s in scores], [torch.full_like(s, 1e-6) for s in scores]]
        for m in moments[0]:
            m.view(-1)[::7] = 0
        weights = [t["weight"].to(dense_dtype) for t in layers] if dense_dtype else []
        dense = [reference.masked_weight(w, t["bits"]) for w, t in zip(weights, layers)]
        return scores, [t["bits"].clone() for t in layers], *moments, dense, weights

    factors = reference.adam_factors(torch.tensor(3), 4e-3, 0.9, 0.999)
    got, plain, truth = state(torch.float32), state(torch.float32), state(torch.float64)
    scores, bits, m, v, dense, weights = got
    rk.mask_update_(scores, bits, m, v, grads, factors, dense=dense, weights=weights)
    for s, dtype in ((plain, torch.float32), (truth, torch.float64)):
        typed = [g.to(dtype) for g in grads]
        reference.mask_update_(*s[:4], s[4], typed, s[5], factors.to(dtype), 0.9, 0.999, 1e-8, THRESHOLD)
    for part in (0, 2, 3):
        for a, b, c in zip(got[part], plain[part], truth[part]):
            assert_no_worse(a, b, c)
    flipped = 0
    for i, s in enumerate(scores):
        assert torch.equal(bits[i], reference.pack_scores(s, THRESHOLD))
        flipped += int((bits[i] != layers[i]["bits"]).sum())
        assert not dense or torch.equal(dense[i], reference.masked_weight(weights[i], bits[i]))
    assert flipped > 100, "the step must change words"


def test_rows_of_a_layer_update_as_in_the_whole():
    t, grad = layer((4, 40, 96)), layer((4, 40, 96), seed=1)["weight"] * 1e-2
    factors = reference.adam_factors(torch.tensor(1), 4e-3, 0.9, 0.999)

    def updated(begin, end):
        scores, bits, weight, g = (x[begin:end].clone() for x in (t["scores"], t["bits"], t["weight"], grad))
        moments, dense = [torch.zeros_like(scores) for _ in range(2)], reference.masked_weight(weight, bits)
        lists = ([x] for x in (scores, bits, *moments, g))
        rk.mask_update_(*lists, factors, dense=[dense], weights=[weight], offsets=[96 * begin])
        return scores, bits, *moments, dense

    parts = zip(*(updated(*rows) for rows in ((0, 4), (4, 23), (23, 40))))
    assert all(torch.equal(whole, torch.cat(rows)) for whole, rows in zip(updated(0, 40), parts))


def test_what_is_not_served_is_refused():
    t = layer((5, 9, 40))
    with pytest.raises(rk.BackendUnavailable, match="float64"):
        rk.masked_linear(t["x"].double(), *mask_of(t))
    with pytest.raises(rk.BackendUnavailable, match="bfloat16"):
        rk.masked_linear(t["x"].bfloat16(), *mask_of(t))
