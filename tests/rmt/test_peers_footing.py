"""What methods share: features once, what they cost, and the names that combine them."""

import time

import peer_tools
import pytest
import torch
import torch.nn.functional as F

from rmt import UserError, clip
from rmt.peers import names
from rmt.peers.footing import Shelf


@pytest.fixture(scope="module")
def footing(tmp_path_factory):
    return peer_tools.footing(tmp_path_factory.mktemp("footing"))


def test_start_is_zero_shot(footing):
    state = footing.start()
    image = next(iter(footing.images("test")))
    want = clip.logits(footing.loaded.model, image, footing.text.zero_shot)
    got = state.logits(footing.features(state, "test")[: len(image)])
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-5)


def test_views_are_the_epochs_of_training(footing):
    """A view's image is the one that training on batches sees in that epoch."""
    batches = footing.batches()
    whole = torch.cat([image for image, _ in batches.whole_epoch(1)])
    image, label = batches(batches.steps_per_epoch)
    order = batches._order(1)[: len(label)]
    assert torch.equal(image, whole[order]) and torch.equal(label, footing.labels("train")[order])
    a, b = (footing.features(footing.start(), "train", view) for view in (0, 1))
    assert not torch.equal(a, b)
    assert torch.equal(footing.features(footing.start(), "train", footing.views), a)
    with torch.no_grad():
        torch.testing.assert_close(footing.loaded.model.encode_image(whole), b, rtol=1e-5, atol=1e-5)


def test_copy_leaves_the_model(footing):
    copied = footing.copy(footing.start())
    assert not any(p.requires_grad for p in copied.parameters())
    with torch.no_grad():
        next(copied.parameters()).add_(1)
    before = footing.start().logits(F.normalize(torch.ones(1, 32), dim=-1))
    assert before.isfinite().all() and copied is not footing.loaded.model


def test_shelf_counts_cost_once():
    shelf = Shelf()

    def slow():
        time.sleep(0.02)
        return 7

    def cost(tally):
        return sum(shelf.costs(tally).values())

    with shelf.tally() as first:
        assert shelf.get(("a",), "a", slow) == 7 and shelf.get(("a",), "a", slow) == 7
    assert first.reused == [] and first.made >= 0.02 and cost(first) == pytest.approx(first.made)
    with shelf.tally() as second:
        assert shelf.get(("a",), "a", slow) == 7
    assert second.reused == ["a"] and second.made == 0 and cost(second) == cost(first)
    with shelf.tally() as third:
        # What a value is made of belongs to its cost, once, reused or not.
        shelf.get(("b",), "b", lambda: shelf.get(("a",), "a", slow) + 1)
        shelf.get(("a",), "a", slow)
    assert third.made < 0.02 <= cost(third) < 0.04 and shelf.costs(third).keys() == {"a", "b"}
    shelf.drop(lambda key: key == ("a",))
    with shelf.tally() as fourth:
        shelf.get(("a",), "a", slow)
    assert fourth.reused == [] and fourth.made >= 0.02


@pytest.mark.parametrize("text,name,parts", [
    ("ramt", "ramt", ("ramt",)),
    ("ramt+coop", "coop+ramt", ("ramt", "coop")),
    ("tip_f+ramt", "tip_f+ramt", ("ramt", "tip_f")),
    ("lora+ramt", "lora+ramt", ("ramt", "lora")),
    ("ramt+tip+coop+lora", "coop+tip+lora+ramt", ("ramt", "lora", "coop", "tip")),
])  # fmt: skip
def test_parse(text, name, parts):
    for module in {names.METHODS[part][0] for part in parts}:
        pytest.importorskip(f"rmt.peers.{module}")
    assert names.parse(text) == names.Stack(name, parts)


@pytest.mark.parametrize("text,why", [
    ("zeroshot+ramt", "this is ramt alone"),
    ("ramt+amt", "twice"),
    ("full_ft+ramt", "moves every weight"),
    ("full_ft+wise_ft", "moves every weight"),
    ("bitfit+ln", "take one"),
    ("coop+cocoop", "class vectors"),
    ("tip+linear_probe", "the head"),
    ("linear_probe+coop", "does not read the class vectors"),
    ("linear_probe_zs+cocoop", "one vector a class"),
    ("ramt+ramt", "once"),
    ("rant", "did you mean ramt"),
])  # fmt: skip
def test_what_cannot_be_combined(text, why):
    with pytest.raises(UserError, match=why):
        names.parse(text)
