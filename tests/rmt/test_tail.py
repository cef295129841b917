"""The class-token tail: equal features and gradients, products of one row an image, and only where a tower pools so."""

import pytest
import tiny
import torch

from rmt.config import MaskConfig
from rmt.masking import apply_masks
from rmt.tail import class_token_tail

TARGETS = {"attention": ("attention",), "mlp": ("mlp",), "all": ("attention", "mlp", "conv"), "none": ()}


def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def made(targets, batch_first=True, **vision):
    model = tiny.model(**vision)
    for module in model.visual.modules():
        if hasattr(module, "batch_first"):
            module.batch_first = batch_first
    found = apply_masks(model, MaskConfig(targets=TARGETS[targets])) if TARGETS[targets] else []
    for mask in found:
        torch.nn.init.uniform_(mask.scores, 4e-3, 1e-2)
    return model, found


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("targets", TARGETS)
def test_features_and_gradients_are_those_of_the_whole_block(targets, batch_first):
    model, found = made(targets, batch_first)
    want = model.encode_image(images())
    with class_token_tail(model) as applies:
        got = model.encode_image(images())
    assert applies and torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    for mask in found:
        whole, tail = (torch.autograd.grad(y.square().sum(), mask.scores, retain_graph=True)[0] for y in (want, got))
        assert (whole - tail).norm() <= 1e-5 * whole.norm() and whole.norm() > 0, mask.key


def test_the_last_blocks_products_have_one_row_an_image_and_the_block_is_itself_afterwards():
    model, _ = made("all")
    block, rows = model.visual.transformer.resblocks[-1], {}
    for name, layer in {"out": block.attn.out_proj, "fc": block.mlp.c_fc, "proj": block.mlp.c_proj}.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: rows.setdefault(name, []).append(args[0].numel()))
    with class_token_tail(model):
        model.encode_image(images())
    model.encode_image(images())
    assert all(one * 17 == every for one, every in rows.values()) and len(rows) == 3
    assert "forward" not in block.__dict__


def test_it_stays_away_where_more_than_the_class_token_counts():
    averaged, _ = made("attention", pool_type="avg")
    checkpointed, _ = made("attention")
    checkpointed.set_grad_checkpointing(True)
    hooked, _ = made("attention")
    hooked.visual.transformer.resblocks[-1].attn.register_forward_hook(lambda *_: None)
    for model in (averaged, checkpointed, hooked, torch.nn.Linear(3, 3)):
        with class_token_tail(model) as applies:
            assert not applies
    model, _ = made("attention")
    with class_token_tail(model), class_token_tail(model) as twice:
        assert not twice
