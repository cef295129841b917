import copy
import json

import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import rmt_kernels as rk
from rmt import clip, merge
from rmt.checkpoint import save_task
from rmt.cli import main
from rmt.config import MaskConfig, RunConfig, UserError
from rmt.model import get_mask_model

CPU = torch.device("cpu")
CUSTOM = {"custom_text": True, "kind": open_clip.CustomTextCLIP}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "image_size": 64}


def base(folder, seed=0, kind=open_clip.CLIP, vision={}, text={}, **config):  # noqa: B006, read only
    """A random open_clip local-dir; returns the name to load it by."""
    cfg = copy.deepcopy(tiny.MODEL) | config
    cfg["vision_cfg"] |= vision
    cfg["text_cfg"] |= text
    torch.manual_seed(seed)
    made = kind(**{name: value for name, value in cfg.items() if name != "custom_text"})
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": tiny.PREPROCESS}))
    save_file(made.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def tuned(folder, name, pretrained=None, image_size=None, **config):
    """A task on the model of that name, with a random tenth off, written to `folder`, and its masked model."""
    loaded = clip.load(name, pretrained, image_size, CPU)
    model = get_mask_model(loaded.model, MaskConfig(**config))
    generator = torch.Generator().manual_seed(5)
    for mask in model.masks:
        mask.set_bits(rk.pack_bits(torch.rand(mask.weight.shape, generator=generator) > 0.1))
    run = RunConfig(model=name, pretrained=pretrained, data="x", image_size=image_size, mask=MaskConfig(**config))
    save_task(folder, model.masks, ("cat", "dog"), run, "a {}.")
    return loaded


def behaviour(model, tokenizer):
    """Features and logits as a user of open_clip computes them, without torch's fused attention."""
    size = open_clip.get_model_preprocess_cfg(model)["size"]
    size = (size, size) if isinstance(size, int) else size
    image = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(1))
    # rmt freezes its models, and torch rounds some products of frozen weights otherwise.
    model.requires_grad_(True)
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        text = F.normalize(model.encode_text(tokenizer(["a red ball.", "sky"])), dim=-1)
        logits = F.normalize(model.encode_image(image), dim=-1) @ text.T
    torch.backends.mha.set_fastpath_enabled(True)
    return text, logits


def same(out, loaded):
    """Loads OUT with open_clip alone and compares it with the masked model, bit for bit."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    got = behaviour(model.eval(), open_clip.get_tokenizer(f"local-dir:{out}"))
    assert all(torch.equal(a, b) for a, b in zip(got, behaviour(loaded.model, loaded.tokenizer)))
    photo = Image.effect_noise((90, 70), 60).convert("RGB")
    assert torch.equal(preprocess(photo), loaded.preprocess(photo))
    return model


MODELS = {
    "vit": ({}, {}),
    "quick_gelu": ({"quick_gelu": True}, {}),
    "both towers, mlp": ({}, {"targets": ("attention", "mlp"), "towers": ("image", "text")}),
    "wide text tower": ({"text": {"width": 128}}, {}),
    "custom text": (CUSTOM, {"towers": ("image", "text"), "targets": ("attention",)}),
    "siglip": (CUSTOM | {"init_logit_bias": -10.0}, {}),
    "resnet": ({"vision": RESNET}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_open_clip_loads_what_equals_the_masked_model(tmp_path, case):
    model, masks = MODELS[case]
    loaded = tuned(tmp_path / "task", base(tmp_path / "base", **model), **masks)
    out = merge.merge(tmp_path / "task", tmp_path / "runs" / "out")
    assert out == tmp_path / "runs" / "out"
    assert sorted(path.name for path in out.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    plain = same(out, loaded)
    before = load_file(tmp_path / "base" / "open_clip_model.safetensors")
    after = plain.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and before.keys() == after.keys()
    assert all(torch.equal(after[key][after[key] != 0], before[key][after[key] != 0]) for key in changed)


def test_quick_gelu_is_in_the_config(tmp_path):
    tuned(tmp_path / "task", base(tmp_path / "base", quick_gelu=True))
    out = merge.merge(tmp_path / "task", tmp_path / "out")
    assert json.loads((out / "open_clip_config.json").read_text())["model_cfg"]["quick_gelu"] is True
    model = open_clip.create_model(f"local-dir:{out}")
    assert any(type(module).__name__ == "QuickGELU" for module in model.visual.modules())


def test_image_size_as_used(tmp_path):
    loaded = tuned(tmp_path / "task", base(tmp_path / "base"), image_size=48)
    out = merge.merge(tmp_path / "task", tmp_path / "out")
    assert json.loads((out / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]["image_size"] == 48
    assert same(out, loaded).visual.image_size == (48, 48)


def test_a_name_with_a_file_of_weights(tmp_path, monkeypatch):
    base(tmp_path / "base", quick_gelu=True)
    config = json.loads((tmp_path / "base" / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-quickgelu", config)
    weights = tmp_path / "base" / "open_clip_model.safetensors"
    loaded = tuned(tmp_path / "task", "tiny-quickgelu", str(weights))
    out = merge.merge(tmp_path / "task", tmp_path / "out")
    monkeypatch.undo()
    same(out, loaded)


def test_the_base_may_have_moved(tmp_path):
    loaded = tuned(tmp_path / "task", base(tmp_path / "base"))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="open_clip cannot load"):
        merge.merge(tmp_path / "task", tmp_path / "out")
    same(merge.merge(tmp_path / "task", tmp_path / "out", model=f"local-dir:{tmp_path / 'moved'}"), loaded)


def test_a_hugging_face_tokenizer_comes_along(tmp_path):
    transformers = pytest.importorskip("transformers", reason="open_clip needs transformers for such tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "a", "cat", "dog", "red", "ball", "sky", "."])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    name = base(tmp_path / "base", text={"hf_tokenizer_name": "someone/else", "vocab_size": len(words)})
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        tmp_path / "base"
    )
    loaded = tuned(tmp_path / "task", name)
    out = merge.merge(tmp_path / "task", tmp_path / "out")
    same(out, loaded)
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(["a dog ."])
    assert tokens[0, :3].tolist() == [2, 4, 8] and tokens.shape == (1, 16)


def broken(name, value):
    """A `_write` after which someone has changed the config."""
    real = merge._write

    def write(folder, *args):
        real(folder, *args)
        path = folder / "open_clip_config.json"
        config = json.loads(path.read_text())
        part, _, leaf = name.rpartition(".")
        config[part][leaf] = value
        path.write_text(json.dumps(config))

    return write


@pytest.mark.parametrize(
    "name, value, what",
    [("model_cfg.quick_gelu", True, "text features"), ("preprocess_cfg.mean", [0.5, 0.5, 0.5], "preprocessing"),
     ("preprocess_cfg.interpolation", "bilinear", "preprocessing")],
)  # fmt: skip
def test_what_loads_otherwise_is_refused_and_leaves_nothing(tmp_path, monkeypatch, name, value, what):
    tuned(tmp_path / "task", base(tmp_path / "base"))
    monkeypatch.setattr(merge, "_write", broken(name, value))
    with pytest.raises(UserError, match=f"but differs in its {what}"):
        merge.merge(tmp_path / "task", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "task"]


def test_one_wrong_bit_in_the_weights_is_refused(tmp_path, monkeypatch):
    tuned(tmp_path / "task", base(tmp_path / "base"))

    def flip(tensors, *args):
        key = "visual.transformer.resblocks.1.attn.out_proj.weight"
        tensors[key] = tensors[key].clone()
        tensors[key].view(torch.int32)[-1, -1] ^= 1
        save_file(tensors, *args)

    monkeypatch.setattr(merge, "save_file", flip)
    with pytest.raises(UserError, match=r"differs in its (logits|weight visual\.transformer.*)"):
        merge.merge(tmp_path / "task", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_and_names_the_file(tmp_path, monkeypatch):
    tuned(tmp_path / "task", base(tmp_path / "base"))

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(merge, "save_file", full)
    with pytest.raises(OSError, match=r"runs/out/open_clip_model.safetensors cannot be written: .*No space left"):
        merge.merge(tmp_path / "task", tmp_path / "runs" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "task"]


def test_another_base_is_refused_unless_allowed(tmp_path):
    tuned(tmp_path / "task", base(tmp_path / "base"))
    other = base(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"another model: expected base weights with sha256 \w{64} .*, got \w{64}"):
        merge.merge(tmp_path / "task", tmp_path / "out", model=other)
    assert not (tmp_path / "out").exists()
    assert merge.merge(tmp_path / "task", tmp_path / "out", model=other, allow_base_mismatch=True).is_dir()


def test_out_must_be_new_or_empty(tmp_path):
    tuned(tmp_path / "task", base(tmp_path / "base"))
    (tmp_path / "out").mkdir()
    merge.merge(tmp_path / "task", tmp_path / "out")
    for path in (tmp_path / "out", tmp_path / "task" / "README.md"):
        with pytest.raises(UserError, match=r"out must be a new folder, or an empty one, but .* holds something"):
            merge.merge(tmp_path / "task", path)


def test_a_link_to_an_empty_folder_is_filled_where_it_points(tmp_path):
    loaded = tuned(tmp_path / "task", base(tmp_path / "base"))
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "empty")
    same(merge.merge(tmp_path / "task", tmp_path / "out"), loaded)
    assert (tmp_path / "out").is_symlink() and [p.name for p in (tmp_path / "disk").iterdir()] == ["empty"]


@pytest.mark.parametrize("out", [".", "", "../here", "link"])
def test_the_current_folder_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys, out):
    """It cannot be replaced: whoever stands in it would stand in a folder that is gone."""
    tuned(tmp_path / "task", base(tmp_path / "base"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(merge, "load_base", lambda *args: pytest.fail("all the work"))
    if out == "link":
        (tmp_path / "link").symlink_to("here")
        out = str(tmp_path / "link")
    assert main(["merge", str(tmp_path / "task"), "--out", out]) == 2
    assert "out must be another folder than the current one: name a new one, such as" in capsys.readouterr().err
    assert list((tmp_path / "here").iterdir()) == []


def test_a_task_without_a_base_needs_one(tmp_path):
    name = base(tmp_path / "base")
    loaded = clip.load(name, None, None, CPU)
    get_mask_model(loaded.model).save_pretrained(tmp_path / "task")
    with pytest.raises(UserError, match=r"task/mask\.safetensors does not name its base model"):
        merge.merge(tmp_path / "task", tmp_path / "out")
    merge.merge(tmp_path / "task", tmp_path / "out", model=name)


def test_torchs_fused_attention_is_on_again(tmp_path):
    tuned(tmp_path / "task", base(tmp_path / "base"))
    merge.merge(tmp_path / "task", tmp_path / "out")
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_open_clip_without_local_dir_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr(open_clip.factory, "parse_model_name")
    with pytest.raises(UserError, match=r"merge needs open_clip 3.0 or later"):
        merge.merge(tmp_path / "task", tmp_path / "out")
