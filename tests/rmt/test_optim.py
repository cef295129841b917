"""MaskAdam is torch.optim.Adam, and leaves bits and masked weights that belong to the new scores."""

import copy
import io

import pytest
import torch
from torch import nn

import rmt
import rmt_kernels as rk
from rmt_kernels import reference

THRESHOLD = 5e-3


def small_model(seed=0):
    """A linear, a convolution and an attention; scores around the threshold."""
    torch.manual_seed(seed)
    model = nn.ModuleList(
        [
            rmt.FusedMaskedLinear(37, 12),
            rmt.FusedMaskedConv2d.from_module(nn.Conv2d(3, 5, 3)),
            rmt.FusedMaskedMultiheadAttention.from_module(nn.MultiheadAttention(16, 2)),
        ]
    )
    with torch.no_grad():
        for mask in rmt.masks(model):
            mask.scores.copy_(THRESHOLD + 1e-3 * torch.randn_like(mask.scores))
    return model


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(100 + step)
    for mask in rmt.masks(model):
        mask.scores.grad = torch.randn(mask.scores.shape, generator=generator) * 1e-3


def scores_of(model):
    return [m.scores.detach().clone() for m in rmt.masks(model)]


def stored(mask):
    """Bits and masked weight as they lie in the module, without the refresh of the public doors."""
    return mask.module._buffers[mask.prefix + "bits"], mask.module._dense[mask.prefix]


def assert_belongs_to_the_scores(model):
    for mask in rmt.masks(model):
        bits, dense = stored(mask)
        want = reference.pack_scores(mask.scores.detach(), THRESHOLD)
        assert torch.equal(bits, want), mask.key
        assert torch.equal(dense, reference.masked_weight(mask.weight, want)), mask.key


OPTIONS = {
    "defaults": {},
    "fast": {"lr": 1e-3},
    "betas": {"lr": 1e-3, "betas": (0.5, 0.9)},
    "eps": {"lr": 1e-3, "eps": 1e-3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_torch_adams(name):
    model = small_model()
    # In float64, so that the bound is our own rounding alone: a few ulps of a score per step.
    truth = [nn.Parameter(s.double()) for s in scores_of(model)]
    ours, torchs = rmt.MaskAdam(model, **OPTIONS[name]), torch.optim.Adam(truth, **({"lr": 8e-5} | OPTIONS[name]))
    for step in range(1, 9):
        set_gradients(model, step)
        for mask, parameter in zip(rmt.masks(model), truth):
            parameter.grad = mask.scores.grad.double()
        ours.step()
        torchs.step()
        for mask, parameter in zip(rmt.masks(model), truth):
            error = (mask.scores.double() - parameter).abs().max()
            assert error <= step * 2**-23 * parameter.abs().max(), f"{mask.key}, step {step}: {error:.2e}"


def test_bits_and_masked_weights_are_new_right_after_a_step():
    model = small_model()
    optimizer = rmt.MaskAdam(model, lr=1e-3)
    for step in range(4):
        before = [m.bits.clone() for m in rmt.masks(model)]
        set_gradients(model, step)
        optimizer.step()
        assert_belongs_to_the_scores(model)
        assert all(not torch.equal(m.bits, b) for m, b in zip(rmt.masks(model), before)), (
            "some bits should have flipped"
        )


def test_a_forward_after_a_step_repacks_nothing_and_is_right(monkeypatch):
    model = small_model()
    optimizer = rmt.MaskAdam(model, lr=1e-3)
    set_gradients(model, 1)
    optimizer.step()
    monkeypatch.setattr(rk, "pack_scores", lambda *a: pytest.fail("repacked what the step had packed"))
    x = torch.randn(20, 37)
    layer = model[0]
    weight = layer.weight * (layer.scores > THRESHOLD)
    assert torch.allclose(layer(x), nn.functional.linear(x, weight, layer.bias), atol=1e-6)


def test_scores_or_weights_changed_by_hand_between_steps_are_noticed():
    model = small_model()
    optimizer = rmt.MaskAdam(model, lr=1e-3)
    set_gradients(model, 1)
    optimizer.step()
    with torch.no_grad():
        for mask in rmt.masks(model):
            mask.scores.mul_(-1).add_(2 * THRESHOLD)
        model[0].weight.mul_(3)
    set_gradients(model, 2)
    optimizer.step()
    assert_belongs_to_the_scores(model)


def test_learning_rate_schedulers_work():
    model, parameters = small_model(), [nn.Parameter(s) for s in scores_of(small_model())]
    optimizers = rmt.MaskAdam(model, lr=1e-3), torch.optim.Adam(parameters, lr=1e-3)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=4) for o in optimizers]
    for step in range(4):
        set_gradients(model, step)
        for mask, parameter in zip(rmt.masks(model), parameters):
            parameter.grad = mask.scores.grad.clone()
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"] < 1e-3
    for mask, parameter in zip(rmt.masks(model), parameters):
        assert torch.allclose(mask.scores, parameter, rtol=1e-5, atol=1e-8)


def test_a_tensor_learning_rate_is_read_at_every_step():
    model, other = small_model(), small_model()
    rate = torch.tensor(1e-3)
    first, second = rmt.MaskAdam(model, lr=rate), rmt.MaskAdam(other, lr=1e-3)
    for step, value in enumerate((1e-3, 5e-4)):
        rate.fill_(value)
        second.param_groups[0]["lr"] = value
        for m, o in ((model, first), (other, second)):
            set_gradients(m, step)
            o.step()
    for a, b in zip(scores_of(model), scores_of(other)):
        assert torch.allclose(a, b, rtol=1e-6, atol=0)


def test_a_state_dict_round_trip_resumes_bitwise():
    model = small_model()
    optimizer = rmt.MaskAdam(model, lr=1e-3)
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again = small_model(seed=9)
    again.load_state_dict(saved["model"])
    resumed = rmt.MaskAdam(again, lr=123.0)
    resumed.load_state_dict(saved["optimizer"])
    for step in range(3, 6):
        for m, o in ((model, optimizer), (again, resumed)):
            set_gradients(m, step)
            o.step()
    for a, b in zip(rmt.masks(model), rmt.masks(again)):
        assert torch.equal(a.scores, b.scores) and torch.equal(a.bits, b.bits)
    assert_belongs_to_the_scores(again)


def test_a_deep_copy_of_the_model_is_not_trained_with_it():
    model = small_model()
    optimizer = rmt.MaskAdam(model, lr=1e-3)
    set_gradients(model, 0)
    optimizer.step()
    clone = copy.deepcopy(model)
    frozen = scores_of(clone)
    set_gradients(model, 1)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(scores_of(clone), frozen))
    other = rmt.MaskAdam(clone, lr=1e-3)
    set_gradients(clone, 2)
    other.step()
    assert_belongs_to_the_scores(model)
    assert_belongs_to_the_scores(clone)


def test_model_and_optimizer_deep_copied_together_train_alike():
    model = small_model()
    optimizer = rmt.MaskAdam(model, lr=1e-3)
    set_gradients(model, 0)
    optimizer.step()
    clone, other = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (clone, other)):
        set_gradients(m, 1)
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(scores_of(model), scores_of(clone)))
    assert_belongs_to_the_scores(clone)


def test_moving_the_model_between_steps_keeps_training_consistent():
    model = small_model()
    optimizer = rmt.MaskAdam(model, lr=1e-3)
    set_gradients(model, 0)
    optimizer.step()
    model.bfloat16()
    set_gradients(model, 1)
    optimizer.step()
    assert_belongs_to_the_scores(model)
    assert all(m.scores.dtype == torch.float32 for m in rmt.masks(model))


def test_float64_weights_are_updated_like_any_other():
    model, plain = small_model().double(), small_model()
    for m in (model, plain):
        optimizer = rmt.MaskAdam(m, lr=1e-3)
        set_gradients(m, 0)
        optimizer.step()
    # float64 weights may be another backend's: its scores may differ in the last bit.
    for a, b in zip(scores_of(model), scores_of(plain)):
        assert (a - b).abs().max() <= 2**-23 * b.abs().max()
    assert_belongs_to_the_scores(model)


def test_layers_of_mixed_dtypes_are_updated_together():
    model = small_model()
    model[1].half()
    model[2].double()
    optimizer = rmt.MaskAdam(model, lr=1e-3)
    set_gradients(model, 0)
    optimizer.step()
    assert_belongs_to_the_scores(model)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_transposed_weight_and_a_channels_last_convolution_can_be_trained(backend):
    linear = nn.Linear(37, 12)
    linear.weight = nn.Parameter(torch.randn(37, 12).T)
    conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    model = nn.ModuleList([rmt.FusedMaskedLinear.from_linear(linear), rmt.FusedMaskedConv2d.from_module(conv)])
    optimizer = rmt.MaskAdam(model, lr=1e-2)
    with rk.use_backend(backend):
        for step in range(2):
            set_gradients(model, step)
            optimizer.step()
            assert_belongs_to_the_scores(model)


def test_masks_without_a_gradient_keep_their_scores_and_no_gradient_at_all_is_no_step():
    model = small_model()
    optimizer = rmt.MaskAdam(model, lr=1e-3)
    before = scores_of(model)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 0
    set_gradients(model, 0)
    model[0].scores.grad = None
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(scores_of(model), before)]
    assert changed == [False, True, True, True]


def test_zero_grad_and_closure():
    model = small_model()
    optimizer = rmt.MaskAdam(model, lr=1e-3)
    x = torch.randn(4, 37)

    def closure():
        optimizer.zero_grad()
        loss = model[0](x).square().sum()
        loss.backward()
        return loss

    before = model[0].scores.detach().clone()
    loss = optimizer.step(closure)
    assert torch.is_tensor(loss), "the closure's loss is handed back, as by torch's optimizers"
    assert not torch.equal(model[0].scores, before)


def test_a_score_that_became_nan_does_not_pass_unseen():
    model = small_model()
    optimizer = rmt.MaskAdam(model, lr=1e-3)
    set_gradients(model, 0)
    model[0].scores.grad[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        optimizer.step()
        model[0](torch.randn(1, 37))


REFUSALS = {
    "nothing-masked": (lambda: rmt.MaskAdam(nn.Linear(2, 2)), "no masked weights"),
    "no-masks": (lambda: rmt.MaskAdam([]), "no masked weights"),
    "two-thresholds": (
        lambda: rmt.MaskAdam(
            nn.ModuleList([rmt.FusedMaskedLinear(2, 2), rmt.FusedMaskedLinear(2, 2, threshold=1e-3)])
        ), r"one threshold, got \[0.001, 0.005\]",
    ),
    "beta": (lambda: one_step(betas=(1.0, 0.9)), r"\[0, 1\), got \(1.0, 0.9\)"),
    "eps-nan": (lambda: one_step(eps=float("nan")), "eps must be a finite number from 0 up, got nan"),
    "rate-nan": (lambda: one_step(lr=float("nan")), "lr must be.*got nan"),
    "rate-negative": (lambda: one_step(lr=-1.0), "lr must be.*got -1"),
}  # fmt: skip


def one_step(**options):
    model = small_model()
    optimizer = rmt.MaskAdam(model, **options)
    set_gradients(model, 0)
    optimizer.step()


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_what_was_expected_and_what_came(name):
    make, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        make()


def losses(model):
    """A task and a general loss that reach every mask, of the same small outputs."""
    generator = torch.Generator().manual_seed(5)
    linear, conv, attention = model
    x = torch.randn(2, 4, 16, generator=generator)
    outputs = [
        linear(torch.randn(6, 37, generator=generator)),
        conv(torch.randn(2, 3, 5, 5, generator=generator)),
        attention(x, x, x, need_weights=False)[0],
    ]
    return sum(y.square().mean() for y in outputs), sum((y - 0.3).abs().mean() for y in outputs)


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradients_in_the_optimizers_buffers_train_as_those_in_grad_do(strength, backend):
    """Dropout, L2 term and update in one call or in two; in the third step the scores have been changed by hand."""
    runs = []
    for fused in (True, False):
        model = small_model()
        optimizer = rmt.MaskAdam(model, lr=1e-3)
        with rk.use_backend(backend):
            for step in range(4):
                if step == 2:
                    with torch.no_grad():
                        rmt.masks(model)[0].scores.mul_(3.0)
                target = optimizer if fused else model
                rmt.backward(*losses(model), target, strength=strength, seed=3, step=step, l2=1e-2)
                optimizer.step()
        assert_belongs_to_the_scores(model)
        assert fused == all(m.scores.grad is None for m in rmt.masks(model))
        runs.append(scores_of(model))
    for one, two in zip(*runs):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-8) and one.std() > 1e-4


def test_a_batch_in_parts_in_the_optimizers_buffers():
    """Two halves of a loss are the loss; a part without the general loss, or masks alone for parts, are refused."""
    runs = []
    for parts in (1, 2):
        model = small_model()
        optimizer = rmt.MaskAdam(model, lr=1e-3)
        for part in range(parts):
            pair = (loss / parts for loss in losses(model))
            rmt.backward(*pair, optimizer, seed=3, step=0, more=part + 1 < parts)
        optimizer.step()
        runs.append(scores_of(model))
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*runs))
    task, general = losses(model)
    with pytest.raises(ValueError, match=r"in parts .* needs an optimizer"):
        rmt.backward(task, general, model, more=True, retain_graph=True)
    rmt.backward(task, general, optimizer, more=True, retain_graph=True)
    with pytest.raises(ValueError, match="all parts of a batch must have a general loss, or none"):
        rmt.backward(task, None, optimizer)


def test_a_general_loss_of_zero_is_dropout_against_zeros():
    """To the same bits as a second pass that brings zeros, and without it."""
    runs = []
    for zero in (False, True):
        model = small_model()
        optimizer = rmt.MaskAdam(model, lr=1e-3)
        task, general = losses(model)
        rmt.backward(task, 0 if zero else 0 * general, optimizer, seed=3, step=0)
        optimizer.step()
        runs.append(scores_of(model))
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    with pytest.raises(ValueError, match="general must be a loss, None or 0, got 1"):
        rmt.backward(losses(model)[0], 1, optimizer)


@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit"])
def test_moments_have_their_format_and_resume_to_the_same_bits(state):
    sizes = {"fp32": 8, "bf16": 4, "8bit": 2}
    whole, half = (rmt.MaskAdam(small_model(), lr=1e-3, state=state) for _ in range(2))
    for step in range(4):
        if step == 2:
            kept, scores = io.BytesIO(), [m.scores.detach().clone() for m in half.masks]
            torch.save(half.state_dict(), kept)
            half = rmt.MaskAdam(small_model(), lr=1e-3, state=state)
            with torch.no_grad():
                for mask, old in zip(half.masks, scores):
                    mask.scores.copy_(old)
            half.load_state_dict(torch.load(io.BytesIO(kept.getvalue()), weights_only=True))
        for optimizer in (whole, half):
            for mask in optimizer.masks:
                generator = torch.Generator().manual_seed(step)
                mask.scores.grad = torch.randn(mask.scores.shape, generator=generator) * 1e-3
            optimizer.step()
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(whole.masks, half.masks))
    stored_bytes = sum(whole.state[m.scores][n].nbytes for m in whole.masks for n in ("exp_avg", "exp_avg_sq"))
    assert stored_bytes == sizes[state] * sum(m.scores.numel() for m in whole.masks)
    other = rmt.MaskAdam(small_model(), state="fp32" if state != "fp32" else "bf16")
    with pytest.raises(ValueError, match="moments must be"):
        other.load_state_dict(whole.state_dict())


def test_whether_all_bits_are_on_is_never_taken_from_an_old_count():
    model = small_model()
    with torch.no_grad():
        for mask in rmt.masks(model):
            mask.scores.fill_(1e-2)
    optimizer = rmt.MaskAdam(model, lr=1e-5)
    first, *others = optimizer.masks
    assert optimizer.all_on()
    with torch.no_grad():
        others[-1].scores[0, 0] = 0.0
    first.scores.grad = torch.ones_like(first.scores)
    optimizer.step()  # counts the first mask alone
    assert not optimizer.all_on()
    with torch.no_grad():
        others[-1].scores[0, 0] = 1e-2
    assert optimizer.all_on()
    optimizer.step()
    assert optimizer.all_on()
    on = [int(rk.unpack_bits(m.bits, m.weight.shape[1]).sum()) for m in optimizer.masks]
    assert optimizer.counts[:, 1].tolist() == on


@pytest.mark.gpu
def test_a_model_moved_after_its_optimizer_was_made_trains_there():
    runs = []
    for device in ("cpu", "cuda"):
        model = small_model()
        optimizer = rmt.MaskAdam(model, lr=1e-3)
        assert not optimizer.all_on()
        model.to(device)
        for mask in optimizer.masks:
            mask.scores.grad = torch.ones_like(mask.scores)
        optimizer.step()
        runs.append([m.scores.detach().cpu() for m in optimizer.masks])
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*runs))
