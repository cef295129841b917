import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import rmt
from rmt import cli, commands, demo
from rmt.cli import expand, main
from rmt.config import from_yaml
from rmt.failures import FAILURES

# Without L2: at random weights the task gradient is so small that its pull alone would switch everything off.
QUICK = ["--lr", "2e-3", "--steps", "6", "--batch", "8", "--l2", "0", "--log-every", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a model and images; the model's name."""
    root = tmp_path_factory.mktemp("files")
    tiny.splits(root / "data")
    return root, tiny.model_folder(root / "model")


def train(files, out, *flags):
    root, model = files
    fixed = ["--model", model, "--data", str(root / "data"), "--shots", "4", "--out", str(out)]
    return main(["train", *fixed, *QUICK, *flags])


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    assert train(files, out) == 0
    return out


def line(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def result(folder):
    return json.loads((folder / "result.json").read_text())


def error(capsys):
    """The one line that an error is."""
    lines = [text for text in capsys.readouterr().err.splitlines() if "warning" not in text]
    assert len(lines) == 1 and lines[0].startswith("rmt: error: "), lines
    return lines[0].removeprefix("rmt: error: ")


def test_short_cuts_are_written_out():
    assert expand(["--lr", "4e-4", "--image-size=8", "--log-every", "2", "pos"]) == [
        "--train.lr", "4e-4", "--image_size=8", "--train.log_every", "2", "pos",
    ]  # fmt: skip
    assert expand(["--targets", "attention,mlp"]) == expand(["--mask.targets", "attention", "mlp"])
    assert expand(["--targets", "a,b"]) == ["--mask.targets", '["a","b"]'] == expand(["--mask.targets=a,b"])
    assert expand(["--modules", "*.qkv", "--seed", "3"]) == ["--mask.modules", '["*.qkv"]', "--seed", "3"]
    assert expand(["--shots", "1", "4", "all", "--out", "x"]) == ["--shots", '[1,4,"all"]', "--out", "x"]
    assert expand(["--shots", "4", "--seeds", "2"]) == ["--shots", "4", "--seeds", "[2]"]
    assert expand(["--mask.targets", "[attention]"]) == ["--mask.targets", "[attention]"]
    assert expand(["--targets", "null", "--shots"]) == ["--mask.targets", "null", "--shots"]
    fields = [f.name for f in dataclasses.fields(rmt.config.RunConfig)]
    parts = sum(len(dataclasses.fields(getattr(rmt.config, f"{p}Config"))) for p in ("Mask", "Select", "Train"))
    assert len(cli.SHORT) == parts and not set(cli.SHORT) & set(fields), "a short name must mean one thing"


def test_train_prints_and_writes_and_eval_says_the_same(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(files, out, "--template", "a toy {}.") == 0
    trained, measured = capsys.readouterr(), result(out)
    correct = round(measured["metrics"]["acc1"] * 24 / 100)
    assert line(trained.out, "tuned").startswith(f"tuned      {measured['metrics']['acc1']:.2f} % ({correct} of 24")
    assert "step 3/6" in trained.out and "step 6/6" in trained.out and measured["off"] > 0
    config = from_yaml((out / "config.yaml").read_text())
    assert (config.template, config.train.lr, config.shots, config.train.steps) == ("a toy {}.", 2e-3, 4, 6)
    assert main(["eval", str(out), "--per-class"]) == 0
    printed = capsys.readouterr().out
    assert line(printed, "accuracy") == f"accuracy   {measured['metrics']['acc1']:.2f} % of 24 test images"
    assert line(printed, "off") == f"off        {measured['percent_off']:.2f} %"
    assert sum(name in printed for name in tiny.COLOURS) == 4
    assert main(["eval", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name, key in {"acc1": "acc1", "mean_per_class": "mean_per_class_recall", "macro_f1": "macro_f1"}.items():
        assert found[name] == measured["metrics"][key]
    assert found["mask_sha"] == measured["bits_sha256"] and found["n"] == 24 and found["split"] == "test"
    assert {"ece", "indices_sha", "env"} <= set(found) and "torch" in found["env"]


def test_a_runs_config_runs_it_again(run, tmp_path, capsys):
    assert main(["train", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    first, again = result(run), result(tmp_path / "again")
    assert first["bits_sha256"] == again["bits_sha256"] and first["metrics"] == again["metrics"]
    assert main(["train", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "new"), "--seed", "2"]) == 0
    assert result(tmp_path / "new")["bits_sha256"] != first["bits_sha256"]


def test_print_config_is_a_config(files, tmp_path, capsys):
    root, model = files
    command = ["train", "--model", model, "--data", str(root / "data"), "--train.lr", "2e-3", "--steps", "6"]
    with pytest.raises(SystemExit) as done:
        main([*command, "--targets", "mlp", "--device", "cpu", "--print_config"])
    assert done.value.code == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--shots", "2", "--out", str(tmp_path / "run")]) == 0
    config = from_yaml((tmp_path / "run" / "config.yaml").read_text())
    assert config.mask.targets == ("mlp",) and config.train.lr == 2e-3 and config.shots == 2


def test_the_same_command_again_reads_the_run_back(files, run, capsys):
    before = (run / "result.json").read_bytes()
    assert train(files, run) == 0 and "is read back" in capsys.readouterr().out
    assert train(files, run, "--seed", "5") == 2 and "holds a run that differs in ['seed']" in error(capsys)
    assert (run / "result.json").read_bytes() == before


def test_several_shots_or_seeds_make_a_table(files, tmp_path, capsys):
    assert train(files, tmp_path / "grid", "--shots", "1", "2", "--seeds", "1", "2") == 0
    table = json.loads((tmp_path / "grid" / "table.json").read_text())
    assert [row["shots"] for row in table["rows"]] == [1, 2] and table["rows"][0]["seeds"] == [1, 2]
    assert (tmp_path / "grid" / "shots2" / "seed1" / "result.json").is_file()
    assert "±" in capsys.readouterr().out
    (tmp_path / "grid" / "shots1" / "seed2" / "config.yaml").write_text("model: x:y\ndata: z\n")
    assert train(files, tmp_path / "grid", "--shots", "1", "2", "--seeds", "1", "2") == 2
    assert "1 failed, the others are done: " in error(capsys)


def test_b2n(files, tmp_path, capsys):
    root, model = files
    command = ["b2n", "--model", model, "--data", str(root / "data"), "--shots", "2", "--out", str(tmp_path / "b2n")]
    assert main([*command, *QUICK, "--seeds", "1", "2"]) == 0
    table = json.loads((tmp_path / "b2n" / "table.json").read_text())
    assert list(table["seeds"]) == ["1", "2"] and set(table["rows"]) == {"zero_shot", "tuned"}
    assert "H of the means" in capsys.readouterr().out
    assert main([*command, *QUICK, "--shots", "1", "2"]) == 2
    assert "b2n needs one number of shots" in error(capsys)
    # Nothing would look at it.
    for one in (["b2n"], ["compare"], ["ablate", "l2"]):
        assert main([*one, *command[1:], "--seed", "7"]) == 2
        assert "--seed is one run's, and there are several here: give --seeds 7" in error(capsys)


def test_eval_on_other_images_of_the_same_classes(run, tmp_path, capsys):
    tiny.splits(tmp_path / "other", train=1, test=2)
    assert main(["eval", str(run), "--data", str(tmp_path / "other"), "--split", "test"]) == 0
    assert "% of 8 test images" in capsys.readouterr().out
    assert main(["eval", str(run), "--data", str(tmp_path / "other"), "--split", "train"]) == 0
    assert "% of 4 train images" in capsys.readouterr().out


def test_all_shots_epochs_and_dotted_overrides(files, tmp_path, capsys):
    root, model = files
    command = ["train", "--model", model, "--data", str(root / "data"), "--out", str(tmp_path / "run")]
    flags = ["--shots", "all", "--train.epochs", "1", "--mask.targets", "[mlp]", "--image-size", "16", "--batch", "16"]
    assert main([*command, *flags, "--schedule", "paper", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "32 images, 4 classes, 2 steps of 16" in printed and "no mask can flip" in printed
    assert result(tmp_path / "run")["off"] == 0


def test_a_task_that_was_shared_is_measured_on_data_of_ones_own(files, run, capsys):
    root, _ = files
    assert main(["eval", str(run / "task"), "--data", str(root / "data"), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["acc1"] == result(run)["metrics"]["acc1"] and found["mask_sha"] == result(run)["bits_sha256"]
    assert main(["eval", str(run / "task"), "--device", "cpu"]) == 2
    assert "a run needs data, or root and dataset" in error(capsys)


def test_select_shows_and_train_scores_what_a_criterion_chooses(files, tmp_path, capsys):
    root, model = files
    command = ["--model", model, "--data", str(root / "data"), "--shots", "2", *QUICK]
    assert main(["select", *command, "--criterion", "magnitude", "--budget", "0.25"]) == 0
    shown = capsys.readouterr().out
    assert "criterion magnitude, budget 0.25" in shown and "visual.conv1.weight" in shown
    out = tmp_path / "run"
    assert main(["train", *command, "--criterion", "magnitude", "--budget", "0.25", "--out", str(out)]) == 0
    assert shown.strip() in capsys.readouterr().out
    candidates = 64 * 192 + 2 * (192 * 64 + 64 * 64)
    assert result(out)["scored"] == 0.25 * candidates < result(out)["masked"]
    assert main(["eval", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["acc1"] == result(out)["metrics"]["acc1"]
    assert main(["select", *command]) == 2
    assert "select needs --criterion, one of magnitude" in error(capsys)


def test_inspect_and_diff(files, run, tmp_path, capsys):
    assert main(["inspect", str(run)]) == 0
    printed = capsys.readouterr().out
    assert result(run)["bits_sha256"] in printed and "visual.conv1.weight" in printed
    assert main(["inspect", str(run / "task"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["masks"]
    assert rows[-1]["off"] == result(run)["off"] and len(rows) == 6
    assert main(["diff", str(run), str(run / "task"), "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["masks"][-1]
    assert total["both"] == result(run)["off"] and total["jaccard"] == 1
    assert main(["diff", str(run), str(run)]) == 0 and "jaccard" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 2 and "expected a task folder" in error(capsys)


def test_merge_writes_a_model_that_measures_the_same(files, run, tmp_path, capsys):
    root, _ = files
    out = tmp_path / "merged"
    assert main(["merge", str(run), "--out", str(out)]) == 0
    assert f"local-dir:{out}, equal to the masked model bit for bit" in capsys.readouterr().out
    again = ["train", "--model", f"local-dir:{out}", "--data", str(root / "data"), "--shots", "1", "--out"]
    assert main([*again, str(tmp_path / "run"), *QUICK]) == 0
    assert result(tmp_path / "run")["zero_shot"]["acc1"] == result(run)["metrics"]["acc1"]
    assert main(["merge", str(run), "--out", str(out)]) == 2
    assert "out must be a new folder, or an empty one" in error(capsys)


def test_convert_there_and_back(files, run, tmp_path, capsys):
    root, model = files
    file, out = tmp_path / "model.pth.tar-30", tmp_path / "run"
    assert main(["convert", "to-official", str(run), "--out", str(file)]) == 0
    command = ["convert", "from-official", str(file), "--model", model, "--data", str(root / "data"), "--device", "cpu"]
    assert main([*command, "--out", str(out)]) == 0
    assert "5 masks after 30 epochs" in capsys.readouterr().out
    assert main(["eval", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mask_sha"] == result(run)["bits_sha256"] and found["acc1"] == result(run)["metrics"]["acc1"]
    assert main([*command, "--out", str(out)]) == 2 and "holds a run" in error(capsys)
    assert main([*command, "--targets", "mlp", "--out", str(tmp_path / "other")]) == 2
    assert "must have the model's 4 masks" in error(capsys) and not (tmp_path / "other").exists()


def test_xd_needs_a_root_and_reports_what_failed(run, tmp_path, capsys):
    assert main(["xd", str(run), "--datasets", "dtd"]) == 2
    assert "xd needs --root" in error(capsys)
    tiny.images(tmp_path / "dtd" / "images", 3, seed=5)
    rows = [["red ball/000.png", 0, "red ball"], ["blue sky/001.png", 1, "blue sky"]]
    split = {"train": rows, "val": rows, "test": rows}
    (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").write_text(json.dumps(split))
    assert main(["xd", str(run), "--datasets", "dtd", "eurosat", "--root", str(tmp_path)]) == 2
    assert "1 failed, the others are done: " in error(capsys)
    assert json.loads((run / "xd" / "table.json").read_text())["rows"]["dtd"]["n"] == 2
    assert main(["xd", str(run), "--datasets", "dtd", "--root", str(tmp_path)]) == 0


def test_data_list_and_check(tmp_path, capsys):
    assert main(["data", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(key in printed for key in ("caltech101", "imagenet_r", "ucf101"))
    assert main(["data", "list", "--json"]) == 0 and len(json.loads(capsys.readouterr().out)) == 15
    assert main(["data", "check", "--root", str(tmp_path), "--dataset", "dtd", "eurosat"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].split()[:2] == ["dtd", "problem"] and str(tmp_path) in lines[0]
    assert main(["data", "check", "--root", str(tmp_path), "--dataset", "cats"]) == 2
    assert "cats" in error(capsys)


@pytest.mark.skipif(not tiny.SHARED.exists(), reason=f"needs Caltech101 under {tiny.SHARED}")
def test_data_check_of_a_whole_data_set(capsys):
    assert main(["data", "check", "--root", str(tiny.SHARED / "coop"), "--dataset", "caltech101"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["caltech101", "ok"]


def test_report_writes_one_page(run, tmp_path, capsys):
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert result(run)["bits_sha256"] in page and page.startswith("<!doctype html>")
    assert main(["report", str(tmp_path)]) == 2 and "a report needs a finished run" in error(capsys)


def test_demo(tmp_path, capsys, monkeypatch):
    """Only what it is called with: tests/rmt/test_demo.py runs it."""
    called = []
    real = inspect.signature(demo.demo)
    monkeypatch.setattr(demo, "demo", lambda *args: called.append(real.bind(*args).arguments))
    assert main(["demo", "--out", str(tmp_path / "x"), "--seed", "3", "--quick"]) == 0
    assert main(["demo"]) == 0
    assert called[0] == {"out": str(tmp_path / "x"), "seed": 3, "quick": True}
    assert called[1] == {"out": "rmt_demo", "seed": 1, "quick": False}
    monkeypatch.undo()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "full")]) == 2
    assert "out must be a new or an empty folder" in error(capsys)


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


MISTAKES = [
    (["--data", "/nowhere"], "/nowhere"),
    (["--model", "local-dir:/nowhere"], "open_clip cannot load 'local-dir:/nowhere'"),
    (["--model", "ViT-B-32"], "pretrained must be a tag or a file"),
    (["--template", "a photo"], "template must be a text with one {} for the class name, got 'a photo'"),
    (["--strength", "2"], "strength must be a number from 0 to 1, or None, got 2.0"),
    (["--targets", "bias"], "targets must be some of attention, mlp, conv, got ('bias',)"),
    (["--device", "gpu"], "device must be auto, cpu or a device of this machine, got 'gpu'"),
    (["--shots", "0"], "shots must be an integer of at least 1, or all, got 0"),
    (["--shots", "some"], "--shots must be an integer or all"),
    (["--shots", "1", "0"], "shots must be an integer of at least 1, or all, got 0"),
    (["--init", "0.001"], "init must be a finite number above threshold"),
    (["--lr", "fast"], "--train.lr must be a number, got 'fast'"),
    (["--train.schedule", "never"], "--train.schedule must be auto or paper, got 'never'"),
    (["--seed", "1.5"], "--seed must be an integer, got '1.5'"),
    (["--epochs", "3"], "epochs or steps must be given, not both, got 3 and 6"),
    (["--batches", "0"], "batches must be an integer of at least 1, got 0"),
    (["--criterion", "guess"], "criterion must be one of magnitude"),
    (["--image-size", "4"], ""),
    (["--root", "/x", "--dataset", "dtd"], "a run needs data, or root and dataset, got {"),
    (["--data", "null", "--root", "/nowhere", "--dataset", "dtd"], "/nowhere"),
    (["--data", "null", "--root", "/", "--dataset", "cats"], "'cats'"),
    (["--strenght", "1"], "unrecognized arguments: --strenght 1: did you mean --strength?"),
    (["--train.bogus", "1"], "unrecognized arguments: --train.bogus 1"),
    (["--lr"], "--train.lr: expected one argument"),
    (["--protocol", "tip"], "protocol must be coop"),
    (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
    (["--classes", "old"], "--classes must be all or base or new, got 'old'"),
]


@pytest.mark.parametrize("flags, message", MISTAKES, ids=[" ".join(flags) for flags, _ in MISTAKES])
def test_a_users_mistake_is_one_line_and_status_2(files, tmp_path, capsys, flags, message):
    assert train(files, tmp_path / "run", *flags) == 2
    assert message in error(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: [", "Problems parsing config"),
        ("- a\n", "Unexpected config"),
        ("bogus: 1\n", "'bogus' is not accepted"),
        ("train: {bogus: 1}\n", "Group 'train' does not accept option 'bogus'"),
        ("train: 3\n", "config.train must be an object"),
        ("train: {lr: fast}\n", "--train.lr must be a number, got 'fast'"),
    ],
)
def test_a_bad_config_file_is_one_line(files, tmp_path, capsys, text, message):
    root, model = files
    (tmp_path / "c.yaml").write_text(text)
    command = ["train", "--model", model, "--data", str(root / "data"), "--out", str(tmp_path / "run")]
    assert main([*command, "--config", str(tmp_path / "c.yaml")]) == 2
    assert message in error(capsys) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["tran"], "there is no command 'tran': did you mean train?"),
        (["data"], "there is no command 'data': did you mean data list or data check?"),
        (["data", "lost"], "there is no command 'data lost': did you mean data list or data check?"),
        (["what"], "there is no command 'what', one of train, "),
        (["eval"], "rmt eval: RUN must be given"),
        (["eval", "/nowhere"], "expected a run folder with config.yaml and task/, got '/nowhere' without it"),
        (["train"], "rmt train: --model, --out must be given"),
        (["eval", "x", "--split", "best"], "--split must be test or val or train, got 'best'"),
    ],
)
def test_a_bad_command_line_is_one_line(capsys, argv, message):
    assert main(argv) == 2
    assert message in error(capsys)


def test_data_that_does_not_fit_is_named(files, run, tmp_path, capsys):
    for part in ("train", "test"):
        tiny.splits(tmp_path / "d", 2, 2) if part == "train" else None
        (tmp_path / "d" / part / "blue sky").rename(tmp_path / "d" / part / "sky")
    assert main(["eval", str(run), "--data", str(tmp_path / "d")]) == 2
    assert "must have the task's 4 classes; the two differ in ['blue sky', 'sky']" in error(capsys)
    tiny.splits(tmp_path / "e", 1, 2)
    (tmp_path / "e" / "test" / "red ball" / "001.png").write_bytes(b"junk")
    assert main(["eval", str(run), "--data", str(tmp_path / "e")]) == 2
    assert "test/red ball/001.png cannot be read as an image" in error(capsys)
    assert main(["eval", str(run), "--data", str(tmp_path / "e"), "--split", "val"]) == 2
    assert "at least one image, got none" in error(capsys)


def copy(run, out, **changed):
    """A run folder of `run`'s config and task, with some fields changed."""
    import yaml

    (out / "task").mkdir(parents=True)
    values = yaml.safe_load((run / "config.yaml").read_text()) | changed
    (out / "config.yaml").write_text(yaml.safe_dump(values))
    (out / "task" / "mask.safetensors").write_bytes((run / "task" / "mask.safetensors").read_bytes())
    return out


def test_a_task_that_is_damaged_or_for_another_model_is_refused(run, tmp_path, capsys):
    bad = copy(run, tmp_path / "bad")
    data = (bad / "task" / "mask.safetensors").read_bytes()
    (bad / "task" / "mask.safetensors").write_bytes(data[:-100])
    assert main(["eval", str(bad)]) == 2
    assert "mask.safetensors is no task file, or is damaged" in error(capsys)
    other = copy(run, tmp_path / "other", model=tiny.model_folder(tmp_path / "m", seed=9))
    assert main(["eval", str(other)]) == 2
    assert "is for another model: expected base weights with sha256" in error(capsys)
    assert main(["eval", str(other), "--allow-base-mismatch"]) == 0


def test_a_full_disk_is_one_line(files, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "RUN/task/mask.safetensors")

    monkeypatch.setattr("rmt.run.save_task", full)
    assert train(files, tmp_path / "run") == 2
    assert error(capsys) == "[Errno 28] No space left on device: 'RUN/task/mask.safetensors'"
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("kind", FAILURES)
def test_what_the_user_can_mend_is_one_line_and_a_fault_of_ours_is_not(monkeypatch, capsys, kind):
    def call(args, fault=kind):
        raise fault("two\n  lines")

    monkeypatch.setitem(commands.COMMANDS, "doctor", commands.COMMANDS["doctor"]._replace(call=call))
    assert main(["doctor"]) == 2 and error(capsys) == "two lines"
    faulty = commands.COMMANDS["doctor"]._replace(call=lambda args: call(args, KeyError))
    monkeypatch.setitem(commands.COMMANDS, "doctor", faulty)
    with pytest.raises(KeyError):
        main(["doctor"])


def test_ctrl_c_ends_with_130_and_one_line_and_the_run_goes_on(files, run, tmp_path, capsys, monkeypatch):
    real, calls = rmt.step.gradients, []

    def gradients(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr("rmt.step.gradients", gradients)
    assert train(files, tmp_path / "run") == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["rmt: stopped; what is finished is kept, and the same command goes on from there"]
    assert train(files, tmp_path / "run") == 0
    assert result(tmp_path / "run")["bits_sha256"] == result(run)["bits_sha256"]


def test_version_usage_and_help(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"rmt {rmt.__version__}\n"
    assert main([]) == 2 and "usage: rmt COMMAND" in capsys.readouterr().err
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in commands.COMMANDS)
    for name in commands.COMMANDS:
        with pytest.raises(SystemExit) as done:
            main([*name.split(), "--help"])
        assert done.value.code == 0 and f"usage: rmt {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_option_has_a_help_text(name):
    bare = [a.dest for a in commands.COMMANDS[name].parser(name)._actions if not a.help]
    assert not bare


def test_the_version_and_the_package_need_no_parser():
    code = (
        "import sys, rmt.cli; rmt.cli.main(['--version'])\n"
        "print(sorted({'jsonargparse', 'open_clip', 'PIL', 'yaml', 'rich', 'sklearn'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(rmt.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"rmt {rmt.__version__}\n[]\n"


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
    command += ["--data", str(data), "--shots", "16", *flags]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(Path(rmt.__file__).parents[1])})
    measured = result(tmp_path / "run")
    assert 0.1 < measured["percent_off"] < 50
    assert measured["metrics"]["acc1"] > measured["zero_shot"]["acc1"] + 10
