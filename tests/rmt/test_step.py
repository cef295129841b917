"""What one step costs: one forward of the student, one of the teacher without a graph, two backward passes."""

from collections import Counter

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rmt_kernels as rk
from rmt.config import MaskConfig, TrainConfig
from rmt.masked import MaskedModule, masks
from rmt.masking import apply_masks
from rmt.optim import MaskAdam
from rmt.step import general_loss, gradients
from rmt.train import tune

TEXT = F.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(7)), dim=-1)
IMAGES = 3


def batch(images):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, 32, 32, generator=generator), torch.arange(images) % 4


@pytest.fixture
def model():
    made = tiny.model()
    for mask in apply_masks(made, MaskConfig(targets=("attention", "conv"))):
        torch.nn.init.uniform_(mask.scores, 4e-3, 1e-2)
    return made


class Ops(TorchDispatchMode):
    """Counts ops, and how many tensors of a masked weight's shape are made."""

    def __init__(self, found):
        super().__init__()
        self.calls, self.made = Counter(), 0
        self.shapes = {tuple(m.weight.shape) for m in found}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        new = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and tuple(t.shape) in self.shapes]
        self.made += sum(t.untyped_storage().data_ptr() not in given for t in new)
        return out


def test_a_step_is_two_forwards_and_two_backwards_that_leave_the_teacher_alone(model, monkeypatch):
    forwards, backwards, grad = [], [], torch.autograd.grad
    modules = [m for m in model.modules() if isinstance(m, MaskedModule)]
    model.visual.register_forward_pre_hook(
        lambda *_: forwards.append((modules[0].masked, torch.is_grad_enabled(), {m.masked for m in modules}))
    )
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backwards.append(1) or grad(*a, **k))
    monkeypatch.setattr(torch.Tensor, "backward", None)
    with Ops(masks(model)) as ops:
        tune(model, TEXT, lambda step: batch(IMAGES), [1e-3] * 2, TrainConfig(strength=1.0))
    student, teacher = (True, True, {True}), (False, False, {False})
    assert sorted(forwards) == [teacher, teacher, student, student]
    assert len(backwards) == 2 * 2
    # Two blocks of two masked products each; in a backward pass every one of them has one input cotangent.
    assert ops.calls["masked_linear"] == 2 * 4 and ops.calls["masked_linear_dx"] == 2 * 2 * 4
    # Each of the two passes makes a weight gradient of every masked product; the convolution hands over its own.
    assert ops.calls["weight_grad_"] == 2 * 2 * 4 and ops.calls["mask_grad"] == ops.calls["gradient_dropout"] == 0
    assert ops.calls["mask_update_"] == 2


def test_while_no_bit_is_off_a_step_is_one_forward_and_one_backward(monkeypatch):
    model, backwards, forwards, grad = tiny.model(), [], [], torch.autograd.grad
    optimizer = MaskAdam(apply_masks(model, MaskConfig(targets=("attention",))), lr=1e-3)
    model.visual.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backwards.append(1) or grad(*a, **k))
    config = TrainConfig(strength=1.0)
    for step in range(2):
        gradients(model, TEXT, *batch(IMAGES), optimizer, config, seed=1, step=step)
        optimizer.step()
    assert forwards == [True, True] and len(backwards) == 2 and optimizer.all_on()
    with torch.no_grad():
        optimizer.masks[-1].scores[3, 5] = 0.0
    assert not optimizer.all_on()
    gradients(model, TEXT, *batch(IMAGES), optimizer, config, seed=1, step=2)
    assert forwards == [True, True, False, True] and len(backwards) == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_one_forward_for_both_gives_the_same_bits(precision, strength):
    """Until the first flip and past it, against the same steps with a teacher's forward and a second backward pass."""
    runs, config = [], TrainConfig(strength=strength, precision=precision)
    for always in (False, True):
        model = tiny.model()
        optimizer = MaskAdam(apply_masks(model, MaskConfig()), lr=1e-3)
        on = []
        for step in range(8):
            on.append(optimizer.all_on())
            alike = False if always else None
            gradients(model, TEXT, *batch(IMAGES), optimizer, config, seed=1, step=step, alike=alike)
            optimizer.step()
        assert on[:3] == [True] * 3 and not on[-1]
        runs.append([mask.scores.detach() for mask in optimizer.masks])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_the_teacher_has_no_graph(model):
    optimizer = MaskAdam(model, lr=1e-3)
    _, teacher, _ = gradients(model, TEXT, *batch(IMAGES), optimizer, TrainConfig(strength=1.0), seed=1, step=0)
    assert not teacher.requires_grad and teacher.grad_fn is None
    assert all(p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize("targets", [("attention",), ("attention", "mlp", "conv")])
def test_after_the_first_step_nothing_weight_sized_is_allocated(targets):
    """But by a convolution: its own backward makes its weight gradient, its forward the masked weight."""
    model = tiny.model()
    found = apply_masks(model, MaskConfig(targets=targets))
    for mask in found:
        torch.nn.init.uniform_(mask.scores, 4e-3, 1e-2)
    optimizer = MaskAdam(found, lr=1e-3)
    for step in range(2):
        with Ops([m for m in found if "conv" not in m.key]) as ops:
            gradients(model, TEXT, *batch(IMAGES), optimizer, TrainConfig(strength=1.0), seed=1, step=step)
            optimizer.step()
        assert (ops.made > 0) == (step == 0)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_general_loss_has_the_closed_form_cotangent(temperature):
    generator = torch.Generator().manual_seed(0)
    teacher, z = (10 * torch.randn(6, 5, generator=generator) for _ in range(2))
    z.requires_grad_(True)
    got = torch.autograd.grad(general_loss(z, teacher, temperature), z)[0]
    want = rk.logit_cotangents(z.detach(), teacher, torch.arange(6) % 5, temperature)[1]
    assert torch.allclose(got, want, atol=1e-6) and want.abs().max() > 0.1


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_shortcuts_and_without_the_step_is_the_same_but_for_rounding(model, temperature):
    pairs = []
    for shortcuts in (False, True):
        optimizer = MaskAdam(model, lr=1e-3)
        config = TrainConfig(strength=1.0, temperature=temperature, shortcuts=shortcuts)
        gradients(model, TEXT, *batch(IMAGES), optimizer, config, seed=1, step=0)
        pairs.append([optimizer.gradients.pair(i, general=True)[:2] for i in range(len(optimizer.masks))])
    for official, mine in zip(*pairs):
        assert all((a - b).norm() <= 1e-4 * a.norm() and a.norm() > 0 for a, b in zip(official, mine))
