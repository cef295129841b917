"""rmt.backward against plain autograd followed by the reference's dropout, on every path a layer can take."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse
from torch import nn
from torch.utils.checkpoint import checkpoint

import rmt
import rmt_kernels as rk
from rmt_kernels import reference

THRESHOLD, L2 = 5e-3, 1e-4


def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mask in rmt.masks(model):
            mask.scores.copy_(THRESHOLD + 1e-3 * torch.randn(mask.scores.shape, generator=generator))
    return model


class Mlp(nn.Module):
    """Two masked linears over tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.second = rmt.FusedMaskedLinear(20, 32), rmt.FusedMaskedLinear(32, 7)
        self.example = torch.randn(6, 5, 20)

    def forward(self, x):
        return self.second(F.gelu(self.first(x)).mean(1))


class Twice(Mlp):
    """A layer that the forward meets twice, with different numbers of rows."""

    def __init__(self):
        super().__init__()
        self.again = rmt.FusedMaskedLinear.from_linear(nn.Linear(20, 20))

    def forward(self, x):
        x = self.again(torch.tanh(self.again(x)[:, :3]))
        return super().forward(x)


class Conv(nn.Module):
    """A patch convolution, then a linear."""

    def __init__(self):
        super().__init__()
        self.conv = rmt.FusedMaskedConv2d.from_module(nn.Conv2d(3, 8, 4, stride=4, bias=False))
        self.head = rmt.FusedMaskedLinear(8, 7)
        self.example = torch.randn(6, 3, 8, 8)

    def forward(self, x):
        return self.head(self.conv(x).flatten(2).mean(-1))


class ConvTwice(Conv):
    def forward(self, x):
        return self.head((self.conv(x) * self.conv(x.flip(0))).flatten(2).mean(-1))


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = {"need_weights": False} | options
        self.attn = rmt.FusedMaskedMultiheadAttention.from_module(nn.MultiheadAttention(12, 2, batch_first=True))
        self.head = rmt.FusedMaskedLinear(12, 7)
        self.example = torch.randn(6, 5, 12)

    def forward(self, x):
        return self.head(self.attn(x, x, x, **self.options)[0].mean(1))


class AttentionWithWeights(Attention):
    """Takes the path over materialised masked weights."""

    def __init__(self):
        super().__init__(need_weights=True)


class Checkpointed(Mlp):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Compiled(Mlp):
    def forward(self, x):
        return torch.compile(super().forward, fullgraph=True, backend="aot_eager")(x)


class ScoresInTheLoss(Mlp):
    """Scores used outside a product as well."""

    def forward(self, x):
        return super().forward(x) + self.first.scores.sum()


MODELS = [Mlp, Twice, Conv, ConvTwice, Attention, AttentionWithWeights, Checkpointed, Compiled, ScoresInTheLoss]


def losses(model):
    """R-AMT's two losses of a model on its own example."""
    torch.manual_seed(3)
    label, teacher = torch.randint(7, (6,)), torch.randn(6, 7)
    z = model(model.example)
    task = F.cross_entropy(z, label)
    return task, -(teacher.softmax(-1) * F.log_softmax(z, -1)).sum(1).mean()


def plain_gradients(model, strength, seed, step, l2, general=True):
    """What the method says, in the model's own dtype: autograd for both losses, L2 and dropout by the reference."""
    found = rmt.masks(model)
    scores = [m.scores for m in found]
    task, other = losses(model)
    a = torch.autograd.grad(task, scores, retain_graph=True, allow_unused=True)
    b = torch.autograd.grad(other, scores, allow_unused=True) if general else [None] * len(found)
    want = []
    for stream, (s, a_, b_) in enumerate(zip(scores, a, b)):
        if a_ is None:
            want.append(None)
            continue
        s = s.detach()
        penalty = None if not l2 else l2 / s.norm()
        want.append(
            reference.gradient_dropout(a_, b_, None, s, penalty, rk.rng_state(seed, step), strength, stream).detach()
        )
    return want


def assert_close_but_for_ties(got, want, strength):
    """Equal up to rounding; a decision on a tie between P and U may differ in a handful of elements."""
    wrong = (got - want).abs() > 1e-4 * want.abs() + 2e-6 * want.abs().max()
    assert wrong.sum() <= (0 if strength == 0 else 2 + 0.002 * wrong.numel()), f"{int(wrong.sum())} of {wrong.numel()}"


@pytest.fixture(params=MODELS, ids=lambda kind: kind.__name__)
def model(request):
    torch.manual_seed(0)
    return randomised(request.param())


@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
def test_gradients_are_plain_autograds_after_the_references_dropout(model, strength):
    want = plain_gradients(model, strength, seed=5, step=9, l2=L2)
    rmt.backward(*losses(model), model, strength=strength, seed=5, step=9)
    kept = []
    for mask, w in zip(rmt.masks(model), want):
        assert mask.scores.grad.dtype == torch.float32 and mask.scores.grad.shape == mask.scores.shape
        assert_close_but_for_ties(mask.scores.grad, w, strength)
        kept.append(mask.scores.grad.ne(0).double().mean().item())
    if strength == 1:
        assert min(kept) < 0.98, "some elements must have been dropped"


def test_without_a_general_loss_it_is_plain_autograd_and_l2(model):
    task, _ = losses(model)
    rmt.backward(task, None, model)
    got = [m.scores.grad.clone() for m in rmt.masks(model)]
    scores = [m.scores for m in rmt.masks(model)]
    task, _ = losses(model)
    want = torch.autograd.grad(task + L2 * sum(torch.norm(s, 2) for s in scores), scores)
    for g, w in zip(got, want):
        assert_close_but_for_ties(g, w, 0)


def test_it_is_no_worse_than_autograd_in_fp32():
    torch.manual_seed(0)
    model = randomised(Mlp())
    rmt.backward(*losses(model), model, strength=0.0, l2=0.0)
    got = [m.scores.grad.clone() for m in rmt.masks(model)]
    plain = plain_gradients(model, 0.0, 0, 0, 0.0)
    weights = [m.dense.double().requires_grad_() for m in rmt.masks(model)]
    biases = [model.first.bias.double(), model.second.bias.double()]
    torch.manual_seed(3)
    label = torch.randint(7, (6,))
    hidden = F.gelu(F.linear(model.example.double(), weights[0], biases[0]))
    z = F.linear(hidden.mean(1), weights[1], biases[1])
    truth = torch.autograd.grad(F.cross_entropy(z, label), weights)
    for g, p, t, mask in zip(got, plain, truth, rmt.masks(model)):
        assert_no_worse(g, p, t * mask.weight.double())


@pytest.mark.parametrize("l2", [0.0, 1e-4, 10.0])
def test_the_l2_coefficient_is_that_of_the_norm(l2):
    torch.manual_seed(0)
    model = randomised(Mlp())
    rmt.backward(losses(model)[0], None, model, l2=l2)
    got = [m.scores.grad.clone() for m in rmt.masks(model)]
    rmt.backward(losses(model)[0], None, model, l2=0.0)
    for mask, g in zip(rmt.masks(model), got):
        want = mask.scores.grad + l2 * mask.scores.detach() / mask.scores.detach().norm()
        assert torch.allclose(g, want, rtol=1e-5, atol=1e-6 * want.abs().max())


def test_scores_of_zero_have_an_l2_gradient_of_zero_as_torch_norm():
    model = Mlp()
    with torch.no_grad():
        model.second.scores.zero_()
    rmt.backward(losses(model)[0], None, model)
    assert model.second.scores.grad.isfinite().all()


def test_pairs_of_tensor_and_cotangent_are_the_losses(model):
    rmt.backward(*losses(model), model, seed=1)
    want = [m.scores.grad.clone() for m in rmt.masks(model)]
    torch.manual_seed(3)
    label, teacher = torch.randint(7, (6,)), torch.randn(6, 7)
    z = model(model.example)
    g_task, g_general = rk.logit_cotangents(z.detach(), teacher, label, 1.0)
    rmt.backward((z, g_task), (z, g_general), model, seed=1)
    for mask, w in zip(rmt.masks(model), want):
        assert_close_but_for_ties(mask.scores.grad, w, 1.0)


def test_a_mask_the_loss_does_not_reach_keeps_its_gradient():
    torch.manual_seed(0)
    model = randomised(Mlp())
    model.unused = rmt.FusedMaskedLinear(3, 4)
    kept = model.unused.scores.grad = torch.randn(4, 3)
    want = plain_gradients(model, 1.0, 0, 0, L2)
    rmt.backward(*losses(model), model)
    assert model.unused.scores.grad is kept
    for mask, w in zip(rmt.masks(model)[:2], want):
        assert_close_but_for_ties(mask.scores.grad, w, 1.0)


def test_a_mask_that_only_the_general_loss_reaches_does_not_disturb_the_others():
    torch.manual_seed(0)
    model = randomised(Mlp())
    extra = randomised(rmt.FusedMaskedLinear(7, 7))
    label, teacher = torch.randint(7, (6,)), torch.randn(6, 7)
    z = model(model.example)
    found = [*rmt.masks(model), *rmt.masks(extra)]
    rmt.backward(F.cross_entropy(z, label), (extra(z) * teacher).sum(), found, strength=0.0)
    plain = torch.autograd.grad(F.cross_entropy(model(model.example), label), [m.scores for m in found[:2]])
    for mask, g in zip(found, plain):
        want = g + L2 * mask.scores.detach() / mask.scores.detach().norm()
        assert_close_but_for_ties(mask.scores.grad, want, 0)


def test_a_general_loss_that_misses_a_layer_drops_nothing_there():
    # b = 0 and P = (1 + |a| / (|a| + eps)) / 2: everything well above eps is kept.
    torch.manual_seed(0)
    model = randomised(Mlp())
    hidden = model.first(model.example)
    z = model.second(F.gelu(hidden).mean(1))
    rmt.backward(1e3 * z.square().sum(), hidden.square().sum(), model, l2=0.0)
    (want,) = torch.autograd.grad(1e3 * model(model.example).square().sum(), [model.second.scores])
    assert_close_but_for_ties(model.second.scores.grad, want, 0)


def test_gradients_are_replaced_not_added():
    model = randomised(Mlp())
    rmt.backward(*losses(model), model, seed=4)
    first = [m.scores.grad.clone() for m in rmt.masks(model)]
    rmt.backward(*losses(model), model, seed=4)
    assert all(torch.equal(m.scores.grad, f) for m, f in zip(rmt.masks(model), first)), "and run to run bitwise"


@pytest.mark.parametrize("change", [{"seed": 8}, {"step": 8}], ids=["seed", "step"])
def test_seed_and_step_change_what_is_dropped(change):
    model = randomised(Mlp())
    rmt.backward(*losses(model), model, seed=1, step=1, l2=0.0)
    before = [m.scores.grad.clone() for m in rmt.masks(model)]
    rmt.backward(*losses(model), model, l2=0.0, **({"seed": 1, "step": 1} | change))
    assert all(not torch.equal(m.scores.grad, b) for m, b in zip(rmt.masks(model), before))


def test_two_layers_alike_drop_different_elements():
    torch.manual_seed(0)
    a = randomised(rmt.FusedMaskedLinear(40, 30))
    b = copy.deepcopy(a)
    x, c = torch.randn(8, 40), torch.randn(8, 30)
    y = a(x) + b(x)
    rmt.backward(y.square().sum(), (y * c).sum(), [*rmt.masks(a), *rmt.masks(b)])
    dropped = [layer.scores.grad.abs() == 0 for layer in (a, b)]
    assert all(0.05 < d.double().mean() < 0.95 for d in dropped)
    assert not torch.equal(*dropped)


def test_losses_of_two_forwards_are_combined_or_refused_never_half_used():
    torch.manual_seed(0)
    model = randomised(Mlp())
    want = plain_gradients(model, 1.0, 0, 0, 0.0)
    try:
        rmt.backward(losses(model)[0], losses(model)[1], model, l2=0.0)
    except ValueError:
        return
    for mask, w in zip(rmt.masks(model), want):
        assert_close_but_for_ties(mask.scores.grad, w, 1.0)


def test_seed_and_step_may_be_tensors():
    model = randomised(Mlp())
    rmt.backward(*losses(model), model, seed=2**40 + 3, step=7)
    want = [m.scores.grad.clone() for m in rmt.masks(model)]
    rmt.backward(*losses(model), model, seed=torch.tensor(2**40 + 3), step=torch.tensor(7))
    assert all(torch.equal(m.scores.grad, w) for m, w in zip(rmt.masks(model), want))


def test_retain_graph_allows_a_second_call(model):
    task, general = losses(model)
    rmt.backward(task, general, model, retain_graph=True)
    want = [m.scores.grad.clone() for m in rmt.masks(model)]
    rmt.backward(task, general, model)
    assert all(torch.equal(m.scores.grad, w) for m, w in zip(rmt.masks(model), want))


def test_only_the_masks_asked_for_get_a_gradient():
    model = randomised(Mlp())
    rmt.backward(*losses(model), rmt.masks(model)[:1])
    assert model.first.scores.grad is not None and model.second.scores.grad is None


def test_no_other_gradient_is_written():
    model = randomised(Mlp())
    model.example.requires_grad_()
    rmt.backward(*losses(model), model)
    assert model.example.grad is None
    assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith("scores"))


def test_half_precision_activations_lose_no_gradient_precision():
    torch.manual_seed(0)
    model = randomised(Mlp())
    with torch.autocast("cpu", torch.bfloat16):
        pair = losses(model)
        want = plain_gradients(model, 0.0, 0, 0, L2)
    rmt.backward(*pair, model, strength=0.0)
    for mask, w in zip(rmt.masks(model), want):
        assert mask.scores.grad.dtype == torch.float32
        assert torch.allclose(mask.scores.grad, w, rtol=1e-2, atol=1e-2 * w.abs().max())


def test_a_layer_used_once_under_autocast_and_once_not():
    torch.manual_seed(0)
    layer, x = randomised(rmt.FusedMaskedLinear(20, 20)), torch.randn(6, 20)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return layer(y.float()).square().sum()

    rmt.backward(run(), None, layer, l2=0.0)
    (want,) = torch.autograd.grad(run(), layer.scores)
    assert torch.allclose(layer.scores.grad, want, rtol=1e-2, atol=1e-2 * want.abs().max())


def test_one_row_without_leading_dimensions():
    layer, x = randomised(rmt.FusedMaskedLinear(20, 9)), torch.randn(20)
    rmt.backward(layer(x).square().sum(), None, layer, l2=0.0)
    (want,) = torch.autograd.grad(layer(x[None]).square().sum(), layer.scores)
    assert torch.allclose(layer.scores.grad, want, rtol=1e-5, atol=1e-7)


def frozen_loss():
    model = Mlp()
    with rmt.disabled(model):
        return losses(model)[0], model


ERRORS = {
    "strength-above-one": (lambda m: rmt.backward(*losses(m), m, strength=1.5), r"strength must be.*, got 1.5"),
    "strength-negative": (lambda m: rmt.backward(*losses(m), m, strength=-1), r"strength must be in \[0, 1\], got -1"),
    "strength-nan": (lambda m: rmt.backward(*losses(m), m, strength=float("nan")), "strength must be.*got nan"),
    "not-a-scalar": (lambda m: rmt.backward(m(m.example), None, m), r"must be a scalar, got shape \(6, 7\)"),
    "no-graph": (lambda m: rmt.backward(torch.tensor(1.0), None, m), "with a graph"),
    "not-a-tensor": (lambda m: rmt.backward(1.0, None, m), "with a graph"),
    "general-without-graph": (lambda m: rmt.backward(losses(m)[0], torch.tensor(1.0), m), "with a graph"),
    "another-model": (lambda m: rmt.backward(*losses(m), Mlp()), "does not depend on any of the 2 masked weights"),
    "no-masks": (lambda m: rmt.backward(*losses(m), nn.Linear(2, 2)), "does not depend on any of the 0 masked weights"),
    "cotangent-shape": (lambda m: rmt.backward((m(m.example), torch.ones(6, 6)), None, m), "(?i)shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_refused_and_no_gradient_written(name):
    make, message = ERRORS[name]
    model = randomised(Mlp())
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        make(model)
    assert all(m.scores.grad is None for m in rmt.masks(model))


def test_a_freed_graph_is_an_error_not_a_wrong_gradient():
    model = randomised(Mlp())
    task, general = losses(model)
    task.backward(retain_graph=False)
    model.zero_grad()
    with pytest.raises(RuntimeError, match="second time"):
        rmt.backward(task, general, model)


def test_scores_changed_between_forward_and_backward_are_an_error_not_a_wrong_gradient():
    model = randomised(Mlp())
    task, general = losses(model)
    with torch.no_grad():
        model.first.scores.mul_(-1)
        model.second.scores.mul_(-1)
    model(model.example)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rmt.backward(task, general, model)


def test_a_general_loss_that_does_not_reach_scores_left_to_autograd_is_a_gradient_of_zero():
    layer = rmt.FusedMaskedLinear(4, 3)  # more rows than columns: left to autograd
    with torch.no_grad():
        layer.scores.copy_(torch.randn(3, 4) * 1e-2 + 5e-3)
    x, free = torch.randn(9, 4), torch.randn(3, requires_grad=True)
    y = layer(x)
    # Gradients near GDR_EPS: with b = 0 they are kept with probability (1 + |a| / (|a| + eps)) / 2, well below 1.
    rmt.backward(1e-9 * y.sum(), free.sum(), layer, strength=1.0, seed=3, step=1, l2=0.0)
    a = 1e-9 * x.sum(0).expand(3, 4) * layer.weight
    kept = rk.keep_probability(a, torch.zeros_like(a)) > rk.philox_uniform(rk.rng_state(3, 1), 0, a.shape)
    assert not kept.all()
    torch.testing.assert_close(layer.scores.grad, torch.where(kept, a, 0), rtol=1e-4, atol=1e-15)
