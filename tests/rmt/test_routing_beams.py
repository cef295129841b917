"""Beam search: against every sequence there is, and against transformers' own, with the image expanded by hand."""

import itertools

import hf_tools
import pytest
import torch

from rmt import UserError
from rmt.routing import RoutedLoRAConfig, inject_routed_lora
from rmt.routing.beams import beam_search

WORDS, LENGTH, IMAGES = 4, 4, 3


def table(image: int, prefix: tuple[int, ...]) -> torch.Tensor:
    """Logits (WORDS,) that depend on the image and on all tokens before."""
    seed = hash((image, *prefix)) % 2**31
    return 2 * torch.randn(WORDS, generator=torch.Generator().manual_seed(seed))


def score(image: int, ids: tuple[int, ...], penalty: float) -> float:
    logps = [table(image, ids[:n]).log_softmax(-1)[ids[n]] for n in range(len(ids))]
    return float(sum(logps)) / len(ids) ** penalty


def searched(beams: int, eos: int | None, penalty: float):
    state = [(image, ()) for image in range(IMAGES)]

    def step(tokens, rows):
        state[:] = [(state[row][0], (*state[row][1], token)) for token, row in zip(tokens.tolist(), rows.tolist())]
        return torch.stack([table(*beam) for beam in state])

    first = torch.stack([table(*beam) for beam in state])
    return beam_search(first, step, beams, LENGTH, eos, penalty)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("eos", [1, None])
def test_wide_enough_beams_find_the_best_of_all_sequences(eos, penalty):
    tokens, scores = searched(WORDS**LENGTH, eos, penalty)
    every = []
    for length in range(1, LENGTH + 1):
        for ids in itertools.product(range(WORDS), repeat=length):
            ended = eos is not None and ids[-1] == eos
            if (ended or length == LENGTH) and eos not in ids[:-1]:
                every.append(ids)
    for image in range(IMAGES):
        best = max(every, key=lambda ids: score(image, ids, penalty))
        assert tuple(tokens[image].tolist()) == best + (eos,) * (tokens.shape[1] - len(best))
        assert scores[image].item() == pytest.approx(score(image, best, penalty), rel=1e-5)


def test_one_beam_is_greedy():
    tokens, _ = searched(1, 1, 1.0)
    for image in range(IMAGES):
        ids = ()
        while len(ids) < LENGTH and 1 not in ids:
            ids = (*ids, int(table(image, ids).argmax()))
        assert tuple(tokens[image].tolist()) == ids + (1,) * (tokens.shape[1] - len(ids))


def captioner(prefix=True):
    model = hf_tools.host("gpt2", prefix=prefix)
    routed = inject_routed_lora(model, RoutedLoRAConfig(function="mul", r=4))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in routed.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=random, dtype=p.dtype))
    return model, routed


@pytest.mark.parametrize("prefix", [True, False])
def test_greedy_without_a_cache(prefix):
    model, _ = captioner(prefix)
    image = hf_tools.batch("gpt2")["image"]
    ids = torch.zeros(3, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(image, ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    got = model.generate(image, max_length=6, eos=23)
    for mine, want in zip(got.tolist(), ids[:, 1:].tolist()):
        stop = want.index(23) + 1 if 23 in want else 6
        assert mine == want[:stop] + [23] * (got.shape[1] - stop)


@pytest.mark.parametrize("beams", [2, 3, 5])
def test_beams_are_those_of_transformers(beams):
    """Its generate has the image fixed, a copy for each beam."""
    model, routed = captioner()
    batch = hf_tools.batch("gpt2")
    ids = batch["input_ids"][:, :2]
    with torch.no_grad():
        x_r = model.see(batch["image"])
        embeds = torch.cat([x_r, model.text.model.get_input_embeddings()(ids)], 1)
    mask, lengths = torch.ones(3, 3, dtype=torch.int64), set()
    for eos in model.generate(batch["image"], ids, max_length=6, eos=0).unique().tolist():
        for penalty in (0.0, 1.0, 2.0):
            got = model.generate(batch["image"], ids, beams, 6, eos, penalty)
            with routed.context(x_r.repeat_interleave(beams, 0)):
                want = model.text.model.generate(
                    inputs_embeds=embeds, attention_mask=mask, num_beams=beams, max_new_tokens=6, eos_token_id=eos,
                    pad_token_id=eos, length_penalty=penalty, do_sample=False,
                )  # fmt: skip
            assert torch.equal(got, want), (eos, penalty)
            lengths |= {row.index(eos) for row in got.tolist() if eos in row}
    assert len(lengths) > 1, "beams must have ended at different steps"


def test_bart_through_transformers_is_the_image_by_itself():
    """Its beams and its cache: what was found has the score that a call without either gives it."""
    model = hf_tools.host("bart")
    routed = inject_routed_lora(model, RoutedLoRAConfig(function="mul", r=4, sites=("self.q", "self.v", "cross.v")))
    with torch.no_grad():
        for p in routed.parameters():
            p.normal_(std=0.3)
    batch = hf_tools.batch("bart")
    labels = batch.pop("labels")
    found = model.generate(
        **batch, num_beams=3, max_new_tokens=6, length_penalty=1.0, return_dict_in_generate=True, output_scores=True,
        eos_token_id=hf_tools.WORDS - 1, pad_token_id=hf_tools.PAD,
    )  # fmt: skip
    with torch.no_grad():
        logp = model(**batch, decoder_input_ids=found.sequences).logits[:, :-1].log_softmax(-1)
    ids = found.sequences[:, 1:]
    real = ids != hf_tools.PAD
    total = (logp.gather(2, ids[..., None])[..., 0] * real).sum(1) / real.sum(1)
    torch.testing.assert_close(found.sequences_scores.double(), total, rtol=1e-5, atol=1e-5)
    assert labels.shape[0] == len(ids)


def test_bad_options():
    with pytest.raises(UserError, match="at least 1, got 0 and 4"):
        searched(0, 1, 1.0)
