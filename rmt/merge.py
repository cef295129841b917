"""A task merged into its base model: a plain open_clip folder that `local-dir:OUT` loads anywhere, without rmt."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from . import clip
from .checkpoint import Task, load_task
from .config import UserError
from .files import whole_folder, write_json
from .model import MaskModel

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
_TEXTS = ("a photo of a cat.", "a diagram of two dogs", "häuser, 12")
_IMAGES, _MOST_TEXTS = 4, 16
# What open_clip's push_to_hf_hub keeps of a model's preprocessing, and two more that change images.
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color", "mode")


def merge(
    task_path: str | Path, out: str | Path, model: str | None = None, pretrained: str | None = None,
    device: str = "cpu", allow_base_mismatch: bool = False,
) -> Path:  # fmt: skip
    """Writes the base model with the task's weights switched off, as `out`/open_clip_config.json and its weights.

    Before the folder gets its name it is loaded again, and all that users see of the two models is compared bit for
    bit: weights, preprocessing, tokens, text features, and logits of random images. Plain models use a fused kernel of
    torch's for attention without gradients, which rounds otherwise; it is off while logits are compared.

    Args:
        out: a new folder, or an empty one that is not the current one.
        model, pretrained: the base model, as for `rmt.clip.load`; None: as the task names it.

    Raises: UserError where `out` holds something or is the current folder, the base model is unknown or another, the
        two models differ, or open_clip is older than 3.0; OSError where the disk is full. Nothing is left then.
    """
    _need_local_dir()
    task, out = load_task(task_path), Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out must be a new folder, or an empty one, but {out} holds something")
    if out.resolve() == Path.cwd():
        # "." cannot be renamed over; by another name it would be gone under the shell that stands in it.
        raise UserError(f"out must be another folder than the current one: name a new one, such as {out / 'merged'}")
    loaded = load_base(task, model, pretrained, torch.device(device))
    masked = MaskModel.from_pretrained(loaded.model, task.path, allow_base_mismatch=allow_base_mismatch)
    texts = clip.prompts(task.classnames, task.template)[:_MOST_TEXTS] if task.template else []
    wanted = _behaviour(loaded, texts or _TEXTS)
    loaded.model = masked.merge_and_unload()
    wanted |= _content(loaded)
    with whole_folder(out) as folder:
        _write(folder, out, loaded)
        again = clip.load(f"local-dir:{folder}", None, None, torch.device(device))
        _need_equal(wanted, _behaviour(again, texts or _TEXTS) | _content(again))
    return out


def _need_local_dir() -> None:
    import open_clip

    if not hasattr(open_clip.factory, "parse_model_name"):
        got = metadata.version("open_clip_torch")
        raise UserError(f"merge needs open_clip 3.0 or later, which loads local-dir: folders, got {got}")


def load_base(task: Task, model: str | None, pretrained: str | None, device: torch.device) -> clip.Clip:
    """The task's base model, plain. model, pretrained: in place of the names that it gives. Raises UserError."""
    name = model or task.model
    if name is None:
        raise UserError(f"{task.path} does not name its base model: model must be given")
    if model is None and pretrained is None:
        pretrained = task.pretrained
    loaded = clip.load(name, pretrained, task.config.get("image_size"), device)
    if loaded.config is None:
        raise UserError(f"open_clip has no configuration of {name!r}, which a folder to load the model from needs")
    return loaded


def _write(folder: Path, out: Path, loaded: clip.Clip) -> None:
    """Into `folder`, which is to become `out`."""
    write_json(folder / CONFIG_FILE, {"model_cfg": loaded.config, "preprocess_cfg": _preprocess(loaded)})
    # open_clip loads a Hugging Face tokenizer of a `local-dir:` from there, whatever name its config has.
    if loaded.config["text_cfg"].get("hf_tokenizer_name"):
        loaded.tokenizer.save_pretrained(str(folder))
    try:
        tensors = {key: tensor.contiguous() for key, tensor in loaded.model.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{out / WEIGHTS_FILE} cannot be written: {error}") from error


def _preprocess(loaded: clip.Clip) -> dict[str, Any]:
    """As a JSON file gives it back: lists for tuples."""
    values = loaded.model.visual.preprocess_cfg
    return json.loads(json.dumps({name: values[name] for name in _PREPROCESS if name in values}))


def _content(loaded: clip.Clip) -> dict[str, Any]:
    from PIL import Image

    height, width = clip.image_format(loaded.model)[0]
    pixels = torch.randint(
        256, (2 * height, 3 * width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    image = loaded.preprocess(Image.fromarray(pixels.numpy()))
    weights = {f"weight {key}": tensor for key, tensor in loaded.model.state_dict().items()}
    return {"preprocessing": _preprocess(loaded), "preprocessed image": image, **weights}


@torch.no_grad()
def _behaviour(loaded: clip.Clip, texts: Sequence[str]) -> dict[str, Tensor]:
    device, size = loaded.model.logit_scale.device, clip.image_format(loaded.model)[0]
    image = torch.randn(_IMAGES, 3, *size, generator=torch.Generator().manual_seed(0))
    tokens = loaded.tokenizer(list(texts))
    # As open_clip loads a model: torch rounds some products of frozen weights otherwise, see reference.linear.
    loaded.model.requires_grad_(True)
    with without_fused_attention():
        text = F.normalize(loaded.model.encode_text(tokens.to(device)).float(), dim=-1)
        logits = clip.logits(loaded.model, image.to(device), text)
    return {"tokens": tokens, "text features": text, "logits": logits}


@contextlib.contextmanager
def without_fused_attention() -> Iterator[None]:
    """Inside, nn.MultiheadAttention runs its products one by one: torch's fused inference path rounds otherwise."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _need_equal(wanted: dict[str, Any], got: dict[str, Any]) -> None:
    if odd := sorted(set(wanted) ^ set(got)):
        raise UserError(f"the merged model must load with the masked one's weights, but {odd[0]} is not in both")
    for name, value in wanted.items():
        equal = torch.equal(value, got[name]) if isinstance(value, Tensor) else value == got[name]
        if not equal:
            raise UserError(f"the merged model must load equal to the masked one, but differs in its {name}")
