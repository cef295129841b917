"""What all processes of a run must have in common, as short texts that are compared at its start.

Ranks exchange gradients only: one whose config, code, weights or images are others would spoil the masks of all without
any error. They would also drift apart where the update rounds differently, so kernels and threads are compared too.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import rmt_kernels

from .config import RunConfig, to_yaml
from .files import sha256
from .masked import Mask
from .world import World

if TYPE_CHECKING:
    from .data import TrainBatches
    from .evaluate import Setup

CODE = (".py", ".json", ".so", ".pyd")
SHOWN = 12  # digits of a hash that a message shows, and that are compared


def what_is_asked(config: RunConfig, world: World) -> dict[str, str]:
    """Known before anything is loaded: config, how gradients travel, code, torch, kernels and threads."""
    return {
        "config": _short(to_yaml(config).encode()), "reduce": world.reduce,
        "zero": str(world.zero),
        "shard": str(world.shard),
        "code": code_sha256()[:SHOWN], "torch": torch.__version__, "threads": str(torch.get_num_threads()),
        "CPU": torch.backends.cpu.get_cpu_capability(),
        "update": ", ".join(f"{row['device']} {row['backend']}" for row in rmt_kernels.explain("mask_update_")),
    }  # fmt: skip


def what_is_there(setup: "Setup", batches: "TrainBatches") -> dict[str, str]:
    """Known once all is loaded: the frozen weights, the training images and the selection.

    Reads all weights: seconds where the model is large. A resume file keeps some of it.
    """
    scores = {mask.key.removesuffix("weight") + "scores" for mask in setup.masks}
    weights = {k: t for k, t in setup.clip.model.state_dict().items() if k not in scores}
    return {
        "weights": sha256({k: t.float() if t.is_floating_point() else t for k, t in weights.items()})[:SHOWN],
        "images": batches.sha256[:SHOWN], "classes": _short("\n".join(setup.split.classnames).encode()),
        "selection": selection_sha256(setup.masks)[:SHOWN], "device": setup.device.type,
    }  # fmt: skip


def selection_sha256(masks: Iterable[Mask]) -> str:
    """Of the bitmaps of the masks whose weights are selected."""
    chosen = b"".join(m.selected.cpu().numpy().tobytes() for m in masks if m.selected is not None)
    return hashlib.sha256(chosen).hexdigest()


def code_sha256(roots: Iterable[Path] | None = None) -> str:
    """Of the files that run: Python, settings and libraries of rmt and rmt_kernels, by name and content."""
    digest = hashlib.sha256()
    for root in roots or (Path(__file__).parent, Path(rmt_kernels.__file__).parent):
        for path in sorted(p for p in root.rglob("*") if p.suffix in CODE):
            data = path.read_bytes()
            digest.update(f"{root.name}/{path.relative_to(root).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:SHOWN]
