"""Routed layers trained on captions and questions: rates, resuming to the same bits, losses, decoding, scores."""

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace

import coca_tools
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rmt import UserError
from rmt.data import Question
from rmt.routing import RoutedLoRAConfig, inject_routed_lora
from rmt.routing.evaluate import generate, held_out, vqa_accuracy
from rmt.routing.resume import RoutingResume
from rmt.routing.scores import bleu, caption_scores, cider, words
from rmt.routing.train import PRESETS, RoutingTrainConfig, caption_loss, train_captions, train_vqa, vqa_loss


def batches(step):
    """Padded captions, of the images of three batches in turn."""
    image, text = coca_tools.batch(4, seed=step % 3)
    text[0, -2:] = 0
    return image, text


def host(dropout=0.0, function="mul"):
    model = coca_tools.coca()
    return model, inject_routed_lora(model, RoutedLoRAConfig(function=function, r=4, dropout=dropout))


def tuned(config, resume=None, dropout=0.5, stop=None):
    """Trained parameters and the logged rows; stop: the number of steps after which the run is killed."""
    model, routed = host(dropout)
    rows = []

    def tick(done):
        if done == stop:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train_captions(model, routed, batches, config, log=rows.append, tick=tick, resume=resume)
    return routed.state_dict(), rows


def test_rates_rise_and_fall_as_transformers_schedule():
    got = RoutingTrainConfig(lr=2.0, warmup=4, steps=12).rates(0)
    assert got == [0.0, 0.5, 1.0, 1.5, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]
    assert RoutingTrainConfig(lr=2.0, warmup=0.25, epochs=2).rates(8)[4] == 2.0
    assert RoutingTrainConfig(lr=2.0, warmup=0, steps=2).rates(0) == [2.0, 1.0]
    with pytest.raises(UserError, match="warmup must be shorter than the run of 500 steps, got 5000"):
        RoutingTrainConfig(warmup=5000, steps=500).rates(0)
    with pytest.raises(UserError, match="lr must be a finite number above 0, got 0"):
        RoutingTrainConfig(lr=0)
    for preset in PRESETS.values():
        recipe = {name: preset[name] for name in ("lr", "warmup", "epochs")}
        assert len(RoutingTrainConfig(**recipe).rates(1000)) == 20_000


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_loop_is_adamw_written_out(clip):
    config = RoutingTrainConfig(lr=1e-2, warmup=2, steps=6, clip=clip, weight_decay=0.1, log_every=1)
    got, rows = tuned(config, dropout=0.0)
    model, routed = host()
    model.train()
    named = dict(routed.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in named.items()}
    for step, rate in enumerate(config.rates(0)):
        image, text = batches(step)
        logits = model(image, text)["logits"]
        loss = -logits.log_softmax(-1).gather(-1, text[:, 1:, None])[text[:, 1:] != 0].mean()
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values()))))
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert rows[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert rows[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        factor = min(1.0, clip / norm.item()) if clip else 1.0
        with torch.no_grad():
            for name, p in named.items():
                a, b = moments[name]
                a.mul_(0.9).add_(0.1 * factor * gradients[name])
                b.mul_(0.999).add_(0.001 * (factor * gradients[name]) ** 2)
                up, down = a / (1 - 0.9 ** (step + 1)), (b / (1 - 0.999 ** (step + 1))).sqrt() + 1e-6
                p.mul_(1 - 0.1 * rate).sub_(rate * up / down)
    for name, p in named.items():
        torch.testing.assert_close(got[name], p.detach(), rtol=1e-3, atol=1e-5)


def test_it_learns_and_leaves_the_host_alone():
    model, routed = host(function="add")
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = held_out(model, [batches(step) for step in range(3)])
    random, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    train_captions(model, routed, batches, RoutingTrainConfig(lr=2e-2, steps=40))
    after = held_out(model, [batches(step) for step in range(3)])
    assert after.loss < before.loss - 0.2 and after.tokens == before.tokens == 3 * (4 * 6 - 2)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert torch.equal(torch.get_rng_state(), random), "the caller's generator is given back"
    assert [module.training for module in model.modules()] == modes


def test_stopped_and_resumed_to_the_same_bits(tmp_path):
    config = RoutingTrainConfig(lr=1e-2, steps=6, save_every=0, log_every=2)
    want, rows = tuned(config)

    def resume(fingerprint="a"):
        return RoutingResume(tmp_path / "last.pt", {"run": fingerprint}, 0)

    tuned(config, resume(), stop=3)
    torch.manual_seed(5)  # what was drawn meanwhile must not matter
    second = resume()
    # The third step was ended before its state was kept.
    assert second.steps_done == 2
    got, others = tuned(config, second)
    assert all(torch.equal(got[name], want[name]) for name in want) and others == rows[1:]
    with pytest.raises(UserError, match="another run's: run was 'a', now it is 'b'"):
        resume("b")
    model = coca_tools.coca()
    routed = inject_routed_lora(model, RoutedLoRAConfig(r=2))
    with pytest.raises(UserError, match="parameters are others"):
        train_captions(model, routed, batches, config, resume=resume())
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:100])
    with pytest.raises(UserError, match=r"last.pt is damaged"):
        resume()


def test_dropout_is_a_function_of_seed_and_step():
    config = RoutingTrainConfig(lr=1e-2, steps=3)
    first, again = tuned(config)[0], tuned(config)[0]
    other = tuned(RoutingTrainConfig(lr=1e-2, steps=3, seed=2))[0]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_bf16_is_near_and_not_equal():
    options = {"lr": 1e-2, "warmup": 0, "steps": 3, "log_every": 1}
    (_, a), (_, b) = (tuned(RoutingTrainConfig(precision=p, **options), dropout=0.0) for p in ("fp32", "bf16"))
    for x, y in zip(a, b):
        assert x["loss"] != y["loss"] and x["loss"] == pytest.approx(y["loss"], rel=0.02)


def test_what_cannot_be_trained_says_so():
    model, routed = host()
    with torch.no_grad():
        model.text_decoder.text_projection[0, 0] = math.inf
    before = {name: p.clone() for name, p in routed.state_dict().items()}
    with pytest.raises(UserError, match=r"step 1: loss must be finite, got (nan|inf)"):
        train_captions(model, routed, batches, RoutingTrainConfig(steps=2))
    assert all(torch.equal(p, before[name]) for name, p in routed.state_dict().items())
    routed.remove()
    model.requires_grad_(False)
    for given in (None, routed):
        with pytest.raises(UserError, match="must have trainable parameters"):
            train_captions(model, given, batches, RoutingTrainConfig(steps=2))
    with pytest.raises(UserError, match=r"logits \(B, L, V\) and labels \(B, L\), got \[None, None\]"):
        caption_loss(lambda image, text: {}, batches(0))


@pytest.mark.parametrize("before", [0, 1])
def test_hosts_that_give_logits_alone(before):
    """As rmt's Hugging Face hosts: one row a token, and one before them for an image token."""
    _, text = batches(0)
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(4, text.shape[1] + before, coca_tools.WORDS, generator=random)
    got = caption_loss(lambda image, ids: SimpleNamespace(logits=logits, loss=None), batches(0)).item()
    total, tokens = 0.0, 0
    for row, ids in zip(logits, text):
        for place, token in enumerate(ids.tolist()):
            if token and place + before:
                # The row before a token speaks of it.
                total -= row[place + before - 1].log_softmax(-1)[token].item()
                tokens += 1
    assert got == pytest.approx(total / tokens, rel=1e-5)
    odd = torch.cat([logits, logits], 1)
    with pytest.raises(UserError, match="a captioner must give"):
        caption_loss(lambda image, ids: {"logits": odd}, batches(0))


class Answers(nn.Module):
    """A VQA model: the mean colour through a trainable head."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, image, text):
        return {"logits": self.head(image.mean((2, 3)))}


class Asked:
    """Two questions: a red image and a blue one; all people answer by colour, but for two."""

    def __init__(self):
        self.classes = {"red": 0, "blue": 1}
        self.questions = [Question(0, "x.jpg", "?", (name,) * 8 + ("pink",) * 2, name) for name in self.classes]

    def __call__(self, step):
        image = torch.zeros(2, 3, 4, 4)
        image[0, 0], image[1, 2] = 1, 1
        return image, torch.ones(2, 3, dtype=torch.long), torch.eye(2)

    def in_order(self):
        yield self(0)


def test_vqa():
    model, asked = Answers(), Asked()
    assert vqa_loss(model, asked(0)).item() == pytest.approx(math.log(2))
    assert vqa_accuracy(model, asked) == 0.5, "of two equals the first is taken: red is right once"
    train_vqa(model, None, asked, RoutingTrainConfig(lr=0.1, steps=30))
    assert vqa_loss(model, asked(0)).item() < 0.4 and vqa_accuracy(model, asked) == 1.0


def test_held_out_is_a_mean_over_tokens():
    model = coca_tools.coca()
    some = [batches(0), coca_tools.batch(2, seed=7)]
    found = held_out(model, some)
    total, tokens = 0.0, 0
    for image, text in some:
        with torch.no_grad():
            logits = model(image, text)["logits"]
        for row, labels in zip(logits, text[:, 1:]):
            kept = labels != 0
            total += F.cross_entropy(row[kept], labels[kept], reduction="sum").item()
            tokens += int(kept.sum())
    assert found.tokens == tokens and found.loss == pytest.approx(total / tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    with pytest.raises(UserError, match="at least one token"):
        held_out(model, [])


@pytest.mark.parametrize("routed", [False, True])
def test_greedy_is_the_stepwise_argmax(routed):
    """Of the whole model, from the pixels, an image at a time."""
    model = coca_tools.coca()
    if routed:
        branches = inject_routed_lora(model, RoutedLoRAConfig(r=4))
        train_captions(model, branches, batches, RoutingTrainConfig(lr=5e-2, steps=10))
    image, _ = coca_tools.batch(6, seed=4)
    free = generate(model, image, start=1, end=-1, length=7)
    # An end that some of the captions reach early.
    end = int(free[0, 3])
    got = generate(model.train(), image, start=1, end=end, length=7)
    assert model.training
    model.eval()
    for row, one in zip(got, image):
        text = torch.tensor([[1]])
        while text.shape[1] < 7 and int(text[0, -1]) != end:
            with torch.no_grad():
                logits = model(one[None], text, output_labels=False)["logits"][0, -1]
            logits[0] = -math.inf
            text = torch.cat([text, logits.argmax()[None, None]], 1)
        want = F.pad(text[0], (0, got.shape[1] - text.shape[1]))
        assert torch.equal(row, want)
    assert (free != 0).all() and got.shape[1] <= 7 and int((got[0] == end).nonzero()[0]) <= 3
    with pytest.raises(UserError, match="length must be from 2 to the model's 8 tokens, got 9"):
        generate(model, image, start=1, end=2, length=9)


def test_words():
    assert words("A man's T-shirt, isn't it?  2 dogs .") == ["a", "man's", "t-shirt", "isn't", "it", "2", "dogs"]


def test_bleu_by_hand():
    """6 of 7 words match once clipped counts are taken; then 5 of 6 pairs, 3 of 5 triples, 1 of 4."""
    mine = [words("the cat sat on the mat today")]
    theirs = [[words("the cat is on the mat now"), words("a cat sat on the old mat")]]
    ones, twos, threes, fours = 6 / 7, 5 / 6, 3 / 5, 1 / 4
    # pairs: the-cat, cat-sat, sat-on, on-the, the-mat; triples: cat-sat-on, sat-on-the, on-the-mat; cat-sat-on-the
    want = [
        ones,
        (ones * twos) ** (1 / 2),
        (ones * twos * threes) ** (1 / 3),
        (ones * twos * threes * fours) ** (1 / 4),
    ]
    assert bleu(mine, theirs) == pytest.approx(want)
    # Brevity: 4 words against the closest reference, of 6; over a corpus lengths add up.
    short = [words("the cat sat on")]
    refs = [[words("the cat sat on the mat"), words("the cat sat on the mat for long")]]
    assert bleu(short, refs) == pytest.approx([math.exp(1 - 6 / 4)] * 4)
    assert bleu(short + short, [*refs, short]) == pytest.approx([math.exp(1 - 10 / 8)] * 4)
    assert bleu([words("dog dog")], [[words("dog cat")]])[:2] == [0.5, 0.0]


def test_cider_by_hand():
    """Two images. Words that both have weigh nothing; others log 2 each."""
    mine, theirs = [["a", "dog"], ["a", "cat"]], [[["a", "dog"]], [["a", "cat"]]]
    # Orders 1 and 2 agree wholly, orders 3 and 4 have no n-grams: (1 + 1 + 0 + 0) / 4, times 10.
    assert cider(mine, theirs) == pytest.approx(5.0)
    # Two dogs against one: clipped to one, norms 2 and 1; a length that differs by 1; no pair in common.
    got = cider([["dog", "dog", "dog"], ["a", "cat"]], [[["a", "dog"]], [["a", "cat"]]])
    first = 10 * (1 / 3) / 4 * math.exp(-1 / 72)
    assert got == pytest.approx((first + 5.0) / 2)


def test_scores_equal_pycocoevalcap():
    scorers = pytest.importorskip("pycocoevalcap.bleu.bleu_scorer", reason="needs pycocoevalcap")
    from pycocoevalcap.cider.cider import Cider

    texts = [line.lower() for line in Path(__file__).read_text().splitlines() if len(line.split()) > 5]
    mine = [words(text) for text in texts[:60:3]]
    theirs = [[words(texts[i + 1]), words(texts[i + 2]), words(texts[i])[:-1]] for i in range(0, 60, 3)]
    scorer = scorers.BleuScorer(n=4)
    for a, b in zip(mine, theirs):
        scorer += (" ".join(a), [" ".join(other) for other in b])
    want, _ = scorer.compute_score(option="closest")
    assert bleu(mine, theirs) == pytest.approx(want, rel=1e-6)
    ids = range(len(mine))
    references = {i: [" ".join(other) for other in theirs[i]] for i in ids}
    want, _ = Cider().compute_score(references, {i: [" ".join(mine[i])] for i in ids})
    assert cider(mine, theirs) == pytest.approx(want, rel=1e-9)


def test_scores_of_texts():
    found = caption_scores(["A dog runs fast here.", "a cat"], [["a dog runs fast here"], ["A cat", "two cats"]])
    assert list(found) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr"] and found["BLEU-4"] == 1.0
    for texts, references in ((["a"], []), ([], []), (["a"], [[]])):
        with pytest.raises(UserError, match="every image must have a caption"):
            caption_scores(texts, references)
