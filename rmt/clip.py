"""open_clip models: loading, frozen text features, logits of the masked and of the plain model.

open_clip is imported inside the functions that need it, so that `import rmt` stays light.
"""

import inspect
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UserError
from .masked import disabled, masks

Tokenizer = Callable[[list[str]], Tensor]
FOLDER = "local-dir:"
# open_clip lets through whatever its parsers and torch.load raise on a bad name, folder or file.
NOT_LOADED = (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError)
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


@dataclass
class Clip:
    """An open_clip model in fp32 and eval mode, its own eval preprocessing, and its tokenizer.

    config: open_clip's `model_cfg`, with the image size and the activation that the model was built with; None where
        this version of open_clip does not tell it.
    """

    model: nn.Module
    preprocess: Callable
    tokenizer: Tokenizer
    config: dict | None = None


def pick_device(name: str) -> torch.device:
    """`auto` is a CUDA device where there is one. Raises UserError for a device that is unknown or not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device must be auto, cpu or a device of this machine, got {name!r}: {error}") from error


# Models that this process was handed in place of files: what `load` is asked for -> makes a new Clip on a device.
HANDED: dict[tuple[str, str | None, int | None], Callable[[torch.device], Clip]] = {}


def load(name: str, pretrained: str | None, image_size: int | None, device: torch.device) -> Clip:
    """Loads `local-dir:PATH`, `hf-hub:ID` or an open_clip name with a pretrained tag or file. fp32, as R-AMT.

    Weights that were trained with QuickGELU and run without it give wrong features without any error (open_clip issue
    771): they are refused where that can be known, and warned of where it cannot.

    Raises: UserError where open_clip cannot load it, or would build it with another activation than OpenAI's weights.
    """
    if (handed := HANDED.get((name, pretrained, image_size))) is not None:
        return handed(device)
    options = {"force_image_size": image_size, "device": device}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model, preprocess, tokenizer = _make(name, pretrained, options)
        except NOT_LOADED as error:
            raise UserError(f"open_clip cannot load {name!r}, pretrained {pretrained!r}: {error}") from error
    quick = any(type(module).__name__ == "QuickGELU" for module in model.modules())
    _check_activation(name, pretrained, quick)
    for warning in caught:
        # Which loader took a TorchScript archive is no news for the user.
        if "torch.jit.load" not in str(warning.message):
            warnings.warn(str(warning.message), warning.category, stacklevel=2)
    _check_loaded(model)
    return Clip(model.eval(), preprocess, tokenizer, _config(name, image_size, quick))


def _make(name: str, pretrained: str | None, options: dict[str, Any]) -> tuple[nn.Module, Callable, Tokenizer]:
    import open_clip

    make = open_clip.create_model_and_transforms
    if name.startswith(FOLDER) and not hasattr(open_clip.factory, "parse_model_name"):
        return _make_folder(Path(name.removeprefix(FOLDER)), options)
    # OpenAI's own files are TorchScript archives, which torch.load takes only so; it hands them to torch.jit.load.
    if _is_torchscript(pretrained) and "weights_only" in inspect.signature(make).parameters:
        options = options | {"weights_only": False}
    model, _, preprocess = make(name, pretrained=pretrained, **options)
    return model, preprocess, open_clip.get_tokenizer(name)


def registered(model_cfg: dict[str, Any]) -> str:
    """Makes a configuration known to open_clip until the process ends. Returns its name, which is no other's."""
    import open_clip

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{Path(scratch).name}.json"
        path.write_text(json.dumps(model_cfg))
        open_clip.add_model_config(path)
        return path.stem


def _make_folder(folder: Path, options: dict[str, Any]) -> tuple[nn.Module, Callable, Tokenizer]:
    """What `local-dir:` does from open_clip 3 on, for those before."""
    import open_clip
    from safetensors.torch import load_file

    config = folder_config(folder)
    image = {f"image_{name}": config.get("preprocess_cfg", {}).get(name) for name in _PREPROCESS}
    name = registered(config["model_cfg"])
    model, _, preprocess = open_clip.create_model_and_transforms(name, **options, **image)
    tokenizer = open_clip.get_tokenizer(name)
    weights = next((folder / file for file in _WEIGHTS if (folder / file).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"expected one of {', '.join(_WEIGHTS)} in {folder}, got none")
    state = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, "cpu", weights_only=True)
    open_clip.model.resize_pos_embed(state, model)
    model.load_state_dict(state)
    return model, preprocess, tokenizer


def folder_config(folder: Path) -> dict[str, Any]:
    """What `open_clip_config.json` in a model's folder holds."""
    return json.loads((folder / "open_clip_config.json").read_text())


def _is_torchscript(pretrained: str | None) -> bool:
    if pretrained is None or not os.path.isfile(pretrained) or not zipfile.is_zipfile(pretrained):
        return False
    with zipfile.ZipFile(pretrained) as archive:
        return any(entry.endswith("/constants.pkl") for entry in archive.namelist())


def _check_activation(name: str, pretrained: str | None, quick: bool) -> None:
    """Whether a model built with QuickGELU, or without, is what its weights need. A folder's config is believed."""
    import open_clip

    if pretrained is None or ":" in name or quick:
        return
    known = open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained)
    fix = f"{name}-quickgelu"
    if known.get("quick_gelu") or _is_torchscript(pretrained):
        whose = repr(pretrained) if known else f"{pretrained}, a TorchScript archive as OpenAI's weights are,"
        raise UserError(f"{whose} was trained with QuickGELU, and {name!r} is built without: its name must be {fix!r}")
    if not known:
        message = f"no one can tell which activation {pretrained!r} needs: OpenAI's weights need {fix}"
        warnings.warn(message, stacklevel=3)


def _config(name: str, image_size: int | None, quick: bool) -> dict | None:
    import open_clip

    if name.startswith(FOLDER):
        config = folder_config(Path(name.removeprefix(FOLDER)))["model_cfg"]
    else:
        config = open_clip.get_model_config(name if ":" in name else name.replace("/", "-"))
    if config is not None:
        config["quick_gelu"] = quick or config.get("quick_gelu", False)
        if image_size is not None:
            config["vision_cfg"]["image_size"] = image_size
    return config


def _check_loaded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"the model's weights must be finite, but {name} is not")


def prompts(classnames: Sequence[str], template: str) -> list[str]:
    """One text a class: `_` becomes a space, and `{}` of the template becomes the name."""
    return [template.replace("{}", name.replace("_", " ")) for name in classnames]


def text_features(clip: Clip, classnames: Sequence[str], template: str) -> Tensor:
    """(C, D) L2-normalised fp32 features of the zero-shot text tower, without a graph, in one batched text pass."""
    return Text.make(clip, classnames, template).zero_shot


@dataclass(frozen=True)
class Text:
    """The class names' text features: computed once, unless the text tower has masks, which change what it computes.

    tokens: (C, context). zero_shot: (C, D) of the tower with all masks disabled.
    """

    model: nn.Module
    tokens: Tensor
    zero_shot: Tensor

    @classmethod
    def make(cls, clip: Clip, classnames: Sequence[str], template: str) -> "Text":
        """One text a class from `template`, which has one {}; before the model is masked, or after."""
        tokens = clip.tokenizer(prompts(classnames, template)).to(clip.model.logit_scale.device)
        with torch.no_grad(), disabled(clip.model):
            return cls(clip.model, tokens, _encode(clip.model, tokens))

    @property
    def masked(self) -> bool:
        """Whether the text tower has masks: any mask outside of `visual`."""
        return any(not mask.key.startswith("visual.") for mask in masks(self.model))

    def features(self, grad: bool = False) -> Tensor:
        """(C, D) features of the tower with its masks as they are; with masks, a text pass over all classes a call."""
        if not self.masked:
            return self.zero_shot
        with torch.set_grad_enabled(grad):
            return _encode(self.model, self.tokens)

    def student(self) -> Tensor:
        """(C, D), with a graph where the text tower has masks."""
        return self.features(grad=True)

    def teacher(self) -> Tensor:
        """(C, D) of the zero-shot model, without a graph."""
        return self.zero_shot


def _encode(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.normalize(model.encode_text(tokens).float(), dim=-1)


def logits(model: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    """(B, 3, H, W) images, (C, D) text features -> (B, C) fp32, under autocast too: exp(logit_scale) * cosine.

    A `logit_bias` (SigLIP) is left out: it is one number for all classes, which changes no softmax and no ranking.
    """
    image_features = F.normalize(model.encode_image(image).float(), dim=-1)
    # A product in 16 bits would be off by a tenth at CLIP's scale of 100.
    with torch.autocast(image_features.device.type, enabled=False):
        return model.logit_scale.exp() * image_features @ text.float().T


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
