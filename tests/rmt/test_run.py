import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

import rmt.run
from rmt.checkpoint import load_task
from rmt.config import RunConfig, SelectConfig, TrainConfig, UserError, from_yaml
from rmt.run import run

SHORT = TrainConfig(lr=2e-3, steps=12, batch=8, strength=1.0, log_every=2, save_every=0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    tiny.splits(root / "data")
    return RunConfig(tiny.model_folder(root / "model"), data=str(root / "data"), shots=4, train=SHORT)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    return out, run(config, out)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(result):
    """What two runs of one config must agree in."""
    return {k: result[k] for k in ("metrics", "zero_shot", "off", "per_layer", "bits_sha256", "indices_sha256")}


def test_a_run_folder_holds_what_it_should(config, finished):
    out, result = finished
    names = {"config.yaml", "fewshot.json", "metrics.jsonl", "result.json", "last.pt", "task"}
    assert {p.name for p in out.iterdir()} == names and {p.name for p in (out / "task").iterdir()} == {
        "mask.safetensors", "README.md",
    }  # fmt: skip
    assert from_yaml((out / "config.yaml").read_text()) == config
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    assert [row["step"] for row in rows(out)] == [2, 4, 6, 8, 10, 12]
    assert rows(out)[-1]["percent_off"] == pytest.approx(result["percent_off"]) and result["off"] > 0
    assert sum(map(sum, result["confusion"])) == 24
    hits = sum(result["confusion"][c][c] for c in range(4))
    assert result["metrics"]["acc1"] == pytest.approx(100 * hits / 24)
    assert sum(off for _, off, _ in result["per_layer"]) == result["off"]
    assert load_task(out / "task").bits_sha256 == result["bits_sha256"]
    assert (out / "last.pt").stat().st_size > 3 * result["task_bytes"], "moments belong into the resume file alone"
    assert len(json.loads((out / "fewshot.json").read_text())["train"]) == 16


def test_the_same_config_gives_the_same_bits(config, finished, tmp_path):
    assert same(run(config, tmp_path / "again")) == same(finished[1])
    assert same(run(replace(config, seed=2), tmp_path / "other"))["bits_sha256"] != finished[1]["bits_sha256"]


def test_a_finished_run_is_read_back_and_another_one_is_refused(config, finished, capsys, monkeypatch):
    out, result = finished
    monkeypatch.setattr(rmt.run, "prepare", lambda *args: pytest.fail("a finished run must not load a model"))
    assert run(config, out) == json.loads(json.dumps(result)) and "is read back" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds a run that differs in \['shots', 'seed'\]"):
        run(replace(config, shots=2, seed=5), out)


def wait_for(condition, process):
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


class Killed(Exception):
    pass


def killed(config, out):
    """A run that ends in its fourth step, its resume file of the third."""

    def log(file, advance, row):
        if row["step"] == 4:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(rmt.run, "_log", log)
        run(config, out)


def other_weights(root):
    shutil.rmtree(root / "model")
    tiny.model_folder(root / "model", seed=1)


def other_pixels(root):
    """Under the same names: within a class, so that labels stay."""
    for folder in (root / "data" / "train").iterdir():
        first, *_, last = sorted(folder.iterdir())
        a, b = first.read_bytes(), last.read_bytes()
        first.write_bytes(b), last.write_bytes(a)


def other_labels(root):
    path = root / "data.csv"
    path.write_text(path.read_text().replace(",0,", ",x,").replace(",1,", ",0,").replace(",x,", ",1,"))


def other_names(root):
    path = root / "data.csv"
    path.write_text(path.read_text().replace(",blue sky,", ",grey sky,"))


@pytest.mark.parametrize(
    "change, what",
    [(other_weights, "weights"), (other_pixels, "contents"), (other_labels, "contents"), (other_names, "classes")],
)
def test_a_killed_run_does_not_go_on_with_other_weights_images_or_classes(tmp_path, capsys, change, what):
    data = tiny.splits(tmp_path / "data", train=2, test=2)
    if change in (other_labels, other_names):
        rows = [
            (path.relative_to(tmp_path), path.parent.name, n, part)
            for part in ("train", "test") for n, folder in enumerate(sorted((data / part).iterdir()))
            for path in sorted(folder.iterdir())
        ]  # fmt: skip
        data = tmp_path / "data.csv"
        data.write_text("\n".join(["path,classname,label,split", *(",".join(map(str, row)) for row in rows)]) + "\n")
    train = replace(SHORT, steps=6)
    config = RunConfig(tiny.model_folder(tmp_path / "model"), data=str(data), shots=2, device="cpu", train=train)
    killed(config, tmp_path / "run")
    change(tmp_path)
    with pytest.raises(UserError, match=rf"last\.pt is another run's: {what} was '\w{{12}}', now it is '\w{{12}}'"):
        run(config, tmp_path / "run")
    # A file from before these were kept says nothing of them.
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    for name in ("weights", "contents", "classes"):
        del state["fingerprint"][name]
    torch.save(state, tmp_path / "run" / "last.pt")
    run(config, tmp_path / "run")
    assert "resume     from step 3 of 6" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [1, 7])
def test_a_run_killed_by_the_system_goes_on_to_the_same_bits(config, finished, tmp_path, capsys, steps):
    """SIGKILL, which no process can catch, after some steps, wherever it hits."""
    out = tmp_path / "run"
    code = (
        "from rmt.config import from_yaml; from rmt.run import run\n"
        f"run(from_yaml(open({str(finished[0] / 'config.yaml')!r}).read()), {str(out)!r})"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(rmt.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    metrics = out / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) * 2 >= steps, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "result.json").exists() and not [p for p in out.iterdir() if p.name.startswith(".")][1:]
    result = run(config, out)
    assert "resume     from step" in capsys.readouterr().out
    assert same(result) == same(finished[1])
    assert rows(out) == rows(finished[0])


def test_a_full_disk_leaves_the_last_whole_resume_file(config, finished, tmp_path, monkeypatch):
    out, write = tmp_path / "run", rmt.resume.write_whole

    def full(path, data):
        if len(rows(out)) >= 3:
            raise OSError(28, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(rmt.resume, "write_whole", full)
    with pytest.raises(OSError, match=r"No space left on device: .*last\.pt"):
        run(config, out)
    monkeypatch.undo()
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 5
    assert same(run(config, out)) == same(finished[1])


def test_a_selection_trains_the_selected_weights_alone(config, tmp_path, capsys):
    chosen = replace(config, select=SelectConfig("taylor", budget=0.05, batches=2))
    result = run(chosen, tmp_path / "run")
    assert result["scored"] == round(0.05 * result["masked"]) and 0 < result["off"] <= result["scored"]
    assert "visual.conv1.weight" in capsys.readouterr().out
    whole = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert sum(s.numel() for s in whole["scores"].values()) == result["scored"]


def test_the_paper_schedule_is_kept_and_auto_stretches(config, tmp_path, capsys):
    short = replace(config, train=TrainConfig(lr=8e-5, batch=8, schedule="paper", log_every=99))
    assert run(short, tmp_path / "paper")["percent_off"] == 0
    assert "schedule   no mask can flip in 60 steps" in capsys.readouterr().out
    auto = replace(config, train=TrainConfig(lr=4e-3, batch=16, log_every=99))
    assert run(replace(auto, mask=replace(config.mask, init=9e-2)), tmp_path / "auto")["percent_off"] > 0
    assert "stretched to" in capsys.readouterr().out
