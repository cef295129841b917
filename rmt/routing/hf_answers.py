"""A Hugging Face ViT and RoBERTa with an answer head for a run on questions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..config import UserError
from ..data.text_batches import QuestionBatches
from ..data.vqa import Question
from .hf_load import Loaded, load_host, padded
from .run_config import RouteConfig

ANSWERS_FILE = "answers.json"


@dataclass(frozen=True)
class Answerer:
    """A host, and the answers that its head's rows stand for."""

    loaded: Loaded
    classes: Mapping[str, int]

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @property
    def pad(self) -> int:
        """RoBERTa's own, which it masks."""
        return self.model.text.model.config.pad_token_id

    def batches(self, questions: Sequence[Question], batch: int, seed: int) -> QuestionBatches:
        """Of these questions through the ViT's own processor and RoBERTa's tokenizer."""
        return QuestionBatches(
            questions, self.classes, self.loaded.preprocess, self.ids, pad=self.pad, batch=batch, seed=seed
        )

    def ids(self, texts: list[str]) -> Tensor:
        """(B, T) int64, with the tokenizer's start and end; what RoBERTa has no positions for is cut before the end."""
        room = self.model.text.model.config.max_position_embeddings - self.pad - 2
        rows = self.loaded.tokenizer(texts, verbose=False)["input_ids"]
        return padded([row if len(row) <= room else [*row[: room - 1], row[-1]] for row in rows], self.pad)


def load_answerer(config: RouteConfig, classes: Mapping[str, int]) -> Answerer:
    """Raises UserError as `load_host`, and for a tokenizer that pads with another id than RoBERTa."""
    answerer = Answerer(load_host(config, len(classes)), classes)
    theirs = answerer.loaded.tokenizer.pad_token_id
    if theirs is not None and theirs != answerer.pad:
        raise UserError(f"{config.text}: the tokenizer pads with id {theirs}, the model with {answerer.pad}")
    return answerer


def answers_file(classes: Mapping[str, int]) -> bytes:
    """A JSON list, in the order of the classes."""
    return (json.dumps(sorted(classes, key=classes.get), indent=1) + "\n").encode()


def read_answers(path: str | Path) -> dict[str, int]:
    """Answer -> its class. Raises UserError for what `answers_file` did not make."""
    try:
        answers = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be the list of answers that rmt route train wrote: {error}") from error
    if not isinstance(answers, list) or not answers or not all(isinstance(text, str) for text in answers):
        raise UserError(f"{path} must be a list of answers, as rmt route train writes it")
    return {answer: label for label, answer in enumerate(answers)}
