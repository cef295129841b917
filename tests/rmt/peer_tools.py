"""A footing on generated images, for the tests of single methods."""

import warnings
from pathlib import Path

import tiny

from rmt import clip
from rmt.config import RunConfig, TrainConfig
from rmt.data import Cache
from rmt.evaluate import sampled
from rmt.peers.footing import Footing, Shelf

TEMPLATE = "a photo of a {}."


def footing(folder: Path, *, shots: int = 4, seed: int = 1, val: int = 4, context: int = 32, **options) -> Footing:
    """Four classes of coloured noise that are easy to learn; a random tiny CLIP at 32 pixels. options: of Footing."""
    name = tiny.model_folder(folder / "model", context=context)
    data = tiny.splits(folder / "data", train=8, test=6)
    if val:  # as many as few_shot takes, so that it has nothing to warn of
        tiny.images(folder / "data" / "val", val, seed=3)
    train = TrainConfig(batch=8, log_every=5, lr=1e-3, steps=10)
    config = RunConfig(name, data=str(data), shots=shots, seed=seed, device="cpu", train=train)
    split, loaded = sampled(config), clip.load(name, None, None, clip.pick_device("cpu"))
    loaded.model.requires_grad_(False)
    text = clip.Text.make(loaded, split.classnames, TEMPLATE)
    given = {"views": 3, "max_steps": 20, "max_feature_steps": 20} | options
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Footing(config, loaded, split, text, TEMPLATE, Shelf(), Cache(), **given)
