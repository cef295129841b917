"""A mask-tuned image tower and routed LoRA in the decoder: trained together and in turn, saved, merged and removed."""

import coca_tools
import pytest
import torch
import torch.nn.functional as F

import rmt
import rmt_kernels as rk
from rmt import UserError
from rmt.masked import masks
from rmt.routing import RoutedAdapterConfig, RoutedLoRAConfig, inject_routed_adapter, inject_routed_lora, load_routed

LORA = RoutedLoRAConfig(r=4, function="mul")


def both(first="masks"):
    """A CoCa with both, in either order."""
    coca = coca_tools.coca()
    if first == "masks":
        model = rmt.get_mask_model(coca)
        return model, inject_routed_lora(model, LORA)
    routed = inject_routed_lora(coca, LORA)
    return rmt.get_mask_model(coca), routed


def moved(model, routed, seed=3):
    """Both away from their start: a fifth of the weights off, no zeros in B."""
    random = torch.Generator().manual_seed(seed)
    for mask in masks(model):
        mask.set_bits(rk.pack_bits(torch.rand(mask.weight.shape, generator=random) > 0.2))
    with torch.no_grad():
        for p in routed.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=random))
    return model, routed


def caption_loss(model, image, text):
    out = model(image, text)
    return F.cross_entropy(out["logits"].flatten(0, 1), out["labels"].flatten())


def logits(model, image, text):
    with torch.no_grad():
        return model(image, text)["logits"]


def tower(model):
    return {key: t for key, t in model.state_dict().items() if key.startswith("visual.")}


@pytest.mark.parametrize("first", ("masks", "routing"))
def test_both_are_in_training_whatever_came_first(first):
    model, routed = both(first)
    found = masks(model)
    assert found and all(mask.key.startswith("visual.") for mask in found)
    want = {*routed.parameters(), *(mask.scores for mask in found)}
    assert {p for p in model.parameters() if p.requires_grad} == want
    assert routed.model is model.model and all(name in model.model.state_dict() for name in routed.state_dict())
    with pytest.raises(UserError, match="has routed lora already"):
        inject_routed_lora(model.model, LORA)


@pytest.mark.parametrize("first", ("masks", "routing"))
def test_trained_jointly(first):
    """rmt.backward collects the scores' gradients, and torch those of the routed parameters, of one loss."""
    model, routed = both(first)
    image, text = coca_tools.batch()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = [p.clone() for p in routed.parameters()]
    scores, lora = rmt.MaskAdam(model, lr=1e-3), torch.optim.AdamW(routed.parameters(), lr=1e-2)
    losses = []
    for step in range(12):
        loss = caption_loss(model, image, text)
        lora.zero_grad()
        loss.backward(retain_graph=True, inputs=list(routed.parameters()))
        rmt.backward(loss, None, scores, step=step)
        scores.step()
        lora.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert any((mask.scores > mask.module.threshold).logical_not().any() for mask in model.masks)
    assert all(not torch.equal(a, b) for a, b in zip(routed.parameters(), start))
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_trained_in_turn():
    """Masks first, the routing over the tuned tower then: neither moves while the other is trained."""
    coca = coca_tools.coca()
    image, text = coca_tools.batch()
    model = rmt.get_mask_model(coca)
    scores, losses = rmt.MaskAdam(model, lr=2e-3), []
    for step in range(6):
        loss = caption_loss(model, image, text)
        rmt.backward(loss, None, scores, step=step)
        scores.step()
        losses.append(loss.item())
    for mask in model.masks:
        mask.scores.requires_grad_(False)
    tuned = [mask.bits.clone() for mask in model.masks]
    routed = inject_routed_lora(model, LORA)
    assert {p for p in model.parameters() if p.requires_grad} == set(routed.parameters())
    lora = torch.optim.AdamW(routed.parameters(), lr=1e-2)
    for _ in range(6):
        lora.zero_grad()
        loss = caption_loss(model, image, text)
        loss.backward()
        lora.step()
        losses.append(loss.item())
    assert losses[5] < losses[0] and losses[-1] < losses[6]
    assert all(torch.equal(mask.bits, bits) for mask, bits in zip(model.masks, tuned))


@pytest.mark.parametrize("first", ("masks", "routing"))
@pytest.mark.parametrize("out", ("masks", "routing"))
def test_out_again_in_any_order(first, out):
    model, routed = moved(*both(first))
    image, text = coca_tools.batch()
    merged = {mask.key: mask.dense.clone() for mask in masks(model)}
    with torch.no_grad():
        live = model(image, text)["logits"]
    if out == "masks":
        plain = model.merge_and_unload()
        torch.testing.assert_close(logits(plain, image, text), live, rtol=0, atol=1e-5)
        assert all(p.requires_grad for p in routed.parameters())
        routed.remove()
    else:
        routed.remove()
        assert {p for p in model.parameters() if p.requires_grad} == {mask.scores for mask in masks(model)}
        plain = model.merge_and_unload()
    fresh = coca_tools.coca()
    want, got = fresh.state_dict(), plain.state_dict()
    assert want.keys() == got.keys() and [type(m) for m in plain.modules()] == [type(m) for m in fresh.modules()]
    for key, t in got.items():
        assert torch.equal(t.reshape(-1), merged.get(key, want[key]).reshape(-1)), key
    assert (logits(plain, image, text) - live).abs().max() > 1e-4


def test_saved_and_loaded_together(tmp_path):
    model, routed = moved(*both())
    image, text = coca_tools.batch()
    want = logits(model, image, text)
    model.save_pretrained(tmp_path / "task")
    routed.save(tmp_path / "routed")
    for first in ("masks", "routing"):
        coca = coca_tools.coca()
        if first == "routing":
            load_routed(coca, tmp_path / "routed")
        again = rmt.MaskModel.from_pretrained(coca, tmp_path / "task")
        if first == "masks":
            load_routed(again, tmp_path / "routed")
        torch.testing.assert_close(logits(again, image, text), want, rtol=0, atol=0)
    assert not any("routed" in key for key in rmt.checkpoint.load_task(tmp_path / "task").shapes)
    assert all(key.startswith("text_decoder.") for key in routed.state_dict())


def test_folded_over_masks():
    model, routed = moved(*both())
    image, text = coca_tools.batch()
    folded = routed.fold_for(image[0])
    assert len(masks(folded)) == len(masks(model)) and not any("routed" in name for name, _ in folded.named_modules())
    torch.testing.assert_close(
        logits(folded, image[:1], text[:1]), logits(model, image[:1], text[:1]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("module", ("attn", "mlp.c_fc"))
def test_no_mask_takes_a_routed_module_s_place_and_no_branch_a_masked_one_s(module):
    config = rmt.MaskConfig(modules=(f"text_decoder.resblocks.*.{module}",))
    image, text = coca_tools.batch()
    coca = coca_tools.coca()
    inject_routed_lora(coca, LORA)
    if module == "attn":
        with pytest.raises(UserError, match="cannot be masked: it is routed, and a mask would take its place"):
            rmt.get_mask_model(coca, config)
        assert not masks(coca)
        masked = rmt.get_mask_model(coca_tools.coca(), config)
        kinds = [type(m) for m in masked.modules()]
        with pytest.raises(UserError, match="its projections are masked"):
            inject_routed_lora(masked, LORA)
        assert [type(m) for m in masked.modules()] == kinds and "_rmt_routed" not in masked.model.__dict__
        return
    # An adapter stands behind the whole mlp: a mask within takes nothing of it.
    adapter = inject_routed_adapter(coca, RoutedAdapterConfig(r=4, zero_init=False))
    want = logits(coca, image, text)
    model = rmt.get_mask_model(coca, config)
    torch.testing.assert_close(logits(model, image, text), want, rtol=0, atol=1e-5)
    assert {p for p in model.parameters() if p.requires_grad} >= set(adapter.parameters())
