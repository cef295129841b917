import copy

import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from rmt.config import MaskConfig, UserError, parse_targets
from rmt.masked import disabled, masks
from rmt.masking import apply_masks, count_off, find_targets, percent_off

BLOCK = "visual.transformer.resblocks."


class Attention(nn.Module):
    """The shape of open_clip main's own attention: one packed parameter, read by the module's own forward."""

    def __init__(self, dim: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.num_heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) * dim**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x, k=None, v=None, attn_mask=None, need_weights=False):
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out_proj(y.transpose(1, 2).flatten(2)), None


@pytest.fixture
def ordinary_path():
    """nn.MultiheadAttention has a second, differently rounded path for inference: off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def test_default_masks_attention_and_patch_convolution_in_module_order():
    found = apply_masks(tiny.model(), MaskConfig())
    kinds = ("attn.in_proj_weight", "attn.out_proj.weight")
    blocks = [f"{BLOCK}{i}.{kind}" for i in range(2) for kind in kinds]
    assert [m.key for m in found] == ["visual.conv1.weight", *blocks]
    assert count_off(found) == (0, 64 * 3 * 8 * 8 + 2 * 4 * 64 * 64)


@pytest.mark.parametrize("targets, count", [("mlp", 4), ("conv", 1), ("attention", 4), ("rmmt", 4), ("rpmt", 9)])
def test_targets_can_be_chosen(targets, count):
    assert len(apply_masks(tiny.model(), MaskConfig(targets=parse_targets(targets)))) == count


def test_keys_are_the_plain_models_state_dict_names():
    model = tiny.model()
    names = set(model.state_dict())
    found = apply_masks(model, MaskConfig(targets=parse_targets("rpmt")))
    assert {m.key for m in found} <= names <= set(model.state_dict())


@pytest.mark.parametrize("targets", ["ramt", "rpmt"])
def test_zero_shot_logits_are_the_same_bits_after_injection(targets, ordinary_path):
    model, image = tiny.model(), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        before = model.encode_image(image)
        apply_masks(model, MaskConfig(targets=parse_targets(targets)))
        assert torch.equal(model.encode_image(image), before)
        with disabled(model):
            assert torch.equal(model.encode_image(image), before)


def test_frozen_means_frozen():
    model = tiny.model().train()
    found = apply_masks(model, MaskConfig())
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(m.scores) for m in found}
    assert not model.training


def test_masks_open_clip_mains_own_attention(ordinary_path):
    model, image = tiny.model(), torch.randn(2, 3, 32, 32)
    for block in model.visual.transformer.resblocks:
        block.attn = Attention()
    names = set(model.state_dict())
    with torch.no_grad():
        before = model.encode_image(image)
        found = apply_masks(model, MaskConfig())
        assert torch.equal(model.encode_image(image), before)
        assert len(found) == 5 and {m.key for m in found} <= names
        mask = next(m for m in found if m.key == f"{BLOCK}1.attn.in_proj_weight")
        mask.set_bits(torch.zeros_like(mask.bits))
        assert not torch.equal(model.encode_image(image), before)


def test_percent_off_counts_every_masked_weight_once():
    found = apply_masks(tiny.model(), MaskConfig())
    bits = found[0].bits.clone()
    bits[0, 0] = 0b1010  # 30 of 32 off
    found[0].set_bits(bits)
    total = sum(m.weight.numel() for m in found)
    assert count_off(found) == (30, total)
    assert percent_off(found) == pytest.approx(100 * 30 / total)


def test_refuses_a_resnet_tower_and_leaves_it_alone():
    vision = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32, "patch_size": None}
    model = open_clip.CLIP(32, vision, tiny.MODEL["text_cfg"])
    before = copy.deepcopy(model)
    for targets in ("ramt", "conv"):
        with pytest.raises(UserError, match="native ViT image tower, got CLIP with image tower ModifiedResNet"):
            apply_masks(model, MaskConfig(targets=parse_targets(targets)))
    assert str(model) == str(before)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1))])
def test_refuses_what_is_no_clip(model):
    with pytest.raises(UserError, match="native ViT image tower, got"):
        find_targets(model, ("attention",))


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
