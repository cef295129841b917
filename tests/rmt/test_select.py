"""Importance identification: each criterion against its plain formula, exact budgets, a model left as it was."""

import copy
import dataclasses
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import rmt
from rmt.budget import top, whole
from rmt.config import CRITERIA, MaskConfig, UserError
from rmt.criteria import DATA_FREE, SCORES
from rmt.masking import apply_masks
from rmt.model import get_mask_model
from rmt.select import Selection, _ready, candidates, clip_loss, select
from rmt_kernels import reference

ALL = MaskConfig(targets=("attention", "mlp", "conv"))
TOWERS = MaskConfig(targets=("attention", "mlp"), towers=("image", "text"))
CLASSES = 5


VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1}


@pytest.fixture
def model():
    return clip()


def clip(vision=VISION):
    torch.manual_seed(0)
    made = open_clip.CLIP(16, vision, TEXT).eval()
    with torch.no_grad():
        made.logit_scale.fill_(3.5)
        for block in (*getattr(made.visual, "transformer", made.transformer).resblocks, *made.transformer.resblocks):
            block.attn.in_proj_weight.mul_(3)
    return made


def text_features():
    return F.normalize(torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(5)), dim=-1)


def tokens():
    text = torch.zeros(CLASSES, 16, dtype=torch.long)
    for i in range(CLASSES):
        text[i, : 4 + i] = torch.tensor([38, *range(7, 9 + i), 39])
    text[0, 1] = 0  # a word of id 0, which is no padding
    return text


def batches(count=3, size=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 16, 16, generator=generator), torch.randint(CLASSES, (size,), generator=generator))
        for _ in range(count)
    ]


LOSS = clip_loss(text_features())


def scores_of(model, criterion, config=ALL, data=None, loss=LOSS):
    """The criterion's scores by key."""
    found = candidates(model, config)
    with _ready(model, found):
        args = () if criterion in DATA_FREE else (batches() if data is None else data, loss)
        return dict(zip((c.key for c in found), SCORES[criterion](model, found, *args)))


def plain_gradients(model, batch, loss=LOSS):
    """{key: gradient in its own shape} by loss.backward on a copy."""
    model = copy.deepcopy(model).requires_grad_(True)
    loss(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def each_gradient(model, keys, data):
    grads = [plain_gradients(model, batch) for batch in data]
    return {key: [g[key].flatten(1) for g in grads] for key in keys}


def weights(model, config=ALL):
    return {c.key: c.matrix() for c in candidates(model, config)}


# --- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ALL, TOWERS, MaskConfig(), MaskConfig(modules=("visual.*mlp.c_fc",))], ids=str)
def test_candidates_are_what_masking_would_mask(model, config):
    found = candidates(model, config)
    masks = apply_masks(copy.deepcopy(model), config)
    assert [c.key for c in found] == [m.key for m in masks]
    assert [tuple(c.matrix().shape) for c in found] == [tuple(m.weight.shape) for m in masks]
    assert all(c.weight is model.get_parameter(c.key) for c in found)


def test_candidates_of_a_resnet_tower():
    net = clip({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16})
    found = candidates(net, MaskConfig())
    masks = apply_masks(copy.deepcopy(net), MaskConfig())
    assert [c.key for c in found] == [m.key for m in masks] and len(found) > 10
    scores = scores_of(net, "multiflow", MaskConfig(), [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))])
    assert all(s.isfinite().all() and s.any() for s in scores.values())


# --- criteria ---------------------------------------------------------------------------------------------------------


def test_magnitude(model):
    for key, s in scores_of(model, "magnitude").items():
        assert torch.equal(s, model.get_parameter(key).detach().flatten(1).abs())


def test_lamp():
    weight = torch.tensor([[3.0, -1.0, 2.0], [0.0, -2.0, 0.5]])
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].weight.data = weight
    (got,) = scores_of(model, "lamp", MaskConfig(modules=("0",))).values()
    want = [[w * w / sum(v * v for v in weight.flatten().tolist() if abs(v) >= abs(w)) for w in row] for row in weight]
    torch.testing.assert_close(got, torch.tensor(want))
    model[0].weight.data.zero_()
    assert not next(iter(scores_of(model, "lamp", MaskConfig(modules=("0",))).values())).any()


def test_snip_averages_before_the_absolute_value(model):
    w, got = weights(model), scores_of(model, "snip")
    for key, grads in each_gradient(model, w, batches()).items():
        want = (sum(grads) / len(grads) * w[key]).abs()
        torch.testing.assert_close(got[key], want, rtol=1e-3, atol=1e-6 * float(want.max()))
        other = sum((g * w[key]).abs() for g in grads) / len(grads)
        assert (want < 0.9 * other).any(), "the two orders must differ on this data"


def test_taylor_spt(model):
    w, data = weights(model), batches()
    taylor, spt = scores_of(model, "taylor"), scores_of(model, "spt")
    for key, grads in each_gradient(model, w, data).items():
        want = sum((g * w[key]) ** 2 for g in grads)
        torch.testing.assert_close(taylor[key], want, rtol=1e-3, atol=1e-6 * float(want.max()))
        want = sum(g**2 for g in grads)
        torch.testing.assert_close(spt[key], want, rtol=1e-3, atol=1e-6 * float(want.max()))


def test_fisher_squares_each_samples_own_gradient(model):
    data = batches(2, 3)
    single = [(image[i : i + 1], label[i : i + 1]) for image, label in data for i in range(3)]
    got, w = scores_of(model, "fisher", data=data), weights(model)
    for key, grads in each_gradient(model, w, single).items():
        want = sum(g**2 for g in grads)
        torch.testing.assert_close(got[key], want, rtol=1e-3, atol=1e-6 * float(want.max()))
    assert not torch.allclose(got[key], scores_of(model, "spt", data=data)[key], rtol=0.1)


def test_influence_is_the_best_steps_loss_drop_a_parameter(model):
    """g'Hg by finite differences of the gradient, in float64, in the subspace of each weight alone."""
    data = batches(2, 3)
    got = scores_of(model, "influence", data=data)
    double = copy.deepcopy(model).double()
    wide = [(image.double(), label) for image, label in data]

    def loss(net, batch):
        z = F.normalize(net.encode_image(batch[0]), dim=-1) @ text_features().double().T
        return F.cross_entropy(net.logit_scale.exp() * z, batch[1])

    def gradient(net, key):
        weight = net.get_parameter(key)
        with sdpa_kernel(SDPBackend.MATH):
            return sum(torch.autograd.grad(loss(net, b), weight)[0] for b in wide) / len(wide)

    positive = 0
    for key, score in got.items():
        g, weight = gradient(double, key), double.get_parameter(key)
        before, t, at = weight.detach().clone(), (1e-6 * weight.norm() / g.norm()).item(), []
        for step in (-t, t):
            weight.data = before + step * g
            at.append(gradient(double, key))
        weight.data = before
        curvature = float(((at[1] - at[0]) / (2 * t) * g).sum())
        want = float((g * g).sum()) ** 2 / (2 * curvature) / g.numel() if curvature > 0 else 0
        positive += curvature > 0
        assert score.shape == () and math.isclose(float(score), want, rel_tol=1e-2), key
    assert positive > 1


def test_influence_of_a_direction_that_curves_down_is_none():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))

    def loss(net, batch):
        return -net[0](batch).square().sum() + net[1](batch[:, :2]).square().sum()

    scores = scores_of(model, "influence", MaskConfig(modules=("0", "1")), [torch.randn(4, 3)], loss)
    assert scores["0.weight"] == 0 and scores["1.weight"] > 0


def flow(weight, squares):
    """MULTIFLOW's score by its formula, one element after another."""
    w, a = weight.abs().double(), squares.double().sqrt()
    out = torch.empty_like(w)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            out[i, j] = w[i, j] * (w[i] * a).mean() * (w[:, j] * a[j]).mean()
    return out.float()


def assert_proportional(got, want):
    torch.testing.assert_close(got / got.max(), want / want.max(), rtol=1e-3, atol=1e-6)


def test_multiflow_of_linears_and_of_a_convolution():
    model = nn.Sequential(nn.Conv2d(2, 5, 3, stride=2, padding=1, dilation=1), nn.Flatten(2), nn.Linear(9, 4))
    data = [torch.randn(3, 2, 5, 5), torch.randn(2, 2, 5, 5)]
    scores = scores_of(model, "multiflow", MaskConfig(modules=("0", "2")), data, lambda net, x: net(x).sum())
    patches = sum(F.unfold(x, 3, padding=1, stride=2).square().sum((0, 2)) for x in data)
    inputs = sum(F.conv2d(x, model[0].weight, model[0].bias, 2, 1).flatten(2).square().sum((0, 1)) for x in data)
    assert_proportional(scores["0.weight"], flow(model[0].weight.detach().flatten(1), patches))
    assert_proportional(scores["2.weight"], flow(model[2].weight.detach(), inputs.detach()))


def test_multiflow_sees_the_inputs_of_attentions_projections(model):
    scores, block = scores_of(model, "multiflow"), model.visual.transformer.resblocks[1]
    inputs, outputs = 0, 0
    with torch.no_grad():
        for image, _ in batches():
            seen = {}
            hook = block.attn.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(x=args[0]))
            model.encode_image(image)
            hook.remove()
            x = seen["x"]  # (B, L, E)
            inputs = inputs + x.square().sum((0, 1))
            q, k, v = F.linear(x, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, k, v))
            y = ((q @ k.transpose(-1, -2) / 16**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
            outputs = outputs + y.square().sum((0, 1))
    name = "visual.transformer.resblocks.1.attn."
    for key, squares in {"in_proj_weight": inputs, "out_proj.weight": outputs}.items():
        assert_proportional(scores[name + key], flow(weights(model)[name + key], squares))


def test_multiflow_drops_padded_text_tokens(model):
    text, loss = tokens(), clip_loss(tokens())
    scores = scores_of(model, "multiflow", TOWERS, loss=loss)
    block, seen = model.transformer.resblocks[0], {}
    hooks = [
        block.attn.register_forward_pre_hook(lambda m, args: seen.update(attn=args[0])),
        block.mlp.c_proj.register_forward_pre_hook(lambda m, args: seen.update(mlp=args[0])),
    ]
    with torch.no_grad():
        model.encode_text(text)
    for hook in hooks:
        hook.remove()
    # The word of id 0 counts.
    lengths = torch.tensor([4 + i for i in range(CLASSES)])
    keep = torch.arange(16) < lengths[:, None]
    assert keep.shape == seen["attn"].shape[:2]
    name = "transformer.resblocks.0."
    for key, x in {"attn.in_proj_weight": seen["attn"], "mlp.c_proj.weight": seen["mlp"]}.items():
        assert_proportional(scores[name + key], flow(weights(model, TOWERS)[name + key], x[keep].square().sum(0)))


def test_multiflow_gives_each_layer_the_count_that_magnitude_would_and_its_own_best(model):
    options = {"config": TOWERS, "scope": "modality", "budget": 0.2}
    loss = clip_loss(tokens())
    flowed = select(model, batches(), criterion="multiflow", loss=loss, **options)
    plain = select(model, criterion="magnitude", **options)
    assert [r["chosen"] for r in flowed.rows()] == [r["chosen"] for r in plain.rows()]
    scores = scores_of(model, "multiflow", TOWERS, loss=loss)
    for key, chosen in places(flowed).items():
        if chosen.any() and not chosen.all():
            assert scores[key][chosen].min() >= scores[key][~chosen].max()
    assert any(not torch.equal(a, b) for a, b in zip(places(flowed).values(), places(plain).values()))


# --- budgets ----------------------------------------------------------------------------------------------------------


def places(selection):
    return {key: reference.unpack_bits(w, selection.shapes[key][1]) for key, w in selection.words.items()}


def chosen_of(selection, start=""):
    return sum(int(p.sum()) for key, p in places(selection).items() if key.startswith(start))


@pytest.mark.parametrize("budget", [1e-9, 0.013, 0.5, 1])
def test_budgets_are_exact_in_every_scope(model, budget):
    total = sum(w.numel() for w in weights(model, TOWERS).values())
    image = sum(w.numel() for key, w in weights(model, TOWERS).items() if key.startswith("visual."))
    made = {s: select(model, criterion="magnitude", budget=budget, scope=s, config=TOWERS)
            for s in ("global", "layer", "modality")}  # fmt: skip
    assert chosen_of(made["global"]) == max(1, round(budget * total))
    assert chosen_of(made["modality"], "visual.") == max(1, round(budget * image))
    assert chosen_of(made["modality"], "transformer.") == max(1, round(budget * (total - image)))
    for key, p in places(made["layer"]).items():
        assert int(p.sum()) == max(1, round(budget * p.numel())), key


def test_a_global_budget_goes_to_the_largest_scores_wherever_they_are(model):
    got, scores = places(select(model, criterion="lamp", budget=0.07, config=ALL)), scores_of(model, "lamp")
    flat = torch.cat([s.flatten() for s in scores.values()])
    bound = flat.sort(descending=True).values[round(0.07 * flat.numel()) - 1]
    for key, s in scores.items():
        assert got[key][s > bound].all() and not got[key][s < bound].any()


def test_ties_go_to_the_first():
    scores = [torch.tensor([[1.0, 2.0], [2.0, 0.0]]), torch.tensor([[2.0, 3.0, -0.0]])]
    assert [t.int().tolist() for t in top(scores, 3)] == [[[0, 1], [1, 0]], [[0, 1, 0]]]
    assert [t.int().tolist() for t in top(scores, 6)] == [[[1, 1], [1, 1]], [[1, 1, 0]]]
    assert not any(t.any() for t in top(scores, 0))


@pytest.mark.parametrize("count", [1, 2, 317, 999, 1000])
def test_top_is_a_stable_sorts(count):
    flat = torch.randn(1000, generator=torch.Generator().manual_seed(0)).abs().mul(20).round() * 1e-8
    got = torch.cat([t.flatten() for t in top([flat[:600].view(20, 30), flat[600:].view(4, 100)], count)])
    want = torch.zeros(1000, dtype=torch.bool)
    want[flat.sort(descending=True, stable=True).indices[:count]] = True
    assert torch.equal(got, want)


def test_whole_modules_are_taken_while_they_fit_and_the_best_always():
    assert whole([1.0, 3.0, 2.0, 2.0], [10, 40, 20, 20], [[0, 1, 2, 3]], 0.67) == {1, 2}
    assert whole([1.0, 3.0, 2.0, 2.0], [10, 40, 20, 20], [[0, 1, 2, 3]], 0.8) == {0, 1, 2}
    assert whole([1.0, 3.0], [10, 40], [[0, 1]], 0.01) == {1}
    assert whole([1.0, 3.0], [10, 40], [[0], [1]], 0.01) == {0, 1}


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "multiflow"])
def test_whole_modules_by_their_mean_score(model, criterion):
    scores = {k: float(s.mean()) for k, s in scores_of(model, criterion).items()}
    made = select(model, batches(), criterion=criterion, unit="module", budget=0.4, config=ALL, loss=LOSS)
    got = places(made)
    assert all(p.all() or not p.any() for p in got.values())
    assert got[max(scores, key=scores.get)].all()
    assert 0 < chosen_of(made) <= 0.4 * sum(p.numel() for p in got.values())


# --- the selection and the model --------------------------------------------------------------------------------------


def state(model):
    tensors = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    flags = [(n, p.requires_grad, p.grad) for n, p in model.named_parameters()]
    modes = [(n, m.training, type(m), m.forward.__func__) for n, m in model.named_modules()]
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    return tensors, flags, modes, hooks


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "fails"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_model_is_left_as_it_was(model, criterion, fails):
    model.train()
    model.visual.eval()
    model.visual.conv1.weight.requires_grad_(False)
    model.visual.proj.grad = torch.ones_like(model.visual.proj)
    before, functions, random = state(model), (F.linear, F.conv2d), torch.get_rng_state()

    def loss(net, batch):
        value = LOSS(net, batch)
        if fails:
            raise KeyError
        return value

    unit = "module" if criterion == "influence" else "weight"
    try:
        select(model, batches(2), criterion=criterion, loss=loss, unit=unit)
    except KeyError:
        assert fails and criterion not in DATA_FREE
    after = state(model)
    assert all(torch.equal(after[0][n], t) for n, t in before[0].items()) and before[0].keys() == after[0].keys()
    assert after[1:] == before[1:]
    assert (F.linear, F.conv2d) == functions and torch.equal(torch.get_rng_state(), random)


def test_the_same_call_chooses_the_same(model):
    a, b = (select(model, batches(), criterion="taylor", loss=LOSS) for _ in range(2))
    assert all(torch.equal(a.words[key], b.words[key]) for key in a.words)


def test_batches_may_come_from_a_generator(model):
    a, b = (
        select(model, given, criterion="influence", unit="module", loss=LOSS, budget=0.5)
        for given in (batches(), iter(batches()))
    )
    assert all(torch.equal(a.words[key], b.words[key]) for key in a.words)


def test_rows_and_report(model):
    made = select(model, criterion="magnitude", budget=0.25, config=ALL)
    rows = made.rows()
    assert [r["key"] for r in rows] == list(weights(model))
    assert sum(r["chosen"] for r in rows) == chosen_of(made)
    assert all(math.isclose(r["percent"], 100 * r["chosen"] / r["total"]) for r in rows)
    lines = made.report().splitlines()
    assert "magnitude" in lines[0] and "0.25" in lines[0] and len(lines) == len(rows) + 3
    total = sum(r["total"] for r in rows)
    assert lines[-1].split() == ["all", f"{round(0.25 * total):,}", f"{total:,}", "25.00"]
    assert len({len(line) for line in lines[1:]}) == 1, "a table's lines are of one width"
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.budget = 1
    assert isinstance(made, Selection)


def test_end_to_end_only_the_selected_weights_flip(model):
    made = select(model, batches(), criterion="snip", budget=0.05, loss=LOSS)
    with torch.no_grad():
        before = LOSS(model, batches()[0])
    masked = get_mask_model(model, MaskConfig(), made)
    found = rmt.masks(masked)
    assert {m.key for m in found} == {row["key"] for row in made.rows() if row["chosen"]}
    assert sum(m.scores.numel() for m in found) == chosen_of(made)
    torch.testing.assert_close(LOSS(masked, batches()[0]).detach(), before)
    optimizer = rmt.MaskAdam(masked, lr=4e-3)
    for step, batch in enumerate(batches(3)):
        rmt.backward(LOSS(masked, batch), None, masked, step=step)
        optimizer.step()
    off = 0
    for mask in found:
        on = reference.unpack_bits(mask.bits, mask.weight.shape[1])
        assert on[~places(made)[mask.key]].all()
        off += int((~on).sum())
    assert off > 0.1 * chosen_of(made)


# --- bad input --------------------------------------------------------------------------------------------------------


def nan_loss(net, batch):
    return LOSS(net, batch) * math.nan


ERRORS = {
    "criterion": ({"criterion": "luck"}, "criterion must be one of magnitude.*got 'luck'"),
    "no-criterion": ({"criterion": None}, "criterion must be one of.*got None"),
    "budget-0": ({"budget": 0}, "budget must be a number above 0 and at most 1, got 0"),
    "budget-2": ({"budget": 2}, "budget must be.*got 2"),
    "budget-nan": ({"budget": math.nan}, "budget must be.*got nan"),
    "scope": ({"scope": "block"}, "scope must be global, layer or modality, got 'block'"),
    "unit": ({"unit": "row"}, "unit must be weight or module, got 'row'"),
    "influence-of-weights": ({"criterion": "influence"}, "needs unit module"),
    "multiflow-of-modules": ({"criterion": "multiflow", "unit": "module"}, "needs unit weight, got module"),
    "modules-in-a-layer": ({"unit": "module", "scope": "layer"}, "leaves no choice"),
    "no-loss": ({"loss": None}, r"snip needs a loss \(model, batch\)"),
    "no-batches": ({"batches": []}, "snip needs at least one batch, got none"),
    "no-batches-multiflow": ({"criterion": "multiflow", "batches": iter(())}, "at least one batch, got none"),
    "nan": ({"loss": nan_loss}, "gradients must be finite, but visual.conv1.weight's is not for batch 0, loss nan"),
    "no-graph": ({"loss": lambda net, batch: LOSS(net, batch).detach()}, "scalar tensor with a graph"),
    "no-scalar": ({"loss": lambda net, batch: net.encode_image(batch[0])}, "scalar tensor with a graph"),
    "unreached": ({"config": TOWERS}, "must depend on every candidate weight, but it does not on transformer"),
    "unseen": ({"config": TOWERS, "criterion": "multiflow"}, "transformer.resblocks.0.attn.in_proj_weight met none"),
    "fisher-batches": ({"criterion": "fisher", "batches": [torch.zeros(2, 3)]}, "tuples of tensors.*got Tensor"),
    "fisher-lengths": (
        {"criterion": "fisher", "batches": [(torch.zeros(2, 3), torch.zeros(3))]}, "tensors of one length",
    ),
    "no-such-module": ({"config": MaskConfig(modules=("nothing.*",))}, "nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_refused_with_what_was_expected_and_what_came(model, name):
    changes, message = ERRORS[name]
    options = {"batches": batches(1), "criterion": "snip", "loss": LOSS} | changes
    before = state(model)
    with pytest.raises(UserError, match=message):
        select(model, options.pop("batches"), **options)
    assert state(model)[1:] == before[1:]


def test_a_masked_model_and_grouped_convolutions_are_refused(model):
    with pytest.raises(UserError, match="plain model, got one with masks"):
        select(get_mask_model(model).model, criterion="magnitude")
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(UserError, match=r"one group.*groups=2.*for 0\.weight"):
        select(grouped, [torch.zeros(1, 4, 2, 2)], criterion="multiflow", config=MaskConfig(modules=("0",)),
               loss=lambda net, x: net(x).sum())  # fmt: skip


def test_a_weight_that_is_not_finite_is_refused(model):
    model.visual.conv1.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match=r"must be finite, but magnitude is not for visual\.conv1\.weight"):
        select(model, criterion="magnitude")
