"""Captioners: what a run needs of one, an open_clip CoCa with its tokenizer, losses and scored captions of either."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from .. import clip
from ..config import UserError
from ..data.captions import Captioned
from ..data.text_batches import CaptionBatches
from .evaluate import generate, held_out
from .hosts import describe
from .run_config import RouteConfig
from .scores import TOKENIZER, caption_scores

EXAMPLES = 5


class Captioner(Protocol):
    """A model with its preprocessing and its tokenizer. pad: the id of padding, which no label is."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def pad(self) -> int: ...

    def batches(self, items: Sequence[Captioned], batch: int, seed: int) -> CaptionBatches:
        """Of these images through the model's own preprocessing and tokenizer."""
        ...

    def write(self, image: Tensor, config: RouteConfig) -> list[str]:
        """A caption for each of (B, 3, H, W)."""
        ...

    def set_grad_checkpointing(self) -> None:
        """Of the blocks that are tuned."""
        ...

    def about(self) -> dict:
        """What a result says of the model."""
        ...


@dataclass(frozen=True)
class CoCaCaptioner:
    """A loaded CoCa with the ids of its tokenizer's start and end."""

    name: str
    pretrained: str | None
    loaded: clip.Clip
    start: int
    end: int

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @property
    def pad(self) -> int:
        return self.model.pad_id

    def batches(self, items: Sequence[Captioned], batch: int, seed: int) -> CaptionBatches:
        """Of these images through the model's own preprocessing and tokenizer."""
        loaded = self.loaded
        return CaptionBatches(items, loaded.preprocess, loaded.tokenizer, pad=self.pad, batch=batch, seed=seed)

    def write(self, image: Tensor, config: RouteConfig) -> list[str]:
        """Greedy captions."""
        ids = generate(
            self.model, image, start=self.start, end=self.end, pad=self.pad,
            length=min(config.length, self.model.context_length),
        )  # fmt: skip
        return [self.text(row) for row in ids.tolist()]

    def set_grad_checkpointing(self) -> None:
        """Of the text decoder."""
        self.model.text_decoder.set_grad_checkpointing(True)

    def about(self) -> dict:
        """Its name and its weights' tag."""
        return {"model": self.name, "pretrained": self.pretrained}

    def text(self, ids: list[int]) -> str:
        """Of one generated row, without start, end and padding."""
        kept = [token for token in ids[1:] if token not in (self.end, self.pad, self.start)]
        return " ".join(self.loaded.tokenizer.decode(kept).split())


def load_coca(config: RouteConfig) -> CoCaCaptioner:
    """Raises UserError for what is no CoCa, one without weights, and a tokenizer without ids of start and end."""
    loaded = clip.load(config.model, config.pretrained, config.image_size, clip.pick_device(config.device))
    if not hasattr(loaded.model, "text_decoder"):
        raise UserError(f"model must be an open_clip CoCa, such as coca_ViT-B-32, got {config.model!r}")
    describe(loaded.model)
    if not loaded.model.text_decoder.text_projection.any():
        raise UserError(
            f"{config.model} must have weights: open_clip leaves a new CoCa's text projection at 0, and no gradient "
            "passes it. Give --pretrained, or a local-dir with weights"
        )
    ids = [getattr(loaded.tokenizer, name, None) for name in ("sot_token_id", "eot_token_id")]
    if None in ids or not hasattr(loaded.tokenizer, "decode"):
        kind = type(loaded.tokenizer).__name__
        raise UserError(f"captioning needs open_clip's own tokenizer, with ids of start and end, got {kind}")
    return CoCaCaptioner(config.model, config.pretrained, loaded, *ids)


def measure(captioner: Captioner, items: Sequence[Captioned], config: RouteConfig) -> dict:
    """Loss, perplexity and tokens over all captions of these images."""
    batches = captioner.batches(items, config.batch, config.seed)
    return dataclasses.asdict(held_out(captioner.model, batches.in_order(), captioner.pad))


def caption(captioner: Captioner, items: Sequence[Captioned], config: RouteConfig) -> dict:
    """Captions of the first `config.generate` images, their scores, and a few printed beside a reference."""
    items, texts = items[: config.generate], []
    loader = captioner.batches(items, config.batch, config.seed)
    device = next(captioner.model.parameters()).device
    for start in range(0, len(items), config.batch):
        image = loader.images([item.path for item in items[start : start + config.batch]]).to(device)
        texts += captioner.write(image, config)
    scores = caption_scores(texts, [item.captions for item in items])
    shown = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
    print(f"captions   {shown} ({len(items)} images; words by {TOKENIZER})")
    examples = [
        {"image": item.path, "caption": text, "reference": item.captions[0]} for item, text in zip(items, texts)
    ]
    for row in examples[:EXAMPLES]:
        print(f"  {Path(row['image']).name}: {row['caption']!r}, a reference: {row['reference']!r}")
    return {"captions": scores, "captioned": len(items), "tokenizer": TOKENIZER, "examples": examples}
