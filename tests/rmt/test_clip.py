import inspect
import json
import subprocess
import sys

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

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


# --- the activation ---------------------------------------------------------------------------------------------------


@pytest.fixture
def names(tmp_path, monkeypatch):
    """open_clip knows `tiny` and `tiny-quickgelu` by name, and a file of weights for them is at hand."""
    import open_clip

    factory = sys.modules["open_clip.factory"]
    # open_clip keeps its configurations, and where they come from, in these two tables for good.
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    for name, extra in (("tiny", {}), ("tiny-quickgelu", {"quick_gelu": True})):
        (tmp_path / f"{name}.json").write_text(json.dumps(tiny.MODEL | extra))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.save(tiny.model().state_dict(), tmp_path / "plain.pt")
    holder = nn.Module()
    for name, value in tiny.model().half().state_dict().items():
        parent, _, child = name.rpartition(".")
        at = holder
        for part in filter(None, parent.split(".")):
            if part not in dict(at.named_children()):
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(child, nn.Parameter(value, requires_grad=False))
    torch.jit.save(torch.jit.script(holder), tmp_path / "OpenAI.pt")
    return tmp_path


def need_torchscript():
    import open_clip

    if "weights_only" not in inspect.signature(open_clip.create_model_and_transforms).parameters:
        pytest.skip("this open_clip cannot read TorchScript archives with torch 2.6 and newer")


def test_openais_file_is_refused_without_quick_gelu_and_the_fix_is_named(names):
    need_torchscript()
    message = r"OpenAI\.pt, a TorchScript archive as OpenAI's .* its name must be 'tiny-quickgelu'"
    with pytest.raises(UserError, match=message):
        clip.load("tiny", str(names / "OpenAI.pt"), None, CPU)


def test_openais_file_loads_with_quick_gelu(names):
    need_torchscript()
    made = clip.load("tiny-quickgelu", str(names / "OpenAI.pt"), None, CPU)
    want = tiny.model().half().state_dict()
    assert all(torch.equal(value, want[name].float()) for name, value in made.model.state_dict().items())
    assert made.config["quick_gelu"] is True


def test_a_file_of_unknown_origin_is_warned_of(names):
    with pytest.warns(UserWarning, match="OpenAI's weights need tiny-quickgelu"):
        made = clip.load("tiny", str(names / "plain.pt"), None, CPU)
    assert made.config["quick_gelu"] is False


def test_a_file_of_unknown_origin_and_quick_gelu_is_not_warned_of(names, recwarn):
    clip.load("tiny-quickgelu", str(names / "plain.pt"), None, CPU)
    assert not [w for w in recwarn if "quickgelu" in str(w.message)]


def load_by_tag(name, tag, monkeypatch):
    """`clip.load` where open_clip's own weights for the tag are our random ones: nothing is downloaded."""
    import open_clip

    quick = name.endswith("-quickgelu") or tag == "openai-by-openai-loader"
    made = open_clip.CLIP(**tiny.MODEL, quick_gelu=quick)
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *_, **__: (made, None, None))
    return clip.load(name, tag, None, CPU)


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_openais_tag_is_refused_without_quick_gelu(name, monkeypatch):
    if not _tag("ViT-B-32", "openai").get("quick_gelu"):
        pytest.skip("this open_clip builds every model for the tag openai with QuickGELU by itself")
    with pytest.raises(UserError, match=f"'openai' was trained with QuickGELU, .*its name must be '{name}-quickgelu'"):
        load_by_tag(name, "openai", monkeypatch)


def _tag(name, tag):
    import open_clip

    return open_clip.get_pretrained_cfg(name, tag)


@pytest.mark.parametrize("name, tag", [("ViT-B-32-quickgelu", "openai"), ("ViT-B-32", "laion2b_s34b_b79k")])
def test_a_tag_with_its_activation_loads_without_a_warning(name, tag, monkeypatch, recwarn):
    assert load_by_tag(name, tag, monkeypatch).config["quick_gelu"] == ("quickgelu" in name)
    assert not [w for w in recwarn if "GELU" in str(w.message)]


def test_a_folders_own_config_is_believed(tmp_path, recwarn):
    for quick in (False, True):
        folder = tmp_path / str(quick)
        name = tiny.model_folder(folder)
        text = json.loads((folder / "open_clip_config.json").read_text())
        text["model_cfg"]["quick_gelu"] = quick
        (folder / "open_clip_config.json").write_text(json.dumps(text))
        made = clip.load(name, None, 48, CPU)
        assert made.config == text["model_cfg"] | {"vision_cfg": tiny.MODEL["vision_cfg"] | {"image_size": 48}}
    assert not [w for w in recwarn if "GELU" in str(w.message).upper()]


# --- text -------------------------------------------------------------------------------------------------------------


def test_text_without_masks_is_computed_once(loaded, monkeypatch):
    text = clip.Text.make(loaded, list(tiny.COLOURS), "a photo of a {}.")
    monkeypatch.setattr(loaded.model, "encode_text", None)
    assert text.features(grad=True) is text.features() is text.student() is text.teacher()
    assert not text.masked and not text.teacher().requires_grad


@pytest.mark.parametrize("before", [True, False], ids=["made-before-masking", "made-after"])
def test_text_of_a_masked_tower_follows_the_masks_and_the_teacher_does_not(loaded, before):
    model = tiny.model()
    made = clip.Clip(model, None, loaded.tokenizer)
    arguments = made, list(tiny.COLOURS), "a photo of a {}."
    zero_shot = clip.text_features(*arguments)
    early = clip.Text.make(*arguments)
    found = apply_masks(model, MaskConfig(targets=("mlp",), towers=("text",)))
    text = early if before else clip.Text.make(*arguments)
    assert text.masked
    torch.testing.assert_close(text.student(), zero_shot)
    found[0].set_bits(torch.zeros_like(found[0].bits))
    assert torch.equal(clip.text_features(*arguments), clip.text_features(*arguments))
    torch.testing.assert_close(text.teacher(), zero_shot)
    assert not torch.allclose(text.features(), zero_shot) and not text.features().requires_grad
    logits = clip.logits(model, torch.randn(3, 3, 32, 32), text.student())
    logits.sum().backward()
    assert all(m.scores.grad is not None for m in found)


def test_open_clip_is_imported_only_when_a_model_is_loaded():
    code = "import rmt.cli, rmt.train, sys; assert 'open_clip' not in sys.modules and 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_logits_are_fp32_under_autocast():
    model, image = tiny.model(), torch.randn(3, 3, 32, 32)
    text = F.normalize(torch.randn(5, 32), dim=-1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = F.normalize(model.encode_image(image).float(), dim=-1)
        got = clip.logits(model, image, text)
    assert got.dtype == torch.float32
    assert torch.equal(got, model.logit_scale.exp().detach() * features @ text.T)
