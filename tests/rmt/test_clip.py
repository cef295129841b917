import subprocess
import sys

import pytest
import tiny
import torch
import torch.nn.functional as F

from rmt import clip
from rmt.config import MaskConfig, UserError
from rmt.masking import apply_masks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return clip.load(tiny.model_folder(tmp_path_factory.mktemp("m") / "tiny"), None, None, CPU)


def test_load_takes_size_mean_std_and_context_from_the_models_config(loaded):
    assert clip.image_format(loaded.model) == ((32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert loaded.tokenizer(["a red ball"]).shape == (1, 16)
    assert not loaded.model.training
    want = tiny.model().state_dict()
    assert all(torch.equal(value, want[name]) for name, value in loaded.model.state_dict().items())


def test_load_with_another_image_size(tmp_path):
    made = clip.load(tiny.model_folder(tmp_path / "m"), None, 48, CPU)
    assert clip.image_format(made.model)[0] == (48, 48)


@pytest.mark.parametrize("template, want", [("{} texture.", "red ball texture."), ("a {}, a toy", "a red ball, a toy")])
def test_prompts_put_spaces_for_underscores(template, want):
    assert clip.prompts(["red_ball"], template) == [want]


def test_text_features_are_open_clips_own_in_one_pass(loaded, monkeypatch):
    calls, encode = [], loaded.model.encode_text
    monkeypatch.setattr(loaded.model, "encode_text", lambda text: calls.append(len(text)) or encode(text))
    text = clip.text_features(loaded, list(tiny.COLOURS), "a photo of a {}.")
    assert calls == [4] and not text.requires_grad
    tokens = loaded.tokenizer([f"a photo of a {name.replace('_', ' ')}." for name in tiny.COLOURS])
    torch.testing.assert_close(text, F.normalize(encode(tokens), dim=-1))


def test_logits_are_open_clips_own():
    model, image = tiny.model(), torch.randn(3, 3, 32, 32)
    tokens = torch.randint(1, 49000, (4, 16))
    with torch.no_grad():
        want, _ = model.get_logits(image, tokens)
        got = clip.logits(model, image, model.encode_text(tokens, normalize=True))
    torch.testing.assert_close(got, want)


def test_frozen_logits_ignore_the_masks_and_have_no_graph():
    model, image, text = tiny.model(), torch.randn(3, 3, 32, 32), F.normalize(torch.randn(4, 32), dim=-1)
    found = apply_masks(model, MaskConfig())
    before = clip.frozen_logits(model, image, text)
    found[1].set_bits(torch.zeros_like(found[1].bits))
    assert torch.equal(clip.frozen_logits(model, image, text), before) and not before.requires_grad
    now = clip.logits(model, image, text)
    assert now.requires_grad and not torch.allclose(now, before)


@pytest.mark.parametrize("name, pretrained", [("local-dir:/nowhere/at/all", None), ("ViT-B-32", "no-such-tag")])
def test_load_says_what_it_could_not_load(name, pretrained):
    with pytest.raises(UserError, match=f"open_clip cannot load {name!r}, pretrained {pretrained!r}: "):
        clip.load(name, pretrained, None, CPU)


def test_load_refuses_weights_that_are_not_finite(tmp_path):
    from safetensors.torch import load_file, save_file

    name = tiny.model_folder(tmp_path / "m")
    file = tmp_path / "m" / "open_clip_model.safetensors"
    weights = load_file(file)
    weights["visual.proj"][3, 4] = float("nan")
    save_file(weights, file)
    with pytest.raises(UserError, match=r"finite, but visual\.proj is not"):
        clip.load(name, None, None, CPU)


@pytest.mark.parametrize("messages", [["QuickGELU mismatch between ..."], []])
def test_quick_gelu_is_warned_of_with_the_fix(messages):
    pretrained = "openai" if messages else "/weights/from/somewhere.pt"
    with pytest.warns(UserWarning, match="ViT-B-32-quickgelu"):
        clip._warn_quick_gelu("ViT-B-32", pretrained, messages)


def test_no_quick_gelu_warning_where_open_clip_knows_better(recwarn):
    clip._warn_quick_gelu("ViT-B-32", "laion2b_s34b_b79k", [])
    clip._warn_quick_gelu("local-dir:/x", None, [])
    assert not recwarn.list


def test_open_clip_is_imported_only_when_a_model_is_loaded():
    code = "import rmt.cli, rmt.train, sys; assert 'open_clip' not in sys.modules and 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
