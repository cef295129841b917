"""The captured step. On a GPU: equal to plain steps bit for bit. Everywhere: what it refuses, what it counts with."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from rmt.config import MaskConfig, TrainConfig, UserError
from rmt.graph import WARMUP, CapturedStep
from rmt.masking import apply_masks
from rmt.optim import MaskAdam
from rmt.select import select
from rmt.step import Step
from rmt.train import tune

TEXT = F.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(7)), dim=-1)


def batch(step, device):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 32, 32, generator=generator).to(device), torch.arange(4, device=device)


def made(device, graph, config, off=True, budget=None):
    model, chosen = tiny.model(), None
    if budget:
        chosen = select(model, [], criterion="magnitude", budget=budget, config=MaskConfig(), loss=None)
    found = apply_masks(model.to(device), MaskConfig(), chosen)
    if off:
        for i, mask in enumerate(found):
            start = 1e-2 - 6e-3 * torch.rand(mask.scores.shape, generator=torch.Generator().manual_seed(i))
            with torch.no_grad():
                mask.scores.copy_(start)
    lr = torch.tensor(1e-3, dtype=torch.float64, device=device) if graph else 1e-3
    optimizer = MaskAdam(found, lr=lr, capturable=graph, state=config.adam)
    kind = CapturedStep if graph else Step
    return optimizer, kind(model, TEXT.to(device), optimizer, config, seed=1)


@pytest.mark.gpu
@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("off", [True, False], ids=["usual", "from the first step"])
def test_replayed_steps_are_plain_steps_bit_for_bit(precision, state, off):
    """Seeds and learning rates change between replays; without a bit off the plain steps before capture go first."""
    config, runs = TrainConfig(strength=1.0, precision=precision, adam=state), []
    for graph in (False, True):
        optimizer, take = made("cuda", graph, config, off)
        for step in range(WARMUP + 8):
            optimizer.set_lr(1e-3 / (1 + step))
            logits = take(*batch(step, "cuda"), step)[0].clone()
        runs.append([logits, *(m.scores.detach() for m in optimizer.masks), *(m.bits for m in optimizer.masks)])
    assert take.graph is not None
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_steps_over_selected_weights_are_plain_steps_bit_for_bit(precision):
    config, runs = TrainConfig(strength=1.0, precision=precision), []
    for graph in (False, True):
        optimizer, take = made("cuda", graph, config, budget=0.3)
        for step in range(WARMUP + 8):
            logits = take(*batch(step, "cuda"), step)[0].clone()
        assert any(m.selected is not None for m in optimizer.masks)
        runs.append([logits, *(m.scores.detach() for m in optimizer.masks), *(m.bits for m in optimizer.masks)])
    assert take.graph is not None
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.gpu
def test_a_captured_step_takes_one_shape():
    _, take = made("cuda", True, TrainConfig(strength=1.0))
    for step in range(WARMUP + 1):
        take(*batch(step, "cuda"), step)
    image, label = batch(0, "cuda")
    with pytest.raises(ValueError, match=r"takes images \(4, 3, 32, 32\), got \(3, 3, 32, 32\)"):
        take(image[:3], label[:3], 9)


@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit"])
def test_counting_on_the_device_is_counting_on_the_host(state):
    """What a graph needs of the optimizer, without one: a tensor for the learning rate and one for the step."""
    config, runs = TrainConfig(strength=1.0, adam=state), []
    for on_device in (False, True):
        model = tiny.model()
        found = apply_masks(model, MaskConfig())
        lr = torch.tensor(2e-3, dtype=torch.float64) if on_device else 2e-3
        optimizer = MaskAdam(found, lr=lr, capturable=on_device, state=state)
        take = Step(model, TEXT, optimizer, config, seed=1)
        for step in range(4):
            optimizer.set_lr(2e-3 / (1 + step))
            take(*batch(step, "cpu"), step)
        runs.append([m.scores.detach() for m in found])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert optimizer.param_groups[0]["lr"] is lr and int(optimizer.param_groups[0]["step"]) == 4


def test_refused():
    config = TrainConfig(strength=1.0, graph=True)
    model = tiny.model()
    apply_masks(model, MaskConfig())
    with pytest.raises(UserError, match="graph needs a CUDA device, the model is on cpu"):
        tune(model, TEXT, lambda step: batch(step, "cpu"), [1e-3], config)
