"""The exported files are run by torch and by onnxruntime, and compared with the live masked model."""

import json

import pytest
import tiny
import torch
import torch.nn.functional as F

import rmt
import rmt_kernels as rk
from rmt import clip, export
from rmt.checkpoint import save_task
from rmt.cli import main
from rmt.config import MaskConfig, RunConfig, UserError
from rmt.merge import without_fused_attention

NAMES, TEMPLATE = ("red ball", "häuser"), "a photo of a {}."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A task on a tiny model, a tenth of its weights off: (its folder, the live masked model, text features)."""
    folder = tmp_path_factory.mktemp("export")
    # One block: tracing takes seconds a block.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.MODEL, "vision_cfg", tiny.MODEL["vision_cfg"] | {"layers": 1})
        name = tiny.model_folder(folder / "model")
    loaded = clip.load(name, None, None, torch.device("cpu"))
    text = clip.text_features(loaded, NAMES, TEMPLATE)
    model = rmt.get_mask_model(loaded.model, MaskConfig())
    for i, mask in enumerate(model.masks):
        on = torch.rand(mask.weight.shape, generator=torch.Generator().manual_seed(i)) > 0.1
        mask.set_bits(rk.pack_bits(on))
    save_task(folder / "task", model.masks, NAMES, RunConfig(model=name, data="x"), TEMPLATE)
    return folder, model, text


def expected(model, images, text):
    with without_fused_attention(), torch.no_grad():
        return clip.logits(model.model, images, text)


def zero_shot(model, images, text):
    with model.disable_adapter():
        return expected(model, images, text)


@pytest.fixture(scope="module")
def files(made):
    """Of both kinds, as the command writes them."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"ONNX needs the package {package}")
    found = {kind: made[0] / "new" / f"model.{kind}" for kind in ("torch", "onnx")}
    for kind, path in found.items():
        assert main(["export", str(made[0] / "task"), "--format", kind, "--out", str(path)]) == 0
    return found


@pytest.fixture(scope="module")
def programs(files):
    """What runs them, (B, 3, 32, 32) -> logits, probabilities; the descriptions inside, as text; onnx's session."""
    extra = {"rmt.json": ""}
    program = torch.export.load(files["torch"], extra_files=extra).module()
    session = __import__("onnxruntime").InferenceSession(str(files["onnx"]), providers=["CPUExecutionProvider"])

    def onnx(images):
        return tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))

    inside = {"torch": extra["rmt.json"], "onnx": session.get_modelmeta().custom_metadata_map["rmt"]}
    return {"torch": program, "onnx": onnx}, inside, session


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_files_compute_what_the_masked_model_does(made, programs, kind, batch):
    _, model, text = made
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    want = expected(model, images, text)
    logits, probabilities = programs[0][kind](images)
    assert logits.shape == (batch, 2)
    atol = 1e-5 * model.logit_scale.exp().item()
    torch.testing.assert_close(logits, want, rtol=0, atol=atol)
    torch.testing.assert_close(probabilities, want.softmax(-1), rtol=0, atol=atol)
    assert (logits - zero_shot(model, images, text)).abs().max() > 100 * atol, "the masks count"


def test_what_goes_in_and_comes_out_is_beside_and_inside(files, programs):
    about = json.loads(files["torch"].with_name("model.torch.json").read_text())
    assert about["classnames"] == list(NAMES) and about["template"] == TEMPLATE
    assert about["inputs"] == {"images": ["batch", 3, 32, 32]} and about["outputs"] == ["logits", "probabilities"]
    assert about["mean"] == tiny.PREPROCESS["mean"] and about["std"] == tiny.PREPROCESS["std"]
    assert about["interpolation"] == "bicubic" and len(about["bits_sha256"]) == 64
    _, inside, session = programs
    assert json.loads(inside["torch"]) == json.loads(inside["onnx"]) == about
    assert [i.name for i in session.get_inputs()] == ["images"] and isinstance(session.get_inputs()[0].shape[0], str)
    assert [o.name for o in session.get_outputs()] == about["outputs"]
    assert sorted(p.name for p in files["torch"].parent.iterdir()) == [
        "model.onnx", "model.onnx.json", "model.torch", "model.torch.json",
    ]  # fmt: skip


def test_features_only(made, tmp_path, monkeypatch):
    """Saving and loading take seconds, and are the others': here the program is run as it was traced."""
    folder, model, _ = made
    programs = []

    def kept(module, images, path, about):
        programs.append(export._program(module, images).module())
        path.write_bytes(b"kept")
        return lambda batch: (programs[0](batch),)

    monkeypatch.setattr(export, "_torch", kept)
    export.export(folder / "task", tmp_path / "f.pt2", features_only=True)
    images = torch.randn(4, 3, 32, 32)
    with without_fused_attention(), torch.no_grad():
        want = model.encode_image(images)
    got = programs[0](images)
    torch.testing.assert_close(F.normalize(got, dim=-1), F.normalize(want, dim=-1), rtol=0, atol=1e-5)
    about = json.loads((tmp_path / "f.pt2.json").read_text())
    assert about["outputs"] == ["features"] and about["classnames"] == []


def test_a_file_that_computes_something_else_is_not_written(made, tmp_path, monkeypatch):
    folder = made[0]

    class Other(export._Exported):
        def forward(self, images):
            logits, probabilities = super().forward(images)
            return logits + 1e-2, probabilities

    monkeypatch.setattr(export, "_Exported", Other)
    monkeypatch.setattr(export, "_torch", lambda module, images, path, about: path.write_bytes(b"x") and module)
    with pytest.raises(UserError, match=r"must compute .* within 0\.00033, but differs by 0\.01"):
        export.export(folder / "task", tmp_path / "new" / "a.pt2")

    class Never(export._Exported):
        def forward(self, images):
            return super().forward(images) if images.sum() > 0 else None

    monkeypatch.setattr(export, "_Exported", Never)
    monkeypatch.setattr(export, "_torch", lambda module, images, *_: export._program(module, images))
    with pytest.raises(UserError, match=r"torch.export cannot trace VisionTransformer"):
        export.export(folder / "task", tmp_path / "new" / "a.pt2")
    assert not any(tmp_path.iterdir())


def test_refusals_come_before_any_work(made, tmp_path, monkeypatch, capsys):
    folder, model, _ = made
    with pytest.raises(UserError, match="format must be one of torch, onnx, got 'tf'"):
        export.export(folder / "task", tmp_path / "a", "tf")
    save_task(tmp_path / "nameless", model.masks, (), RunConfig(model="local-dir:x", data="x"))
    with pytest.raises(UserError, match="has no class names or no template to bake in"):
        export.export(tmp_path / "nameless", tmp_path / "a")
    other = tiny.model_folder(tmp_path / "other", seed=1)
    save_task(tmp_path / "seed0", rmt.get_mask_model(tiny.model(), MaskConfig()).masks, NAMES, None, TEMPLATE)
    assert main(["export", str(tmp_path / "seed0"), "--model", other, "--out", str(tmp_path / "a")]) == 2
    assert "is for another model" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs onnx, onnxscript and onnxruntime \(extra \[export\]\)"):
        export.export(folder / "task", tmp_path / "a", "onnx")
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.json").exists()


def test_weights_that_onnx_puts_beside_its_file_come_along(made, tmp_path, monkeypatch):
    """As it does above 1.5 GiB: the check before has seen them, and a file that is moved alone has none."""
    onnxruntime = pytest.importorskip("onnxruntime")
    program = pytest.importorskip("torch.onnx._internal.exporter._onnx_program")
    if not hasattr(program, "_LARGE_MODEL_THRESHOLD"):
        pytest.skip("this torch has no such threshold")
    monkeypatch.setattr(program, "_LARGE_MODEL_THRESHOLD", 1000)
    out = tmp_path / "sub" / "my task.onnx"
    export.export(made[0] / "task", out, "onnx")
    assert {f.name for f in out.parent.iterdir()} == {"my task.onnx", "my task.onnx.data", "my task.onnx.json"}
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": torch.randn(2, 3, 32, 32).numpy()})[0].shape[0] == 2
