"""Methods that train through the backbone: CLIP-LoRA, BitFit, LayerNorm tuning, full fine-tuning, WiSE-FT."""

import copy
import dataclasses
import math

import peer_tools
import pytest
import tiny
import torch
import torch.nn.functional as F
from open_clip.transformer import Attention
from safetensors.torch import load, save
from torch import nn

from rmt import UserError, clip
from rmt.config import MaskConfig
from rmt.model import get_mask_model
from rmt.peers import full_ft, lora, names, parts
from rmt.peers.footing import Shelf, encode
from rmt.peers.method import State, cosine_logits

NAMES = ("lora", "bitfit", "ln", "full_ft")
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None}


def with_model(footing, model):
    """Its class vectors are apart: random queries and keys look at one token, which all texts have."""
    with torch.no_grad():
        model.transformer.resblocks[0].attn.in_proj_weight[: 2 * 32] *= 0.05
    loaded = dataclasses.replace(footing.loaded, model=model)
    text = clip.Text.make(loaded, footing.split.classnames, peer_tools.TEMPLATE)
    return dataclasses.replace(footing, loaded=loaded, text=text, shelf=Shelf())


@pytest.fixture(scope="module")
def footing(tmp_path_factory):
    made = peer_tools.footing(tmp_path_factory.mktemp("towers"), context=16)
    train = dataclasses.replace(made.config.train, lr=None, steps=None)
    made = dataclasses.replace(made, config=dataclasses.replace(made.config, train=train))
    return with_model(made, made.loaded.model)


@pytest.fixture(scope="module")
def resnet(footing):
    model = tiny.model(**RESNET)
    model.visual.preprocess_cfg = tiny.PREPROCESS
    return with_model(footing, model)


@pytest.fixture
def trained(monkeypatch):
    """The models that were trained, as training left them."""
    models = []
    for module in (lora, parts):
        loop = module.train

        def kept(footing, model, *rest, loop=loop):
            models.append(model)
            return loop(footing, model, *rest)

        monkeypatch.setattr(module, "train", kept)
    return models


def with_rate(footing, name, lr, **changed):
    return dataclasses.replace(footing, rates={name: lr}, **changed)


def loss_of(model, footing, text):
    """Of the first batch, written out."""
    image, label = footing.batches()(0)
    cosine = F.normalize(model.encode_image(image), dim=-1) @ text.T
    return F.cross_entropy(model.logit_scale.exp() * cosine, label)


@pytest.mark.parametrize("name", NAMES)
def test_stored_restores_the_same_bits(footing, name, trained):
    method, start = names.method(name), footing.start()
    before = {key: value.clone() for key, value in start.model.state_dict().items()}
    torch.manual_seed(1)
    fit = method.fit(footing, start)
    noise = torch.rand(3)
    torch.manual_seed(2)
    again = method.fit(footing, start)
    assert fit.stored.keys() == again.stored.keys()
    assert all(torch.equal(value, again.stored[key]) for key, value in fit.stored.items())
    torch.manual_seed(1)
    assert torch.equal(noise, torch.rand(3)), "the caller's random numbers are not used up"
    assert fit.trained == sum(value.numel() for value in fit.stored.values()) and fit.steps == 20
    features, made = [], []
    for stored in (fit.stored, load(save(fit.stored))):
        state = method.restore(footing, start, stored)
        image = next(iter(footing.images("test")))
        features.append(encode(state.model, image))
        made.append(state.logits(features[-1]))
    assert torch.equal(*made) and torch.equal(*features)
    assert state.stack == (name,) and type(state.model) is type(start.model)
    assert not any(p.requires_grad for p in state.model.parameters())
    assert not any(module.training for module in state.model.modules())
    assert state.model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in start.model.state_dict().items())
    tuned = trained[0].eval()
    # Only LoRA's restored weights are another sum of the same numbers.
    exact = {} if name == "lora" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(features[0], encode(tuned, image), **exact)
    with torch.no_grad():
        text = F.normalize(tuned.encode_text(footing.text.tokens), dim=-1)
    torch.testing.assert_close(state.text, text if name == "lora" else start.text, **exact)


@pytest.mark.parametrize("name,lr", [("lora", 1e-2), ("bitfit", 3e-2), ("ln", 1e-2), ("full_ft", 3e-4)])
def test_learns(footing, name, lr):
    footing = with_rate(footing, name, lr, max_steps=60)
    method, start = names.method(name), footing.start()
    label = footing.labels("test")

    def accuracy(state):
        features = torch.cat([encode(state.model, image) for image in footing.images("test")])
        return (state.logits(features).argmax(-1) == label).float().mean().item()

    state = method.restore(footing, start, method.fit(footing, start).stored)
    assert accuracy(start) < 0.4 and accuracy(state) > 0.8


@pytest.mark.parametrize("name", NAMES)
def test_bf16_trains_fp32_parameters(footing, name):
    config = dataclasses.replace(footing.config, train=dataclasses.replace(footing.config.train, precision="bf16"))
    high = dataclasses.replace(footing, max_steps=2)
    method, start = names.method(name), footing.start()
    low, high = (method.fit(each, start).stored for each in (dataclasses.replace(high, config=config), high))
    assert all(value.dtype is torch.float32 for value in low.values())
    # B of LoRA begins at 0; A, which B's zeros keep where it was in the first step, is left out.
    keys = [key for key in low if not key.endswith("lora_A")]
    begin = {key: 0 if name == "lora" else start.model.get_parameter(key).detach() for key in keys}
    moved = [torch.cat([(stored[key] - begin[key]).flatten() for key in keys]) for stored in (low, high)]
    assert not torch.equal(*moved), "the towers ran in fp32"
    assert F.cosine_similarity(*moved, dim=0) > 0.9


@pytest.mark.parametrize("name,wanted", [
    ("bitfit", lambda key, p: "bias" in key.rpartition(".")[2]),
    ("ln", lambda key, p: ".ln_" in key),
    ("full_ft", lambda key, p: True),
])  # fmt: skip
def test_one_step_of_adamw(footing, name, wanted):
    """theta - lr * wd * theta - lr * g / (|g| + 1e-8), AdamW's first step; wise-ft clips g to norm 1 before."""
    lr, decay = 1e-3, 0.1 if name == "full_ft" else 0.0
    one, start = with_rate(footing, name, lr, max_steps=1), footing.start()
    fit = names.method(name).fit(one, start)
    model = copy.deepcopy(start.model).requires_grad_(True)
    mine = {key: p for key, p in model.named_parameters() if key.startswith("visual.") and wanted(key, p)}
    assert mine.keys() == fit.stored.keys() and fit.trained == sum(p.numel() for p in mine.values())
    grads = torch.autograd.grad(loss_of(model, footing, start.text), mine.values())
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    assert norm > 1, "else nothing is clipped"
    for (key, p), g in zip(mine.items(), grads):
        g = g / norm if name == "full_ft" else g
        want = p * (1 - lr * decay) - lr * g / (g.abs() + 1e-8)
        # A gradient of about eps (in_proj's k biases have none but rounding) has no sign to go by.
        clear = g.abs() > 1e-5
        torch.testing.assert_close(fit.stored[key][clear], want[clear].detach(), rtol=1e-5, atol=1e-7)


def test_norms_of_a_resnet_keep_their_statistics(resnet):
    start = resnet.start()
    stored = (fit := parts.LayerNormTuning().fit(resnet, start)).stored
    model = parts.LayerNormTuning().restore(resnet, start, stored).model
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and name.startswith("visual")]
    assert stored.keys() == {f"{name}.{key}" for name in norms for key in ("weight", "bias")} and fit.steps == 20
    for key, value in start.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]) == (key not in stored), key


def test_budget_is_the_masks(footing):
    """30 epochs, which are stretched where the masks' are; a length that was asked for is kept."""
    train = dataclasses.replace(footing.config.train, epochs=30)
    asked = dataclasses.replace(footing, config=dataclasses.replace(footing.config, train=train))
    # Rates sum to 5 times the way of 5e-3 from init to threshold: 8e-5 * 2 * (epochs + 1) / 2 >= 2.5e-2.
    published = 2 * (math.ceil(5 * 5e-3 / 8e-5) - 1)
    whole = dataclasses.replace(asked, max_steps=None)
    assert parts.mask_steps(whole) == (30 * (4 * 4 // 8), published)
    assert parts.mask_steps(asked) == parts.mask_steps(footing) == (20, published)
    fit = parts.BitFit().fit(footing, footing.start())
    assert (fit.steps, fit.published_steps) == (20, published)


def random_branches(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (layer.lora_A, layer.lora_B):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layer


def test_branches_equal_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed: its LoRA is what ours is compared with")
    torch.manual_seed(0)
    attn = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    nn.init.normal_(attn.in_proj_bias)
    layer = random_branches(lora.LoraAttention.over(attn)).eval()
    x = torch.randn(5, 3, 16, dtype=torch.float64)
    parts = layer._linear(x, "in_proj_", layer.in_proj_bias).split(16, -1)
    for i, got in enumerate(parts):
        linear = nn.Linear(16, 16, dtype=torch.float64)
        linear.load_state_dict(
            {"weight": attn.in_proj_weight[16 * i : 16 * i + 16], "bias": attn.in_proj_bias[16 * i : 16 * i + 16]}
        )
        config = peft.LoraConfig(r=2, lora_alpha=1, use_rslora=True, lora_dropout=0.25, target_modules=["0"])
        other = peft.get_peft_model(nn.Sequential(linear), config).eval()
        for name, p in other.named_parameters():
            if "lora_" in name:
                p.data = (layer.lora_A if "lora_A" in name else layer.lora_B)[i].detach().clone()
        torch.testing.assert_close(got, other(x), rtol=1e-12, atol=1e-12)


def test_merged_equals_unmerged(footing):
    """In float64 to its rounding; the formula of the merged weight is written out."""
    model = copy.deepcopy(footing.loaded.model).double()
    merged = copy.deepcopy(model)
    for i, (name, attn) in enumerate(lora.attentions(model).items()):
        layer = random_branches(lora.LoraAttention.over(attn), seed=i).eval()
        model.set_submodule(name, layer)
        delta = torch.cat([b @ a for a, b in zip(layer.lora_A, layer.lora_B)]) * 2**-0.5
        merged.get_submodule(name).in_proj_weight.data += delta.detach()
    image, tokens = footing.batches()(0)[0].double(), footing.text.tokens
    with torch.no_grad():
        for got, want in ((model.encode_image(image), merged.encode_image(image)),
                          (model.encode_text(tokens), merged.encode_text(tokens))):  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_new_branches_are_zero_and_all_train(footing, training):
    # With a gradient to take, so that torch's attention keeps off its fused inference path, which rounds differently.
    plain = copy.deepcopy(footing.loaded.model).requires_grad_(True)
    model = copy.deepcopy(plain).requires_grad_(False)
    layers = {name: lora.LoraAttention.over(attn) for name, attn in lora.attentions(model).items()}
    blocks = (
        "visual.transformer.resblocks.0.attn",
        "visual.transformer.resblocks.1.attn",
        "transformer.resblocks.0.attn",
    )
    assert tuple(layers) == blocks or set(layers) == set(blocks)
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(training))
        # kaiming_uniform(a=sqrt(5)) of a fan-in of E
        bound = layer.embed_dim**-0.5
        assert 0.9 * bound < layer.lora_A.max() <= bound and layer.lora_A.min() < -0.9 * bound
    image = footing.batches()(0)[0]
    assert torch.equal(model.encode_image(image), plain.encode_image(image))
    text = model.encode_text(footing.text.tokens)
    assert torch.equal(text, plain.encode_text(footing.text.tokens))
    loss_of(model, footing, F.normalize(text, dim=-1)).backward()
    for name, layer in layers.items():
        # Each of q, k and v; while B is 0 nothing reaches A.
        assert all(g.abs().max() > 0 for g in layer.lora_B.grad) and layer.lora_A.grad.abs().max() == 0, name
        assert layer.in_proj_weight.grad is None


def test_dropout_is_in_training_alone_and_each_branch_has_its_own():
    layer = lora.LoraAttention.over(nn.MultiheadAttention(400, 2, bias=False))
    with torch.no_grad():
        layer.in_proj_weight.zero_()
        layer.lora_A.zero_()[:, 0, 0] = 1
        layer.lora_B.zero_()[:, 0, 0] = 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.ones(2000, 400)
        q, k, v = layer.train()._linear(x, "in_proj_", None)[:, ::400].T
    for branch in (q, k, v):
        kept = branch != 0
        assert abs(kept.float().mean() - 0.75) < 0.03
        torch.testing.assert_close(branch[kept], torch.full_like(branch[kept], 2**-0.5 / 0.75))
    assert not torch.equal(q, k) and not torch.equal(k, v) and not torch.equal(q, v)
    y = layer.eval()._linear(x[:2], "in_proj_", None)
    torch.testing.assert_close(y[:, ::400], torch.full((2, 3), 2**-0.5))


def test_lora_trains_both_towers(footing):
    fit = names.method("lora").fit(footing, footing.start())
    assert fit.trained == 2 * (3 * 2 * 2 * 64) + 3 * 2 * 2 * 32 and fit.published_steps == 500 * 4
    for key, value in fit.stored.items():
        if key.endswith("lora_B"):
            assert all(part.abs().max() > 0 for part in value), key


def test_over_masks_what_is_off_gets_the_delta_alone(footing):
    masked = get_mask_model(footing.copy(footing.start()), MaskConfig())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mask in masked.masks:
            mask.scores.copy_(torch.rand(mask.scores.shape, generator=generator) * 1e-2)
    model, text = masked.merge_and_unload(), footing.text.zero_shot
    below = State(model, ("ramt",), text, cosine_logits(model, text))
    fit = names.method("lora").fit(footing, below)
    state = names.method("lora").restore(footing, below, fit.stored)
    assert state.stack == ("ramt", "lora")
    for name in (f"visual.transformer.resblocks.{i}.attn" for i in (0, 1)):
        a, b = (fit.stored[f"{name}.lora_{which}"].double() for which in "AB")
        delta = (torch.cat([b[i] @ a[i] for i in range(3)]) / math.sqrt(2)).float()
        before, after = (m.get_submodule(name).in_proj_weight for m in (model, state.model))
        off = before == 0
        assert 0.4 < off.float().mean() < 0.6 and delta[off].abs().max() > 0
        torch.testing.assert_close(after[off], delta[off], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(after, before + delta)


def test_wise_ft_is_halfway(footing):
    start, asked = footing.start(), []
    tuned = {key: torch.randn_like(p) for key, p in start.model.named_parameters() if key.startswith("visual.")}

    def fitted(name):
        asked.append(name)
        return tuned

    method = names.method("wise_ft")
    fit = method.fit(dataclasses.replace(footing, fitted=fitted), start)
    model = method.restore(footing, start, fit.stored).model
    assert asked == ["full_ft"] and fit.stored.keys() == tuned.keys() and fit.chosen == {"alpha": 0.5}
    for key, p in model.named_parameters():
        old = start.model.get_parameter(key)
        if key in tuned:
            torch.testing.assert_close(p, (old + tuned[key]) / 2)
        else:
            assert torch.equal(p, old), key


def test_wise_ft_of_full_ft(footing):
    """Without a step of its own it is between both ends."""
    full, start = names.method("full_ft"), footing.start()
    stored = full.fit(footing, start).stored
    fit = names.method("wise_ft").fit(dataclasses.replace(footing, fitted=lambda name: stored), start)
    for key, value in fit.stored.items():
        ends = torch.stack([start.model.get_parameter(key), stored[key]])
        assert (value >= ends.amin(0)).all() and (value <= ends.amax(0)).all(), key


def test_bad_input(footing, resnet):
    start, method = footing.start(), names.method("lora")
    with pytest.raises(UserError, match="no attention blocks of a ViT image tower; lora needs a ViT"):
        method.fit(resnet, resnet.start())
    model = tiny.model()
    model.visual.transformer.resblocks[1].attn = Attention(64, 2)
    own = dataclasses.replace(footing, loaded=dataclasses.replace(footing.loaded, model=model))
    with pytest.raises(
        UserError, match=r"resblocks\.1\.attn must be nn\.MultiheadAttention, got Attention; lora needs"
    ):
        method.fit(own, own.start())
    layer = lora.LoraAttention.over(nn.MultiheadAttention(8, 2))
    with pytest.raises(UserError, match="without returned weights"):
        layer(*[torch.ones(3, 1, 8)] * 3)
    with pytest.raises(UserError, match="learning rate too large"):
        method.fit(with_rate(footing, "lora", 1e30), start)
    with pytest.raises(UserError, match="wise_ft starts from the weights of full_ft"):
        names.method("wise_ft").fit(footing, start)
    for name in NAMES:
        fit = names.method(name).fit(dataclasses.replace(footing, max_steps=1), start)
        key = next(iter(fit.stored))
        for wrong in (fit.stored | {key: torch.zeros(5, 5)}, {k: v for k, v in fit.stored.items() if k != key},
                      fit.stored | {"visual.other": torch.zeros(1)}):  # fmt: skip
            with pytest.raises(UserError, match=f"what {name} stored is of another model.*fit it again"):
                names.method(name).restore(footing, start, wrong)
    bare = tiny.model()
    bare.visual = nn.Sequential(nn.Linear(2, 2, bias=False))
    with pytest.raises(UserError, match="bitfit found nothing to train in Sequential"):
        parts.BitFit().fit(footing, dataclasses.replace(start, model=bare))


def test_recipes():
    """What CLIP-LoRA's run_utils.py and lora.py have, and what is stated as ours."""
    assert (lora.RANK, lora.ALPHA, lora.DROPOUT, lora.LR, lora.LAST_LR) == (2, 1, 0.25, 2e-4, 1e-6)
    assert (lora.DECAY, lora.STEPS_A_SHOT) == (1e-2, 500)
    assert (full_ft.FullFineTuning.lr, full_ft.FullFineTuning.decay, full_ft.ALPHA) == (1e-5, 0.1, 0.5)
    assert (parts.BitFit.lr, parts.LayerNormTuning.lr) == (1e-3, 1e-3)
