"""bench/real/captions.py on a few captions of its own: splits, losses, other images' controls, cells that are kept."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "real"))
import captions
import captions_model
from captions_model import END, START, Captions, Decoder

from rmt.routing import RoutedLoRAConfig, inject_routed_lora

WIDTH = 16
COUNTS = {"train": 8, "val": 3, "test": 3}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    names = [f"{split}/{n}.jpg" for split, count in COUNTS.items() for n in range(count)]
    rows = [{"image": name, "captions": ["a dog runs", f"a {'red ' * (n % 4)}ball"]} for n, name in enumerate(names)]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    random = torch.Generator().manual_seed(0)
    features = {name: 3 * torch.randn(WIDTH, generator=random) for name in names}
    monkeypatch.setattr(captions, "image_features", lambda model, folder, cache: features)
    args = argparse.Namespace(model="none", data=str(tmp_path), runs=str(tmp_path / "runs"))
    small = captions.Settings(
        "none", str(tmp_path), layers=2, heads=2, least=1, text_steps=4, text_batch=3, r=2, steps=3, batch=3
    )
    return captions.Experiment(args, small)


def routed_at_random(decoder, function):
    routed = inject_routed_lora(decoder, RoutedLoRAConfig(function=function, r=2))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in routed.parameters():
            p.copy_(torch.randn(p.shape, generator=random))
    return routed


def test_the_splits_share_no_image(experiment):
    owners = {split: set(part.owners.tolist()) for split, part in experiment.splits.items()}
    assert {split: len(found) for split, found in owners.items()} == {"text": 4, "tuning": 4, "val": 3, "test": 3}
    assert len(set.union(*owners.values())) == sum(COUNTS.values())
    train = experiment.splits["text"].features[sorted(owners["text"] | owners["tuning"])]
    torch.testing.assert_close(train.square().mean(), torch.tensor(1.0))


def test_an_epoch_has_each_caption_once_with_its_image(experiment):
    part = experiment.splits["tuning"]
    seen = []
    for tokens, owners in part.batches(3, torch.Generator().manual_seed(0)):
        seen += [(row[row >= 0].tolist(), owner) for row, owner in zip(tokens, owners.tolist())]
    assert sorted(seen) == sorted(zip(part.captions, part.owners.tolist()))
    assert all(text[0] == START and text[-1] == END for text, _ in seen)


def test_the_loss_is_that_of_every_next_token_alone(experiment):
    torch.manual_seed(0)
    model = Decoder(9, WIDTH, 2, 2, 8, 0.0).eval()
    model.prefix = True
    part = Captions([[0, 3, 4, 1], [0, 5, 1]], torch.tensor([1, 0]), torch.randn(2, WIDTH))
    want = 0.0
    with torch.no_grad():
        for text, owner in zip(part.captions, part.owners):
            for n in range(1, len(text)):
                logits = model(torch.tensor([text[:n]]), part.features[owner][None])[0, -1]
                want -= logits.log_softmax(-1)[text[n]].item()
    assert captions.held_out(model, part) == pytest.approx(want / 5, rel=1e-5)


@pytest.mark.parametrize("prefix", [False, True])
def test_a_word_sees_itself_and_what_is_before_it(prefix):
    torch.manual_seed(0)
    model = Decoder(9, WIDTH, 2, 2, 8, 0.0).eval()
    model.prefix = prefix
    text, image = torch.tensor([[0, 3, 4, 5]]), torch.randn(1, WIDTH)
    with torch.no_grad():
        change = (model(text, image) - model(torch.tensor([[0, 3, 6, 5]]), image)).abs().amax(-1)[0] > 1e-5
    assert change.tolist() == [False, False, True, True]


@pytest.mark.parametrize("mode", captions.MODES)
@pytest.mark.parametrize("function", ["none", "mul"])
def test_another_image_changes_what_sees_it(experiment, mode, function):
    decoder, part = experiment.decoder, experiment.splits["test"]
    decoder.prefix = mode == "prefix"
    routed = routed_at_random(decoder, function)
    own, everywhere, in_x_r = (captions.held_out(decoder, part, routed, other) for other in ("", "shuffled", "routed"))
    assert (everywhere != own) == (mode == "prefix" or function == "mul")
    assert (in_x_r != own) == (function == "mul")
    assert (in_x_r == everywhere) == (mode == "blind")


def test_cells_are_kept_and_give_back_what_was_trained(experiment, monkeypatch):
    first = [experiment.tested(mode, "gram", 1e-2, 1) for mode in captions.MODES]
    assert ["routed" in row for row in first] == [False, True]
    experiment.decoder.prefix = True
    monkeypatch.setattr(captions, "fit", lambda *args: pytest.fail("trained again"))
    for row in first:
        assert experiment.tested(row["mode"], "gram", 1e-2, 1) == row
        (experiment.cell(row["mode"], "gram", 1e-2, 1) / "test.json").unlink()
        assert experiment.tested(row["mode"], "gram", 1e-2, 1) == row
    assert not any(name.startswith("routed") for name, _ in experiment.decoder.named_modules())


def test_the_same_parameters_for_every_function(experiment):
    rows = [experiment.tuned("blind", function, 1e-2, 1) for function in captions.FUNCTIONS]
    assert {row["parameters"] for row in rows} == {2 * 2 * 2 * (WIDTH + WIDTH)}
    assert captions_model.IGNORE not in {token for text in experiment.splits["val"].captions for token in text}
    lines = captions.table([row | {"test": 1.0, "shuffled": 1.5} for row in rows], [{"mode": "blind", "test": 2.0}])
    assert lines.count("+0.5000") == len(captions.FUNCTIONS)
