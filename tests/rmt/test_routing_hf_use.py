"""Hugging Face hosts of routed modules in use: from checkpoints, at real size, and with what does not fit."""

import sys

import hf_tools
import pytest
import torch

from rmt import UserError
from rmt.routing import (
    CLIPBart,
    RoutedAdapterConfig,
    RoutedLoRAConfig,
    ViTGPT2,
    ViTRoberta,
    inject_routed_adapter,
    inject_routed_lora,
    load_routed,
    trainable_extras,
)  # fmt: skip


def test_a_grid_of_clip_patches():
    import transformers

    config = transformers.CLIPVisionConfig(**{**hf_tools.SMALL, "image_size": 16, "patch_size": 4})
    vision, image = transformers.CLIPVisionModel(config).eval(), torch.randn(2, 3, 16, 16)
    model = CLIPBart(hf_tools.bart(), vision, grid=2).eval()
    with torch.no_grad():
        patches = vision(pixel_values=image).last_hidden_state[:, 1:]
        quarters = [[r * 4 + c for r in (i, i + 1) for c in (j, j + 1)] for i in (0, 2) for j in (0, 2)]
        want = model.project(torch.stack([patches[:, rows].amax(1) for rows in quarters], 1))
        torch.testing.assert_close(model.see(image), want)
    with pytest.raises(UserError, match="grid 5 needs a square"):
        CLIPBart(hf_tools.bart(), vision, grid=5).see(image)


def real_size(kind, large):
    """With transformers' sizes, on the meta device."""
    import transformers

    d, layers, heads = (1024, 24, 16) if large else (768, 12, 12)
    size = {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * d}
    with torch.device("meta"):
        vit = transformers.ViTModel(transformers.ViTConfig(**{**size, "num_hidden_layers": 1}))
        if kind == "gpt2":
            config = transformers.GPT2Config(n_embd=d, n_layer=layers, n_head=heads)
            return ViTGPT2(vit, transformers.GPT2LMHeadModel(config))
        config = transformers.RobertaConfig(
            **size, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1
        )
        return ViTRoberta(vit, transformers.RobertaModel(config), 3129)


# The numbers of the paper's setups, by the official code's rules of freezing: routed parts; biases, norms and head.
@pytest.mark.parametrize(
    ("kind", "large", "config", "routed", "extras"),
    [
        ("gpt2", False, RoutedLoRAConfig(r=128), 4_718_592, 27_648 + 36_864),
        ("gpt2", True, RoutedLoRAConfig(r=128), 12_582_912, 172_032),
        ("roberta", False, RoutedLoRAConfig(r=128), 4_718_592, 18_432 + 36_864 + 5_993_529),
        ("roberta", True, RoutedLoRAConfig(r=128), 12_582_912, 147_456 + 8_514_617),
        ("gpt2", False, RoutedAdapterConfig(r=128, share=True), 2_370_048, None),
        ("roberta", False, RoutedAdapterConfig(r=64, residual=False), 2_379_264, None),
    ],
)
def test_how_much_is_trained_at_real_size(kind, large, config, routed, extras):
    model = real_size(kind, large)
    inject = inject_routed_lora if isinstance(config, RoutedLoRAConfig) else inject_routed_adapter
    injection = inject(model, config)
    assert sum(p.numel() for p in injection.parameters()) == routed
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == routed
    if extras is not None:
        found = trainable_extras(model, train_ln=True, train_bias=True, train_new=kind == "roberta")
        assert sum(p.numel() for p in found.values()) == extras
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == routed + extras


def test_extras_by_name():
    model, _ = hf_tools.injected("gpt2")
    found = trainable_extras(model, train_bias=True, train_ln=True, layers=(1,))
    inside = "text.model.transformer.h.1."
    names = ["ln_1.weight", "ln_1.bias", "attn.c_attn.bias", "ln_2.weight", "ln_2.bias"]
    assert set(found) == {inside + name for name in names}
    assert all(model.get_parameter(name) is p and p.requires_grad for name, p in found.items())
    with pytest.raises(UserError, match="train_new: ViTGPT2 has nothing of the kind"):
        trainable_extras(model, train_new=True)
    with pytest.raises(UserError, match="layers must be from 0 to 1, got 2"):
        trainable_extras(model, train_ln=True, layers=(2,))
    with pytest.raises(UserError, match="at least one of"):
        trainable_extras(model)


def test_loaded_from_checkpoints(tmp_path):
    import transformers

    parts = {"vit": hf_tools.vit(), "gpt2": hf_tools.gpt2(), "roberta": hf_tools.roberta(), "bart": hf_tools.bart()}
    parts["blind"] = transformers.ViTModel(parts["vit"].config, add_pooling_layer=False)
    parts["unread"] = transformers.RobertaForMaskedLM(parts["roberta"].config)
    clip = transformers.CLIPVisionConfig(**{**hf_tools.SMALL, "image_size": 16, "patch_size": 8})
    parts["clip"] = transformers.CLIPVisionModel(clip)
    at = {name: str(tmp_path / name) for name in parts}
    for name, part in parts.items():
        part.eval().save_pretrained(at[name])
    batch, d = hf_tools.batch("gpt2", dtype=torch.float32), 6
    loaded = ViTGPT2.from_pretrained(at["vit"], at["gpt2"]), ViTRoberta.from_pretrained(at["vit"], at["roberta"], d)
    built = ViTGPT2(parts["vit"], parts["gpt2"]), ViTRoberta(parts["vit"], parts["roberta"], d)
    built[1].head.load_state_dict(loaded[1].head.state_dict())
    loaded += (CLIPBart.from_pretrained(at["bart"], at["clip"]),)
    built += (CLIPBart(parts["bart"], parts["clip"]).eval(),)
    built[2].project.load_state_dict(loaded[2].project.state_dict())
    for a, b in zip(loaded, built):
        arguments = {k: v for k, v in batch.items() if k != "labels" or a is loaded[2]}
        with torch.no_grad():
            assert torch.equal(a(**arguments).logits, b(**arguments).logits)
    for missing in ((at["blind"], at["roberta"]), (at["vit"], at["unread"])):
        with pytest.raises(UserError, match=r"no weights for pooler\.dense\.bias"):
            ViTRoberta.from_pretrained(*missing, 6)
    assert ViTRoberta.from_pretrained(at["vit"], at["unread"], 6, drawn=True).text.model.pooler is not None

    routed = inject_routed_adapter(built[0], RoutedAdapterConfig(r=4, share=True))
    with torch.no_grad():
        for p in routed.parameters():
            p.normal_()
        routed.save(tmp_path / "routed")
        load_routed(loaded[0], tmp_path / "routed")
        assert torch.equal(loaded[0](**batch).logits, built[0](**batch).logits)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'rmt\[routing\]'"):
        ViTGPT2.from_pretrained("a", "b")


def test_hosts_that_do_not_fit():
    with pytest.raises(UserError, match=r"got 16 and 32\. ViT-B \(768\) goes with gpt2"):
        ViTGPT2(hf_tools.vit(hidden_size=16), hf_tools.gpt2())
    with pytest.raises(UserError, match="built without a pooler"):
        import transformers

        ViTGPT2(transformers.ViTModel(hf_tools.vit().config, add_pooling_layer=False), hf_tools.gpt2())
    with pytest.raises(UserError, match="vision model, or the width of features"):
        CLIPBart(hf_tools.bart())
    with pytest.raises(UserError, match="grid is of a vision model"):
        CLIPBart(hf_tools.bart(), features=10, grid=2)
    with pytest.raises(UserError, match=r"no site cross\.q"):
        inject_routed_lora(hf_tools.host("gpt2"), RoutedLoRAConfig(sites=("cross.q",)))


@pytest.mark.parametrize("kind", hf_tools.HOSTS)
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"input_ids": torch.ones(2, 5, dtype=torch.int64)}, r"input_ids must be int64 \(3, T\)"),
        ({"input_ids": torch.ones(3, 5)}, r"input_ids must be int64 .* got torch\.float32"),
        ({"input_ids": torch.ones(3, 40, dtype=torch.int64), "attention_mask": None}, "positions, got 40 tokens"),
        ({"attention_mask": torch.ones(3, 4)}, r"attention_mask must be \(3, 5\)"),
        ({"image": torch.randn(3, 7)}, "image must be"),
    ],
)
def test_bad_input(kind, broken, message):
    model, batch = hf_tools.host(kind), hf_tools.batch(kind)
    with pytest.raises(UserError, match=message):
        model(**{**batch, **broken})


def test_other_bad_input():
    model, batch = hf_tools.host("gpt2"), hf_tools.batch("gpt2")
    with pytest.raises(UserError, match="the ViT takes no image"):
        model(torch.randn(3, 3, 8, 8, dtype=torch.float64), batch["input_ids"])
    with pytest.raises(UserError, match="20 positions, got 1 tokens and 31 others"):
        model.generate(batch["image"], max_length=30)
    for other in (model, hf_tools.host("bart")):
        with pytest.raises(UserError, match=r"needs model\.eval"):
            other.train().generate(batch["image"], batch["input_ids"])
    with pytest.raises(UserError, match="labels or decoder_input_ids"):
        hf_tools.host("bart")(**{**hf_tools.batch("bart"), "labels": None})
