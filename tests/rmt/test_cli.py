import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import rmt
from rmt.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a model and images; the model's name."""
    root = tmp_path_factory.mktemp("files")
    tiny.splits(root / "data")
    return root, tiny.model_folder(root / "model")


def train(files, out, *flags):
    root, model = files
    fixed = ["--model", model, "--data", str(root / "data"), "--shots", "4", "--out", str(out)]
    return main(["train", *fixed, "--lr", "2e-3", "--steps", "6", "--batch", "8", "--log-every", "3", *flags])


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    assert train(files, out) == 0
    return out


def line(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def test_train_prints_and_writes_and_eval_says_the_same(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(files, out, "--template", "a toy {}.") == 0
    trained = capsys.readouterr()
    result = json.loads((out / "result.json").read_text())
    correct = round(result["metrics"]["acc1"] * 24 / 100)
    assert line(trained.out, "tuned").startswith(f"tuned      {result['metrics']['acc1']:.2f} % ({correct} of 24")
    assert line(trained.out, "zero-shot").startswith(f"zero-shot  {result['zero_shot']['acc1']:.2f} %")
    assert line(trained.out, "off").startswith(f"off        {result['percent_off']:.2f} %") and result["off"] > 0
    assert "step 3/6" in trained.out and "step 6/6" in trained.out
    assert [json.loads(row)["step"] for row in (out / "metrics.jsonl").read_text().splitlines()] == [3, 6]
    assert {"torch", "commit", "date", "machine"} <= set(result["environment"])
    assert len(json.loads((out / "fewshot.json").read_text())["train"]) == 16
    assert main(["eval", str(out)]) == 0
    evaluated = capsys.readouterr().out
    assert line(evaluated, "tuned") == line(trained.out, "tuned").rpartition(",")[0]
    assert line(evaluated, "off") == line(trained.out, "off").partition(" (")[0]


def test_the_same_command_twice_writes_the_same_bits(files, run, tmp_path):
    assert train(files, tmp_path / "again") == 0
    first, again = (json.loads((out / "result.json").read_text()) for out in (run, tmp_path / "again"))
    assert first["bits_sha256"] == again["bits_sha256"] and first["metrics"] == again["metrics"]
    assert train(files, tmp_path / "other", "--seed", "2") == 0
    assert json.loads((tmp_path / "other" / "result.json").read_text())["bits_sha256"] != first["bits_sha256"]


def test_eval_per_class_and_on_other_data(files, run, tmp_path, capsys):
    tiny.splits(tmp_path / "other", train=1, test=2)
    assert main(["eval", str(run), "--data", str(tmp_path / "other"), "--per-class"]) == 0
    out = capsys.readouterr().out
    assert "of 8" in line(out, "tuned") and sum(name in out for name in tiny.COLOURS) == 4


def test_epochs_all_shots_and_other_targets(files, tmp_path, capsys):
    root, model = files
    flags = ["--shots", "all", "--epochs", "1", "--targets", "rmmt", "--image-size", "16", "--batch", "16"]
    command = ["train", "--model", model, "--data", str(root / "data"), "--out", str(tmp_path / "run")]
    assert main([*command, *flags]) == 0
    printed = capsys.readouterr()
    assert "masks      4 tensors" in printed.out and "32 images, 4 classes, 2 steps of 16" in printed.out
    assert "rmt: warning: no mask can flip" in printed.err and "off        0.00 %" in printed.out
    assert main(["eval", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "/nowhere"], "data must be a folder, got '/nowhere', which is missing"),
        (["--model", "local-dir:/nowhere"], "open_clip cannot load 'local-dir:/nowhere'"),
        (["--model", "ViT-B-32"], "pretrained must be a tag or a file"),
        (["--template", "a photo"], "template must be a text with one {}"),
        (["--strength", "2"], "strength must be a number from 0 to 1, got 2.0"),
        (["--targets", "bias"], "targets must be some of attention, mlp, conv"),
        (["--device", "gpu"], "device must be auto, cpu or a device of this machine, got 'gpu'"),
        (["--shots", "0"], "shots must be an integer of at least 1, or None, got 0"),
        (["--init", "0.001"], "init must be a finite number above threshold"),
        (["--image-size", "4"], ""),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(files, tmp_path, capsys, flags, message):
    assert train(files, tmp_path / "run", *flags) == 2
    printed = capsys.readouterr()
    errors = [text for text in printed.err.splitlines() if "warning" not in text]
    assert len(errors) == 1 and errors[0].startswith("rmt: error: ") and message in errors[0]
    assert not (tmp_path / "run").exists()


def test_train_keeps_an_earlier_runs_task(files, run, capsys):
    before = (run / "task.safetensors").read_bytes()
    assert train(files, run) == 2
    assert "holds the task file of an earlier run" in capsys.readouterr().err
    assert (run / "task.safetensors").read_bytes() == before


def test_eval_refuses_what_does_not_fit(files, run, tmp_path, capsys):
    assert main(["eval", str(tmp_path)]) == 2
    assert "lacks the first" in capsys.readouterr().err
    tiny.splits(tmp_path / "d", 2, 2)
    for part in ("train", "test"):
        (tmp_path / "d" / part / "blue sky").rename(tmp_path / "d" / part / "sky")
    assert main(["eval", str(run), "--data", str(tmp_path / "d")]) == 2
    assert "must have the task's classes" in capsys.readouterr().err
    other = tmp_path / "run"
    other.mkdir()
    config = json.loads((run / "config.json").read_text()) | {"model": tiny.model_folder(tmp_path / "m", seed=9)}
    (other / "config.json").write_text(json.dumps(config))
    (other / "task.safetensors").write_bytes((run / "task.safetensors").read_bytes())
    assert main(["eval", str(other)]) == 2
    assert "is for another model: expected base weights with sha256" in capsys.readouterr().err


def test_an_unreadable_test_image_is_named(files, run, tmp_path, capsys):
    tiny.splits(tmp_path / "d", 1, 2)
    (tmp_path / "d" / "test" / "red ball" / "001.png").write_bytes(b"junk")
    assert main(["eval", str(run), "--data", str(tmp_path / "d")]) == 2
    assert "test/red ball/001.png cannot be read as an image" in capsys.readouterr().err


def test_version_and_usage(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"rmt {rmt.__version__}\n"
    with pytest.raises(SystemExit) as done:
        main([])
    assert done.value.code == 2


@pytest.mark.skipif(not tiny.SHARED.exists(), reason=f"needs the real model and images of {tiny.SHARED}")
def test_the_main_job_on_real_images(tmp_path):
    """Through the shell, on a pretrained model at 112 px: the masks beat zero-shot on images that they never saw."""
    real, data = tiny.SHARED / "folders" / "pacs_photo", tmp_path / "data"
    for folder in sorted(real.glob("t*/*")):
        # All of train; 8 images a class of test, to save time.
        files = sorted(folder.iterdir())[: 8 if folder.parent.name == "test" else None]
        (data / folder.relative_to(real)).mkdir(parents=True)
        for file in files:
            (data / file.relative_to(real)).symlink_to(file)
    flags = ["--image-size", "112", "--steps", "15", "--lr", "8e-4", "--log-every", "5", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "rmt.cli", "train", "--model", f"local-dir:{tiny.SHARED}/weights/deit_ti16_lit"]
    command += ["--data", str(data), "--template", "a photo of a {}.", "--shots", "16", *flags]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(Path(rmt.__file__).parents[1])})
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0.1 < result["percent_off"] < 50
    assert result["metrics"]["acc1"] > result["zero_shot"]["acc1"] + 10
