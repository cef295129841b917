"""What one step costs: one forward of the student, one of the teacher without a graph, two backward passes."""

import weakref
from collections import Counter

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmt.config import MaskConfig, TrainConfig
from rmt.masked import MaskedModule, masks
from rmt.masking import apply_masks
from rmt.optim import MaskAdam
from rmt.train import gradients, tune

TEXT = F.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(7)), dim=-1)
# A layer takes 17 rows an image, and its cotangents while those are no more than its 64 columns.
FEW, MANY = 3, 8


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
    """Counts ops, and how many weight-shaped tensors are alive that are neither the model's nor a result."""

    def __init__(self, found, held=()):
        super().__init__()
        self.found, self.calls, self.refs, self.most = found, Counter(), [], 0
        self.shapes = {
            tuple(s) for m in found for s in (m.weight.shape, m.module._parameters[m.prefix + "weight"].shape)
        }
        self.held = {t.untyped_storage().data_ptr() for t in held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        new = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and tuple(t.shape) in self.shapes]
        self.refs = [r for r in self.refs if r() is not None] + [weakref.ref(t) for t in new]
        results = {m.scores.grad.untyped_storage().data_ptr() for m in self.found if m.scores.grad is not None}
        alive = {r().untyped_storage().data_ptr() for r in self.refs} - self.held - results
        self.most = max(self.most, len(alive))
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
        tune(model, TEXT, lambda step: batch(FEW), [1e-3] * 2, TrainConfig(strength=1.0))
    student, teacher = (True, True, {True}), (False, False, {False})
    assert sorted(forwards) == [teacher, teacher, student, student]
    assert len(backwards) == 2 * 2
    # Two blocks of two masked products each; in a backward pass every one of them has one input cotangent.
    assert ops.calls["masked_linear"] == 2 * 4 and ops.calls["masked_linear_dx"] == 2 * 2 * 4
    assert ops.calls["mask_grad"] == 2 * 4


def test_the_teacher_has_no_graph(model):
    _, teacher, _ = gradients(model, TEXT, *batch(FEW), masks(model), TrainConfig(strength=1.0), seed=1, step=0)
    assert not teacher.requires_grad and teacher.grad_fn is None
    assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith("scores"))


@pytest.mark.parametrize("images", [FEW, MANY], ids=["by cotangents", "by autograd"])
def test_no_weight_sized_temporary_lives_between_layers(images):
    """Few rows: none at all but the result in flight. Many rows: for each mask its task gradient or the final one
    that takes its place as soon as the general gradient arrives; one more is in flight, and one a view's copy."""
    model = tiny.model()
    found = apply_masks(model, MaskConfig(targets=("attention",)))
    optimizer = MaskAdam(found, lr=1e-3)
    for step in range(2):
        held = [*model.parameters(), *model.buffers(), *(m.dense for m in found)]
        held += [t for state in optimizer.state.values() for t in state.values()]
        optimizer.zero_grad()
        with Ops(found, held) as ops:
            gradients(model, TEXT, *batch(images), found, TrainConfig(strength=1.0), seed=1, step=step)
        optimizer.step()
        assert ops.calls["mask_grad"] == (1 if images == FEW else 2) * len(found)
        assert ops.most <= (0 if images == FEW else len(found)) + 2
