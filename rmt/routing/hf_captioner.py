"""A Hugging Face ViT and GPT-2 as a captioner of a run.

A text is the caption and the end token; without the image's token before it, the start token too, which is GPT-2's end
token. So the labels are the same in both forms, and their losses compare. Deviation from the official code, which pads
with id 0 and leaves it out of the loss, so that GPT-2's "!" is never learned: padding here is -100, which is no token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import UserError
from ..data.captions import Captioned
from ..data.text_batches import CaptionBatches
from .evaluate import evaluating
from .hf_load import PAD, Loaded, load_host, padded
from .run_config import RouteConfig


@dataclass(frozen=True)
class GPT2Captioner:
    """See the module. start: token ids before every caption."""

    loaded: Loaded
    start: tuple[int, ...]
    end: int
    pad: int = PAD

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @property
    def room(self) -> int:
        """Positions for a caption and its end."""
        positions = self.model.text.model.config.max_position_embeddings
        return positions - self.model.prefix - len(self.start)

    def batches(self, items: Sequence[Captioned], batch: int, seed: int) -> CaptionBatches:
        """Of these images through the ViT's own processor and GPT-2's tokenizer."""
        return CaptionBatches(items, self.loaded.preprocess, self.ids, pad=self.pad, batch=batch, seed=seed)

    def ids(self, texts: list[str]) -> Tensor:
        """(B, T) int64; a caption that GPT-2 has no positions for is cut."""
        rows = self.loaded.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return padded([[*self.start, *row[: self.room - 1], self.end] for row in rows], self.pad)

    def write(self, image: Tensor, config: RouteConfig) -> list[str]:
        """By beam search; one beam is greedy."""
        prompt = torch.tensor([self.start] * len(image), dtype=torch.int64, device=image.device)
        with evaluating(self.model):
            ids = self.model.generate(
                image, prompt.reshape(len(image), len(self.start)), beams=config.beams,
                max_length=min(config.length, self.room), eos=self.end,
            )  # fmt: skip
        return [self.text(row) for row in ids.tolist()]

    def text(self, ids: list[int]) -> str:
        """Of one generated row, without end tokens."""
        return " ".join(self.loaded.tokenizer.decode([token for token in ids if token != self.end]).split())

    def set_grad_checkpointing(self) -> None:
        """Of GPT-2."""
        self.model.set_grad_checkpointing(True)

    def about(self) -> dict:
        """Names of both, version of transformers."""
        return self.loaded.about


def load_gpt2(config: RouteConfig) -> GPT2Captioner:
    """Raises UserError as `load_host`, and for a tokenizer without an end token."""
    loaded = load_host(config)
    end = loaded.tokenizer.eos_token_id
    if end is None:
        raise UserError(f"{config.text}: captions need a tokenizer with an end token (eos_token), got none")
    start = loaded.tokenizer.bos_token_id
    return GPT2Captioner(loaded, () if config.prefix else (end if start is None else start,), end)
