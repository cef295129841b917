import json
import os

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rmt_kernels as rk
from rmt import checkpoint, clip
from rmt.checkpoint import apply_task, from_official, load_task, save_task, to_official, write_whole
from rmt.config import MaskConfig, RunConfig, TrainConfig, UserError, from_json, to_json
from rmt.masking import apply_masks, count_off

CONV, NAMES = "visual.conv1.weight", ("red ball", "häuser")
CONFIG = RunConfig(
    model="local-dir:x", data="/home/me/pets", template="a {}.", mask=MaskConfig(("conv", "mlp"), 0.02, 0.001),
    train=TrainConfig(lr=1e-3, steps=7, strength=0.3),
)  # fmt: skip


def masked(seed=0, **vision):
    """A tiny masked model with a random tenth of its weights off, and its masks."""
    model = tiny.model(seed, **vision)
    found = apply_masks(model, MaskConfig())
    generator = torch.Generator().manual_seed(5)
    for mask in found:
        mask.set_bits(rk.pack_bits(torch.rand(mask.weight.shape, generator=generator) > 0.1))
    return model, found


@pytest.fixture
def file(tmp_path):
    save_task(tmp_path / "task.safetensors", masked()[1], NAMES, CONFIG)
    return tmp_path / "task.safetensors"


def rewrite(path, change_tensors=lambda t: None, **changes):
    """Writes the task file again with other metadata or tensors."""
    with safe_open(path, "pt") as opened:
        values = json.loads(opened.metadata()["rmt"])
    tensors = load_file(path)
    change_tensors(tensors)
    save_file(tensors, path, {"rmt": json.dumps(values | changes)})


def test_save_and_load_give_the_same_logits_and_bits(file):
    model, found = masked()
    image, text = torch.randn(4, 3, 32, 32), torch.randn(3, 32)
    want = clip.logits(model, image, text)
    fresh = tiny.model()
    loaded = apply_masks(fresh, MaskConfig())
    assert not torch.equal(clip.logits(fresh, image, text), want)
    apply_task(load_task(file), loaded)
    assert torch.equal(clip.logits(fresh, image, text), want)
    assert all(torch.equal(a.bits, b.bits) for a, b in zip(found, loaded)) and count_off(loaded)[0] > 1000


def test_the_file_says_what_it_belongs_to_and_nothing_of_our_folders(file):
    task = load_task(file)
    assert task.classnames == NAMES and task.shapes[CONV] == (64, 192)
    assert task.config["template"] == "a {}." and task.config["mask"]["threshold"] == 0.001
    assert b"/home/me" not in file.read_bytes()


def test_the_file_is_small_and_equal_tasks_are_equal_files(file, tmp_path):
    save_task(tmp_path / "again", masked()[1], NAMES, CONFIG)
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    weights = count_off(masked()[1])[1]
    assert weights / 8 < file.stat().st_size < weights / 8 + 3000


def test_the_words_can_be_read_with_numpy_alone(file):
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + size])[CONV]["data_offsets"]
    words = np.frombuffer(data[8 + size + begin : 8 + size + end], "<i4").reshape(64, 6)
    mask = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :192].astype(bool)
    assert torch.equal(torch.from_numpy(mask), rk.unpack_bits(masked()[1][0].bits, 192))


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_whole(file, monkeypatch, where):
    before = file.read_bytes()

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    if where == "write":
        real = os.fdopen

        def half(handle, mode):
            opened = real(handle, mode)

            class Half:
                def __enter__(self):
                    return self

                def __exit__(self, *args):
                    opened.close()

                def write(self, data):
                    opened.write(data[: len(data) // 2])
                    opened.flush()
                    raise OSError(28, "No space left on device")

            return Half()

        monkeypatch.setattr(os, "fdopen", half)
    else:
        monkeypatch.setattr(os, where, stop)
    with pytest.raises((KeyboardInterrupt, OSError)):
        save_task(file, masked(seed=3)[1], NAMES, CONFIG)
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    load_task(file)


def test_a_written_file_has_ordinary_permissions(tmp_path):
    write_whole(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_refuses_another_base_model_and_shows_both_hashes(file):
    found = apply_masks(tiny.model(seed=1), MaskConfig())
    task = load_task(file)
    with pytest.raises(UserError, match="another model") as caught:
        apply_task(task, found)
    assert task.base_sha256 in str(caught.value) and checkpoint.base_sha256(found) in str(caught.value)
    assert count_off(found)[0] == 0


def test_base_hash_does_not_depend_on_the_storage_dtype():
    model = tiny.model().half().float()
    found = apply_masks(model, MaskConfig())
    want = checkpoint.base_sha256(found)
    assert checkpoint.base_sha256(apply_masks(tiny.model().half(), MaskConfig())) == want
    assert checkpoint.base_sha256(apply_masks(tiny.model(), MaskConfig())) != want


def test_refuses_other_masks_and_other_shapes(file):
    task = load_task(file)
    with pytest.raises(UserError, match=r"lacks \['visual.*mlp.*has besides \['visual"):
        apply_task(task, apply_masks(tiny.model(), MaskConfig(targets=("mlp",))))
    with pytest.raises(UserError, match=r"visual.conv1.weight must be \(96, 192\), got \(64, 192\)"):
        apply_task(task, apply_masks(tiny.model(width=96), MaskConfig()))


def test_refuses_another_format_version(file):
    rewrite(file, format_version=2)
    with pytest.raises(UserError, match="format version 1, got 2"):
        load_task(file)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t[CONV].bitwise_xor_(1 << 7), "damaged: expected bits with sha256"),
        (lambda t: t.update({CONV: t[CONV][:, :2].clone()}), r"got torch.int32 \(64, 2\)"),
        (lambda t: t.update({CONV: t[CONV].float()}), "got torch.float32"),
        (lambda t: t.pop(CONV), "damaged: expected masks"),
    ],
)  # fmt: skip
def test_refuses_damaged_bits(file, change, message):
    rewrite(file, change)
    with pytest.raises(UserError, match=message):
        load_task(file)


def test_refuses_bits_beyond_the_last_column(file):
    with safe_open(file, "pt") as opened:
        shapes = json.loads(opened.metadata()["rmt"])["shapes"]
    rewrite(file, shapes=shapes | {CONV: [64, 180]})
    with pytest.raises(UserError, match="bits set beyond column 180"):
        load_task(file)


@pytest.mark.parametrize("changes", [{"shapes": 3}, {"classnames": None}, {"shapes": {CONV: [0, -1]}}])
def test_refuses_nonsense_in_the_metadata(file, changes):
    rewrite(file, **changes)
    with pytest.raises(UserError, match="is damaged"):
        load_task(file)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_refuses_a_truncated_file(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="is no task file, or is damaged"):
        load_task(file)


def test_refuses_a_missing_file_and_a_foreign_one(tmp_path):
    with pytest.raises(UserError, match=r"expected a task file at .*no, got none"):
        load_task(tmp_path / "no")
    save_file({"a": torch.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(UserError, match="is no task file"):
        load_task(tmp_path / "foreign")


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 32), (9, 20), (64, 192), (5, 771)])
def test_official_bytes_are_numpys_packbits(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.3
    flat, words = torch.from_numpy(np.packbits(mask.numpy())), rk.pack_bits(mask)
    assert torch.equal(from_official(flat, shape[1], shape[0]), words)
    assert torch.equal(from_official(bytes(flat.tolist()), shape[1], shape[0]), words)
    assert torch.equal(to_official(words, shape[1]), flat)
    with pytest.raises(UserError, match=f"must come as {len(flat)} bytes, got {len(flat) + 1}"):
        from_official(torch.cat([flat, flat[:1]]), shape[1], shape[0])


def test_config_goes_to_json_and_back():
    assert from_json(to_json(CONFIG)) == CONFIG


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "must be JSON"),
        ("[]", "must be an object"),
        ('{"model": "local-dir:x"}', "incomplete"),
        ('{"model": "local-dir:x", "data": "y", "speed": 3}', r"got \['speed'\]"),
        ('{"model": "local-dir:x", "data": "y", "train": {"lr": "x"}}', "lr must be a finite number above 0, got 'x'"),
        ('{"model": "local-dir:x", "data": "y", "template": "a photo"}', "template must be a text with one {}"),
        ('{"model": "ViT-B-32", "data": "y"}', "pretrained must be a tag or a file"),
        ('{"model": "local-dir:x", "data": "y", "mask": {"targets": ["bias"]}}', "targets must be some of"),
        ('{"model": "local-dir:x", "data": "y", "mask": {"init": 0.005}}', "init must be a finite number above thr"),
    ],
)  # fmt: skip
def test_config_says_what_it_expected_and_what_came(text, message):
    with pytest.raises(UserError, match=message):
        from_json(text)


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", 0.0), ("lr", float("nan")), ("epochs", 0), ("steps", 0), ("batch", 1.5), ("strength", 1.1),
        ("strength", -0.1), ("l2", -1e-4), ("temperature", 0), ("seed", -1), ("seed", True), ("log_every", 0),
    ],
)  # fmt: skip
def test_train_config_refuses_bad_values(name, value):
    with pytest.raises(UserError, match=f"{name} must be .*, got {value!r}"):
        TrainConfig(**{name: value})
