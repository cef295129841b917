from dataclasses import replace

import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F

import rmt_kernels as rk
from rmt import clip
from rmt.config import MaskConfig, TrainConfig, UserError
from rmt.masked import masks
from rmt.masking import apply_masks, count_off, percent_off
from rmt.optim import MaskAdam
from rmt.resume import Resume
from rmt.step import gradients
from rmt.train import tune

RATES = [4e-4] * 5
RECIPE = TrainConfig(lr=4e-4, strength=1.0)
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


def tuned(config=RECIPE, rates=RATES, reverse=False, device="cpu", partly_off=False, seed=1, **options):
    """A tiny model after tuning, and the rows that were logged."""
    model, rows = tiny.model().to(device), []
    for mask in apply_masks(model, MaskConfig()):
        if partly_off:
            with torch.no_grad():
                mask.scores.copy_(start(mask.scores.shape))
    text = text_features().to(device)
    tune(model, text, batches(reverse), rates, config, seed=seed, log=rows.append, **options)
    return model, rows


def scores(model):
    return torch.cat([mask.scores.detach().flatten() for mask in masks(model)])


def bits_agree_where_clear(a, b, threshold=5e-3):
    clear = ((a - threshold).abs() > 2 * CLOSE) & ((a - b).abs() <= CLOSE)
    return torch.equal((a > threshold)[clear], (b > threshold)[clear])


def official(rates, config, count, seed):
    """The official code's step, transcribed from method.md 1.1 into plain autograd: two backward passes, torch's Adam.

    Only the uniforms are ours.
    """
    model, text = tiny.model().requires_grad_(False), text_features()
    keys = [mask.key for mask in apply_masks(tiny.model(), MaskConfig())]
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
            u = rk.philox_uniform(rk.rng_state(seed, step), i, a_.shape)
            mask.grad = ((1 - config.strength) + config.strength * (p > u)) * a_
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
    return torch.cat([m.detach().flatten() for m in real.values()])


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_three_steps_equal_the_official_arithmetic(strength):
    config = TrainConfig(strength=strength)
    want, got = official(RATES, config, 3, 3), scores(tuned(config, RATES[:3], partly_off=True, seed=3)[0])
    assert (want - official(RATES, config, 0, 3)).abs().max() > 3e-4
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
    the batch in the opposite order. None: each op's default. Triton lacks some ops: the reference serves those."""
    used = ("pack_scores", "masked_weight", "masked_linear", "masked_linear_dx", "mask_grad", "mask_update_")
    reasons = [reason for op in used if backend and (reason := rk.backends.why_not(backend, op, device))]
    if reasons:
        pytest.skip(f"backend {backend} on {device}: {reasons[0]}")
    with rk.use_backend("reference"):
        plain = scores(tuned(device=device, partly_off=True)[0])
        reverse = scores(tuned(device=device, partly_off=True, reverse=True)[0])
    if backend == "triton":
        monkeypatch.setitem(rk.backends.ORDER, device, ("triton", "reference"))
        monkeypatch.setattr(rk.backends, "unconfirmed", lambda *_: None)
    with rk.use_backend(None if backend == "triton" else backend):
        got = scores(tuned(device=device, partly_off=True)[0])
    if backend is not None:
        assert rk.backends.last("masked_linear", device) == backend
    first = scores(tuned(rates=[1e-30], device=device, partly_off=True)[0])
    assert ((plain > 5e-3) != (first > 5e-3)).sum() > 1000, "masks must flip for their agreement to mean anything"
    rounding, apart = (((x - plain).abs() > CLOSE).float().mean() for x in (reverse, got))
    assert apart <= 2 * rounding + 1e-4, (
        f"{apart:.2e} of the scores differ; another order of sums changes {rounding:.2e}"
    )
    assert bits_agree_where_clear(plain, got)


def test_the_same_seed_gives_the_same_scores_and_another_seed_others():
    first, again, other = (scores(tuned(seed=seed)[0]) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_masks_learn_and_the_teacher_stays():
    text, (image, label) = text_features(), batches(images=32)(999)
    plain = tiny.model()
    with torch.no_grad():
        before = clip.logits(plain, image, text)
    model, rows = tuned(TrainConfig(strength=1.0, log_every=5), [4e-3] * 25)
    with torch.no_grad():
        after, frozen = clip.logits(model, image, text), clip.frozen_logits(model, image, text)
    assert torch.allclose(frozen, before, atol=1e-5)
    assert F.cross_entropy(after, label) < 0.7 * F.cross_entropy(before, label)
    assert rows[-1]["percent_off"] > 1 and rows[-1]["task"] < 0.7 * rows[0]["task"]
    assert all(torch.equal(p, plain.get_parameter(n)) for n, p in model.named_parameters() if not n.endswith("scores"))


def test_rows_are_logged_every_so_often_and_last():
    rows = tuned(TrainConfig(strength=1.0, log_every=2), [2e-3] * 5)[1]
    model, one_by_one = tuned(TrainConfig(strength=1.0, log_every=1), [2e-3] * 5)
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert set(rows[0]) == {"step", "lr", "task", "general", "batch_acc1", "percent_off", "flips", "layers"}
    found = masks(model)
    assert rows[-1]["percent_off"] == pytest.approx(percent_off(found)) and rows[-1]["percent_off"] > 0
    assert rows[-1]["layers"] == pytest.approx([percent_off([mask]) for mask in found])
    # Bits that go off and on again between two rows do not count there.
    assert rows[-1]["flips"] == one_by_one[-1]["flips"] and rows[0]["flips"] <= sum(r["flips"] for r in one_by_one[:2])
    assert one_by_one[0]["flips"] == one_by_one[0]["percent_off"] * count_off(found)[1] / 100


def test_a_loss_that_is_not_finite_stops_the_run():
    model = tiny.model()
    apply_masks(model, MaskConfig())
    text = text_features()
    text[0, 0] = float("inf")
    with pytest.raises(UserError, match="loss must be finite, got nan"):
        tune(model, text, batches(), RATES[:1], RECIPE)


def test_no_mask_flips_below_the_budget_and_some_do_above():
    below, above = ([rate] * 20 for rate in (2.4e-4, 4e-4))
    assert count_off(masks(tuned(rates=below)[0]))[0] == 0
    assert count_off(masks(tuned(rates=above)[0]))[0] > 0


@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_in_parts_is_the_batch(parts, strength):
    """Both gradients are summed before the test of their signs. Parts of 8 images: 4 and 4, or 3, 3 and 2."""
    whole, some = TrainConfig(strength=strength), TrainConfig(strength=strength, accumulate=parts)
    plain, reverse, got = (
        scores(tuned(config, RATES[:3], partly_off=True, reverse=turned)[0])
        for config, turned in ((whole, False), (whole, True), (some, False))
    )
    rounding, apart = (((x - plain).abs() > CLOSE).float().mean() for x in (reverse, got))
    assert apart <= 2 * rounding + 1e-4 and bits_agree_where_clear(plain, got)


def dropped_out(image, label, config=RECIPE):
    """The gradient of one step after dropout, flat. Adam's first moment is a tenth of it."""
    model = tiny.model()
    for mask in apply_masks(model, MaskConfig()):
        with torch.no_grad():
            mask.scores.copy_(start(mask.scores.shape))
    optimizer = MaskAdam(model, lr=1e-3)
    gradients(model, text_features(), image, label, optimizer, config, seed=1, step=0)
    optimizer.step()
    return torch.cat([10 * optimizer.state[mask.scores]["exp_avg"].flatten() for mask in masks(model)])


def test_dropping_out_part_by_part_would_be_another_method():
    image, label = batches()(0)
    once = dropped_out(image, label)
    in_parts = dropped_out(image, label, replace(RECIPE, accumulate=2))
    halves = [dropped_out(x, y) for x, y in zip(image.chunk(2), label.chunk(2))]
    far = 1e-3 * once.abs().max()
    assert ((sum(halves) / 2 - once).abs() > far).float().mean() > 0.01
    assert ((in_parts - once).abs() > far).float().mean() < 1e-3


def test_bf16_keeps_scores_moments_and_gradients_in_fp32():
    optimizers = []
    for precision in ("fp32", "bf16"):
        model = tiny.model()
        apply_masks(model, MaskConfig())
        config = TrainConfig(strength=0.0, precision=precision)
        optimizers.append(MaskAdam(model, lr=1e-3))
        gradients(model, text_features(), *batches()(0), optimizers[-1], config, seed=1, step=0)
    for i, mask in enumerate(optimizers[1].masks):
        (want, *_), (got, _, chained) = (optimizer.gradients.pair(i, general=True) for optimizer in optimizers)
        assert got.dtype == mask.scores.dtype == mask.weight.dtype == torch.float32 and chained
        error = (want - got).norm() / want.norm()
        assert 1e-6 < error < 0.05, f"{mask.key}: {error:.3f}"
        # A gradient of the weight that had been rounded to bf16 on its way would have no bits below its eighth.
        left_over = ((got - got.bfloat16()).abs() / got.abs())[got.abs() > 1e-3 * got.abs().max()]
        assert left_over.median() > 1e-4, mask.key


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_after, adam", [(1, "fp32"), (3, "fp32"), (4, "fp32"), (3, "bf16"), (3, "8bit")])
def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path, killed_after, adam):
    config, rates = TrainConfig(strength=1.0, log_every=2, adam=adam), [2e-3] * 5

    def kill(step):
        if step == killed_after:
            raise Killed

    unbroken, rows = tuned(config, rates)
    with pytest.raises(Killed):
        # The tick comes before the file is written: this step is lost, and done again.
        tuned(config, rates, tick=kill, resume=Resume(tmp_path / "last.pt", {"run": "a"}, every=0))
    resume = Resume(tmp_path / "last.pt", {"run": "a"}, every=0)
    assert resume.steps_done == killed_after - 1
    again, more = tuned(config, rates, resume=resume)
    assert torch.equal(scores(unbroken), scores(again))
    assert all(torch.equal(a.bits, b.bits) for a, b in zip(masks(unbroken), masks(again)))
    assert more == rows[-len(more) :] and more[-1]["step"] == 5


def test_a_resume_file_of_another_run_or_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    tuned(rates=RATES[:1], resume=Resume(path, {"run": "a"}, every=0))
    with pytest.raises(UserError, match=r"last\.pt is another run's: run was 'a', now it is 'b'"):
        Resume(path, {"run": "b"}, every=0)
    resume = Resume(path, {"run": "a"}, every=0)
    model = tiny.model()
    apply_masks(model, MaskConfig(targets=("mlp",)))
    with pytest.raises(UserError, match="its 5 masks are not the model's"):
        tune(model, text_features(), batches(), RATES, RECIPE, resume=resume)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"junk" * 99):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"last\.pt is damaged: delete it"):
            Resume(path, {"run": "a"}, every=0)


def test_the_resume_file_is_written_when_its_time_has_come(tmp_path):
    path, seen = tmp_path / "last.pt", []
    tuned(rates=RATES, resume=Resume(path, {}, every=3600), tick=lambda step: seen.append(path.exists()))
    assert seen == [False] * 5 and Resume(path, {}, every=0).steps_done == 5


def test_a_masked_text_tower_trains_and_its_teacher_stays():
    model = tiny.model()
    loaded = clip.Clip(model, None, open_clip.get_tokenizer("ViT-B-32", context_length=16))
    names = [f"class {n}" for n in range(4)]
    before = clip.text_features(loaded, names, "a {}.")
    found = apply_masks(model, MaskConfig(targets=("attention",), towers=("text",)))
    text = clip.Text.make(loaded, names, "a {}.")
    rows = []
    tune(model, text, batches(images=32), [4e-3] * 12, TrainConfig(strength=1.0, log_every=6), log=rows.append)
    assert all(not mask.key.startswith("visual") for mask in found) and count_off(found)[0] > 0
    assert torch.allclose(text.teacher(), before) and not torch.allclose(text.student(), before, atol=1e-3)
    assert rows[-1]["task"] < rows[0]["task"]
