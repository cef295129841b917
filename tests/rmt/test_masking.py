import copy
import dataclasses
from types import SimpleNamespace

import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from helpers import assert_no_worse
from torch import nn

import rmt_kernels as rk
from rmt.config import PRESETS, TARGETS, MaskConfig, UserError
from rmt.masked import disabled, masks
from rmt.masking import apply_keys, apply_masks, count_off, find_targets, per_layer, percent_off, remove_masks

BLOCK = "visual.transformer.resblocks."
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None}
PARTS = ("k_proj", "q_proj", "v_proj", "c_proj")


class Attention(nn.Module):
    """The shape of open_clip main's own attention (2026): its blocks give x as k and v too, and it then splits one
    packed parameter. As a stand-in for nn.MultiheadAttention it takes and returns what blocks up to 3.3 expect."""

    def __init__(self, dim: int = 64, heads: int = 2, batch_first: bool = True) -> None:
        super().__init__()
        self.num_heads, self.batch_first = heads, batch_first
        self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) * dim**-0.5)
        self.in_proj_bias = nn.Parameter(torch.randn(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x, k_x=None, v_x=None, attn_mask=None, need_weights=False):
        parts = [t if self.batch_first else t.transpose(0, 1) for t in (x, k_x, v_x)]
        weights = None
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3, dim=0)
        each = zip(parts, weights, self.in_proj_bias.chunk(3))
        q, k, v = (F.linear(t, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t, w, b in each)
        y = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y if self.batch_first else y.transpose(0, 1), None


class Both(nn.Module):
    """Both towers as one call, for `functional_call`."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, image, text):
        return features(self.model, image, text)


class Scaled(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


def main_style() -> nn.Module:
    model = tiny.model()
    for block in model.visual.transformer.resblocks:
        block.attn = Attention(batch_first=getattr(block.attn, "batch_first", True))
    return model


def custom_blocks() -> nn.Module:
    """A tower of the installed open_clip's own `Attention`, where its configuration offers one."""
    if "block_type" not in {f.name for f in dataclasses.fields(open_clip.CLIPVisionCfg)}:
        pytest.skip("this open_clip has no vision_cfg.block_type")
    return tiny.model(block_type="custom")


def resnet() -> nn.Module:
    """Every BatchNorm a little off 0 and 1: at its start, bn3's weight of 0 lets nothing through a block."""
    torch.manual_seed(0)
    model = open_clip.CLIP(32, RESNET, tiny.MODEL["text_cfg"])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.add_(torch.rand_like(tensor))
    return model.eval()


def both_towers() -> nn.Module:
    return tiny.model(kind=open_clip.CustomTextCLIP)


MODELS = {"vit": tiny.model, "main": main_style, "blocks": custom_blocks, "resnet": resnet, "custom-text": both_towers}
CONFIGS = {
    "ramt": MaskConfig(),
    "rpmt": MaskConfig(targets=TARGETS),
    "both-towers": MaskConfig(targets=TARGETS, towers=("image", "text")),
}


@pytest.fixture
def ordinary_path():
    """nn.MultiheadAttention has a second, differently rounded path for inference: off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def randomised(found, seed=1):
    """Scores around the threshold: half of all bits are off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mask in found:
            mask.scores.copy_(5e-3 + 1e-3 * torch.randn(mask.scores.shape, generator=generator))
    return found


def features(model, image, text):
    return torch.cat([model.encode_image(image), model.encode_text(text)])


def inputs():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 3, 32, 32, generator=generator), torch.randint(1, 49000, (2, 16), generator=generator)


CASES = ["vit ramt", "blocks rpmt", "vit both-towers", "main rpmt", "resnet rpmt", "custom-text both-towers"]


@pytest.fixture(params=CASES)
def case(request, ordinary_path):
    name, config = request.param.split()
    torch.manual_seed(0)
    return MODELS[name](), CONFIGS[config]


# --- every host, every choice -----------------------------------------------------------------------------------------


def test_zero_shot_features_are_the_same_bits_after_injection(case):
    model, config = case
    with torch.no_grad():
        before = features(model, *inputs())
        names = set(model.state_dict())
        found = apply_masks(model, config)
        assert torch.equal(features(model, *inputs()), before)
        randomised(found)
        assert not torch.equal(features(model, *inputs()), before)
        with disabled(model):
            assert torch.equal(features(model, *inputs()), before)
    assert {m.key for m in found} <= names <= set(model.state_dict())


def test_frozen_means_frozen(case):
    model, config = case
    found = apply_masks(model.train(), config)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(m.scores) for m in found}
    assert not model.training


def gradients(plain, found, dtype):
    """{key: (N, K) d loss / d B} by autograd of the plain model with W * B in place of W, B a leaf."""
    plain, (image, text) = copy.deepcopy(plain).to(dtype), inputs()
    names = dict(plain.named_parameters())
    leaves = {m.key: (m.scores.detach() > 5e-3).to(dtype).requires_grad_() for m in found}
    merged = {f"model.{key}": names[key] * leaf.view_as(names[key]) for key, leaf in leaves.items()}
    (torch.func.functional_call(Both(plain), merged, (image.to(dtype), text)) ** 2).sum().backward()
    return {key: leaf.grad for key, leaf in leaves.items()}


def test_every_scores_gradient_is_autograds_through_weight_times_mask(case):
    model, config = case
    plain = copy.deepcopy(model)
    found = randomised(apply_masks(model, config))
    (features(model, *inputs()) ** 2).sum().backward()
    want, truth = (gradients(plain, found, dtype) for dtype in (torch.float32, torch.float64))
    for mask in found:
        assert truth[mask.key].any(), mask.key
        assert_no_worse(mask.scores.grad, want[mask.key], truth[mask.key])


def test_removing_the_masks_gives_the_plain_classes_and_the_masked_outputs_bit_for_bit(case):
    model, config = case
    kinds, names = [(n, type(m)) for n, m in model.named_modules()], list(model.state_dict())
    found = randomised(apply_masks(model, config))
    merged = {m.key: m.dense.clone() for m in found}
    with torch.no_grad():
        masked = features(model, *inputs())
        assert remove_masks(model) is model
        assert torch.equal(features(model, *inputs()), masked)
    assert [(n, type(m)) for n, m in model.named_modules()] == kinds and list(model.state_dict()) == names
    assert all(torch.equal(model.get_parameter(key).flatten(1), dense) for key, dense in merged.items())
    assert not masks(model) and not any(p.requires_grad for p in model.parameters())
    assert apply_masks(model, config), "and it can be masked again"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_merging_is_exact_in_every_dtype(dtype):
    model = tiny.model().to(dtype)
    found = randomised(apply_masks(model, MaskConfig(targets=TARGETS)))
    want = {m.key: m.weight * (m.scores > 5e-3) for m in found}
    remove_masks(model)
    for key, weight in want.items():
        got = model.get_parameter(key)
        assert got.dtype == dtype and torch.equal(got.flatten(1), weight)


# --- which weights ----------------------------------------------------------------------------------------------------


def test_default_masks_attention_and_patch_convolution_in_module_order():
    found = apply_masks(tiny.model(), MaskConfig())
    kinds = ("attn.in_proj_weight", "attn.out_proj.weight")
    blocks = [f"{BLOCK}{i}.{kind}" for i in range(2) for kind in kinds]
    assert [m.key for m in found] == ["visual.conv1.weight", *blocks]
    assert count_off(found) == (0, 64 * 3 * 8 * 8 + 2 * 4 * 64 * 64)


@pytest.mark.parametrize(
    "targets, count", [(("mlp",), 4), (("conv",), 1), (("attention",), 4), (("attention", "conv"), 5), (TARGETS, 9)]
)
def test_targets_can_be_chosen(targets, count):
    assert len(apply_masks(tiny.model(), MaskConfig(targets=targets))) == count


@pytest.mark.parametrize("kind, prefix", [(open_clip.CLIP, ""), (open_clip.CustomTextCLIP, "text.")])
def test_the_text_tower_is_masked_on_request(kind, prefix):
    found = apply_masks(tiny.model(kind=kind), MaskConfig(towers=("text",)))
    block = f"{prefix}transformer.resblocks.0.attn."
    assert [m.key for m in found] == [f"{block}in_proj_weight", f"{block}out_proj.weight"]
    found = apply_masks(tiny.model(kind=kind), MaskConfig(towers=("text", "image"), targets=TARGETS))
    assert len(found) == 4 + 9


def test_the_text_tower_has_no_convolution():
    with pytest.raises(UserError, match="CLIP has no conv to mask in its text tower"):
        find_targets(tiny.model(), MaskConfig(targets=("conv",), towers=("text",)))


@pytest.mark.parametrize("preset", ["ramt", "rpmt"])
def test_resnet_50_has_the_official_codes_59_tensors(preset):
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("RN50"))
    names = find_targets(model, MaskConfig(targets=PRESETS[preset].targets))
    assert len(names) == 59
    assert sum(model.get_submodule(name).weight.numel() for name in names) == 38_154_080


def test_vit_b_16_has_the_official_codes_25_tensors():
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16"))
    names = find_targets(model, MaskConfig())
    weights = [p for name in names for key, p in model.get_submodule(name).named_parameters() if key.endswith("weight")]
    assert len(weights) == 25 and sum(w.numel() for w in weights) == 28_901_376


def test_a_resnets_attention_and_convolutions():
    found = apply_masks(resnet(), MaskConfig(targets=("attention",)))
    assert [m.key for m in found] == [f"visual.attnpool.{part}.weight" for part in PARTS]
    keys = [m.key for m in apply_masks(resnet(), MaskConfig(targets=("conv",)))]
    stem, blocks = keys[:3], keys[3:]
    assert stem == [f"visual.conv{i}.weight" for i in (1, 2, 3)] and len(blocks) == 4 * 4
    assert "visual.layer3.0.downsample.0.weight" in blocks


def test_mlp_alone_is_nothing_of_a_resnet():
    model = resnet()
    before = str(model)
    with pytest.raises(UserError, match="CLIP has no mlp to mask in its ResNet image tower"):
        apply_masks(model, MaskConfig(targets=("mlp",)))
    assert str(model) == before


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1))])
def test_refuses_what_is_no_clip_and_names_the_way_out(model):
    with pytest.raises(UserError, match=r"ViT or ResNet image tower, got .*MaskConfig\(modules="):
        find_targets(model, MaskConfig())


def test_refuses_an_attention_it_cannot_mask_and_swaps_nothing():
    model = tiny.model()
    model.visual.transformer.resblocks[1].attn = nn.MultiheadAttention(64, 2, kdim=32, vdim=32, batch_first=True)
    with pytest.raises(UserError, match=rf"{BLOCK}1.attn \(MultiheadAttention\) cannot be masked"):
        apply_masks(model, MaskConfig())
    assert not masks(model)


def test_refuses_to_mask_twice():
    model = tiny.model()
    apply_masks(model, MaskConfig())
    with pytest.raises(UserError, match="masks already"):
        apply_masks(model, MaskConfig())


def test_a_parametrized_weight_cannot_be_masked():
    model = tiny.model()
    nn.utils.parametrizations.weight_norm(model.visual.transformer.resblocks[0].mlp.c_fc)
    with pytest.raises(UserError, match=r"c_fc .*cannot be masked.*no parameter weight: is it parametrized"):
        apply_masks(model, MaskConfig(targets=("mlp",)))


def test_a_linear_with_a_forward_of_its_own_keeps_it():
    torch.manual_seed(0)
    model, x = nn.Sequential(Scaled(8, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(5, 8)
    before = model(x)
    found = randomised(apply_masks(model, MaskConfig(modules=("*",))))
    with disabled(model):
        assert torch.equal(model(x), before)
    masked = model(x)
    weight = found[0].weight * (found[0].scores > 5e-3)
    torch.testing.assert_close(masked, model[2](F.relu(F.linear(x, 2 * weight, model[0].bias))))
    masked.sum().backward()
    assert all(m.scores.grad.any() for m in found)
    assert torch.equal(remove_masks(model)(x), masked) and type(model[0]) is Scaled


class Doubled(nn.MultiheadAttention):
    """Attention with a forward of its own that ends in torch's."""

    def forward(self, query, key, value, **options):
        y, weights = super().forward(query, key, value, **options)
        return 2 * y, weights


def test_an_attention_with_a_forward_of_its_own_keeps_it():
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"attn": Doubled(24, 3)}).eval(), torch.randn(5, 2, 24)
    plain = nn.MultiheadAttention(24, 3).eval()
    plain.load_state_dict(model.attn.state_dict())
    found = randomised(apply_masks(model, MaskConfig(modules=("attn",))))
    with disabled(model):
        torch.testing.assert_close(model.attn(x, x, x)[0], 2 * plain(x, x, x)[0])
    for mask in found:
        plain.get_parameter(mask.key.removeprefix("attn.")).data.copy_(mask.dense)
    masked = model.attn(x, x, x)[0]
    torch.testing.assert_close(masked, 2 * plain(x, x, x)[0])
    masked.sum().backward()
    assert len(found) == 2 and all(m.scores.grad.any() for m in found)
    assert type(remove_masks(model).attn) is Doubled


def test_hooks_and_training_mode_outlive_masking_and_unmasking():
    model, calls = nn.Sequential(nn.Linear(4, 4)), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    apply_masks(model, MaskConfig(modules=("0",)))
    model(torch.randn(2, 4))
    remove_masks(model.train())(torch.randn(2, 4))
    assert calls == [1, 1] and model[0].training


# --- a selection, a task's keys ---------------------------------------------------------------------------------------


def some(key, words):
    """A selection of one tensor."""
    return SimpleNamespace(words={key: words})


def test_a_selection_leaves_modules_plain_of_which_nothing_is_selected(ordinary_path):
    model, reference = tiny.model(), tiny.model()
    key, chosen = f"{BLOCK}1.attn.out_proj.weight", torch.rand(64, 64) > 0.9
    empty = torch.zeros(64, 6, dtype=torch.int32)
    selection = some(key, rk.pack_bits(chosen))
    selection.words["visual.conv1.weight"] = empty
    found = apply_masks(model, MaskConfig(), selection)
    assert [m.key for m in found] == [key]
    assert tuple(found[0].scores.shape) == (int(chosen.sum()),)
    assert type(model.visual.conv1) is nn.Conv2d
    assert type(model.visual.transformer.resblocks[0].attn) is nn.MultiheadAttention
    image, _ = inputs()
    with torch.no_grad():
        assert torch.equal(model.encode_image(image), reference.encode_image(image))
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(found[0].scores)}
    model.encode_image(image).sum().backward()
    assert found[0].scores.grad.shape == found[0].scores.shape and found[0].scores.grad.any()
    with torch.no_grad():
        found[0].scores[:10] = 0
        masked = model.encode_image(image)
    assert per_layer(found) == [(key, 10, 64 * 64)]
    off = ~rk.unpack_bits(found[0].bits, 64)
    assert off.sum() == 10 and not (off & ~chosen).any()
    remove_masks(model)
    with torch.no_grad():
        assert torch.equal(model.encode_image(image), masked)
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]


@pytest.mark.parametrize(
    "key, words, message",
    [
        ("visual.proj", torch.ones(64, 1, dtype=torch.int32), "got visual.proj, which is none"),
        ("visual.conv1.weight", torch.zeros(64, 6, dtype=torch.int32), "got nothing"),
        (
            "visual.conv1.weight",
            torch.ones(64, 5, dtype=torch.int32),
            r"does not fit visual\.conv1\.weight: .*\(64, 6\)",
        ),
    ],
)
def test_a_selection_of_other_weights_is_refused(key, words, message):
    model = tiny.model()
    with pytest.raises(UserError, match=message):
        apply_masks(model, MaskConfig(), some(key, words))
    assert not masks(model)


@pytest.mark.parametrize("make", [tiny.model, resnet], ids=["vit", "resnet"])
def test_a_tasks_keys_are_masked_and_nothing_else(make):
    keys = [m.key for m in apply_masks(make(), MaskConfig(targets=("attention",)))][1::2]
    found = apply_keys(make(), keys, MaskConfig())
    assert [m.key for m in found] == keys
    assert all(m.scores.dim() == 2 for m in found), "a whole tensor needs no bitmap"


def test_a_tasks_keys_of_another_model_are_refused():
    with pytest.raises(UserError, match=r"CLIP has no module visual\.layer1\.0\.conv1"):
        apply_keys(tiny.model(), ["visual.layer1.0.conv1.weight"], MaskConfig())


# --- counts -----------------------------------------------------------------------------------------------------------


def test_percent_off_counts_every_masked_weight_once():
    found = apply_masks(tiny.model(), MaskConfig())
    bits = found[0].bits.clone()
    bits[0, 0] = 0b1010  # 30 of 32 off
    found[0].set_bits(bits)
    total = sum(m.weight.numel() for m in found)
    assert count_off(found) == (30, total)
    assert percent_off(found) == pytest.approx(100 * 30 / total)
    assert per_layer(found)[:2] == [
        ("visual.conv1.weight", 30, 64 * 192),
        (f"{BLOCK}0.attn.in_proj_weight", 0, 192 * 64),
    ]


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_spread_scores_lie_evenly_around_init_and_switch_nothing_off(share):
    found = apply_masks(tiny.model(), config := MaskConfig(spread=share))
    width = share * (config.init - config.threshold)
    for stream, mask in enumerate(found):
        scores = mask.scores.detach()
        assert (scores > config.threshold).all() and count_off([mask])[0] == 0
        assert torch.equal(mask.bits, rk.pack_scores(scores, config.threshold))
        rest = ((scores - config.init) / width).flatten().double()
        assert rest.abs().max() <= 1 + 1e-5 and abs(rest.mean()) < 5 / rest.numel() ** 0.5
        assert torch.histc(rest, 4, -1, 1).min() > 0.2 * rest.numel(), "evenly"
        assert stream == 0 or not torch.equal(scores.flatten()[:64], found[0].scores.flatten()[:64]), "each its own"
    again = apply_masks(tiny.model(), config)
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(found, again))
    with pytest.raises(UserError, match=r"spread must be a number from 0 to 1, got 1\.5"):
        MaskConfig(spread=1.5)


def test_spread_scores_of_a_selection():
    plain = apply_masks(tiny.model(), MaskConfig())
    words = {plain[1].key: torch.full_like(plain[1].bits, 5)}
    found = apply_masks(tiny.model(), MaskConfig(spread=1.0), SimpleNamespace(words=words))
    assert len(found) == 1 and found[0].scores.dim() == 1 and found[0].scores.unique().numel() > 100


def test_a_lowest_draw_stays_above_the_threshold(monkeypatch):
    monkeypatch.setattr("rmt.masking.philox_uniform", lambda rng, stream, shape: torch.full(shape, 1 - 2.0**-24))
    found = apply_masks(tiny.model(), MaskConfig(spread=1.0))
    assert percent_off(found) == 0 and float(found[0].scores.detach().max()) < 0.0050001
