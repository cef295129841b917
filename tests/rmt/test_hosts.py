"""Models unknown to rmt, masked by naming modules: Hugging Face CLIP and SigLIP, timm alone and in open_clip."""

import copy

import open_clip
import pytest
import tiny
import torch
from helpers import assert_no_worse
from test_masking import ordinary_path, randomised  # noqa: F401
from torch import nn

import rmt
from rmt.config import MaskConfig, UserError
from rmt.masked import disabled, masks
from rmt.masking import apply_keys, apply_masks, remove_masks

LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = LAYERS | {"image_size": 16, "patch_size": 8}
TEXT = LAYERS | {"vocab_size": 60, "max_position_embeddings": 12, "projection_size": 32}


def hugging_face(name: str, **extra) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="Hugging Face models need the package transformers")
    config = getattr(transformers, f"{name}Config")(vision_config=dict(VISION), text_config=dict(TEXT), **extra)
    return getattr(transformers, f"{name}Model")(config)


class ImageTower(nn.Module):
    """A Hugging Face model's image features, by one call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image):
        out = self.model.vision_model(pixel_values=image)
        return out.pooler_output


def hf_clip() -> nn.Module:
    return ImageTower(hugging_face("CLIP", projection_dim=16))


def hf_siglip() -> nn.Module:
    return ImageTower(hugging_face("Siglip"))


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm models need the package timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    return timm.models.vision_transformer.VisionTransformer(**sizes)


def timm_in_open_clip() -> nn.Module:
    """An open_clip model whose image tower is timm's: `visual.trunk`."""
    pytest.importorskip("timm", reason="timm models need the package timm")
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    return open_clip.CLIP(32, vision, tiny.MODEL["text_cfg"]).visual


HOSTS = {
    "hf-clip": (hf_clip, ("*.layers.*.self_attn.*_proj", "*.patch_embedding"), 9, 16),
    "hf-siglip": (hf_siglip, ("*.vision_model.*.self_attn.*_proj", "*.head.attention", "*.head.mlp.fc?"), 12, 16),
    "timm": (timm_vit, ("blocks.*.attn.qkv", "blocks.*.attn.proj", "patch_embed.proj"), 5, 16),
    "timm-in-open_clip": (timm_in_open_clip, ("trunk.blocks.*.attn.qkv", "trunk.blocks.*.mlp.fc1"), 12, 160),
}


@pytest.fixture(params=HOSTS)
def host(request, ordinary_path):  # noqa: F811
    make, patterns, count, size = HOSTS[request.param]
    torch.manual_seed(0)
    model = make().eval()
    if request.param == "hf-clip":
        # The text tower's layers match as well; they are not in this tower's features.
        patterns = tuple(p.replace("*.", "*.vision_model.*", 1) for p in patterns[:1]) + patterns[1:]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Hugging Face's attention starts so small that nothing depends on queries and keys.
            if parameter.dim() > 1 and "proj" in name:
                parameter.mul_(4)
    return model, MaskConfig(modules=patterns), count, torch.randn(2, 3, size, size)


def test_logits_are_the_same_bits_with_all_masks_on_and_keys_are_state_dict_names(host):
    model, config, count, image = host
    with torch.no_grad():
        before, names = model(image), set(model.state_dict())
        found = apply_masks(model, config)
        assert len(found) == count and {m.key for m in found} <= names
        assert torch.equal(model(image), before)
        randomised(found)
        assert not torch.equal(model(image), before)
        with disabled(model):
            assert torch.equal(model(image), before)


def test_frozen_means_frozen(host):
    model, config, _, _ = host
    found = apply_masks(model.train(), config)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(m.scores) for m in found}
    assert not model.training


def gradients(plain, found, image, dtype):
    plain = copy.deepcopy(plain).to(dtype)
    names = dict(plain.named_parameters())
    leaves = {m.key: (m.scores.detach() > 5e-3).to(dtype).requires_grad_() for m in found}
    merged = {key: names[key] * leaf.view_as(names[key]) for key, leaf in leaves.items()}
    torch.func.functional_call(plain, merged, (image.to(dtype),)).square().sum().backward()
    return {key: leaf.grad for key, leaf in leaves.items()}


def test_every_scores_gradient_is_autograds_through_weight_times_mask(host):
    model, config, _, image = host
    plain = copy.deepcopy(model)
    found = randomised(apply_masks(model, config))
    model(image).square().sum().backward()
    want, truth = (gradients(plain, found, image, dtype) for dtype in (torch.float32, torch.float64))
    for mask in found:
        assert truth[mask.key].any(), mask.key
        assert_no_worse(mask.scores.grad, want[mask.key], truth[mask.key])


def test_rmt_backward_and_mask_adam_reach_every_mask(host):
    model, config, _, image = host
    found = apply_masks(model, config)
    before = [m.scores.detach().clone() for m in found]
    y = model(image)
    rmt.backward(y.square().sum(), y.sum(), model)
    rmt.MaskAdam(model, lr=1e-3).step()
    assert all(not torch.equal(m.scores, b) for m, b in zip(found, before))


def test_merged_it_computes_what_it_did_masked_bit_for_bit_with_the_plain_classes(host):
    model, config, _, image = host
    kinds = [type(m) for m in model.modules()]
    keys = [m.key for m in randomised(apply_masks(model, config))]
    with torch.no_grad():
        masked = model(image)
        assert torch.equal(remove_masks(model)(image), masked)
    assert [type(m) for m in model.modules()] == kinds
    assert [m.key for m in apply_keys(model, keys, config)] == keys


# --- patterns ---------------------------------------------------------------------------------------------------------


def refused(model, patterns, message):
    before = str(model)
    with pytest.raises(UserError, match=message):
        apply_masks(model, MaskConfig(modules=patterns))
    assert str(model) == before and not masks(model)


def test_a_pattern_that_matches_nothing_is_refused():
    refused(tiny.model(), ("visual.trunk.*",), r"'visual\.trunk\.\*' must match a Linear, .* but matches no module")


def test_a_pattern_that_matches_nothing_maskable_names_what_it_matches():
    refused(tiny.model(), ("visual.ln_p*",), r"'visual\.ln_p\*' .* but matches only LayerNorm")


def test_a_linear_that_nn_multihead_attention_never_calls_is_refused_with_what_to_write():
    name = r"visual\.transformer\.resblocks\.0\.attn"
    message = rf"matches {name}\.out_proj, .*: write .* instead, {name} \(MultiheadAttention\)"
    refused(tiny.model(), ("visual.*.out_proj",), message)


def test_a_linear_that_an_attention_pool_never_calls_is_refused_with_what_to_write():
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None}
    model = open_clip.CLIP(32, vision, tiny.MODEL["text_cfg"])
    message = r"matches visual\.attnpool\.q_proj, .* instead, visual\.attnpool \(AttentionPool2d\)"
    refused(model, ("visual.attnpool.q_proj",), message)
    assert len(apply_masks(model, MaskConfig(modules=("visual.attnpool", "visual.layer1.*.conv?")))) == 7


@pytest.mark.parametrize("patterns", [("*.c_fc", "visual.*.mlp.*"), ("visual.conv1", "visual.conv1")])
def test_patterns_that_match_weights_twice_are_refused(patterns):
    refused(tiny.model(), patterns, "must not match weights twice: .* match visual")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


def test_a_weight_that_two_modules_share_is_refused():
    refused(Tied(), ("a",), "a has weights that other modules use as well")
    shared = nn.Linear(4, 4)
    refused(nn.Sequential(shared, shared), ("0",), "0 has weights that other modules use as well")


def test_an_encoder_layers_eval_fast_path_reads_the_masked_weights():
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True).eval(), torch.randn(2, 5, 24)
    randomised(apply_masks(model, MaskConfig(modules=("linear?",))))
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x))
    with torch.no_grad(), disabled(model):
        assert not torch.allclose(fast, model(x))
