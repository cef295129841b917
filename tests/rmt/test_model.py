import copy
import inspect
import pickle

import open_clip
import pytest
import test_masking
import tiny
import torch
import torch.nn.functional as F
from test_masking import ordinary_path, randomised, resnet  # noqa: F401

import rmt
from rmt.config import TARGETS, MaskConfig, UserError
from rmt.model import MaskModel, get_mask_model
from rmt.select import select


def made(config=None) -> MaskModel:
    model = get_mask_model(tiny.model(), config)
    randomised(model.masks)
    return model


def image() -> torch.Tensor:
    return test_masking.inputs()[0]


def features(model) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_image(image())


def test_calls_and_attributes_are_the_models_own():
    plain = tiny.model()
    model = get_mask_model(plain)
    assert model.model is plain and model.logit_scale is plain.logit_scale and model.visual is plain.visual
    assert model.config == MaskConfig() and not model.training
    picture, text = test_masking.inputs()
    for got, want in zip(model(picture, text), plain(picture, text)):
        assert torch.equal(got, want)
    with pytest.raises(AttributeError, match="'CLIP' object has no attribute 'nothing_such'"):
        model.nothing_such  # noqa: B018


def test_mask_keys_are_the_plain_models_names_from_the_wrapper_too():
    names = set(tiny.model().state_dict())
    model = made()
    assert {m.key for m in model.masks} <= names
    assert [m.key for m in rmt.masks(model)] == [m.key for m in model.masks]


def test_it_trains_by_backward_and_mask_adam():
    model, text = get_mask_model(tiny.model()), F.normalize(torch.randn(4, 32), dim=-1)
    optimizer = rmt.MaskAdam(model, lr=1e-3)
    before = [m.scores.detach().clone() for m in model.masks]
    logits = F.normalize(model.encode_image(image()), dim=-1) @ text.T
    rmt.backward(F.cross_entropy(logits, torch.tensor([0, 1, 2])), logits.square().sum(), model)
    optimizer.step()
    assert all(not torch.equal(m.scores, b) for m, b in zip(model.masks, before))


def test_print_trainable_parameters(capsys):
    model = get_mask_model(tiny.model(), MaskConfig(targets=("mlp",)))
    model.print_trainable_parameters()
    total, masked = sum(p.numel() for p in tiny.model().parameters()), 4 * 64 * 256
    assert capsys.readouterr().out.splitlines() == [
        f"masks      4 tensors, {masked:,} weights, {100 * masked / total:.2f} % of {total:,} parameters",
        f"scores     {masked:,} trainable, 100.00 % of the masked weights",
        f"task file  {masked // 8:,} bytes of bits",
    ]


def test_print_trainable_parameters_of_a_selection(capsys):
    words = torch.zeros(64, 6, dtype=torch.int32)
    words[:, 0] = 0b111
    model = get_mask_model(tiny.model(), MaskConfig(), test_masking.some("visual.conv1.weight", words))
    model.print_trainable_parameters()
    out = capsys.readouterr().out
    assert "1 tensors, 12,288 weights" in out and "192 trainable, 1.56 % of the masked weights" in out


def test_disable_adapter_is_the_zero_shot_model(ordinary_path):  # noqa: F811
    model, plain = made(), tiny.model()
    masked = features(model)
    with model.disable_adapter():
        assert torch.equal(features(model), features(plain))
    assert torch.equal(features(model), masked) and not torch.equal(masked, features(plain))


def test_merge_and_unload_is_a_plain_model_with_the_masked_outputs(ordinary_path):  # noqa: F811
    model, kinds = made(MaskConfig(targets=TARGETS)), [type(m) for m in tiny.model().modules()]
    masked = features(model)
    plain = model.merge_and_unload()
    assert [type(m) for m in plain.modules()] == kinds and torch.equal(features(plain), masked)


def test_saved_and_loaded_it_computes_the_same(tmp_path):
    model = made(MaskConfig(targets=("attention", "mlp")))
    model.save_pretrained(tmp_path / "task", ["a", "b"], "a photo of a {}.")
    loaded = MaskModel.from_pretrained(tiny.model(), tmp_path / "task")
    assert [m.key for m in loaded.masks] == [m.key for m in model.masks]
    assert torch.equal(features(loaded), features(model))


def test_a_selection_saved_and_loaded_computes_the_same(tmp_path):
    words = torch.full((64, 2), 0x0F0F0F0F, dtype=torch.int32)
    key = "visual.transformer.resblocks.1.attn.out_proj.weight"
    model = get_mask_model(tiny.model(), MaskConfig(), test_masking.some(key, words))
    randomised(model.masks)
    model.save_pretrained(tmp_path / "task")
    loaded = MaskModel.from_pretrained(tiny.model(), tmp_path / "task")
    assert [m.key for m in loaded.masks] == [key]
    assert torch.equal(features(loaded), features(model))


def test_a_task_for_another_base_model_is_refused_unless_allowed(tmp_path):
    made().save_pretrained(tmp_path / "task")
    with pytest.raises(UserError, match="sha256"):
        MaskModel.from_pretrained(tiny.model(seed=1), tmp_path / "task")
    assert MaskModel.from_pretrained(tiny.model(seed=1), tmp_path / "task", allow_base_mismatch=True).masks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [tiny.model, resnet, test_masking.main_style], ids=["vit", "resnet", "main"])
def test_a_copy_computes_the_same_and_is_its_own(copied, make):
    model = get_mask_model(make(), MaskConfig(targets=TARGETS))
    randomised(model.masks)
    twin = copied(model)
    want = features(model)
    assert torch.equal(features(twin), want) and twin.config == model.config
    randomised(twin.masks, seed=5)
    assert not torch.equal(features(twin), want) and torch.equal(features(model), want)
    assert [type(m) for m in twin.merge_and_unload().modules()] == [type(m) for m in make().modules()]


def test_state_dict_round_trip():
    model = made()
    other = get_mask_model(tiny.model(seed=3))
    other.load_state_dict(model.state_dict())
    assert torch.equal(features(other), features(model))
    assert set(tiny.model().state_dict()) <= {name.removeprefix("model.") for name in model.state_dict()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_another_dtype_keeps_scores_in_fp32_and_merges_exactly(dtype):
    model = made().to(dtype)
    assert {m.scores.dtype for m in model.masks} == {torch.float32} and {m.weight.dtype for m in model.masks} == {dtype}
    want = [m.dense.clone() for m in model.masks]
    keys = [m.key for m in model.masks]
    plain = model.merge_and_unload()
    assert all(torch.equal(plain.get_parameter(key).flatten(1), dense) for key, dense in zip(keys, want))


def test_encode_image_compiles():
    model = made(MaskConfig(targets=TARGETS))
    got = torch.compile(model.encode_image, fullgraph=True, backend="aot_eager")(image())
    torch.testing.assert_close(got, model.encode_image(image()))
    got.sum().backward()
    assert all(m.scores.grad.any() for m in model.masks)


@pytest.mark.parametrize("kind", ["attention-pool", "main"])
def test_modules_masked_by_weight_compile(kind):
    """Whole models of these kinds take half a minute to trace."""
    make, name = {
        "attention-pool": (resnet, "visual.attnpool"),
        "main": (test_masking.main_style, "visual.transformer.resblocks.0"),
    }[kind]
    model = get_mask_model(make(), MaskConfig(targets=("attention",)))
    randomised(model.masks)
    part = model.model.get_submodule(name)
    x = torch.randn(2, 256, 1, 1) if kind == "attention-pool" else torch.randn(2, 5, 64)
    got = torch.compile(part, backend="aot_eager")(x)
    torch.testing.assert_close(got, part(x))
    got.square().sum().backward()
    assert all(m.scores.grad.any() for m in rmt.masks(part))


def test_gradient_checkpointing_gives_the_same_scores_gradients():
    if "use_reentrant=False" not in inspect.getsource(open_clip.transformer):
        pytest.skip("this open_clip's checkpointing is torch's reentrant one, which torch.autograd.grad refuses")
    gradients = []
    for enable in (False, True):
        model = get_mask_model(tiny.model())
        model.set_grad_checkpointing(enable)
        model.train()
        rmt.backward(model.encode_image(image()).sum(), None, model)
        gradients.append([m.scores.grad for m in model.masks])
    for got, want in zip(*gradients):
        torch.testing.assert_close(got, want)


def test_batch_norm_stays_in_eval_and_its_statistics_do_not_move():
    model = get_mask_model(resnet(), MaskConfig(targets=TARGETS))
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    model.train()
    assert model.training and model.visual.training
    model.encode_image(image()).sum().backward()
    after = dict(model.named_buffers())
    assert before and all(torch.equal(after[name], value) for name, value in before.items())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_masking_twice_is_refused():
    with pytest.raises(UserError, match="masks already"):
        get_mask_model(made().model)


def test_a_real_selection_masks_what_it_selects_and_no_more():
    config = MaskConfig(targets=TARGETS)
    selection = select(tiny.model(), [], criterion="magnitude", budget=0.1, config=config)
    model = get_mask_model(tiny.model(), config, selection)
    masked = sum(m.weight.numel() for m in get_mask_model(tiny.model(), config).masks)
    assert sum(m.scores.numel() for m in model.masks) == pytest.approx(0.1 * masked, rel=1e-3)
    for mask in model.masks:
        assert torch.equal(mask.selected, selection.words[mask.key])
    with model.disable_adapter():
        want = features(model)
    torch.testing.assert_close(features(model), want)
