"""LoRA over masks is exact, a mask over LoRA is refused: against peft itself."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

import rmt
import rmt_kernels as rk
from rmt.config import MaskConfig, UserError
from rmt.masked import masks
from rmt.masking import apply_keys

peft = pytest.importorskip("peft", reason="stacking with LoRA needs the package peft")
MLP = MaskConfig(targets=("mlp",))
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["c_fc", "c_proj"]}


def masked(seed=0, config=MLP):
    """A tiny model with a fifth of its masked weights off."""
    model = rmt.get_mask_model(tiny.model(seed), config)
    generator = torch.Generator().manual_seed(7)
    for mask in model.masks:
        mask.set_bits(rk.pack_bits(torch.rand(mask.weight.shape, generator=generator) > 0.2))
    return model


def randomised(model):
    """LoRA's B starts at 0, which would hide everything."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.fixture
def image():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_lora_over_a_live_mask_is_the_masked_product_plus_its_own():
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(40, 30))
    layer = host[0] = rmt.FusedMaskedLinear.from_linear(host[0])
    on = torch.rand(30, 40) > 0.3
    masks(host)[0].set_bits(rk.pack_bits(on))
    model = randomised(peft.get_peft_model(host, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])))
    wrapped = model.base_model.model[0]
    a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    x = torch.randn(5, 40)
    weight = layer.state_dict()["weight"].double() * on
    want = x.double() @ weight.T + layer.bias.double() + 2 * (x.double() @ a.double().T @ b.double().T)
    torch.testing.assert_close(model(x).double(), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        plain = F.linear(x, layer.to_linear().weight, layer.bias)
        assert torch.equal(model(x), plain + wrapped.lora_B["default"](wrapped.lora_A["default"](x)) * 2)


def test_lora_trains_with_the_masks_fixed_saves_and_loads(image, tmp_path):
    model = masked()
    model.save_pretrained(tmp_path / "task")
    before = {m.key: (m.bits.clone(), m.weight.clone()) for m in model.masks}
    tuned = peft.get_peft_model(model.model, peft.LoraConfig(**LORA))
    trained = [(name, p) for name, p in tuned.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name, _ in trained), "scores are frozen with all else"
    optimizer = torch.optim.Adam([p for _, p in trained], lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (tuned.base_model.model.encode_image(image) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {m.key: (m.bits, m.weight) for m in masks(model)}
    assert before.keys() == after.keys(), "keys are the plain model's under an adapter too"
    assert all(torch.equal(x, y) for key in before for x, y in zip(before[key], after[key]))
    tuned.save_pretrained(tmp_path / "lora")
    again = rmt.MaskModel.from_pretrained(tiny.model(), tmp_path / "task")
    again = peft.PeftModel.from_pretrained(again.model, tmp_path / "lora").eval()
    with torch.no_grad():
        assert torch.equal(
            again.base_model.model.encode_image(image), tuned.eval().base_model.model.encode_image(image)
        )
    # The mask is still saved as the plain model's: what was written under the adapter loads without it.
    model.save_pretrained(tmp_path / "under")
    assert (tmp_path / "under" / "mask.safetensors").read_bytes() == (
        tmp_path / "task" / "mask.safetensors"
    ).read_bytes()


def test_masks_are_merged_first_and_the_adapter_then(image):
    model = masked()
    tuned = randomised(peft.get_peft_model(model.model, peft.LoraConfig(**LORA))).eval()
    lora = tuned.base_model.model.visual.transformer.resblocks[0].mlp.c_fc
    delta = lora.get_delta_weight("default").detach()
    with torch.no_grad():
        live = tuned.base_model.model.encode_image(image)
        dense = model.masks[0].dense.clone()
        model.merge_and_unload()
        assert not masks(tuned) and type(lora.base_layer) is nn.Linear
        torch.testing.assert_close(tuned.base_model.model.encode_image(image), live, rtol=1e-5, atol=1e-5)
        plain = tuned.merge_and_unload()
        assert torch.equal(plain.visual.transformer.resblocks[0].mlp.c_fc.weight, dense + delta)
        torch.testing.assert_close(plain.encode_image(image), live, rtol=1e-4, atol=1e-4)


def test_lora_over_a_merged_model_is_exact(image):
    plain = masked().merge_and_unload()
    dense = plain.visual.transformer.resblocks[1].mlp.c_proj.weight.clone()
    tuned = randomised(peft.get_peft_model(plain, peft.LoraConfig(**LORA))).eval()
    layer = tuned.base_model.model.visual.transformer.resblocks[1].mlp.c_proj
    delta = layer.get_delta_weight("default").detach()
    tuned.merge_adapter()
    assert torch.equal(layer.base_layer.weight, dense + delta)


@pytest.mark.parametrize("how", ["merge_adapter", "safe", "merge_and_unload"])
def test_merging_an_adapter_under_a_live_mask_is_refused_and_changes_nothing(image, how):
    model = masked()
    tuned = randomised(peft.get_peft_model(model.model, peft.LoraConfig(**LORA))).eval()
    before = {key: value.clone() for key, value in tuned.state_dict().items()}
    with torch.no_grad():
        features = tuned.base_model.model.encode_image(image)
        with pytest.raises(ValueError, match=r"\(W \+ BA\) \* m is not W \* m \+ BA: merge the mask first"):
            if how == "merge_and_unload":
                tuned.merge_and_unload()
            else:
                tuned.merge_adapter(safe_merge=how == "safe")
        assert torch.equal(tuned.base_model.model.encode_image(image), features)
    assert all(torch.equal(value, before[key]) for key, value in tuned.state_dict().items())


def test_other_methods_that_write_or_read_the_weight_past_the_mask_are_refused(image):
    for config in (
        peft.LoraConfig(**LORA, use_dora=True), peft.LoraConfig(**LORA, init_lora_weights="pissa"),
        peft.LoraConfig(**LORA, init_lora_weights="olora"),
    ):  # fmt: skip
        model = masked()
        weights = [m.weight.clone() for m in model.masks]
        with pytest.raises(ValueError, match="merge the mask first"), torch.no_grad():
            peft.get_peft_model(model.model, config).base_model.model.encode_image(image)
        assert all(torch.equal(a, b.weight) for a, b in zip(weights, masks(model)))
    model = masked()
    tuned = peft.get_peft_model(model.model, peft.IA3Config(target_modules=["c_fc"], feedforward_modules=[]))
    with torch.no_grad():
        tuned.base_model.model.encode_image(image)
    with pytest.raises(ValueError, match="merge the mask first"):
        tuned.merge_adapter()


def test_attention_of_peft_merges_at_every_step_and_is_refused(image):
    model = masked(config=MaskConfig())
    with pytest.raises(ValueError):
        peft.get_peft_model(model.model, peft.LoraConfig(r=2, target_modules=["attn"])).base_model.model.encode_image(
            image
        )
    # Other layers of a model with masked attention are free.
    model = masked(config=MaskConfig())
    with torch.no_grad():
        before = model.encode_image(image)
        tuned = peft.get_peft_model(model.model, peft.LoraConfig(**LORA))
        assert torch.equal(tuned.base_model.model.encode_image(image), before), "B is 0"
        randomised(tuned).merge_adapter()
        assert not torch.equal(tuned.base_model.model.encode_image(image), before)


@pytest.mark.parametrize("merged", [False, True])
def test_masking_what_an_adapter_wraps_is_refused_with_the_reason(merged):
    plain = tiny.model()
    tuned = randomised(peft.get_peft_model(plain, peft.LoraConfig(**LORA)))
    if merged:
        tuned.merge_adapter()
    keys = [f"visual.transformer.resblocks.0.mlp.c_fc{inner}.weight" for inner in ("", ".base_layer")]
    reason = r"\(W \+ BA\) \* m is not W \* m \+ BA. Mask first"
    state = "merged into it" if merged else "over it"
    for call in (
        lambda: rmt.get_mask_model(plain, MLP),
        lambda: rmt.get_mask_model(plain, MaskConfig(modules=("*.c_fc.base_layer",))),
        lambda: apply_keys(plain, keys[:1], MaskConfig()),
        lambda: apply_keys(plain, keys[1:], MaskConfig()),
    ):
        with pytest.raises(UserError, match=f"has an adapter {state}, and {reason}"):
            call()
    assert not masks(plain)
    # Modules that no adapter touches can be masked; and once it is merged for good, all can.
    rmt.get_mask_model(plain, MaskConfig(targets=("attention",))).merge_and_unload()
    if not merged:
        assert rmt.get_mask_model(tuned.merge_and_unload(), MLP).masks


def test_what_must_stay_allowed_does(image, tmp_path):
    model = masked()
    weight = model.masks[0].module.weight
    assert weight is model.masks[0].module._parameters["weight"] and isinstance(weight, nn.Parameter)
    with torch.no_grad():
        features = model.encode_image(image)
        for copied in (copy.deepcopy(model), model):
            copied.load_state_dict(model.state_dict())
            assert torch.equal(copied.encode_image(image), features)
        model.to(torch.bfloat16).float()
        other = rmt.FusedMaskedLinear(8, 4)
        other.weight = nn.Parameter(torch.ones(4, 8), requires_grad=False)
        assert torch.equal(other(torch.ones(1, 8)), 8 + other.bias[None])
        other.weight.data.zero_()
        del other.weight
    assert not hasattr(other, "weight")
    attention = rmt.FusedMaskedMultiheadAttention(8, 2)
    assert attention.in_proj_weight.shape == (24, 8) and "in_proj_weight" in attention.state_dict()
    compiled = torch.compile(rmt.FusedMaskedLinear(8, 4), fullgraph=True, backend="eager")
    assert compiled(torch.ones(2, 8)).shape == (2, 4)
