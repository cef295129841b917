"""rmt route train and rmt route eval over Hugging Face hosts: captions by GPT-2, answers by RoBERTa."""

import json
import sys

import hf_tools
import pytest
import text_tools
import torch

from rmt.cli import main
from rmt.data.captions import Captioned
from rmt.routing import hf_answers, hf_captioner
from rmt.routing.run_config import RouteConfig, read_yaml

QUICK = ["--r", "4", "--steps", "6", "--batch", "8", "--lr", "3e-2", "--log-every", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders of vit, gpt2, roberta, captions and questions."""
    root = tmp_path_factory.mktemp("files")
    found = hf_tools.folders(root / "hf")
    found["captions"] = str(text_tools.captions(root / "captions", parts=("train", "val")))
    return found | {"questions": str(text_tools.questions(root / "vqav2"))}


def command(files, kind, out, *flags):
    """kind: gpt2 or roberta."""
    data = ["--captions", files["captions"]] if kind == "gpt2" else ["--questions", files["questions"]]
    own = ["--length", "8"] if kind == "gpt2" else ["--min-answers", "2"]
    data += [*own, "--out", str(out)]
    return ["route", "train", "--vision", files["vit"], "--text", files[kind], *data, *QUICK, *flags]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def evaluated(out, capsys, *flags):
    capsys.readouterr()
    assert main(["route", "eval", str(out), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def asked(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "vqa"
    assert main(command(files, "roberta", out, "--train-ln", "--train-bias", "--steps", "30")) == 0
    return out


@pytest.mark.parametrize(
    "form", [[], ["--prefix", "false", "--beams", "1", "--kind", "adapter", "--precision", "bf16", "--share"]]
)
def test_captions(files, form, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(files, "gpt2", out, "--generate", "2", "--beams", "2", *form)) == 0
    found = result(out)
    assert found["after"]["loss"] < found["before"]["loss"]
    # 12 images with captions of 4 and 5 words, each with its end: the same labels with and without the image's token.
    assert found["before"]["tokens"] == 12 * (5 + 6) and (found["split"], found["images"]) == ("val", 12)
    assert (found["vision"], found["text"]) == (files["vit"], files["gpt2"]) and found["transformers"]
    assert "beside_sha256" not in found and not (out / "beside.safetensors").exists()
    again = evaluated(out, capsys, "--split", "val")
    assert again["loss"] == found["after"]["loss"] and again["examples"] == found["examples"]
    assert len(again["examples"]) == 2 and not any("s>" in row["caption"] for row in again["examples"])


def test_padding_is_no_token_and_a_long_caption_is_cut(files, tmp_path):
    config = RouteConfig(vision=files["vit"], text=files["gpt2"], captions="x", device="cpu")
    captioner = hf_captioner.load_gpt2(config)
    words = {word: 4 + place for place, word in enumerate(hf_tools.SAID)}
    ids = captioner.ids(["red !", "is", "red " * 50])
    assert ids[:2, :4].tolist() == [[words["red"], 1, 2, -100], [words["is"], 2, -100, -100]]
    assert ids.shape == (3, captioner.room) and captioner.room == 19 and ids[2, -2:].tolist() == [words["red"], 2]
    blind = hf_captioner.load_gpt2(RouteConfig(**{**vars(config), "prefix": False}))
    assert blind.ids(["is"]).tolist() == [[0, words["is"], 2]] and blind.room == 19
    # The end is learned, and what is behind it changes nothing.
    image = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for each in (captioner, blind):
            short, model = each.ids(["is"]), each.model.double()
            rows = model(image, short).logits
            longer = torch.nn.functional.pad(short, (0, 3), value=-100)
            torch.testing.assert_close(model(image, longer).logits[:, : rows.shape[1]], rows, rtol=0, atol=1e-12)
    text_tools.image(tmp_path / "a.png", (200, 40, 40), 0)
    batch = captioner.batches([Captioned(str(tmp_path / "a.png"), ("is", "red"))], 2, 1)
    assert [tuple(tensor.shape) for tensor in batch(0)] == [(2, 3, 16, 16), (2, 2)]


def test_questions(files, asked, tmp_path, capsys):
    found = result(asked)
    assert sorted(path.name for path in asked.iterdir()) == [
        "answers.json", "before.json", "beside.safetensors", "config.yaml", "last.pt", "metrics.jsonl", "result.json",
        "routed",
    ]  # fmt: skip
    assert json.loads((asked / "answers.json").read_text()) == list(text_tools.WORDS)
    assert found["after"]["loss"] < found["before"]["loss"] and found["after"]["vqa_accuracy"] > 0.25
    assert (found["split"], found["questions"], found["answers"]) == ("val", 8, 4)
    # Eval draws another head and LayerNorms are as they came, until what was saved is read.
    again = evaluated(asked, capsys)
    assert {name: again[name] for name in found["after"]} == found["after"]
    few = evaluated(asked, capsys, "--limit", "2", "--split", "train", "--questions", files["questions"])
    assert (few["split"], few["questions"]) == ("train", 2)
    assert main(["route", "eval", str(asked), "--split", "test"]) == 2
    assert "has no test questions" in capsys.readouterr().err
    # 2 layers: r (32 + 32) for q and v; 2 LayerNorms; biases of q and v; the head.
    head = 32 * 64 + 64 + 2 * 64 + 64 * 4 + 4
    assert found["trainable"] == 2 * (2 * 4 * 64 + 2 * 64 + 2 * 32) + head


def test_what_lies_beside_is_read_and_checked(asked, files, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "run"
    shutil.copytree(asked, copy)
    state = load_file(asked / "beside.safetensors")
    save_file({name: torch.zeros_like(p) for name, p in state.items()}, copy / "beside.safetensors")
    # All logits are 0: log 2 each.
    assert evaluated(copy, capsys)["loss"] == pytest.approx(0.693147, abs=1e-6)
    save_file({name: p for name, p in state.items() if name != "head.0.bias"}, copy / "beside.safetensors")
    assert main(["route", "eval", str(copy)]) == 2 and "head.0.bias is missing" in capsys.readouterr().err
    (copy / "beside.safetensors").write_bytes(b"no")
    assert main(["route", "eval", str(copy)]) == 2 and "must be what rmt route train wrote" in capsys.readouterr().err
    (copy / "answers.json").write_text('["red", 3]')
    assert main(["route", "eval", str(copy)]) == 2 and "must be a list of answers" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_killed_and_started_again_it_ends_with_the_same_bits(kind, files, tmp_path, monkeypatch, capsys):
    out, step = tmp_path / "killed", torch.optim.AdamW.step
    flags = ["--dropout", "0.3", "--save-every", "0", "--train-ln", "--train-bias", "--checkpointing"]
    monkeypatch.setattr(torch.optim.AdamW, "step", text_tools.killed_at(step, 4))
    # Three processes' own random states, which a run must not depend on.
    torch.manual_seed(4)
    assert main(command(files, kind, out, *flags)) == 130
    assert not (out / "result.json").exists() and not (out / "beside.safetensors").exists()
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    capsys.readouterr()
    torch.manual_seed(5)
    assert main(command(files, kind, out, *flags)) == 0 and "resume     from step 3 of 6" in capsys.readouterr().out
    torch.manual_seed(6)
    assert main(command(files, kind, tmp_path / "whole", *flags)) == 0
    ends = [result(folder) for folder in (out, tmp_path / "whole")]
    for name in ("routed_sha256", "beside_sha256", "before", "after"):
        assert ends[0][name] == ends[1][name]
    assert (out / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_a_pooler_that_is_missing_is_drawn_where_asked_for_and_kept(files, tmp_path, capsys):
    import transformers

    at = tmp_path / "unread"
    transformers.RobertaForMaskedLM(transformers.RobertaConfig(**hf_tools.ROBERTA)).save_pretrained(at)
    hf_tools.tokenizer("<pad>", ends=True, pad_token="<pad>").save_pretrained(at)
    mine = files | {"roberta": str(at)}
    assert main(command(mine, "roberta", tmp_path / "run")) == 2
    assert "--draw-pooler draws it" in capsys.readouterr().err
    published = ["--draw-pooler", "--double-embeddings", "--kind", "adapter", "--residual", "false"]
    assert main(command(mine, "roberta", tmp_path / "run", *published)) == 0
    found = result(tmp_path / "run")
    # Another draw at eval, which what was kept replaces.
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 1", "seed: 2"))
    again = evaluated(tmp_path / "run", capsys)
    assert {name: again[name] for name in found["after"]} == found["after"]


@pytest.mark.parametrize("preset", ["gpt2-lora", "gpt2-adapter", "roberta-lora", "roberta-adapter"])
def test_presets_stand_between_defaults_and_options(preset, files, tmp_path, capsys):
    kind, part = preset.split("-")
    plain = command(files, kind, tmp_path / "run")
    own = ["--device", "cpu", "--r", "8", "--preset", preset, "--steps", "2"]
    plain = plain[: plain.index("--r")] + own
    warm = ["--warmup", "1"] if kind == "gpt2" else []
    assert main([*plain, *warm]) == 0
    config = read_yaml(tmp_path / "run" / "config.yaml")
    want = ("gpt2", 3e-5, 1, 40) if kind == "gpt2" else ("roberta", 3e-4, 0.05, 512)
    assert (kind, config["lr"], config["warmup"], config["batch"]) == want
    assert (config["kind"], config["r"], config["epochs"]) == (part, 8, 20)
    other = command(files, {"gpt2": "roberta", "roberta": "gpt2"}[kind], tmp_path / "b", "--preset", preset)
    assert main(other) == 2 and f"--preset {preset} is of " in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("gpt2", ["--text", "roberta"], "--text must be a model of the kind gpt2, got"),
        ("roberta", ["--text", "gpt2"], "--text must be a model of the kind roberta, got"),
        ("gpt2", ["--vision", "gpt2"], "--vision must be a model of the kind vit, got"),
        ("gpt2", ["--vision", "captions"], "--vision: transformers cannot load"),
        ("gpt2", ["--text", "narrow"], "got 32 and 64. ViT-B (768) goes with gpt2"),
        ("gpt2", ["--model", "coca_ViT-B-32"], "a run has one host"),
        ("gpt2", ["--questions", "questions"], "one of --captions and --questions must be given, got both"),
        ("gpt2", ["--pretrained", "x"], "--pretrained is of a CoCa (--model), not of captions"),
        ("gpt2", ["--min-answers", "3"], "--min-answers is of --questions with"),
        ("gpt2", ["--beams", "0"], "beams must be an integer of at least 1, got 0"),
        ("gpt2", ["--residual", "false"], "--share, --residual and --zero-init are of --kind adapter"),
        ("gpt2", ["--zero-init", "false"], "--share, --residual and --zero-init are of --kind adapter"),
        ("gpt2", ["--kind", "adapter", "--couple-qv"], "--couple-qv is of --kind lora, not of adapter"),
        ("gpt2", ["--source", "first"], "--source is of a CoCa (--model), not of captions"),
        ("roberta", ["--source", "first"], "--source is of a CoCa (--model), not of --questions"),
        ("roberta", ["--length", "8"], "--length is of a CoCa (--model) or captions"),
        ("gpt2", ["--sites", "cross.q"], "no site cross.q"),
        ("roberta", ["--generate", "2"], "--generate is of a CoCa (--model) or captions"),
        ("roberta", ["--prefix", "false"], "--prefix is of captions with --vision and --text"),
        ("roberta", ["--min-answers", "3"], "at least one answer must occur 3 times, got at most 2"),
        ("roberta", ["--questions", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_mistakes_in_one_line(kind, flags, message, files, tmp_path, capsys):
    if flags[1] == "narrow":
        hf_tools.gpt2(n_embd=64).save_pretrained(tmp_path / "narrow")
        hf_tools.tokenizer("!").save_pretrained(tmp_path / "narrow")
    known = files | {"narrow": str(tmp_path / "narrow")}
    capsys.readouterr()
    assert main([*command(files, kind, tmp_path / "run"), flags[0], known.get(flags[1], flags[1]), *flags[2:]]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rmt: error")]
    assert len(error) == 1 and message in error[0], error
    assert not (tmp_path / "run").exists(), "what is mended can run there"


def test_tokenizers_that_do_not_fit(files, tmp_path, capsys):
    import shutil

    for kind, broken, message in (
        ("gpt2", hf_tools.tokenizer("!", eos_token=None), "captions need a tokenizer with an end token"),
        ("gpt2", hf_tools.tokenizer("!", additional_special_tokens=[f"<{n}>" for n in range(9)]), "the model 24"),
        ("roberta", hf_tools.tokenizer("!", ends=True, pad_token="</s>"), "pads with id 2, the model with 1"),
    ):
        at = tmp_path / f"{kind} {message}"
        shutil.copytree(files[kind], at)
        broken.save_pretrained(at)
        assert main([*command(files, kind, tmp_path / "run"), "--text", str(at)]) == 2
        assert message in capsys.readouterr().err
    assert main(["route", "train", "--vision", files["vit"], "--captions", "x", "--out", "y"]) == 2
    assert "--model must be given, or both --vision and --text" in capsys.readouterr().err


def test_a_long_question_is_cut_before_its_end(files):
    config = RouteConfig(vision=files["vit"], text=files["roberta"], questions="x", device="cpu")
    ids = hf_answers.load_answerer(config, {"red": 0, "blue": 1}).ids(["What colour is it ?", "is " * 50])
    assert ids.shape == (2, 17) and ids[0, 5:].tolist() == [hf_tools.SAID.index("?") + 4, 2, *[1] * 10]
    assert ids[1, 0] == 0 and ids[1, -1] == 2 and 2 not in ids[1, :-1]


def test_without_transformers(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(command(files, "gpt2", tmp_path / "run")) == 2
    assert "pip install 'rmt[routing]'" in capsys.readouterr().err
