import json
import re
import statistics

import open_clip
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from rmt import upstream
from rmt.config import UserError
from rmt.data import read_json
from rmt.demo import QUICK, demo, write_digits
from rmt.pictures import NUMBERS, SIZE, bank, render


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A quick demo through the public function."""
    out = tmp_path_factory.mktemp("demo") / "out"
    result = demo(out, seed=3, quick=True)
    assert result == json.loads((out / "result.json").read_text())
    return out


def test_the_demo_leaves_numbers_runs_and_a_page(folder):
    result = json.loads((folder / "result.json").read_text())
    assert list(result["few_shot"]) == ["zero-shot", "linear probe", "AMT", "R-AMT"] and result["seeds"] == [3]
    run = json.loads((folder / "ramt" / "shots16" / "seed3" / "result.json").read_text())
    assert result["few_shot"]["R-AMT"]["mean"] == run["metrics"]["acc1"] and result["task_bytes"] == run["task_bytes"]
    assert run["config"]["train"]["strength"] == 0.3 and len(run["confusion"]) == 10
    amt = json.loads((folder / "amt" / "shots16" / "seed3" / "result.json").read_text())
    assert amt["config"]["train"]["strength"] == 0 and amt["indices_sha256"] == run["indices_sha256"]
    halves = result["base_to_new"]["R-AMT"]
    both = [halves[name]["mean"] for name in ("base", "new")]
    assert halves["harmonic_of_means"] == pytest.approx(statistics.harmonic_mean(both) if all(both) else 0)
    base = json.loads((folder / "b2n_ramt" / "seed3" / "result.json").read_text())
    assert base["classnames"] == list(NUMBERS[:5]) and base["config"]["train"]["strength"] == 1
    page = (folder / "report.html").read_text()
    assert page.count('<img src="data:image/') == 5 and not re.search(r'(?:src|href)="(?!data:)|<script', page)
    assert result["recipe"] in page and "linear probe" in page and "--seed 3 --quick" in page


def test_the_demo_needs_a_folder_of_its_own(folder):
    with pytest.raises(UserError, match=r"out must be a new or an empty folder, got '.*', which has content"):
        demo(folder, quick=True)


def test_the_digits_are_scikit_learns_and_no_image_is_in_two_parts(tmp_path):
    split = read_json(write_digits(tmp_path / "digits", QUICK))
    assert split.classnames == NUMBERS
    parts = [split.train, split.val, split.test]
    assert [len(part) for part in parts] == [10 * QUICK.train, 10 * QUICK.val, 10 * QUICK.test]
    places = [int(item.path[-8:-4]) for part in parts for item in part]
    assert len(set(places)) == len(places)
    digits = load_digits()
    assert all(digits.target[int(item.path[-8:-4])] == item.label for part in parts for item in part)
    image = Image.open(split.test[0].path).resize((8, 8), Image.Resampling.BOX)
    pixels = torch.tensor(list(image.tobytes())).reshape(8, 8) / 255 * 16
    assert (pixels - torch.from_numpy(digits.images[places[-10 * QUICK.test]])).abs().mean() < 1


def test_pictures_depend_on_seed_and_step_alone():
    first, again = render(1, 5, 16), render(1, 5, 16)
    assert torch.equal(first.image, again.image) and first.captions == again.captions
    assert first.image.shape == (16, 3, SIZE, SIZE) and first.image.min() >= 0 and first.image.max() <= 1
    for other in (render(2, 5, 16), render(1, 6, 16)):
        assert not torch.equal(first.image, other.image) and first.captions != other.captions
    _, concepts = bank()
    assert all(caption in concepts[c].captions for caption, c in zip(first.captions, first.concept.tolist()))


def test_every_glyph_shows_something_and_shapes_have_their_colour():
    glyphs, concepts = bank()
    ink = glyphs.mean((1, 2))
    assert ink.min() > 0.01 and ink.max() < 0.7
    assert len(concepts) == 10 + 26 + 8 * 8 and len({c.captions for c in concepts}) == len(concepts)
    scene = render(1, 0, 512)
    for place, colour in enumerate(("red", "green", "blue")):
        mine = scene.image[[colour in caption for caption in scene.captions]]
        others = [channel for channel in range(3) if channel != place]
        assert len(mine) > 3 and ((mine[:, place] - mine[:, others].mean(1)).amax((1, 2)) > 0.2).all()


def test_contrastive_loss_is_clips_where_no_concept_comes_twice():
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(6, 4), dim=-1) for _ in range(2))
    expected = open_clip.ClipLoss()(image, text, torch.tensor(10.0))
    assert torch.allclose(upstream.contrastive_loss(image, text, torch.arange(6), torch.tensor(10.0)), expected)
    twice = torch.tensor([0, 0, 1, 2, 3, 4])
    swapped = upstream.contrastive_loss(image, text[[1, 0, 2, 3, 4, 5]], twice, torch.tensor(10.0))
    assert torch.allclose(upstream.contrastive_loss(image, text, twice, torch.tensor(10.0)), swapped)


def test_upstream_learns_is_deterministic_and_leaves_the_generator_alone(tmp_path):
    torch.manual_seed(7)
    losses, before = [], torch.get_rng_state()
    model = upstream.train(12, seed=1, batch=32, progress=lambda step, loss: losses.append(loss))
    assert torch.equal(torch.get_rng_state(), before) and losses[-1] < losses[0] and len(losses) == 12
    again = upstream.train(12, seed=1, batch=32)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    name = upstream.save(model, tmp_path / "model")
    loaded, _, preprocess = open_clip.create_model_and_transforms(name)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert preprocess(Image.new("RGB", (40, 30))).shape == (3, SIZE, SIZE)
