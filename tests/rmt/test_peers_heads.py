"""Heads on frozen features: each against its formula written out, as a file, and against bad input."""

import dataclasses
import math

import peer_tools
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from sklearn.linear_model import LogisticRegression
from torch import nn

from rmt import UserError
from rmt.peers import coop, heads, names, tip
from rmt.peers.coop import coop_epochs
from rmt.peers.footing import Shelf
from rmt.peers.method import State, cosine_logits

HEADS = ("linear_probe", "linear_probe_zs", "tip", "tip_f", "clip_adapter")


@pytest.fixture(scope="module")
def footing(tmp_path_factory):
    return peer_tools.footing(tmp_path_factory.mktemp("heads"), max_feature_steps=20)


@pytest.fixture(scope="module")
def trained(footing):
    """Every head, fitted: {name: Fit}."""
    wide = dataclasses.replace(footing, max_feature_steps=60)
    return {name: names.method(name).fit(wide, wide.start()) for name in HEADS}


def unit(tensor):
    return tensor / tensor.norm(dim=-1, keepdim=True)


def logits(footing, name, stored, part="test"):
    state = footing.start()
    return names.method(name).restore(footing, state, stored).logits(footing.features(state, part))


def acc1(footing, scores, part="test"):
    return 100 * float((scores.argmax(-1) == footing.labels(part)).float().mean())


def without_class(footing, lost, part="train"):
    """The footing as if class `lost` had no image in that part."""
    kept = [item for item in getattr(footing.split, part) if item.label != lost]
    split = dataclasses.replace(footing.split, **{part: tuple(kept)})
    return dataclasses.replace(footing, split=split, shelf=Shelf())


@pytest.mark.parametrize("name", HEADS)
def test_a_head_comes_back_from_its_file(footing, trained, name):
    fit = trained[name]
    first, again = (logits(footing, name, stored) for stored in (fit.stored, load(save(fit.stored))))
    assert torch.equal(first, again) and first.dtype == torch.float32 and not first.requires_grad
    twice = names.method(name).fit(dataclasses.replace(footing, max_feature_steps=60, shelf=Shelf()), footing.start())
    assert all(torch.equal(tensor, twice.stored[key]) for key, tensor in fit.stored.items())
    assert fit.stored.keys() == twice.stored.keys() and fit.chosen == twice.chosen


@pytest.mark.parametrize("name", HEADS)
def test_a_head_learns(footing, name):
    """From class vectors that mean nothing, but differ: those of the tiny text tower are all but one."""
    text = torch.linalg.qr(torch.randn(32, 4, generator=torch.Generator().manual_seed(1)))[0].T.contiguous()
    state = State(footing.loaded.model, (), text, cosine_logits(footing.loaded.model, text))
    wide, method = dataclasses.replace(footing, max_feature_steps=None), names.method(name)
    scores, before = (s.logits(footing.features(s, "test")) for s in (
        method.restore(wide, state, method.fit(wide, state).stored), state))  # fmt: skip
    assert acc1(footing, before) < 40 and acc1(footing, scores) > 75


@pytest.mark.parametrize("name", HEADS)
def test_a_head_leaves_the_state_and_never_sees_test_images(footing, name):
    blind = dataclasses.replace(
        footing, split=dataclasses.replace(footing.split, test=()), shelf=Shelf(), max_feature_steps=2
    )
    state = blind.start()
    before = {key: tensor.clone() for key, tensor in state.model.state_dict().items()}
    done = names.method(name).restore(blind, state, names.method(name).fit(blind, state).stored)
    assert done.model is state.model and done.stack == () and torch.equal(done.text, state.text)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.model.state_dict().items())


@pytest.mark.parametrize("name", ["linear_probe", "tip", "tip_f"])
def test_no_validation_images(footing, name):
    none = dataclasses.replace(footing, split=dataclasses.replace(footing.split, val=()))
    with pytest.raises(UserError, match=f"^{name} chooses on validation images.*val folder.*leave the method out"):
        names.method(name).fit(none, none.start())


@pytest.mark.parametrize("name", ["linear_probe_zs", "clip_adapter"])
def test_validation_images_are_not_needed(footing, name):
    none = dataclasses.replace(footing, split=dataclasses.replace(footing.split, val=()), max_feature_steps=2)
    assert not names.method(name).needs_val and names.method(name).fit(none, none.start()).steps == 2


def test_a_class_without_images(footing):
    lacking = without_class(footing, 2)
    lost = footing.split.classnames[2]
    with pytest.raises(UserError, match=f"every class, got none of {lost}: put some.*or leave"):
        names.method("linear_probe").fit(lacking, lacking.start())
    for name in ("tip", "tip_f", "linear_probe_zs", "clip_adapter"):
        fit = names.method(name).fit(lacking, lacking.start())
        assert logits(lacking, name, fit.stored).shape == (24, 4)
    stored = names.method("tip").fit(lacking, lacking.start()).stored
    state = lacking.start()
    got, clip = logits(lacking, "tip", stored), state.logits(lacking.features(state, "test"))
    assert torch.equal(got[:, 2], clip[:, 2]) and (got > clip)[:, [0, 1, 3]].all()


def test_one_class(footing):
    alone = footing
    for label in (1, 2, 3):
        alone = without_class(alone, label)
    alone = dataclasses.replace(alone, split=dataclasses.replace(alone.split, classnames=("grey stone",)))
    with pytest.raises(UserError, match="two classes or more"):
        names.method("linear_probe").fit(alone, alone.start())


def test_linear_probe_is_logistic_regression(footing, trained):
    fit, state = trained["linear_probe"], footing.start()
    x, y = footing.features(state, "train").numpy(), footing.labels("train").numpy()
    model = LogisticRegression(C=fit.chosen["C"], max_iter=1000).fit(x, y)
    want = model.decision_function(footing.features(state, "test").numpy())
    torch.testing.assert_close(logits(footing, "linear_probe", fit.stored), torch.from_numpy(want), check_dtype=False)
    val = model.score(footing.features(state, "val").numpy(), footing.labels("val").numpy())
    assert fit.chosen["val_acc1"] == pytest.approx(100 * val) and fit.trained == 4 * 32 + 4


def test_linear_probe_of_two_classes(footing):
    two = without_class(without_class(footing, 2), 3)
    for part in ("val", "test"):
        for label in (2, 3):
            two = without_class(two, label, part)
    two = dataclasses.replace(two, split=dataclasses.replace(two.split, classnames=footing.split.classnames[:2]))
    fit = names.method("linear_probe").fit(two, two.start())
    assert fit.stored["weight"].shape == (2, 32) and not fit.stored["weight"][0].any()
    assert acc1(two, logits(two, "linear_probe", fit.stored)) == 100


def test_linear_probe_zs_is_claps(footing):
    """ZS-LP written out with torch's own optimiser and schedule; one batch an epoch."""
    fit = names.method("linear_probe_zs").fit(dataclasses.replace(footing, max_feature_steps=None), footing.start())
    assert (fit.steps, fit.published_steps, fit.trained) == (300, 300, 4 * 32)
    model, tokens = footing.loaded.model, footing.text.tokens
    with torch.no_grad():
        w = nn.Parameter(model.encode_text(tokens).clone())
        scale = model.logit_scale.exp()
    x = torch.cat([footing.features(footing.start(), "train", view) for view in range(3)])
    y = footing.labels("train").repeat(3)
    optimizer = torch.optim.SGD([w], 0.1, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for epoch in range(300):
        rate = cosine.get_last_lr()[0] if epoch else 1e-5
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(scale * unit(x) @ unit(w).T, y).backward()
        optimizer.step()
        if epoch:
            optimizer.param_groups[0]["lr"] = rate
            cosine.step()
    with torch.no_grad():
        want = scale * unit(footing.features(footing.start(), "test")) @ unit(w).T
    # The order within the one batch is another, so that sums are rounded otherwise in each of 300 steps.
    torch.testing.assert_close(logits(footing, "linear_probe_zs", fit.stored), want, rtol=1e-3, atol=1e-2)


def tip_formula(footing, stored, part):
    """Every image and key on its own."""
    start = footing.start()
    f = footing.features(start, part)
    alpha, beta = stored["alpha"].item(), stored["beta"].item()
    out = start.logits(f).double()
    for i, row in enumerate(unit(f.double())):
        for key, label in zip(stored["keys"].double(), stored["labels"].tolist()):
            out[i, label] += alpha * math.exp(-beta * (1 - float(row @ key)))
    return out


@pytest.mark.parametrize("name", ["tip", "tip_f"])
def test_tip_is_its_formula(footing, trained, name):
    fit = trained[name]
    torch.testing.assert_close(logits(footing, name, fit.stored).double(), tip_formula(footing, fit.stored, "test"),
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    assert fit.chosen["val_acc1"] == acc1(footing, logits(footing, name, fit.stored, "val"), "val")
    assert (
        fit.stored["keys"].dtype == torch.float16 and fit.stored["labels"].tolist() == footing.labels("train").tolist()
    )
    assert fit.trained == (16 * 32 if name == "tip_f" else 0)


def test_tips_keys_are_means_over_views(footing, trained):
    start = footing.start()
    mean = (sum(footing.features(start, "train", view) for view in range(3))) / 3
    torch.testing.assert_close(trained["tip"].stored["keys"], unit(mean).half(), rtol=0, atol=2**-11)


def test_tips_search_is_the_authors():
    """Their two loops, on overlapping clouds, so that alpha and beta matter."""
    random = torch.Generator().manual_seed(0)
    truth = torch.arange(5).repeat_interleave(8)
    scores = 3 * F.one_hot(truth, 5) + 4 * torch.randn(40, 5, generator=random)
    near, values = torch.rand(40, 10, generator=random), F.one_hot(torch.arange(5).repeat(2), 5).float()
    near += 0.3 * values[:, truth].T
    best, chosen = 0, None
    for beta in [i * (9 - 0.1) / 200 + 0.1 for i in range(200)]:
        for alpha in [i * (4 - 0.1) / 20 + 0.1 for i in range(20)]:
            tip_logits = scores + ((-1) * (beta - beta * near)).exp() @ values * alpha
            hits = int((tip_logits.topk(1)[1][:, 0] == truth).sum())
            if hits > best:
                best, chosen = hits, (beta, alpha)
    found = tip.search(scores, lambda beta: tip.votes(near, values, beta), truth, ((9, 4),))
    assert (found["beta"], found["alpha"]) == chosen and found["val_acc1"] == 100 * best / 40
    assert chosen[0] > 0.1 and chosen[1] > 0.1 and best < 40


def test_tip_f_is_the_authors_training(footing):
    """Their loop with torch's own scheduler; the best of the epochs by validation images, the first of equals."""
    config = dataclasses.replace(footing.config, root="x", data=None, dataset="imagenet")
    whole = dataclasses.replace(footing, max_feature_steps=None, config=config)
    fit = names.method("tip_f").fit(whole, footing.start())
    assert (fit.steps, fit.published_steps) == (20, 20)
    start, y, truth = footing.start(), footing.labels("train"), footing.labels("val")
    values = F.one_hot(y, 4).float()
    keys = nn.Parameter(unit(sum(footing.features(start, "train", view) for view in range(3)) / 3))
    optimizer = torch.optim.AdamW([keys], lr=1e-3, eps=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    def tip_logits(f):
        return start.logits(f) + 1.17 * torch.exp(-(1 - 1 * (unit(f) @ keys.T))) @ values

    best, kept = -1, None
    for epoch in range(20):
        optimizer.zero_grad()
        F.cross_entropy(tip_logits(footing.features(start, "train", epoch % 3)), y).backward()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            hits = int((tip_logits(footing.features(start, "val")).argmax(-1) == truth).sum())
        if hits > best:
            best, kept, at = hits, keys.detach().clone(), epoch + 1
    assert (fit.chosen["epoch"], fit.chosen["epoch_val_acc1"]) == (at, 100 * best / len(truth))
    torch.testing.assert_close(fit.stored["keys"].float(), kept, rtol=0, atol=1e-3)


def test_tips_recipes_follow_the_data_set(footing, trained):
    config = dataclasses.replace(footing.config, root="x", data=None, dataset="eurosat")
    fit = names.method("tip_f").fit(dataclasses.replace(footing, config=config, max_feature_steps=1), footing.start())
    assert (fit.published_steps, fit.chosen["init_alpha"], fit.chosen["scales"]) == (100, 2, [[12, 10]])
    elsewhere, free = trained["tip_f"].chosen, trained["tip"].chosen
    assert (elsewhere["init_alpha"], elsewhere["init_beta"]) == (free["alpha"], free["beta"])
    assert [tip.recipe(None, n).epochs for n in (256, 257)] == [100, 20] and tip.recipe("dtd", 47).epochs == 20


def test_a_wider_range_wins_only_where_it_is_better():
    truth, values = torch.tensor([0, 1]), torch.eye(2)
    # Both votes are right; CLIP's margin of 5 against them needs an alpha above what 3 allows.
    near, clip = torch.eye(2), torch.tensor([[0.0, 5.0], [5.0, 0.0]])
    narrow, wide, both = (
        tip.search(clip, lambda beta: tip.votes(near, values, beta), truth, scales)
        for scales in (((7, 3),), ((50, 50),), ((7, 3), (50, 50)))
    )
    assert narrow["val_acc1"] == 0 and both == wide and both["val_acc1"] == 100 and both["alpha"] > 5
    # A margin of 1 is overcome in both ranges: the first one counts.
    first, second, either = (
        tip.search(clip / 5, lambda beta: tip.votes(near, values, beta), truth, scales)
        for scales in (((7, 3),), ((50, 50),), ((7, 3), (50, 50)))
    )
    assert either == first != second and first["val_acc1"] == second["val_acc1"] == 100


def test_tip_stands_on_what_was_learned_before(footing):
    """CLIP's part is the state's own: other class vectors move it, and nothing else."""
    start = footing.start()
    other = dataclasses.replace(start, logits=lambda f: 2 * start.logits(f) + torch.arange(4.0))
    stored = names.method("tip").fit(footing, start).stored
    f = footing.features(start, "test")
    a, b = (names.method("tip").restore(footing, state, stored).logits(f) for state in (start, other))
    torch.testing.assert_close(b - a, other.logits(f) - start.logits(f), rtol=1e-4, atol=1e-4)


def test_clip_adapter_is_its_formula(footing, trained):
    stored, model = trained["clip_adapter"].stored, footing.loaded.model
    fc = nn.Sequential(nn.Linear(32, 8, bias=False), nn.ReLU(), nn.Linear(8, 32, bias=False), nn.ReLU())
    fc.load_state_dict({"0.weight": stored["down"], "2.weight": stored["up"]})
    f = footing.features(footing.start(), "test")
    with torch.no_grad():
        want = model.logit_scale.exp() * unit(0.2 * fc(f) + (1 - 0.2) * f) @ footing.text.zero_shot.T
    torch.testing.assert_close(logits(footing, "clip_adapter", stored), want, rtol=1e-4, atol=1e-4)
    assert trained["clip_adapter"].trained == 2 * 8 * 32
    assert (trained["clip_adapter"].steps, trained["clip_adapter"].published_steps) == (60, 100 * 2)
    assert trained["clip_adapter"].notes == coop.notes(footing) != ()


def test_clip_adapter_needs_a_gradient(footing):
    state = dataclasses.replace(footing.start(), logits=torch.no_grad()(footing.start().logits))
    with pytest.raises(UserError, match=r"without a gradient.*leave one of the two out"):
        names.method("clip_adapter").fit(footing, state)


@pytest.mark.parametrize("dataset,shots,epochs", [
    (None, 1, 50), (None, 2, 100), (None, 4, 100), (None, 8, 200), (None, 16, 200), (None, "all", 200),
    ("imagenet", 16, 50),
])  # fmt: skip
def test_coops_epochs(footing, dataset, shots, epochs):
    data = {"data": None, "root": "x", "dataset": dataset} if dataset else {}
    assert coop_epochs(dataclasses.replace(footing.config, shots=shots, **data)) == epochs


def test_dassls_schedule():
    """10 epochs of 3 steps: torch's cosine, one epoch late, behind one epoch at 1e-5."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    want = [1e-5] * 3
    for _ in range(9):
        want += cosine.get_last_lr() * 3
        optimizer.step()
        cosine.step()
    assert heads.dassl_rates(0.5, 30, 10) == pytest.approx(want)
    assert heads.dassl_rates(0.5, 5, 10) == pytest.approx(want[::6])


def test_a_rate_too_large(footing):
    wild = dataclasses.replace(footing, rates={"tip_f": 1e30})
    with pytest.raises(UserError, match="loss must be finite"):
        names.method("tip_f").fit(wild, wild.start())
