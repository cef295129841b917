"""Hugging Face checkpoints for a run: host, image processor and tokenizer, by name or folder, checked to fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .. import clip
from ..config import UserError
from .hf import ViTGPT2, ViTRoberta, need_transformers
from .run_config import RouteConfig

# CaptionBatches and cross_entropy know it for padding; no token has it, so that none is left unlearned.
PAD = -100


@dataclass(frozen=True)
class Loaded:
    """A host in fp32 and eval mode, an image -> (3, H, W), a tokenizer, and what a result says of them."""

    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Any
    about: dict


def load_host(config: RouteConfig, answers: int = 0) -> Loaded:
    """ViTGPT2 for captions, ViTRoberta with so many answers for questions. What is drawn is drawn by config.seed.

    Raises: UserError for what cannot be loaded, is of another kind or does not fit together.
    """
    transformers, device = need_transformers(), clip.pick_device(config.device)
    for option, name, kind in (("--vision", config.vision, "vit"), ("--text", config.text, config.host)):
        found = _loaded(option, name, transformers.AutoConfig.from_pretrained).model_type
        if found != kind:
            raise UserError(f"{option} must be a model of the kind {kind}, got {name!r}, a {found}")
    processor = _loaded("--vision", config.vision, transformers.AutoImageProcessor.from_pretrained)
    tokenizer = _loaded("--text", config.text, transformers.AutoTokenizer.from_pretrained)
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        model = _host(config, answers)
    words = model.text.model.config.vocab_size
    if len(tokenizer) > words:
        raise UserError(f"{config.text}: the tokenizer has {len(tokenizer)} tokens, the model {words}")
    about = {"vision": config.vision, "text": config.text, "transformers": transformers.__version__}
    return Loaded(model.float().to(device).eval(), Preprocess(processor), tokenizer, about)


def _host(config: RouteConfig, answers: int) -> nn.Module:
    if config.host == "gpt2":
        return _loaded("--text", config.text, lambda text: ViTGPT2.from_pretrained(config.vision, text, config.prefix))
    try:
        return _loaded(
            "--text", config.text,
            lambda text: ViTRoberta.from_pretrained(
                config.vision, text, answers, config.double_embeddings, config.draw_pooler
            ),
        )  # fmt: skip
    except UserError as error:
        # The command's name for what the class calls drawn.
        raise UserError(str(error).replace("drawn=True draws", "--draw-pooler draws")) from error


def _loaded(option: str, name: str, load: Callable[[str], Any]) -> Any:
    try:
        return load(name)
    except UserError:
        raise
    # What transformers lets through for a name, a folder or a file that is not what it should be.
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{option}: transformers cannot load {name!r}: {why}") from error


@dataclass(frozen=True)
class Preprocess:
    """An image -> (3, H, W), by transformers' image processor."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """(B, T) int64, T that of the longest, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
