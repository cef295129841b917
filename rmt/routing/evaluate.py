"""Measuring a captioner or a VQA model: held-out loss and perplexity, greedy captions, the official VQA accuracy."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import UserError
from ..data.text_batches import QuestionBatches
from ..data.vqa import accuracy
from .train import answer_logits, next_tokens


@dataclass(frozen=True)
class HeldOut:
    """loss: nats a token, over all tokens alike. perplexity: its exponential. tokens: how many."""

    loss: float
    perplexity: float
    tokens: int


@torch.no_grad()
def held_out(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], pad: int = 0) -> HeldOut:
    """Next-token loss of a captioner over batches of image (B, 3, H, W) and text (B, T), in eval mode.

    Raises: UserError where there is no token.
    """
    total, tokens = 0.0, 0
    with evaluating(model) as device:
        for batch in batches:
            logits, labels = next_tokens(model, [t.to(device) for t in batch])
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=pad, reduction="sum")
            total, tokens = total + loss.item(), tokens + int((labels != pad).sum())
    if not tokens:
        raise UserError("measuring needs at least one token of a caption, got none")
    mean = total / tokens
    # exp overflows at 710 nats, where nothing is left to read off it.
    return HeldOut(mean, math.exp(mean) if mean < 700 else math.inf, tokens)


@dataclass(frozen=True)
class HeldOutAnswers:
    """loss: mean binary cross-entropy over questions and classes, nats. vqa_accuracy: the official one, 0 to 1, of the
    likeliest answer of the vocabulary, a mean over all questions. questions: how many."""

    loss: float
    vqa_accuracy: float
    questions: int


@torch.no_grad()
def held_out_answers(model: nn.Module, batches: QuestionBatches) -> HeldOutAnswers:
    """Of a VQA model over all questions, in eval mode."""
    answers, right, asked, total = list(batches.classes), [], iter(batches.questions), 0.0
    with evaluating(model) as device:
        for image, text, target in batches.in_order():
            logits = answer_logits(model, image.to(device), text.to(device))
            total += F.binary_cross_entropy_with_logits(logits, target.to(device), reduction="sum").item()
            for best in logits.argmax(-1).tolist():
                right.append(accuracy(answers[best], next(asked).answers))
    return HeldOutAnswers(total / (len(right) * len(answers)), sum(right) / len(right), len(right))


def vqa_accuracy(model: nn.Module, batches: QuestionBatches) -> float:
    """The official accuracy alone: see `HeldOutAnswers`."""
    return held_out_answers(model, batches).vqa_accuracy


@torch.no_grad()
def generate(model: nn.Module, image: Tensor, *, start: int, end: int, pad: int = 0, length: int = 30) -> Tensor:
    """Greedy captions of an open_clip CoCa: (B, 3, H, W) -> (B, L) int64, L at most `length`, start token included.

    A caption ends with `end`, unless `length` ends it, and is padded behind. The image is encoded once. In place of
    CoCa.generate, which asserts that it has transformers and finds none in version 5. The likeliest token every time;
    no beams, no least length.

    Raises: UserError for a length that the model has no positions for.
    """
    if not 2 <= length <= model.context_length:
        raise UserError(f"length must be from 2 to the model's {model.context_length} tokens, got {length}")
    with evaluating(model) as device:
        seen = model(image.to(device))
        if not isinstance(seen, Mapping) or "image_embs" not in seen:
            raise UserError(f"greedy captions need open_clip's CoCa, got {type(model).__name__}")
        text = torch.full((len(image), 1), start, device=device)
        done = torch.zeros(len(image), dtype=torch.bool, device=device)
        while text.shape[1] < length and not done.all():
            logits = model(None, text, seen["image_features"], seen["image_embs"], output_labels=False)["logits"]
            logits[:, -1, pad] = -math.inf
            token = logits[:, -1].argmax(-1).masked_fill(done, pad)
            text, done = torch.cat([text, token[:, None]], 1), done | (token == end)
    return text


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """The model in eval mode inside; gives its device."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield next(model.parameters()).device
    finally:
        for module, mode in modes.items():
            module.training = mode
