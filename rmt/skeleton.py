"""An open_clip model without weights: of its configuration alone, on the meta device."""

import contextlib
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from .clip import FOLDER, NOT_LOADED, folder_config, registered
from .config import UserError


def skeleton(name: str, image_size: int | None = None) -> nn.Module:
    """The model `name`, an open_clip name or `local-dir:PATH`, in eval mode; no weight is downloaded, read or drawn.

    Raises: UserError where there is no such configuration, or open_clip cannot build it.
    """
    import open_clip

    try:
        known = _known(name)
        with torch.device("meta"), _no_logging():
            return open_clip.create_model(known, force_image_size=image_size, device="meta").eval()
    except UserError:
        raise
    except NOT_LOADED as error:
        raise UserError(f"open_clip cannot build {name!r}: {error}") from error


def _known(name: str) -> str:
    """The name by which open_clip has its configuration."""
    import open_clip

    if name.startswith(FOLDER):
        return registered(folder_config(Path(name.removeprefix(FOLDER)))["model_cfg"])
    if ":" in name:
        raise UserError(f"model must be an open_clip name or {FOLDER}PATH, whose configuration is here, got {name!r}")
    known = name.replace("/", "-")
    if known not in open_clip.list_models():
        near = difflib.get_close_matches(known, open_clip.list_models(), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "open_clip.list_models() has all names"
        raise UserError(f"open_clip has no model {name!r}: {hint}")
    return known


@contextlib.contextmanager
def _no_logging() -> Iterator[None]:
    """open_clip warns of random weights, which is no news where there are to be none."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
