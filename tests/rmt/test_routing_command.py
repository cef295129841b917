"""rmt route train and rmt route eval: files, the way back in, what is printed, what is refused."""

import json
import re
import shutil

import pytest
import text_tools
import tiny
import torch
from safetensors.torch import load_file

from rmt import clip
from rmt.cli import main
from rmt.config import UserError
from rmt.routing import load_routed, train

QUICK = ["--r", "4", "--steps", "6", "--batch", "8", "--lr", "3e-2", "--log-every", "2", "--length", "8"]
QUICK += ["--device", "cpu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder of captions; the model's name."""
    root = tmp_path_factory.mktemp("files")
    return text_tools.captions(root / "captions"), text_tools.coca_folder(root / "model")


def command(files, out, *flags):
    return ["route", "train", "--model", files[1], "--captions", str(files[0]), "--out", str(out), *QUICK, *flags]


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    assert main(command(files, out, "--generate", "2")) == 0
    return out


def result(folder):
    return json.loads((folder / "result.json").read_text())


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_run_folder(run, files, capsys):
    assert sorted(path.name for path in run.iterdir()) == [
        "before.json", "config.yaml", "last.pt", "metrics.jsonl", "result.json", "routed",
    ]  # fmt: skip
    found = result(run)
    assert found["after"]["loss"] < found["before"]["loss"] and found["before"]["tokens"] == 132
    assert (found["split"], found["images"], found["steps"], found["captioned"]) == ("val", 12, 6, 2)
    assert [row["step"] for row in metrics(run)] == [2, 4, 6] and {"lr", "loss", "grad_norm"} < set(metrics(run)[0])
    assert len(found["examples"]) == 2 and found["examples"][0]["reference"] == "A red wall ."
    assert "not PTB" in found["tokenizer"] and 0 <= found["captions"]["CIDEr"] <= 10
    # What was saved gives what was measured, and eval on that part says the same.
    capsys.readouterr()
    assert main(["route", "eval", str(run), "--split", "val", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["loss"] == pytest.approx(found["after"]["loss"], rel=1e-6) and again["examples"] == found["examples"]
    assert main(["route", "eval", str(run), "--limit", "2", "--generate", "1"]) == 0
    printed = capsys.readouterr().out
    assert "on 2 test images" in printed and "(1 images; words by rmt's own" in printed and "a reference:" in printed


def test_the_same_command_again_and_another(run, files, tmp_path, capsys):
    assert main(command(files, run, "--generate", "2")) == 0 and "is read back" in capsys.readouterr().out
    assert main(command(files, run)) == 2
    assert "holds a run that differs in ['generate']" in capsys.readouterr().err
    assert main(["route", "train", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert result(tmp_path / "again")["routed_sha256"] == result(run)["routed_sha256"]
    both = ["--config", str(run / "config.yaml"), "--epochs", "3"]
    assert main(["route", "train", *both, "--out", str(tmp_path / "both")]) == 2
    assert "--epochs or steps must be given, not both, got 3 and 6" in capsys.readouterr().err
    (tmp_path / "odd.yaml").write_text("model: x\nnonsense: 3\n")
    assert main(["route", "train", "--config", str(tmp_path / "odd.yaml"), "--captions", "x", "--out", "y"]) == 2
    assert "got ['nonsense']" in capsys.readouterr().err


def test_killed_and_started_again_it_ends_with_the_same_bits(run, files, tmp_path, monkeypatch, capsys):
    out, step = tmp_path / "killed", torch.optim.AdamW.step
    flags = ["--dropout", "0.3", "--save-every", "0"]
    monkeypatch.setattr(torch.optim.AdamW, "step", text_tools.killed_at(step, 4))
    assert main(command(files, out, *flags)) == 130
    assert not (out / "result.json").exists() and not (out / "routed").exists()
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    capsys.readouterr()
    assert main(command(files, out, *flags)) == 0 and "resume     from step 3 of 6" in capsys.readouterr().out
    assert main(command(files, tmp_path / "whole", *flags)) == 0
    assert result(out)["routed_sha256"] == result(tmp_path / "whole")["routed_sha256"]
    assert metrics(out) == metrics(tmp_path / "whole")


def killed(command, monkeypatch):
    """In its fourth step, its resume file of the third."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", text_tools.killed_at(torch.optim.AdamW.step, 4))
        assert main([*command, "--save-every", "0"]) == 130
    return [*command, "--save-every", "0"]


def test_a_killed_run_does_not_go_on_from_another_host(files, tmp_path, monkeypatch, capsys):
    mine, out = (files[0], text_tools.coca_folder(tmp_path / "model")), tmp_path / "run"
    again = killed(command(mine, out), monkeypatch)
    shutil.rmtree(tmp_path / "model")
    text_tools.coca_folder(tmp_path / "model", seed=1)
    assert main(again) == 2
    assert re.search(r"before\.json is another host's: weights was '\w{12}', now it is '", capsys.readouterr().err)
    (out / "before.json").unlink()
    assert main(again) == 2
    assert re.search(r"last\.pt is another run's: weights was '\w{12}', now it is '", capsys.readouterr().err)
    # A file from before these were kept says nothing of them.
    state = torch.load(out / "last.pt", weights_only=True)
    del state["fingerprint"]["weights"]
    torch.save(state, out / "last.pt")
    before = json.loads((out / "before.json").read_text())
    del before["weights"]
    (out / "before.json").write_text(json.dumps(before))
    assert main(again) == 0 and "resume     from step 3 of 6" in capsys.readouterr().out
    assert result(out)["before"] == before


def test_a_config_is_compared_by_value(run, files, tmp_path, monkeypatch, capsys):
    values = (run / "config.yaml").read_text().replace("alpha: null", "alpha: 8")
    (tmp_path / "eight.yaml").write_text(values)
    plain = ["route", "train", "--config", str(tmp_path / "eight.yaml"), "--out", str(tmp_path / "run")]
    again = killed(plain, monkeypatch)
    capsys.readouterr()
    assert main([*again, "--alpha", "8"]) == 0 and "resume     from step 3 of 6" in capsys.readouterr().out


def test_what_was_trained_is_not_put_into_another_host(run, files, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(files[1], text_tools.coca_folder(tmp_path / "model", seed=1)))
    assert main(["route", "eval", str(copy)]) == 2
    assert "is for another host: expected weights with sha256" in capsys.readouterr().err
    model = clip.load(f"local-dir:{tmp_path / 'model'}", None, None, torch.device("cpu")).model
    names = set(model.state_dict())
    with pytest.raises(UserError, match=r"another host: expected weights with sha256 \w{12}, got \w{12}\. allow"):
        load_routed(model, copy / "routed")
    assert set(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())
    load_routed(model, copy / "routed", allow_base_mismatch=True).remove()
    # In another dtype the right weights cannot be told from others.
    load_routed(model.bfloat16(), copy / "routed").remove()
    path = copy / "routed" / "routed_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"host": {"hash": "x"}}))
    with pytest.raises(UserError, match=r"as Routed\.save writes them"):
        load_routed(model.float(), copy / "routed")
    # A file from before it was kept.
    del values["host"]
    path.write_text(json.dumps(values))
    assert main(["route", "eval", str(copy), "--limit", "2", "--generate", "0"]) == 0


def test_a_coca_without_weights_is_refused(files, tmp_path, monkeypatch, capsys):
    load = clip.load

    def bare(*args):
        loaded = load(*args)
        torch.nn.init.zeros_(loaded.model.text_decoder.text_projection)
        return loaded

    monkeypatch.setattr(clip, "load", bare)
    assert main(command(files, tmp_path / "bare")) == 2
    assert "must have weights: open_clip leaves a new CoCa's text projection at 0" in capsys.readouterr().err
    assert not (tmp_path / "bare").exists()


def test_options_reach_the_injection(files, tmp_path, capsys):
    flags = [
        "--function",
        "gram",
        "--source",
        "tokens",
        "--sites",
        "self.q",
        "cross.q",
        "--layers",
        "1",
        "--steps",
        "2",
    ]
    flags += ["--alpha", "8", "--checkpointing", "--precision", "bf16", "--clip", "1", "--limit", "4"]
    assert main(command(files, tmp_path / "lora", *flags)) == 0
    model = text_tools.coca_folder(tmp_path / "model")
    import rmt.clip

    loaded = rmt.clip.load(model, None, None, torch.device("cpu")).model
    routed = load_routed(loaded, tmp_path / "lora" / "routed")
    config = routed.config
    assert (config.function, config.source, config.sites, config.layers, config.alpha, config.r) == (
        "gram", "tokens", ("self.q", "cross.q"), (1,), 8, 4,
    )  # fmt: skip
    assert len(list(routed.named_parameters())) == 4
    others = ["--kind", "adapter", "--steps", "2", "--warmup", "0", "--train-ln"]
    assert main(command(files, tmp_path / "adapter", *others)) == 0
    assert (tmp_path / "adapter" / "routed" / "routed.safetensors").is_file()
    # LayerNorms lie beside the adapters, and are read back.
    capsys.readouterr()
    assert main(["route", "eval", str(tmp_path / "adapter"), "--split", "val", "--json"]) == 0
    loss = result(tmp_path / "adapter")["after"]["loss"]
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(loss, rel=1e-6)
    assert len(load_file(tmp_path / "adapter" / "beside.safetensors")) > 4


def test_presets_are_of_other_hosts(files, tmp_path, capsys):
    plain = command(files, tmp_path / "run")[:8]
    for preset, of in (("roberta-adapter", "--questions with"), ("gpt2-lora", "captions with")):
        assert main([*plain, "--preset", preset]) == 2
        assert f"--preset {preset} is of {of} --vision and --text, not of a CoCa" in capsys.readouterr().err
    assert train.PRESETS["gpt2-lora"] == {
        "kind": "lora", "r": 128, "alpha": 128, "lr": 3e-5, "warmup": 5000, "batch": 40, "epochs": 20,
        "couple_qv": True, "train_ln": True, "train_bias": True,
    }  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--captions", "nowhere"], "captions must be a folder, got 'nowhere', which is missing"),
        (["--function", "times"], "--function must be none or add or mul or expand or gram, got 'times'"),
        (["--r", "0"], "r must be an integer of at least 1, got 0"),
        (["--lr", "-1"], "lr must be a finite number above 0, got -1.0"),
        (["--source", "tokens"], "source tokens needs the function gram"),
        (["--layers", "7"], "layers must be from 0 to 1, got 7"),
        (["--vision", "google/vit-base-patch16-224"], "a run has one host: --model, or --vision and --text"),
        (["--beams", "2"], "--beams is of captions with --vision and --text, not of a CoCa"),
        (["--batches", "3"], "did you mean --batch"),
        (["--kind", "adapter", "--alpha", "8"], "--alpha is of --kind lora, not of adapter"),
        (["--kind", "adapter", "--dropout", "0.1"], "--dropout is of --kind lora, not of adapter"),
        (["--kind", "adapter", "--sites", "cross.q"], "--sites is of --kind lora, or of an adapter with --train-bias"),
        (["--epochs", "3"], "--epochs or steps must be given, not both, got 3 and 6"),
    ],
)
def test_mistakes_in_one_line(files, tmp_path, flags, message, capsys):
    assert main(command(files, tmp_path / "run", *flags)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert len(error) == 1 and message in error[0], error
    assert not (tmp_path / "run").exists(), "what is mended can run there"


def test_what_is_no_coca(files, tmp_path, capsys):
    clip = tiny.model_folder(tmp_path / "clip")
    assert main([*command(files, tmp_path / "run"), "--model", clip]) == 2
    assert "model must be an open_clip CoCa" in capsys.readouterr().err
    assert main(["route", "train", "--captions", "x", "--out", "y"]) == 2
    assert "--model must be given" in capsys.readouterr().err
    assert main(["route", "eval", str(tmp_path)]) == 2 and "has no config.yaml" in capsys.readouterr().err
    assert main(["route", "evil", "x"]) == 2 and "did you mean route train or route eval" in capsys.readouterr().err
