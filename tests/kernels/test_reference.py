"""The reference against what it claims to be: R-AMT's own step, torch's Adam, numpy's bits, a Philox of our own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import THRESHOLD, assert_no_worse, layer

import rmt_kernels as rk
from rmt_kernels import reference

COEFFICIENT = 1e-4


# R-AMT's step, transcribed from method.md 1.1 (code/trainers/masktuning.py), in whatever dtype it is given.


class Binarizer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, threshold):
        out = scores.clone()
        out[scores.le(threshold)] = 0
        out[scores.gt(threshold)] = 1
        return out

    @staticmethod
    def backward(ctx, g):
        return g, None


def kl_loss(student, teacher, temperature):
    soft = (teacher / temperature).softmax(-1)
    return (-soft * F.log_softmax(student / temperature, -1) * temperature**2).sum(1).mean()


def graddrop(a, b, uniform, strength):
    probability = (torch.sign(a) * (a + b) / (a.abs() + b.abs() + 1e-8) + 1) / 2
    return ((1.0 - strength) + strength * (probability > uniform).to(a.dtype)) * a


class TwoLayers:
    """x -> masked linear -> gelu -> mean over tokens -> masked linear: B images, 5 tokens, 20 -> 32 -> 7 features."""

    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(7)

        def normal(*size):
            return torch.randn(*size, generator=generator).to(dtype)

        self.x, self.weights, self.bias = normal(8, 5, 20), [normal(32, 20), normal(7, 32)], normal(32)
        self.scores = [(normal(*w.shape) * 1e-2 + THRESHOLD).requires_grad_() for w in self.weights]
        self.teacher, self.label = normal(8, 7), torch.randint(7, (8,), generator=generator)

    def official(self, temperature):
        """Logits and, per layer, the gradients of loss_a and loss_b for the scores."""
        masked = [Binarizer.apply(s, THRESHOLD) * w for s, w in zip(self.scores, self.weights)]
        z = F.linear(F.gelu(F.linear(self.x, masked[0], self.bias)).mean(1), masked[1])
        loss_a = F.cross_entropy(z, self.label) + COEFFICIENT * sum(torch.norm(s, 2) for s in self.scores)
        loss_b = kl_loss(z, self.teacher, temperature)
        b = torch.autograd.grad(loss_b, self.scores, retain_graph=True)
        return z, torch.autograd.grad(loss_a, self.scores), b

    def ours(self, temperature, strength, rng):
        """Logits and the final gradients of the scores, through the reference's functions alone."""
        bits = [reference.pack_scores(s.detach(), THRESHOLD) for s in self.scores]
        hidden = reference.masked_linear(self.x, self.weights[0], bits[0], self.bias, None).requires_grad_()
        pooled = F.gelu(hidden).mean(1)
        z = reference.masked_linear(pooled, self.weights[1], bits[1], None, None)
        top = reference.logit_cotangents(z.detach(), self.teacher, self.label, temperature)
        low = []
        for g in top:
            cotangent = reference.masked_linear_dx(g, self.weights[1], bits[1], None)
            low.append(torch.autograd.grad(pooled, hidden, cotangent, retain_graph=True)[0].flatten(0, -2))
        inputs = (self.x.flatten(0, -2), *low), (pooled.detach(), *top)
        grads = []
        for stream, ((x, g_task, g_general), w, s) in enumerate(zip(inputs, self.weights, self.scores)):
            s = s.detach()
            penalty = COEFFICIENT / s.norm()
            grads.append(reference.mask_grad(x, g_task, g_general, w, s, penalty, rng, strength, stream))
        return z, grads


@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_step_is_the_official_step(temperature, strength):
    net, rng = TwoLayers(), rk.rng_state(3, 17)
    z, a, b = net.official(temperature)
    ours_z, ours = net.ours(temperature, strength, rng)
    assert torch.allclose(ours_z, z, rtol=1e-12, atol=1e-12)
    for stream, (a_, b_, got) in enumerate(zip(a, b, ours)):
        uniform = reference.philox_uniform(rng, stream, a_.shape)
        want = graddrop(a_, b_, uniform, strength)
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-15), (got - want).abs().max()
        dropped = (want != a_).double().mean()
        assert (dropped == 0) if strength == 0 else (0.05 < dropped < 0.9), "the case must drop some elements"


def test_the_step_in_fp32_is_no_worse_than_the_official_code_in_fp32():
    single, double = TwoLayers(torch.float32), TwoLayers(torch.float64)
    for t in ("x", "bias", "teacher"):
        setattr(double, t, getattr(single, t).double())
    double.weights = [w.double() for w in single.weights]
    double.scores = [s.detach().double().requires_grad_() for s in single.scores]
    _, plain, _ = single.official(1.0)
    _, truth, _ = double.official(1.0)
    _, got = single.ours(1.0, 0.0, rk.rng_state(0, 0))
    for g, p, t in zip(got, plain, truth):
        assert_no_worse(g, p, t)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logit_cotangents_are_the_gradients_of_the_two_losses(temperature):
    z = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    teacher, label = torch.randn(6, 9, dtype=torch.float64), torch.randint(9, (6,))
    got = reference.logit_cotangents(z.detach(), teacher, label, temperature)
    losses = F.cross_entropy(z, label), kl_loss(z, teacher, temperature)
    for g, loss in zip(got, losses):
        (want,) = torch.autograd.grad(loss, z)
        assert torch.allclose(g, want, rtol=1e-12, atol=1e-15)


def test_logit_cotangents_of_half_precision_logits_are_fp32():
    z, teacher = torch.randn(4, 5).bfloat16(), torch.randn(4, 5).half()
    got = reference.logit_cotangents(z, teacher, torch.arange(4), 1.0)
    want = reference.logit_cotangents(z.float(), teacher.float(), torch.arange(4), 1.0)
    assert all(g.dtype == torch.float32 and torch.equal(g, w) for g, w in zip(got, want))


@pytest.mark.parametrize(
    ("a", "b", "probability"),
    [
        pytest.param(0.2, -0.6, 0.25, id="published-example"),
        pytest.param(0.2, 0.6, 1.0, id="signs-agree"),
        pytest.param(-0.2, -0.6, 1.0, id="both-negative"),
        pytest.param(-0.2, 0.6, 0.25, id="mirrored"),
        pytest.param(0.0, 0.6, 0.5, id="no-task-gradient"),
        pytest.param(0.0, 0.0, 0.5, id="nothing"),
        pytest.param(1e-3, -1e3, 1e-6, id="outweighed"),
        pytest.param(5e-9, 5e-9, 0.75, id="eps-at-1e-8"),
        pytest.param(5e-8, 5e-8, 0.9545454545, id="eps-at-1e-7"),
    ],
)
def test_keep_probability_has_the_stated_values(a, b, probability):
    got = reference.keep_probability(*(torch.tensor(v, dtype=torch.float64) for v in (a, b)))
    assert got.item() == pytest.approx(probability, abs=2e-8)


def test_no_task_gradient_gives_no_gradient_whatever_is_drawn():
    zero, b = torch.zeros(64, 64), torch.randn(64, 64)
    got = reference.gradient_dropout(zero, b, None, None, None, rk.rng_state(1, 1), 1.0, 0)
    assert got.eq(0).all()


def test_elements_are_kept_as_often_as_their_probability_says():
    rng = rk.rng_state(11, 4)
    for target in (0.1, 0.25, 0.5, 0.9):
        # a = 1 and b = -r give P = (1 + (1 - r) / (1 + r)) / 2 = 1 / (1 + r).
        a = torch.ones(200, 250)
        b = torch.full_like(a, 1 - 1 / target)
        kept = reference.gradient_dropout(a, b, None, None, None, rng, 1.0, 0).ne(0).double().mean().item()
        assert abs(kept - target) < 5 * (target * (1 - target) / a.numel()) ** 0.5, f"P = {target}, kept {kept}"


@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
def test_a_dropped_element_keeps_one_minus_strength_of_itself(strength):
    a, b = torch.randn(50, 60), torch.randn(50, 60)
    got = reference.gradient_dropout(a, b, None, None, None, rk.rng_state(5, 6), strength, 2)
    dropped = ~(reference.keep_probability(a, b) > reference.philox_uniform(rk.rng_state(5, 6), 2, (50, 60)))
    assert torch.equal(got[~dropped], a[~dropped])
    assert torch.equal(got[dropped], (1 - strength) * a[dropped])
    assert dropped.any()


def test_the_l2_term_joins_the_task_gradient_before_the_dropout():
    scores = torch.randn(20, 30, dtype=torch.float64, requires_grad=True)
    (COEFFICIENT * torch.norm(scores, 2)).backward()
    t = scores.detach()
    penalty = COEFFICIENT / t.norm()
    zero, opposing = torch.zeros_like(t), -3 * scores.grad
    assert torch.allclose(reference.gradient_dropout(zero, None, None, t, penalty, None, 1.0, 0), scores.grad)
    rng = rk.rng_state(2, 2)
    got = reference.gradient_dropout(zero, opposing, None, t, penalty, rng, 1.0, 0)
    want = graddrop(scores.grad, opposing, reference.philox_uniform(rng, 0, t.shape), 1.0)
    assert torch.allclose(got, want, rtol=1e-12, atol=0)
    assert got.eq(0).any() and got.ne(0).any(), "the L2 term alone must decide what is dropped"


def test_the_general_gradient_gets_the_chain_rule_but_not_the_l2_term():
    t = layer((4, 20, 30), torch.float64)
    ga, gb = torch.randn(20, 30, dtype=torch.float64), torch.randn(20, 30, dtype=torch.float64)
    scores, penalty = t["scores"].double(), torch.tensor(0.5, dtype=torch.float64)
    got = reference.gradient_dropout(ga, gb, t["weight"], scores, penalty, t["rng"], 0.3, 1)
    uniform = reference.philox_uniform(t["rng"], 1, ga.shape)
    assert torch.allclose(got, graddrop(ga * t["weight"] + 0.5 * scores, gb * t["weight"], uniform, 0.3))


def test_mask_update_is_torch_adam():
    start = THRESHOLD + torch.randn(9, 33, dtype=torch.float64) * 1e-3
    parameter = start.clone().requires_grad_()
    adam = torch.optim.Adam([parameter], lr=1e-3, betas=(0.8, 0.97), eps=1e-6)
    scores, m, v = [start.clone()], [torch.zeros_like(start)], [torch.zeros_like(start)]
    weight = [torch.randn_like(start)]
    bits = [reference.pack_scores(start, THRESHOLD)]
    dense, first = [reference.masked_weight(weight[0], bits[0])], bits[0].clone()
    for step in range(1, 7):
        grad = torch.randn_like(start)
        parameter.grad = grad.clone()
        adam.step()
        # Not adam_factors: it rounds to fp32, which is checked on its own below.
        factors = torch.tensor([1e-3 / (1 - 0.8**step), (1 - 0.97**step) ** -0.5], dtype=torch.float64)
        reference.mask_update_(scores, bits, m, v, dense, [grad], weight, factors, 0.8, 0.97, 1e-6, THRESHOLD)
        assert torch.allclose(scores[0], parameter.detach(), rtol=1e-12, atol=1e-15), f"step {step}"
        assert torch.equal(bits[0], reference.pack_bits(parameter.detach().float() > THRESHOLD))
        assert torch.equal(dense[0], weight[0] * reference.unpack_bits(bits[0], 33))
    assert not torch.equal(bits[0], first), "some bits should have flipped"


def test_adam_factors_are_adams_corrections():
    for step in (1, 2, 10, 100_000):
        lr, denominator = reference.adam_factors(torch.tensor(step), 8e-5, 0.9, 0.999).tolist()
        assert lr == pytest.approx(8e-5 / (1 - 0.9**step), rel=1e-7)
        assert denominator == pytest.approx((1 - 0.999**step) ** -0.5, rel=1e-7)
    assert reference.adam_factors(torch.tensor(3), torch.tensor(1e-3), 0.9, 0.999).dtype == torch.float32


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 8, 31, 32, 33, 64, 197, 771])
def test_bits_are_numpy_packbits_little_endian(k):
    mask = torch.rand(5, k) > 0.5
    bits = reference.pack_bits(mask)
    assert bits.dtype == torch.int32 and bits.shape == (5, -(-k // 32))
    padded = np.zeros((5, bits.shape[1] * 32), dtype=bool)
    padded[:, :k] = mask.numpy()
    assert np.array_equal(np.packbits(padded, axis=1, bitorder="little"), bits.numpy().view(np.uint8))
    assert torch.equal(reference.unpack_bits(bits, k), mask)


def test_one_bit_each():
    mask = torch.zeros(3, 64, dtype=torch.bool)
    mask[0, 0] = mask[1, 31] = mask[2, 33] = True
    assert reference.pack_bits(mask).tolist() == [[1, 0], [-(2**31), 0], [0, 2]]


def test_pad_bits_are_ignored_when_unpacking():
    dirty = torch.full((2, 2), -1, dtype=torch.int32)
    assert reference.unpack_bits(dirty, 33).shape == (2, 33)
    assert reference.unpack_bits(dirty, 33).all()


def test_the_threshold_is_strict_and_compared_in_fp32():
    at = torch.tensor(THRESHOLD)
    above, below = torch.nextafter(at, torch.tensor(1.0)), torch.nextafter(at, torch.tensor(0.0))
    scores = torch.stack([below, at, above, torch.tensor(-0.0)])[None]
    assert reference.pack_scores(scores, at.item()).tolist() == [[0b0100]]
    # A python threshold is rounded to fp32 first: a score stored in fp32 as 5e-3 is not above 5e-3.
    assert reference.pack_scores(torch.full((1, 1), 5e-3), 5e-3).tolist() == [[0]]
    assert reference.pack_scores(torch.tensor([[0.0, -0.0, 1e-45]]), 0.0).tolist() == [[0b100]]


def test_masked_weight_replaces_off_elements_even_where_they_are_not_finite():
    weight = torch.tensor([[float("nan"), float("inf"), -2.0, 3.0]])
    got = reference.masked_weight(weight, torch.tensor([[0b1000]], dtype=torch.int32))
    assert got.tolist() == [[0.0, 0.0, 0.0, 3.0]]
    assert not got.signbit().any(), "off is +0"


def test_products_are_those_of_the_masked_weight():
    t = layer((6, 20, 45), torch.float64)
    dense = t["weight"] * (t["scores"] > THRESHOLD)
    y = reference.masked_linear(t["x"], t["weight"], t["bits"], t["bias"], None)
    assert torch.allclose(y, t["x"] @ dense.T + t["bias"], rtol=1e-12)
    assert torch.allclose(reference.masked_linear_dx(t["g_task"], t["weight"], t["bits"], None), t["g_task"] @ dense)
    grad = reference.mask_grad(t["x"], t["g_task"], None, t["weight"], None, None, None, 1.0, 0)
    assert torch.allclose(grad, (t["g_task"].T @ t["x"]) * t["weight"], rtol=1e-12)


def test_a_transposed_batch_gives_linear_to_the_last_bit_of_an_unfrozen_linear():
    x, weight, bias = torch.randn(3, 40, 64).transpose(0, 1), torch.randn(48, 64, requires_grad=True), torch.randn(48)
    assert torch.equal(reference.linear(x, weight.detach(), bias), F.linear(x, weight, bias).detach())


def test_grouped_rows_use_their_own_tasks_bits():
    t = layer((9, 12, 40), torch.float64)
    bits = [*(reference.pack_bits(torch.rand(12, 40) > 0.5) for _ in range(3)), None]
    for invariant in (False, True):
        got = reference.grouped_masked_linear(t["x"], t["weight"], bits, t["bias"], [0, 2, 2, 8, 9], invariant)
        for row, task in enumerate([0, 0, 2, 2, 2, 2, 2, 2, 3]):
            kept = 1 if bits[task] is None else reference.unpack_bits(bits[task], 40)
            assert torch.allclose(got[row], (t["weight"] * kept) @ t["x"][row] + t["bias"], rtol=1e-12)


def test_the_invariant_reference_knows_no_neighbours():
    t = layer((70, 48, 100))
    bits = [t["bits"], None]
    y = reference.grouped_masked_linear(t["x"], t["weight"], bits, t["bias"], [0, 40, 70], True)
    for row in (0, 39, 40, 69):
        words = [bits[row >= 40]]
        alone = reference.grouped_masked_linear(t["x"][row : row + 1], t["weight"], words, t["bias"], [0, 1], True)
        assert torch.equal(y[row], alone[0])


@pytest.mark.parametrize("known", [False, True], ids=["whole", "old"])
def test_masked_weight_in_place_is_that_of_the_new_bits(known):
    t = layer((1, 12, 40))
    old, new = (reference.pack_bits(torch.rand(12, 40) > 0.5) for _ in range(2))
    out = reference.masked_weight(t["weight"], old)
    reference.masked_weight_(out, t["weight"], new, old if known else None)
    assert torch.equal(out, reference.masked_weight(t["weight"], new))


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["masked_linear", "masked_weight"])
def test_gradcheck_in_float64(op):
    t = layer((3, 4, 35), torch.float64)
    leaves = [t[name].clone().requires_grad_() for name in ("x", "weight", "bias")]
    if op == "masked_linear":
        assert torch.autograd.gradcheck(lambda x, w, b: rk.masked_linear(x, w, t["bits"], b), leaves)
    else:
        assert torch.autograd.gradcheck(lambda w: rk.masked_weight(w, t["bits"]), leaves[1:2])


@pytest.mark.parametrize("op", ["masked_linear", "masked_weight"])
def test_the_gradient_of_the_scores_is_straight_through(op):
    t = layer((7, 10, 35), torch.float64)
    scores = t["scores"].double().requires_grad_()
    if op == "masked_linear":
        y = rk.masked_linear(t["x"], t["weight"], t["bits"], t["bias"], scores=scores)
    else:
        y = t["x"] @ rk.masked_weight(t["weight"], t["bits"], scores).T
    y.backward(t["g_task"])
    want = (t["g_task"].T @ t["x"]) * t["weight"]
    assert torch.allclose(scores.grad, want, rtol=1e-12)
    off = ~reference.unpack_bits(t["bits"], 35)
    assert scores.grad[off].ne(0).any(), "off weights get a gradient too, so that they can come back"


# --- draws ------------------------------------------------------------------------------------------------------------


def numpy_philox(counter, key):
    """Philox4x32-10 as Salmon et al. 2011 define it, in Python integers. counter: 4 words, key: 2 words."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(product1 >> 32) ^ c[1] ^ k[0], product1 % 2**32, (product0 >> 32) ^ c[3] ^ k[1], product0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def expected_uniforms(seed, step, stream, first, count):
    """What element first .. first + count - 1 must draw, from Random123's generator."""
    key = (seed % 2**32, ((seed >> 32) + stream) % 2**32)
    out = []
    for index in range(first, first + count):
        group, counter_step = index // 4, step % 2**64
        counter = (group % 2**32, group >> 32, counter_step % 2**32, counter_step >> 32)
        out.append((numpy_philox(counter, key)[index % 4] >> 8) / 2**24)
    return torch.tensor(out)


def test_the_philox_of_this_file_gives_random123s_known_answers():
    # kat_vectors of Random123, philox4x32 10.
    assert [f"{w:08x}" for w in numpy_philox((0,) * 4, (0,) * 2)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = (2**32 - 1,)
    assert [f"{w:08x}" for w in numpy_philox(ones * 4, ones * 2)] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert [f"{w:08x}" for w in numpy_philox(*pi)] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


@pytest.mark.parametrize(
    ("seed", "step", "stream"),
    [
        pytest.param(0, 0, 0, id="zero"),
        pytest.param(1234567890123, 42, 7, id="wide-seed"),
        pytest.param(2**63 - 1, 2**40 + 7, 2**31, id="carry-out-of-the-key"),
        pytest.param(-3, -1, 5, id="negative"),
    ],
)
def test_draws_are_philox_4x32_10(seed, step, stream):
    got = reference.philox_uniform(rk.rng_state(seed, step), stream, (3, 7))
    assert torch.equal(got.flatten(), expected_uniforms(seed, step, stream, 0, 21))


@pytest.mark.parametrize("first_group", [2**29 - 1, 2**30, 2**32 - 1, 2**33 + 5], ids=hex)
@pytest.mark.parametrize("skip", [0, 3])
def test_the_counter_is_64_bits_wide(first_group, skip):
    got = reference.philox_uniform(rk.rng_state(99, 3), 1, (2, 4), 4 * first_group + skip)
    assert torch.equal(got.flatten(), expected_uniforms(99, 3, 1, 4 * first_group + skip, 8))


def test_draws_are_uniform():
    u = reference.philox_uniform(rk.rng_state(0, 1), 0, (500, 600)).flatten().double()
    n = u.numel()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    # Kolmogorov-Smirnov: the chance of 2.5 / sqrt(n) is under 1e-5.
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    ordered = u.sort().values
    distance = torch.maximum((ordered - steps[:-1]).max(), (steps[1:] - ordered).max())
    assert distance < 2.5 / n**0.5, f"KS distance {distance:.2e}"
    lagged = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(lagged) < 5 / n**0.5


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param((1, 0, 0), (1, 0, 1), id="streams"),
        pytest.param((1, 0, 0), (1, 1, 0), id="steps"),
        pytest.param((1, 0, 0), (2, 0, 0), id="seeds"),
        pytest.param((1, 0, 0), (1 + 2**40, 0, 0), id="high-words-of-the-seed"),
        pytest.param((1, 0, 0), (1, 2**32, 0), id="high-words-of-the-step"),
    ],
)
def test_draws_differ_and_are_uncorrelated_between(first, second):
    u, v = (reference.philox_uniform(rk.rng_state(a, b), c, (200, 200)).flatten() for a, b, c in (first, second))
    assert (u == v).double().mean() < 1e-3
    assert abs(torch.corrcoef(torch.stack([u, v]))[0, 1]) < 5 / u.numel() ** 0.5


def test_a_draw_depends_on_the_flat_index_alone():
    rng = rk.rng_state(8, 8)
    flat = reference.philox_uniform(rng, 3, (1, 600))
    for shape in ((600, 1), (20, 30), (5, 120)):
        assert torch.equal(reference.philox_uniform(rng, 3, shape).flatten(), flat.flatten())
    assert torch.equal(reference.philox_uniform(rng, 3, (11, 13)).flatten(), flat.flatten()[:143])
