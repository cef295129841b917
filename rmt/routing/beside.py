"""What a run trains or draws beside the routed parameters, which `Routed.save` does not keep: its file."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..config import UserError
from .extras import trainable_extras
from .run_config import RouteConfig

FILE = "beside.safetensors"


def beside(model: nn.Module, config: RouteConfig) -> dict[str, nn.Parameter]:
    """After the injection: makes LayerNorms, biases and a head trainable, and returns them by name, with a pooler that
    was drawn and stays as it is.

    Raises: UserError where the host has nothing of a kind.
    """
    new = bool(getattr(model, "new_parts", ()))
    wanted = {"train_ln": config.train_ln, "train_bias": config.train_bias, "train_new": new}
    found = {}
    if any(wanted.values()):
        found |= trainable_extras(model, **wanted, layers=config.layers, sites=config.sites)
    if config.draw_pooler:
        found |= {name: p for name, p in model.named_parameters() if name.startswith("text.model.pooler.")}
    return found


def to_bytes(parameters: Mapping[str, Tensor]) -> bytes:
    """A safetensors file."""
    return save({name: p.detach().cpu().contiguous() for name, p in parameters.items()})


@torch.no_grad()
def load(parameters: Mapping[str, nn.Parameter], path: str | Path) -> None:
    """Fills them from the file. Raises UserError where it is missing, damaged or of others; nothing is changed then."""
    try:
        state = load_file(path)
    # safetensors raises an error of its own, which is no subclass of these.
    except Exception as error:
        raise UserError(f"{path} must be what rmt route train wrote beside the routed layers: {error}") from error
    shapes = [{name: tuple(p.shape) for name, p in side.items()} for side in (parameters, state)]
    if shapes[0] != shapes[1]:
        odd = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise UserError(f"{path} is of another model or run: {odd[0]} is missing there or here, or of another shape")
    for name, p in parameters.items():
        p.copy_(state[name])
