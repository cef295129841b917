"""open_clip models: loading, frozen text features, logits of the masked and of the plain model.

open_clip is imported inside the functions that need it, so that `import rmt` stays light.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UserError
from .masked import disabled

Tokenizer = Callable[[list[str]], Tensor]


@dataclass
class Clip:
    """An open_clip model in fp32 and eval mode, its own eval preprocessing, and its tokenizer."""

    model: nn.Module
    preprocess: Callable
    tokenizer: Tokenizer


def load(name: str, pretrained: str | None, image_size: int | None, device: torch.device) -> Clip:
    """Loads `local-dir:PATH`, `hf-hub:ID` or an open_clip name with a pretrained tag or file.

    Warns where the weights were, or may have been, trained with QuickGELU and the model is built without: it then
    computes wrong features without any error (open_clip issue 771). fp32, as R-AMT.

    Raises: UserError where open_clip cannot load it.
    """
    import open_clip

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, pretrained=pretrained, force_image_size=image_size, device=device
            )
            tokenizer = open_clip.get_tokenizer(name)
        # open_clip lets through whatever its parsers and torch.load raise on a bad name, folder or file.
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(f"open_clip cannot load {name!r}, pretrained {pretrained!r}: {error}") from error
    for warning in caught:
        warnings.warn(str(warning.message), warning.category, stacklevel=2)
    _warn_quick_gelu(name, pretrained, [str(warning.message) for warning in caught])
    _check_loaded(model)
    return Clip(model.eval(), preprocess, tokenizer)


def _warn_quick_gelu(name: str, pretrained: str | None, messages: list[str]) -> None:
    import open_clip

    known = pretrained is None or open_clip.pretrained.is_pretrained_cfg(name, pretrained)
    if any("QuickGELU" in message for message in messages):
        warnings.warn(f"{name!r} has another activation than {pretrained!r} needs: try {name}-quickgelu", stacklevel=3)
    elif not known and "quickgelu" not in name:
        warnings.warn(
            f"no one can tell which activation {pretrained!r} needs: OpenAI's weights need {name}-quickgelu",
            stacklevel=3,
        )


def _check_loaded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"the model's weights must be finite, but {name} is not")


def prompts(classnames: Sequence[str], template: str) -> list[str]:
    """One text a class: `_` becomes a space, and `{}` of the template becomes the name."""
    return [template.replace("{}", name.replace("_", " ")) for name in classnames]


@torch.no_grad()
def text_features(clip: Clip, classnames: Sequence[str], template: str) -> Tensor:
    """(C, D) L2-normalised fp32 text features, in one batched text pass; the text tower is never masked."""
    device = clip.model.logit_scale.device
    text = clip.tokenizer(prompts(classnames, template)).to(device)
    return F.normalize(clip.model.encode_text(text).float(), dim=-1)


def logits(model: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    """(B, 3, H, W) images, (C, D) text features -> (B, C) fp32: exp(logit_scale) * cosine.

    A `logit_bias` (SigLIP) is left out: it is one number for all classes, which changes no softmax and no ranking.
    """
    image_features = F.normalize(model.encode_image(image).float(), dim=-1)
    return model.logit_scale.exp() * image_features @ text.T


@torch.no_grad()
def frozen_logits(model: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    """`logits` of the zero-shot model, (B, C): the same weights with all masks disabled, and no graph."""
    with disabled(model):
        return logits(model, image, text)


def image_format(model: nn.Module) -> tuple[tuple[int, int], tuple[float, ...], tuple[float, ...]]:
    """(height, width), mean and std of the images the model takes."""
    size = model.visual.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    cfg = model.visual.preprocess_cfg
    return size, tuple(cfg["mean"]), tuple(cfg["std"])
