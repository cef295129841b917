"""The rivals of gradient dropout, against their formulas written out here, from the gradients that the method has."""

import pytest
import tiny
import torch
import torch.nn.functional as F

import rmt
import rmt_kernels as rk
from rmt import clip
from rmt.config import MaskConfig, RunConfig, TrainConfig, UserError, from_yaml, to_yaml
from rmt.masking import apply_masks
from rmt.optim import MaskAdam
from rmt.rivals import RIVALS
from rmt.run import run
from rmt.select import clip_loss, select
from rmt.step import Step, general_loss, gradients

TEXT = F.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(7)), dim=-1)
SEED, L2 = 5, 1e-3
RIVAL = ("random", "sign", "kl")
VARIANTS = {"plain": {}, "bf16": {"precision": "bf16"}, "parts": {"accumulate": 2}, "official": {"shortcuts": False}}


def batch(step=0):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)


def optimizer_of(compact=False, off=True, **options):
    """Masks of which a sixth is off; compact: of a fifth of the weights."""
    model, config = tiny.model(), MaskConfig(targets=("attention", "conv"))
    chosen = None
    if compact:
        chosen = select(model, [batch(9)], criterion="snip", budget=0.2, config=config, loss=clip_loss(TEXT))
    optimizer = MaskAdam(apply_masks(model, config, chosen), lr=1e-3, **options)
    for i, mask in enumerate(optimizer.masks if off else ()):
        with torch.no_grad():
            mask.scores.uniform_(4e-3, 1e-2, generator=torch.Generator().manual_seed(i))
        mask.refresh()
    return model, optimizer


def the_two(model, optimizer, config, step):
    """(a, b) of every mask as the method has them, fp64: a with the L2 term."""
    gradients(model, TEXT, *batch(), optimizer, config, seed=SEED, step=step)
    pairs = []
    for i, mask in enumerate(optimizer.masks):
        a, b, chained = optimizer.gradients.pair(i, general=True)
        factor = mask.weight.double() if chained else 1.0
        scores = mask.scores.detach().double()
        pairs.append((a.double() * factor + L2 * scores / scores.norm(), b.double() * factor))
    optimizer.zero_grad()
    return pairs


def by_hand(rival, a, b, strength, i, step):
    """The formulas of the brief, in fp64. Returns the gradient and where rounding may decide otherwise."""
    if rival == "kl":
        return a + b, torch.zeros_like(a, dtype=torch.bool)
    if rival == "sign":
        kept, near = (a > 0) & (b >= 0) | (a < 0) & (b <= 0), a.abs() < 1e-9
    else:
        p = 0.5 * (1 + torch.sign(a) * (a + b) / (a.abs() + b.abs() + 1e-8))
        uniform = rk.philox_uniform(rk.rng_state(SEED, step), i, tuple(a.shape)).double()
        kept, near = uniform < p.mean(), (uniform - p.mean()).abs() < 1e-6
    return torch.where(kept, a, a - strength * a), near


def close(g, want, a, b):
    """But for fp32's rounding of the terms, which may cancel."""
    return bool(((g - want).abs() <= 1e-6 * (a.abs() + b.abs() + L2)).all())


def got(optimizer):
    assert optimizer._dropout.general is False and optimizer._dropout.l2 == 0
    pairs = [optimizer.gradients.pair(i, general=False) for i in range(len(optimizer.masks))]
    assert not any(chained for *_, chained in pairs)
    return [a.double() for a, *_ in pairs]


@pytest.mark.parametrize("compact", [False, True], ids=["all weights", "compact"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rival", RIVAL)
def test_a_rivals_gradient_is_its_formula(rival, variant, compact):
    config, step = {"strength": 0.7, "l2": L2} | VARIANTS[variant], 3
    model, optimizer = optimizer_of(compact)
    pairs = the_two(model, optimizer, TrainConfig(**config), step)
    gradients(model, TEXT, *batch(), optimizer, TrainConfig(**config, dropout=rival), seed=SEED, step=step)
    opposed = 0
    for i, ((a, b), g) in enumerate(zip(pairs, got(optimizer))):
        want, near = by_hand(rival, a, b, 0.7, i, step)
        assert near.sum() <= 2
        assert close(g[~near], want[~near], a[~near], b[~near]), optimizer.masks[i].key
        opposed += int((a * b < 0).sum())
    assert opposed > 100, "without a conflict all rules are one"


@pytest.mark.parametrize("rival", RIVAL)
def test_while_no_bit_is_off_the_general_gradient_is_0(rival):
    """sign and kl are then the task gradient; random keeps mean(P) with b = 0, nearly all."""
    model, optimizer = optimizer_of(off=False)
    config = {"strength": 1.0, "l2": L2}
    pairs = the_two(model, optimizer, TrainConfig(**config), 0)
    assert optimizer.all_on() and all(not b.any() for _, b in pairs)
    gradients(model, TEXT, *batch(), optimizer, TrainConfig(**config, dropout=rival), seed=SEED, step=0)
    for i, ((a, b), g) in enumerate(zip(pairs, got(optimizer))):
        want, near = by_hand(rival, a, b, 1.0, i, 0)
        assert close(g[~near], want[~near], a[~near], b[~near])
        if rival != "random":
            assert close(g, a, a, b) and a.any()


def test_random_keeps_as_many_as_the_method_and_does_not_look_at_the_signs():
    model, optimizer = optimizer_of()
    pairs = the_two(model, optimizer, TrainConfig(strength=1.0, l2=L2), 0)
    config = TrainConfig(strength=1.0, l2=L2, dropout="random")
    gradients(model, TEXT, *batch(), optimizer, config, seed=SEED, step=0)
    for (a, b), g, mask in zip(pairs, got(optimizer), optimizer.masks):
        kept, p = g != 0, 0.5 * (1 + torch.sign(a) * (a + b) / (a.abs() + b.abs() + 1e-8))
        method = rk.gradient_dropout(a.float(), b.float(), rng=rk.rng_state(SEED, 0), stream=0) != 0
        close = 5 * (0.25 / a.numel()) ** 0.5
        assert abs(kept.double().mean() - p.mean()) < close > abs(method.double().mean() - kept.double().mean())
        agree = a * b > 0
        # The method keeps where signs agree; this keeps as many of either kind.
        few = min(int(agree.sum()), int((~agree).sum()))
        assert abs(kept[agree].double().mean() - kept[~agree].double().mean()) < 5 * (0.5 / few) ** 0.5
        assert method[agree].double().mean() - method[~agree].double().mean() > 0.3, mask.key


def test_kl_is_the_gradient_of_the_summed_loss():
    """CE + l2 * norm + T^2 KL in one backward pass, without any dropout."""
    model, optimizer = optimizer_of()
    config = TrainConfig(strength=1.0, l2=L2, temperature=2.0, dropout="kl", shortcuts=False)
    gradients(model, TEXT, *batch(), optimizer, config, seed=SEED, step=0)
    mine = got(optimizer)
    image, label = batch()
    teacher, logits = clip.frozen_logits(model, image, TEXT), clip.logits(model, image, TEXT)
    loss = F.cross_entropy(logits, label) + general_loss(logits, teacher, 2.0)
    rmt.backward(loss, None, optimizer.masks, l2=L2)
    for g, mask in zip(mine, optimizer.masks):
        want = mask.scores.grad.double()
        assert (g - want).norm() <= 1e-4 * want.norm() and want.norm() > 0


@pytest.mark.parametrize("rival", RIVAL)
def test_the_update_is_adam_of_that_gradient(rival):
    model, optimizer = optimizer_of()
    before = [mask.scores.detach().clone().requires_grad_() for mask in optimizer.masks]
    config = TrainConfig(strength=1.0, l2=L2, dropout=rival)
    gradients(model, TEXT, *batch(), optimizer, config, seed=SEED, step=0)
    adam = torch.optim.Adam(before, lr=1e-3)
    for scores, g in zip(before, got(optimizer)):
        scores.grad = g.float()
    adam.step()
    optimizer.step()
    for scores, mask in zip(before, optimizer.masks):
        assert torch.allclose(mask.scores.detach(), scores.detach(), rtol=1e-5, atol=1e-9)
        assert torch.equal(mask.bits, rk.pack_scores(mask.scores.detach(), 5e-3))


@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_runs_are_functions_of_their_seed_and_every_rule_is_another_one(state):
    """From the first step, with all bits on, and past the first flips."""
    ends = {}
    for name, seed in [("agreement", 1), *((r, 1) for r in RIVALS), ("random", 1), ("random", 2), ("sign", 2)]:
        model, optimizer = optimizer_of(off=False, state=state)
        config = TrainConfig(strength=1.0, l2=0.0, dropout=name, adam=state)
        step = Step(model, TEXT, optimizer, config, seed=seed)
        for n in range(10):
            step(*batch(n), n)
        assert not optimizer.all_on()
        end = torch.cat([mask.scores.detach().flatten() for mask in optimizer.masks])
        if (name, seed) in ends:
            assert torch.equal(ends[name, seed], end)
        ends[name, seed] = end
    names = [("agreement", 1), ("random", 1), ("sign", 1), ("kl", 1), ("random", 2)]
    assert all(not torch.equal(ends[a], ends[b]) for a in names for b in names if a != b)
    # Nothing in sign is drawn but the rounding of the moments.
    assert torch.equal(ends["sign", 1], ends["sign", 2]) == (state == "fp32")


def test_refused():
    with pytest.raises(UserError, match="dropout must be agreement, random, sign or kl, got 'none'"):
        TrainConfig(dropout="none")
    with pytest.raises(UserError, match="graph captures the method's own step, dropout agreement: the rival sign"):
        TrainConfig(graph=True, dropout="sign")
    assert TrainConfig(graph=True).dropout == "agreement"


def test_a_run_from_before_the_rivals_goes_on(tmp_path, capsys):
    """Its config.yaml and the fingerprint of its resume file have no field dropout."""
    train = TrainConfig(lr=2e-3, steps=4, batch=8, strength=1.0, save_every=0)
    data = str(tiny.splits(tmp_path / "data", train=2, test=2))
    config = RunConfig(tiny.model_folder(tmp_path / "model"), data=data, shots=2, device="cpu", train=train)
    result = run(config, tmp_path / "run")
    older = to_yaml(config).replace("  dropout: agreement\n", "")
    assert from_yaml(older) == config and "dropout" not in older
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    print_of = state["fingerprint"]
    assert "  dropout: agreement\n" in print_of["config"]
    state["fingerprint"] = print_of | {"config": print_of["config"].replace("  dropout: agreement\n", "")}
    torch.save(state, tmp_path / "run" / "last.pt")
    (tmp_path / "run" / "config.yaml").write_text(older)
    (tmp_path / "run" / "result.json").unlink()
    again = run(config, tmp_path / "run")
    assert "resume     from step 4 of 4" in capsys.readouterr().out
    assert again["bits_sha256"] == result["bits_sha256"]
    state["fingerprint"]["config"] = print_of["config"].replace("dropout: agreement", "dropout: sign")
    torch.save(state, tmp_path / "run" / "last.pt")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match=r"is another run's: config was .*dropout: sign"):
        run(config, tmp_path / "run")
