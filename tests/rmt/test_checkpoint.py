import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rmt_kernels as rk
from rmt import checkpoint, clip, task_file
from rmt.checkpoint import apply_task, load_task, save_task, write_task, write_whole
from rmt.config import MaskConfig, RunConfig, TrainConfig, UserError
from rmt.files import whole_folder, write_folder
from rmt.masking import apply_masks, count_off

CONV, NAMES = "visual.conv1.weight", ("red ball", "häuser", "a | b")
CONFIG = RunConfig(
    model="local-dir:x", data="/home/me/pets", template="a {}.", mask=MaskConfig(("conv", "attention"), init=0.02),
    train=TrainConfig(lr=1e-3, steps=7, strength=0.3),
)  # fmt: skip


def masked(seed=0, **vision):
    """A tiny masked model with a random tenth of its weights off, and its masks."""
    model = tiny.model(seed, **vision)
    found = apply_masks(model, MaskConfig(init=0.02))
    generator = torch.Generator().manual_seed(5)
    for mask in found:
        mask.set_bits(rk.pack_bits(torch.rand(mask.weight.shape, generator=generator) > 0.1))
    return model, found


@pytest.fixture
def folder(tmp_path):
    save_task(tmp_path / "task", masked()[1], NAMES, CONFIG)
    return tmp_path / "task"


@pytest.fixture
def file(folder):
    return folder / "mask.safetensors"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def metadata(path):
    with safe_open(path, "pt") as opened:
        return json.loads(opened.metadata()["rmt"])


def rewrite(path, change_tensors=lambda t: None, **changes):
    """Writes the task file again with other metadata or tensors, as one would who means it: with a right sha256."""
    values, tensors = metadata(path) | changes, load_file(path)
    change_tensors(tensors)
    values["sha256"] = task_file.metadata_sha256(values)
    save_file(tensors, path, {"rmt": json.dumps(values)})


def test_save_and_load_give_the_same_logits_and_bits(folder):
    model, found = masked()
    image, text = torch.randn(4, 3, 32, 32), torch.randn(3, 32)
    want = clip.logits(model, image, text)
    fresh = tiny.model()
    loaded = apply_masks(fresh, MaskConfig())
    assert not torch.equal(clip.logits(fresh, image, text), want)
    apply_task(load_task(folder), loaded)
    assert torch.equal(clip.logits(fresh, image, text), want)
    assert all(torch.equal(a.bits, b.bits) for a, b in zip(found, loaded)) and count_off(loaded)[0] > 1000


def test_a_task_loads_from_its_folder_or_its_file_as_it_was_saved(folder, file):
    saved = save_task(folder, masked()[1], NAMES, CONFIG)
    for task in (load_task(folder), load_task(str(file))):
        assert {**vars(task), "bits": 0} == {**vars(saved), "bits": 0} and task.path == file
        assert all(torch.equal(task.bits[key], saved.bits[key]) for key in saved.bits)


def test_the_file_says_what_it_belongs_to_and_nothing_of_our_data(folder, file):
    task = load_task(folder)
    assert task.classnames == NAMES and task.shapes[CONV] == (64, 192) and task.selected == {}
    assert (task.model, task.pretrained, task.template) == ("local-dir:x", None, "a {}.")
    assert (task.init, task.threshold, task.config["train"]["strength"]) == (0.02, 0.005, 0.3)
    assert not {"data", "root", "device"} & set(task.config)
    assert not any(b"/home/me" in data for data in contents(folder).values())


def test_masks_that_no_run_made_are_a_task_too(tmp_path):
    save_task(tmp_path / "task", masked()[1])
    task = load_task(tmp_path / "task")
    assert task.model is task.template is None and task.classnames == ()
    assert task.config == {"mask": {"init": 0.02, "threshold": 0.005}}


def test_a_template_goes_before_the_configs(tmp_path):
    assert save_task(tmp_path / "task", masked()[1], NAMES, CONFIG, "the {}!").template == "the {}!"
    assert load_task(tmp_path / "task").template == "the {}!"


def test_the_file_is_small_and_equal_tasks_are_equal_files(folder, file, tmp_path):
    save_task(tmp_path / "again", masked()[1], NAMES, CONFIG)
    assert contents(tmp_path / "again") == contents(folder)
    weights = count_off(masked()[1])[1]
    # A tenth off is 0.469 bits a weight.
    assert file.stat().st_size < 0.48 * weights / 8 + 3000


def test_the_card_tells_people_what_it_is(folder):
    task = save_task(folder, masked()[1], NAMES, CONFIG, numbers={"tuned top-1, %": 88.126, "note": "few\nimages"})
    text, (off, total) = (folder / "README.md").read_text(), count_off(masked()[1])
    for part in (
        f"| switched off | {off:,} ({100 * off / total:.2f} %) |", "| 3 classes | red ball, häuser, a \\| b |",
        "| tuned top-1, % | 88.13 |", "| note | few images |", "create_model_and_transforms('local-dir:x')",
        "rmt.MaskModel.from_pretrained(base", f"({total // 8:,} as plain bits)", task.bits_sha256, task.base_sha256,
    ):  # fmt: skip
        assert part in text
    assert "88.13" not in (folder / "mask.safetensors").read_bytes().decode("latin1")


def test_a_selection_is_counted_and_loading_needs_none(tmp_path):
    model = tiny.model()
    found = apply_masks(model, MaskConfig())
    chosen = torch.rand(64, 192, generator=torch.Generator().manual_seed(1)) > 0.7
    found[0].module.select("", rk.pack_bits(chosen))
    found[0].set_bits(rk.pack_bits(~(chosen & (torch.arange(192) % 2 == 0))))
    save_task(tmp_path / "task", found)
    task, whole = load_task(tmp_path / "task"), apply_masks(tiny.model(), MaskConfig())
    assert task.selected == {CONV: int(chosen.sum())}
    apply_task(task, whole)
    assert torch.equal(whole[0].bits, found[0].bits) and count_off(whole)[0] == int(chosen[:, ::2].sum()) > 0
    other = apply_masks(tiny.model(), MaskConfig())
    other[0].module.select("", rk.pack_bits(~chosen))
    with pytest.raises(UserError, match=f"weights of {CONV} off that are not selected"):
        apply_task(task, other)


def test_refuses_masks_of_two_scales_or_none(tmp_path):
    found = masked()[1]
    found[0].module.init = 0.5
    for masks in (found, []):
        with pytest.raises(UserError, match=r"masks of one \(init, threshold\), got"):
            save_task(tmp_path / "task", masks)
    assert not list(tmp_path.iterdir())


class Half:
    """A file of which every write stops halfway: the disk is full."""

    def __init__(self, opened):
        self.opened = opened

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.opened.close()

    def write(self, data):
        self.opened.write(data[: len(data) // 2])
        self.opened.flush()
        raise OSError(28, "No space left on device")


def break_writing(monkeypatch, where, stop=(OSError, 28, "No space left on device")):
    def broken(*args, **kwargs):
        raise stop[0](*stop[1:])

    real = os.fdopen
    monkeypatch.setattr(os, where, broken if where != "fdopen" else lambda *args: Half(real(*args)))


@pytest.mark.parametrize("where", ["fdopen", "fsync", "chmod", "replace"])
def test_a_full_disk_leaves_the_old_task_whole_and_names_the_file(folder, monkeypatch, where):
    before = contents(folder)
    break_writing(monkeypatch, where)
    with pytest.raises(OSError, match=r"No space left on device: '.*task/(README.md|mask.safetensors)'"):
        save_task(folder, masked(seed=3)[1], NAMES, CONFIG)
    monkeypatch.undo()
    assert contents(folder) == before
    load_task(folder)


@pytest.mark.parametrize("where", ["fdopen", "replace"])
def test_a_full_disk_leaves_no_half_of_a_new_task(tmp_path, monkeypatch, where):
    break_writing(monkeypatch, where)
    with pytest.raises(OSError, match="No space left"):
        save_task(tmp_path / "runs" / "task", masked()[1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_task_whole(folder, monkeypatch, where):
    before = contents(folder)
    break_writing(monkeypatch, where, (KeyboardInterrupt,))
    with pytest.raises(KeyboardInterrupt):
        save_task(folder, masked(seed=3)[1], NAMES, CONFIG)
    monkeypatch.undo()
    assert contents(folder) == before


def test_the_mask_is_renamed_last(tmp_path, monkeypatch):
    seen, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(Path(b).name), real(a, b)))
    save_task(tmp_path / "task", masked()[1])
    assert seen == ["README.md", "mask.safetensors"]


def test_a_limit_of_the_system_leaves_the_old_files_whole(tmp_path):
    """No simulation: the kernel refuses to let a file of this process grow beyond 1000 bytes."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    code = (
        f"import resource; from pathlib import Path; from rmt.files import write_folder\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))\n"
        f"write_folder({str(tmp_path / 'new')!r}, {{'small': b'x', 'large': bytes(5000)}})"
    )
    root = Path(checkpoint.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.strip().endswith(f"File too large: '{tmp_path}/new/large'")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), whole_folder(tmp_path / "a" / "b") as temporary:
        (temporary / "x").write_bytes(b"1")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with whole_folder(tmp_path / "a" / "b") as temporary:
        (temporary / "x").write_bytes(b"1")
        assert not (tmp_path / "a" / "b").exists()
    assert contents(tmp_path / "a" / "b") == {"x": b"1"} and len(list((tmp_path / "a").iterdir())) == 1


def test_a_folder_that_was_there_stays_with_what_else_it_holds(tmp_path):
    (tmp_path / "notes").write_text("mine")
    write_folder(tmp_path, {"a": b"1"})
    assert contents(tmp_path) == {"notes": b"mine", "a": b"1"}
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="a'"):
        write_folder(tmp_path, {"a": b"2"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "notes"]


def test_what_is_written_has_ordinary_permissions(tmp_path):
    write_whole(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    with whole_folder(tmp_path / "c") as temporary:
        write_whole(temporary / "a", b"x")
    (tmp_path / "d").mkdir()
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "d").stat().st_mode


def test_refuses_another_base_model_and_shows_both_hashes(folder):
    found = apply_masks(tiny.model(seed=1), MaskConfig())
    task = load_task(folder)
    with pytest.raises(UserError, match="another model") as caught:
        apply_task(task, found)
    assert task.base_sha256 in str(caught.value) and checkpoint.base_sha256(found) in str(caught.value)
    assert count_off(found)[0] == 0
    apply_task(task, found, allow_base_mismatch=True)
    assert all(torch.equal(mask.bits, task.bits[mask.key]) for mask in found)


def test_base_hash_does_not_depend_on_the_storage_dtype():
    model = tiny.model().half().float()
    found = apply_masks(model, MaskConfig())
    want = checkpoint.base_sha256(found)
    assert checkpoint.base_sha256(apply_masks(tiny.model().half(), MaskConfig())) == want
    assert checkpoint.base_sha256(apply_masks(tiny.model(), MaskConfig())) != want


@pytest.mark.parametrize("allow", [False, True])
def test_refuses_other_masks_and_other_shapes(folder, allow):
    task = load_task(folder)
    with pytest.raises(UserError, match=r"lacks \['visual.*mlp.*has besides \['visual"):
        apply_task(task, apply_masks(tiny.model(), MaskConfig(targets=("mlp",))), allow)
    with pytest.raises(UserError, match=r"visual.conv1.weight must be \(96, 192\), got \(64, 192\)"):
        apply_task(task, apply_masks(tiny.model(width=96), MaskConfig()), allow)


def test_refuses_another_format_version(file):
    rewrite(file, format_version=1)
    with pytest.raises(UserError, match="format version 2 or 3, got 1"):
        load_task(file)


def stream(n, k):
    mask = torch.rand(n, k, generator=torch.Generator().manual_seed(2)) >= 0.5
    return torch.frombuffer(bytearray(rk.encode_bits(rk.pack_bits(mask), k)), dtype=torch.uint8)


def declared(n, k):
    """A stream of a mask that is all on, however large."""
    header = struct.pack("<4sBBBBIIQQ", b"RMTB", 1, 1, 0, 0, n, k, 0, 0)
    return torch.frombuffer(bytearray(header + zlib.crc32(header).to_bytes(4, "little")), dtype=torch.uint8)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t[CONV][50].bitwise_xor_(1), f"{CONV}: a mask stream is damaged: expected crc32"),
        (lambda t: t.update({CONV: t[CONV][:40].clone()}), f"{CONV}: a mask stream is damaged"),
        (lambda t: t.update({CONV: t[CONV][:0].clone()}), rf"{CONV} must hold 1 to 1572 bytes .* got U8 \[0\]"),
        (lambda t: t.update({CONV: torch.zeros(1573, dtype=torch.uint8)}), rf"{CONV} must hold 1 to 1572 bytes"),
        (lambda t: t.update({CONV: t[CONV].float()}), rf"{CONV} must hold .* got F32"),
        (lambda t: t.update({CONV: stream(64, 192)}), "damaged: expected bits with sha256"),
        (lambda t: t.update({CONV: stream(192, 64)}), f"{CONV} must hold a mask 64 x 192, got 192 x 64"),
        (lambda t: t.update({CONV: declared(2**15, 2**15)}), f"{CONV}: a mask's words must take at most 1,536 bytes"),
        (lambda t: t.pop(CONV), f"expected 5 tensors: it lacks .*{CONV}"),
        (lambda t: t.update(text_features=torch.ones(3, 1)), "has besides .*text_features"),
    ],
)  # fmt: skip
def test_refuses_damaged_bits(file, change, message):
    rewrite(file, change)
    with pytest.raises(UserError, match=message) as caught:
        load_task(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"shapes": 3}, {"classnames": None}, {"shapes": {CONV: [0, -1]}}, {"template": 1}, {"threshold": "x"},
     {"shapes": {CONV: 3}}, {"selected": None}, {"shapes": {CONV: [True, 5]}}, {"classnames": [1]},
     {"classnames": ["\ud800"]}, {"selected": {CONV: 64 * 192 + 1}}, {"selected": {"x": 1}}, {"init": float("nan")},
     {"threshold": float("inf")}, {"config": {"image_size": "9" * 300}}, {"shapes": {}},
     {"shapes": {CONV: [2**40, 2**40]}}, {"text_features_sha256": "x"}, {"text_features_sha256": 1}],
)  # fmt: skip
def test_refuses_nonsense_in_the_metadata(file, changes):
    rewrite(file, **changes)
    with pytest.raises(UserError, match="is damaged"):
        load_task(file)


@pytest.mark.parametrize("field", sorted({*task_file.FIELDS, "text_features_sha256", "sha256", "format_version"}))
def test_refuses_metadata_with_a_field_missing_or_changed(file, field):
    values, tensors = metadata(file), load_file(file)
    without = {name: value for name, value in values.items() if name != field}
    changed = values | {field: values[field] + "x" if isinstance(values[field], str) else "x"}
    for odd in (without, changed):
        save_file(tensors, file, {"rmt": json.dumps(odd)})
        with pytest.raises(UserError, match=field.replace("_", ".") if odd is without else "damaged|format version"):
            load_task(file)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_refuses_a_truncated_file(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="is no task file, or is damaged"):
        load_task(file)


def test_no_flipped_byte_goes_unseen(file):
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for place in [*range(0, header, 3), *range(header, len(data), 97)]:
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(UserError, match=r"mask\.safetensors"):
            load_task(file)


def test_refuses_a_missing_file_a_foreign_one_and_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"expected a task folder.* at .*no, got none"):
        load_task(tmp_path / "no")
    with pytest.raises(UserError, match=r"expected a task folder.*mask.safetensors, got none"):
        load_task(tmp_path)
    save_file({"a": torch.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(UserError, match="is no task file"):
        load_task(tmp_path / "foreign")


def write_version_2(path, task, change=lambda values, tensors: None):
    """As the code before the codec wrote it: the words as int32, no text features."""
    values = {name: getattr(task, name) for name in task_file.FIELDS} | {"format_version": 2}
    values["classnames"] = list(task.classnames)
    tensors = {key: words.clone() for key, words in task.bits.items()}
    change(values, tensors)
    values["sha256"] = task_file.metadata_sha256(values)
    header, body = {"__metadata__": {"rmt": json.dumps(values, sort_keys=True)}}, b""
    for key in sorted(tensors):
        data = tensors[key].numpy().astype("<i4").tobytes()
        span = [len(body), len(body) + len(data)]
        header[key] = {"dtype": "I32", "shape": list(tensors[key].shape), "data_offsets": span}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def test_a_file_of_version_2_is_read(folder, tmp_path):
    saved = load_task(folder)
    write_version_2(tmp_path / "old.safetensors", saved)
    old = load_task(tmp_path / "old.safetensors")
    assert {**vars(old), "bits": 0, "path": 0} == {**vars(saved), "bits": 0, "path": 0}
    assert all(torch.equal(old.bits[key], saved.bits[key]) for key in saved.bits)
    write_task(tmp_path / "again", old)
    assert (tmp_path / "again" / "mask.safetensors").read_bytes() == (folder / "mask.safetensors").read_bytes()


def test_refuses_damaged_words_of_version_2(folder, tmp_path):
    task, path = load_task(folder), tmp_path / "old.safetensors"
    narrower = {**task.shapes, CONV: (64, 180)}
    for change, message in [
        (lambda values, tensors: tensors[CONV].bitwise_xor_(1 << 7), "damaged: expected bits with sha256"),
        (lambda values, tensors: tensors.update({CONV: tensors[CONV][:, :2].clone()}), r"got I32 \[64, 2\]"),
        (lambda values, tensors: values.update(shapes=narrower), f"{CONV} has bits set beyond column 180"),
    ]:
        write_version_2(path, task, change)
        with pytest.raises(UserError, match=message):
            load_task(path)


def features(classes=3, width=8):
    rows = torch.randn(classes, width, generator=torch.Generator().manual_seed(4))
    return torch.nn.functional.normalize(rows, dim=1)


def test_text_features_are_kept(tmp_path):
    save_task(tmp_path / "task", masked()[1], NAMES, CONFIG, text_features=features())
    task = load_task(tmp_path / "task")
    assert torch.equal(task.text_features, features()) and task.text_features.dtype == torch.float32
    assert write_task(tmp_path / "again", task).path == tmp_path / "again" / "mask.safetensors"
    assert contents(tmp_path / "again") == contents(tmp_path / "task")


@pytest.mark.parametrize(
    "odd, message",
    [
        (features().half(), "got torch.float16"), (features(2), r"each of 3 classes, got .*\(2, 8\)"),
        (features()[:, :0], r"got .*\(3, 0\)"), (2 * features(), "of length 2"), (features() * float("nan"), "nan"),
        (torch.full((3, 8), 1e30), "length"),
    ],
)  # fmt: skip
def test_refuses_text_features_that_are_none(tmp_path, odd, message):
    with pytest.raises(UserError, match=f"text_features must be .*{message}"):
        save_task(tmp_path / "task", masked()[1], NAMES, CONFIG, text_features=odd)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t["text_features"][0].neg_(), "expected text_features with sha256"),
        (lambda t: t["text_features"].mul_(2), "rows of length 1"),
        (lambda t: t.update(text_features=t["text_features"].double()), "must be an fp32 matrix .* got F64"),
        (lambda t: t.update(text_features=features(4)), "each of 3 classes"),
        (lambda t: t.pop("text_features"), "it lacks .*text_features"),
    ],
)  # fmt: skip
def test_refuses_damaged_text_features(tmp_path, change, message):
    file = save_task(tmp_path / "task", masked()[1], NAMES, CONFIG, text_features=features()).path
    rewrite(file, change)
    with pytest.raises(UserError, match=message):
        load_task(file)


def test_a_task_that_could_not_be_loaded_is_not_written(folder, tmp_path):
    task = load_task(folder)
    other = {**task.bits, CONV: task.bits[CONV][:, :2]}
    for change, message in [
        ({"bits": other}, f"{CONV} must hold the int32 words"), ({"bits": {CONV: task.bits[CONV]}}, "it lacks"),
        ({"shapes": {**task.shapes, CONV: (64, 180)}}, "beyond column 180"), ({"selected": {CONV: 0}}, "selected of"),
        ({"init": float("inf")}, "must be finite"), ({"classnames": ("x" * (2 << 20),)}, "at most 2,097,152 bytes"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            write_task(tmp_path / "new", dataclasses.replace(task, **change))
    assert not (tmp_path / "new").exists()


def test_refuses_what_is_larger_than_its_limit_before_reading_it(file, tmp_path, monkeypatch):
    words = sum(4 * words.numel() for words in load_task(file).bits.values())
    assert load_task(file, limit=words).bits
    with pytest.raises(UserError, match=f"at most {words - 1:,} bytes, got shapes that take {words:,}"):
        load_task(file, limit=words - 1)
    large = tmp_path / "large.safetensors"
    with open(large, "wb") as opened:
        opened.truncate((2 << 30) + (2 << 20) + 1)
    with pytest.raises(UserError, match=r"at most 2,149,580,800 bytes, got 2,149,580,801"):
        load_task(large)
    large.write_bytes((50 << 20).to_bytes(8, "little") + b" " * (50 << 20))
    with pytest.raises(UserError, match=r"at most 2,097,152 bytes, got 52,428,800"):
        load_task(large)


@pytest.mark.parametrize("bomb", ["[" * 500_000, '{"a":' * 100_000, "9" * 500_000, "[" + "[]," * 100_000 + "[]]"])
def test_refuses_json_made_to_burst(file, bomb):
    save_file(load_file(file), file, {"rmt": bomb})
    with pytest.raises(UserError, match="is no task file, or is damaged"):
        load_task(file)


def test_the_reader_in_the_docs_reads_a_task(tmp_path, monkeypatch):
    """The block as it stands there, with no import but numpy's and Python's."""
    text = (Path(checkpoint.__file__).parents[1] / "docs" / "format.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    lines = [line for line in code.splitlines() if line.strip()]
    assert {name for line in lines if line.startswith("import") for name in line.replace(",", "").split()[1:]} <= {
        "json", "struct", "sys", "zlib", "numpy", "as", "np",
    }  # fmt: skip
    assert len(lines) <= 20
    found = masked()[1]
    for mask, off in zip(found, (0.0, 0.03, 0.5, 0.97, 1.0)):
        mask.set_bits(rk.pack_bits(torch.rand(mask.weight.shape) >= off))
    task = save_task(tmp_path / "task", found, NAMES, CONFIG, text_features=features())
    monkeypatch.setattr(sys, "argv", ["reader", str(task.path)])
    exec(code, read := {})
    assert read["masks"].keys() == task.bits.keys() and len(found) == 5
    for key, mask in read["masks"].items():
        assert torch.equal(torch.from_numpy(mask), rk.unpack_bits(task.bits[key], task.shapes[key][1])), key
