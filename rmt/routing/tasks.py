"""What a run is tuned on and measured by: captions, of either captioner, or questions."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ..config import UserError
from ..data.captions import Captioned, read_captions
from ..data.text_batches import CaptionBatches, QuestionBatches
from ..data.vqa import Question, read_vqa, vocabulary
from .captioner import Captioner, caption, load_coca, measure
from .evaluate import held_out_answers
from .hf_answers import ANSWERS_FILE, Answerer, answers_file, load_answerer, read_answers
from .hf_captioner import load_gpt2
from .inject import Routed
from .run_config import RouteConfig
from .train import train_captions, train_vqa

CAPTIONERS = {"coca": load_coca, "gpt2": load_gpt2}


class Task(Protocol):
    """A loaded host with its data.

    unit: what is counted, images or questions. files: what a finished run must keep for `of_run`, by name.
    """

    unit: str
    files: Mapping[str, bytes]

    @staticmethod
    def parts(config: RouteConfig) -> dict[str, list]:
        """train and, where the data has them, val and test."""
        ...

    @classmethod
    def new(cls, config: RouteConfig, train: Sequence) -> "Task":
        """For a run on these training items."""
        ...

    @classmethod
    def of_run(cls, config: RouteConfig, run: Path) -> "Task":
        """Of a finished run, before its parameters."""
        ...

    @property
    def model(self) -> nn.Module: ...

    def batches(self, items: Sequence) -> CaptionBatches | QuestionBatches: ...

    def counted(self, batches: Any) -> str:
        """What an epoch goes over, in words."""
        ...

    def fingerprint(self, batches: Any) -> dict[str, str]:
        """Which data these are."""
        ...

    def train(self, routed: Routed, batches: Any, **others: Any) -> None: ...

    def set_grad_checkpointing(self) -> None: ...

    def measure(self, items: Sequence) -> dict: ...

    def said(self, found: Mapping) -> str:
        """What `measure` found, in words."""
        ...

    def show(self, items: Sequence) -> dict:
        """What is made and scored besides; nothing where the config asks for none."""
        ...

    def about(self) -> dict:
        """What a result says of the model."""
        ...


def task_of(config: RouteConfig) -> type["CaptionTask"] | type["QuestionTask"]:
    """Of the config's data."""
    return CaptionTask if config.questions is None else QuestionTask


@dataclasses.dataclass(frozen=True)
class CaptionTask:
    """Next-token loss of captions."""

    config: RouteConfig
    captioner: Captioner
    unit = "images"

    @property
    def files(self) -> dict[str, bytes]:
        return {}

    @staticmethod
    def parts(config: RouteConfig) -> dict[str, list[Captioned]]:
        return vars(read_captions(config.captions))

    @classmethod
    def new(cls, config: RouteConfig, train: Sequence[Captioned]) -> "CaptionTask":
        return cls(config, CAPTIONERS[config.host](config))

    @classmethod
    def of_run(cls, config: RouteConfig, run: Path) -> "CaptionTask":
        return cls(config, CAPTIONERS[config.host](config))

    @property
    def model(self) -> nn.Module:
        return self.captioner.model

    def batches(self, items: Sequence[Captioned]) -> CaptionBatches:
        return self.captioner.batches(items, self.config.batch, self.config.seed)

    def counted(self, batches: CaptionBatches) -> str:
        return f"{len(batches.pairs)} captions"

    def fingerprint(self, batches: CaptionBatches) -> dict[str, str]:
        return {"captions": _hash(batches.pairs)}

    def train(self, routed: Routed, batches: CaptionBatches, **others: Any) -> None:
        train_captions(self.model, routed, batches, self.config.training(), pad=self.captioner.pad, **others)

    def set_grad_checkpointing(self) -> None:
        self.captioner.set_grad_checkpointing()

    def measure(self, items: Sequence[Captioned]) -> dict:
        return measure(self.captioner, items, self.config)

    def said(self, found: Mapping) -> str:
        tokens = f"{found['tokens']:,} tokens"
        return f"loss {found['loss']:.4f} nats a token, perplexity {found['perplexity']:.2f} ({tokens})"

    def show(self, items: Sequence[Captioned]) -> dict:
        return caption(self.captioner, items, self.config) if self.config.generate else {}

    def about(self) -> dict:
        return self.captioner.about()


@dataclasses.dataclass(frozen=True)
class QuestionTask:
    """Binary cross-entropy of answers; the vocabulary is of the training answers alone."""

    config: RouteConfig
    answerer: Answerer
    unit = "questions"

    @staticmethod
    def parts(config: RouteConfig) -> dict[str, list[Question]]:
        return vars(read_vqa(config.questions))

    @classmethod
    def new(cls, config: RouteConfig, train: Sequence[Question]) -> "QuestionTask":
        try:
            classes = vocabulary(train, config.min_answers)
        except UserError as error:
            raise UserError(f"{config.questions}: {error}: --min-answers {config.min_answers} is too many") from error
        return cls(config, load_answerer(config, classes))

    @classmethod
    def of_run(cls, config: RouteConfig, run: Path) -> "QuestionTask":
        return cls(config, load_answerer(config, read_answers(run / ANSWERS_FILE)))

    @property
    def model(self) -> nn.Module:
        return self.answerer.model

    @property
    def files(self) -> dict[str, bytes]:
        return {ANSWERS_FILE: answers_file(self.answerer.classes)}

    def batches(self, items: Sequence[Question]) -> QuestionBatches:
        return self.answerer.batches(items, self.config.batch, self.config.seed)

    def counted(self, batches: QuestionBatches) -> str:
        return f"{len(batches.classes)} answers"

    def fingerprint(self, batches: QuestionBatches) -> dict[str, str]:
        return {"questions": _hash(batches.questions), "answers": _hash(list(batches.classes))}

    def train(self, routed: Routed, batches: QuestionBatches, **others: Any) -> None:
        train_vqa(self.model, routed, batches, self.config.training(), **others)

    def set_grad_checkpointing(self) -> None:
        self.model.set_grad_checkpointing(True)

    def measure(self, items: Sequence[Question]) -> dict:
        return dataclasses.asdict(held_out_answers(self.model, self.batches(items)))

    def said(self, found: Mapping) -> str:
        return f"VQA accuracy {100 * found['vqa_accuracy']:.2f} %, BCE {found['loss']:.4f}"

    def show(self, items: Sequence[Question]) -> dict:
        return {}

    def about(self) -> dict:
        return self.answerer.loaded.about | {"answers": len(self.answerer.classes)}


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
