import warnings

import pytest
import tiny
import torch
import torch.nn.functional as F

import rmt_kernels as rk
from rmt import clip
from rmt.config import MaskConfig, TrainConfig, UserError
from rmt.masked import masks
from rmt.masking import apply_masks, count_off
from rmt.train import learning_rates, tune, warn_flip_budget

RATES = [4e-4] * 5
# Two runs of one arithmetic in another order: scores agree to this, but for elements whose gradient is rounding noise
# (Adam makes a whole step of any sign) and for draws within rounding of P.
CLOSE = 2e-6


def text_features():
    return F.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(7)), dim=-1)


def batches(reverse=False, images=8):
    def batch(step):
        generator = torch.Generator().manual_seed(100 + step)
        label = torch.arange(images) % 4
        image = torch.randn(images, 3, 32, 32, generator=generator) * 0.5
        image[torch.arange(images), label % 3] += 1 + label[:, None, None] // 3
        return (image.flip(0), label.flip(0)) if reverse else (image, label)

    return batch


def start(shape):
    """Scores of which two sevenths are off. While all are on, student and teacher agree, and nothing is dropped out."""
    return 1e-2 - 7e-3 * torch.rand(shape, generator=torch.Generator().manual_seed(3))


def tuned(config=TrainConfig(), rates=RATES, reverse=False, device="cpu", partly_off=False):  # noqa: B008, frozen
    """A tiny model after tuning, and the rows that were logged."""
    model, rows = tiny.model().to(device), []
    for mask in apply_masks(model, MaskConfig()):
        if partly_off:
            with torch.no_grad():
                mask.scores.copy_(start(mask.scores.shape))
    tune(model, text_features().to(device), batches(reverse), rates, config, rows.append)
    return model, rows


def scores(model):
    return torch.cat([mask.scores.detach().flatten() for mask in masks(model)])


def bits_agree_where_clear(a, b, threshold=5e-3):
    clear = ((a - threshold).abs() > 2 * CLOSE) & ((a - b).abs() <= CLOSE)
    return torch.equal((a > threshold)[clear], (b > threshold)[clear])


def official(rates, config, count):
    """The official code's step, transcribed from method.md 1.1 into plain autograd: two backward passes, torch's Adam.

    Only the uniforms are ours.
    """
    model, text = tiny.model().requires_grad_(False), text_features()
    keys = [mask.key for mask in masks(tuned(rates=[])[0])]
    weights = {key: model.get_parameter(key) for key in keys}
    real = {k: start(w.flatten(1).shape).view_as(w).clone().requires_grad_() for k, w in weights.items()}
    optimizer = torch.optim.Adam(real.values(), lr=1.0)
    for step in range(count):
        image, label = batches()(step)
        binary = {k: (m > 5e-3).float() + m - m.detach() for k, m in real.items()}
        with torch.no_grad():
            teacher = clip.logits(model, image, text)
        student = {k: binary[k] * weights[k] for k in keys}
        features = torch.func.functional_call(model, student, (image,))[0]
        logits = model.logit_scale.exp() * F.normalize(features, dim=-1) @ text.T
        general = -(teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        task = F.cross_entropy(logits, label) + config.l2 * sum(m.norm(2) for m in real.values())
        b = torch.autograd.grad(general, list(real.values()), retain_graph=True)
        a = torch.autograd.grad(task, list(real.values()))
        for i, (mask, a_, b_) in enumerate(zip(real.values(), a, b)):
            p = (a_.sign() * (a_ + b_) / (a_.abs() + b_.abs() + 1e-8) + 1) / 2
            u = rk.philox_uniform(rk.rng_state(config.seed, step), i, a_.shape)
            mask.grad = ((1 - config.strength) + config.strength * (p > u)) * a_
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
    return torch.cat([m.detach().flatten() for m in real.values()])


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_three_steps_equal_the_official_arithmetic(strength):
    config = TrainConfig(strength=strength, seed=3)
    want, got = official(RATES, config, 3), scores(tuned(config, RATES[:3], partly_off=True)[0])
    assert (want - official(RATES, config, 0)).abs().max() > 3e-4
    assert ((got - want).abs() <= CLOSE).float().mean() > 0.999
    assert bits_agree_where_clear(want, got)


@pytest.mark.parametrize(
    "backend, device",
    [
        (None, "cpu"),
        ("cpu", "cpu"),
        ("triton", "cpu"),
        pytest.param(None, "cuda", marks=pytest.mark.gpu),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
        pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_five_steps_agree_with_the_reference(backend, device, monkeypatch):
    """A backend may differ from the reference in twice as many scores as the reference does from itself, when it sums
    the batch in the opposite order. None: each op's default."""
    used = ("pack_scores", "masked_weight", "masked_linear", "masked_linear_dx", "mask_grad", "mask_update_")
    reasons = [reason for op in used if backend and (reason := rk.backends.why_not(backend, op, device))]
    if reasons:
        pytest.skip(f"backend {backend} on {device}: {reasons[0]}")
    # Counting what is off needs unpack_bits, which not every backend has.
    monkeypatch.setattr("rmt.train.percent_off", lambda found: 0.0)
    with rk.use_backend("reference"):
        plain = scores(tuned(device=device, partly_off=True)[0])
        reverse = scores(tuned(device=device, partly_off=True, reverse=True)[0])
    with rk.use_backend(backend):
        got = scores(tuned(device=device, partly_off=True)[0])
    first = scores(tuned(rates=[], device=device, partly_off=True)[0])
    assert ((plain > 5e-3) != (first > 5e-3)).sum() > 1000, "masks must flip for their agreement to mean anything"
    rounding, apart = (((x - plain).abs() > CLOSE).float().mean() for x in (reverse, got))
    assert apart <= 2 * rounding + 1e-4, (
        f"{apart:.2e} of the scores differ; another order of sums changes {rounding:.2e}"
    )
    assert bits_agree_where_clear(plain, got)


def test_the_same_seed_gives_the_same_scores_and_another_seed_others():
    first, again, other = (scores(tuned(TrainConfig(seed=seed))[0]) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_masks_learn_and_the_teacher_stays():
    text, (image, label) = text_features(), batches(images=32)(999)
    plain = tiny.model()
    with torch.no_grad():
        before = clip.logits(plain, image, text)
    model, rows = tuned(TrainConfig(log_every=5), [4e-3] * 25)
    with torch.no_grad():
        after, frozen = clip.logits(model, image, text), clip.frozen_logits(model, image, text)
    assert torch.allclose(frozen, before, atol=1e-5)
    assert F.cross_entropy(after, label) < 0.7 * F.cross_entropy(before, label)
    assert rows[-1]["percent_off"] > 1 and rows[-1]["task"] < 0.7 * rows[0]["task"]
    assert all(torch.equal(p, plain.get_parameter(n)) for n, p in model.named_parameters() if not n.endswith("scores"))


def test_rows_are_logged_every_so_often_and_last():
    rows = tuned(TrainConfig(log_every=2), RATES)[1]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert set(rows[0]) == {"step", "lr", "task", "general", "batch_acc1", "percent_off"}
    off, total = count_off(masks(tuned(TrainConfig(), [2e-3] * 5)[0]))
    assert tuned(TrainConfig(), [2e-3] * 5)[1][-1]["percent_off"] == pytest.approx(100 * off / total)


def test_a_loss_that_is_not_finite_stops_the_run():
    model = tiny.model()
    apply_masks(model, MaskConfig())
    text = text_features()
    text[0, 0] = float("inf")
    with pytest.raises(UserError, match="loss must be finite, got nan"):
        tune(model, text, batches(), RATES[:1], TrainConfig(), lambda row: None)


@pytest.mark.parametrize("steps, spe", [(None, 4), (10, 4), (3, 4), (7, 1), (None, 1)])
def test_rates_are_those_of_cosine_annealing_stepped_once_an_epoch(steps, spe):
    rates = learning_rates(TrainConfig(lr=0.3, epochs=6, steps=steps), spe)
    epochs = 6 if steps is None else -(-steps // spe)
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    want = []
    for _ in range(epochs):
        want += [optimizer.param_groups[0]["lr"]] * spe
        optimizer.step()
        schedule.step()
    assert len(rates) == (steps or 6 * spe)
    assert rates == pytest.approx(want[: len(rates)])


@pytest.mark.parametrize("spe, warns", [(1, True), (3, True), (5, False)])
def test_flip_budget_of_the_official_recipe(spe, warns):
    """method.md 1.5: at lr 8e-5 and 30 epochs, up to 3 steps an epoch leave the zero-shot model as it was."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_flip_budget(learning_rates(TrainConfig(), spe), MaskConfig())
    assert [("no mask can flip" in str(w.message)) for w in caught] == [True] * warns


def test_no_mask_flips_below_the_budget_and_some_do_above():
    below, above = ([rate] * 20 for rate in (2.4e-4, 4e-4))
    assert count_off(masks(tuned(rates=below)[0]))[0] == 0
    assert count_off(masks(tuned(rates=above)[0]))[0] > 0
