"""Folders of images as few-shot tasks: the split, CoOp's sample, the training batches and the evaluation batches.

Two layouts are read, with .jpg, .jpeg, .png, .webp and .bmp files, in the order of their sorted names:
    FOLDER/{train,val,test}/{class name}/*.jpg     val may be missing
    FOLDER/{class name}/*.jpg                      no split: rmt makes its own, 50 / 20 / 30 % of every class, from a
                                                   shuffle that depends on the class's name alone, never on the seed
Everything random is a function of (seed, step) and of the place in the batch: batch 7 can be made without batch 6.
"""

import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .config import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SPLITS = ("train", "val", "test")


class Item(NamedTuple):
    """One image: its path, its label and its class name."""

    path: str
    label: int
    classname: str


@dataclass(frozen=True)
class Split:
    """The items of a data set in file order, and the class names in label order."""

    train: list[Item]
    val: list[Item]
    test: list[Item]
    classnames: tuple[str, ...]


def read_folder(folder: str | Path) -> Split:
    """Reads either layout. Raises UserError for a missing or empty folder, or parts that differ in their classes."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"data must be a folder, got {str(folder)!r}, which is {'a file' if folder.exists() else 'missing'}"
        )
    if not any((folder / part).is_dir() for part in SPLITS):
        return _own_split(_read_classes(folder))
    parts = {part: _read_classes(folder / part) for part in SPLITS if part != "val" or (folder / part).is_dir()}
    classnames = tuple(parts["train"])
    for part, classes in parts.items():
        if tuple(classes) != classnames:
            odd = sorted(set(classes) ^ set(classnames))
            raise UserError(f"{folder / part} must have the classes of {folder / 'train'}; only one of them has {odd}")
    return Split(*(_items(parts.get(part, {}), classnames) for part in SPLITS), classnames)


def _read_classes(folder: Path) -> dict[str, list[str]]:
    """Class name -> sorted image paths."""
    if not folder.is_dir():
        raise UserError(f"data needs the folder {folder}, which is missing")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UserError(f"{folder} must hold a folder for each class, got none")
    classes = {}
    for name in names:
        files = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
        if not files:
            raise UserError(f"{folder / name} must hold images ({', '.join(SUFFIXES)}), got none")
        classes[name] = [str(p) for p in files]
    return classes


def _items(classes: dict[str, list[str]], classnames: Sequence[str]) -> list[Item]:
    return [Item(p, label, name) for label, name in enumerate(classnames) for p in classes.get(name, [])]


def _own_split(classes: dict[str, list[str]]) -> Split:
    """50 / 20 / 30 % of every class, as CoOp divides a data set that comes without a split."""
    parts: tuple[dict[str, list[str]], ...] = ({}, {}, {})
    for name, paths in classes.items():
        if len(paths) < 4:
            raise UserError(
                f"class {name!r} needs at least 4 images to be split into train, val and test, got {len(paths)}"
            )
        paths = random.Random(f"rmt split of {name}").sample(paths, len(paths))
        train = round(0.5 * len(paths))
        val = train + max(1, round(0.2 * len(paths)))
        for part, chosen in zip(parts, (paths[:train], paths[train:val], paths[val:])):
            part[name] = sorted(chosen)
    names = tuple(classes)
    return Split(*(_items(part, names) for part in parts), names)


def few_shot(train: Sequence[Item], val: Sequence[Item], shots: int, seed: int) -> tuple[list[Item], list[Item]]:
    """CoOp's sample, draw for draw: `shots` training and min(shots, 4) validation items a class.

    Classes in the order in which they first appear, `random.sample` in each, one stream for train, then val; a class
    with fewer items gives all of them and draws nothing. A private `random.Random`, so that no other draw can disturb
    it. Source: Dassl's generate_fewshot_dataset, CoOp's datasets; equal to their published samples.
    """
    rng = random.Random(seed)
    return _sample(train, shots, rng), _sample(val, min(shots, 4), rng)


def _sample(items: Sequence[Item], shots: int, rng: random.Random) -> list[Item]:
    by_label = defaultdict(list)
    for item in items:
        by_label[item.label].append(item)
    chosen = []
    for mine in by_label.values():
        if len(mine) < shots:
            warnings.warn(
                f"class {mine[0].classname!r} has {len(mine)} images, fewer than {shots}: all taken", stacklevel=3
            )
        chosen += rng.sample(mine, shots) if len(mine) >= shots else mine
    return chosen


def decode(source: str | bytes, path: str) -> Image.Image:
    """An RGB image from a file's path or its bytes. Raises UserError that names the file where it cannot be read."""
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error


class TrainBatches:
    """The few-shot images, their encoded bytes in memory, as endless augmented batches.

    An epoch is a fresh permutation cut into batches; its incomplete last batch is dropped, as in the official code,
    unless it is the only one. Augmentation, also the official one: RandomResizedCrop with scale (0.5, 1), bicubic, and
    a horizontal flip, then the model's own mean and std.

    Args:
        size: (height, width) in pixels. mean, std: of the model's images.

    Raises: UserError for an unreadable image, named: all are decoded once here, before any time is spent on training.
    """

    def __init__(
        self, items: Sequence[Item], size: tuple[int, int], mean: Sequence[float], std: Sequence[float],
        batch: int, seed: int,
    ) -> None:  # fmt: skip
        # Not at the top: torchvision takes longer to import than torch and rmt together.
        from torchvision import transforms as T

        if not items:
            raise UserError("training needs at least one image, got none")
        self.items, self.batch, self.seed = list(items), min(batch, len(items)), seed
        self.encoded = [Path(item.path).read_bytes() for item in self.items]
        for data, item in zip(self.encoded, self.items):
            decode(data, item.path)
        bicubic = T.InterpolationMode.BICUBIC
        crop = T.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=bicubic)
        self.augment = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(mean, std)])

    @property
    def steps_per_epoch(self) -> int:
        return len(self.items) // self.batch

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Batch number `step`, counted from 0 over all epochs: image (B, 3, H, W) fp32, label (B,) int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = list(range(len(self.items)))
        random.Random(f"order {self.seed} {epoch}").shuffle(order)
        chosen = order[place * self.batch : (place + 1) * self.batch]
        image = torch.stack([self._image(i, epoch) for i in chosen])
        return image, torch.tensor([self.items[i].label for i in chosen])

    def _image(self, index: int, epoch: int) -> Tensor:
        image = decode(self.encoded[index], self.items[index].path)
        # torchvision draws from torch's global generator: it gets a seed of this image's own, and its state back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(random.Random(f"image {self.seed} {epoch} {index}").getrandbits(63))
            return self.augment(image)


def eval_batches(items: Sequence[Item], preprocess: Callable, batch: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
    """(image (B, 3, H, W), label (B,)) in order, through the model's own eval preprocessing."""
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        image = torch.stack([preprocess(decode(item.path, item.path)) for item in part])
        yield image, torch.tensor([item.label for item in part])
