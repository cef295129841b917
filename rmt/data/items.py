"""Items and splits, CoOp's few-shot sample of them, and its base and new halves of the classes."""

import random
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..config import UserError

PARTS = ("train", "val", "test")


class Item(NamedTuple):
    """One image: its path, its label and its class name."""

    path: str
    label: int
    classname: str


@dataclass(frozen=True)
class Split:
    """The items of a data set in file order, and the class names in label order.

    template: the data set's own prompt, a text with one {}; dataset: its key in DATASETS. None for a user's own data.
    """

    train: list[Item]
    val: list[Item]
    test: list[Item]
    classnames: tuple[str, ...]
    template: str | None = None
    dataset: str | None = None


def make_split(parts: Mapping[str, list[Item]], where: str) -> Split:
    """A Split of items whose labels and class names are checked here.

    Args:
        parts: items of train, val and test, each of which may be missing. where: their source, for errors.

    Raises: UserError where labels are not 0, 1, ..., C - 1, a label has two names, or a class no training image.
    """
    names: dict[int, str] = {}
    for part in PARTS:
        for item in parts.get(part, []):
            if names.setdefault(item.label, item.classname) != item.classname:
                both = f"{names[item.label]!r} and {item.classname!r}"
                raise UserError(f"{where} must have one class name for a label, but label {item.label} is {both}")
    if not names:
        raise UserError(f"{where} must name at least one image, got none")
    if sorted(names) != list(range(len(names))):
        odd = next(label for place, label in enumerate(sorted(names)) if label != place)
        raise UserError(f"{where} has {len(names)} classes, so its labels must be 0 to {len(names) - 1}, got {odd}")
    trained = {item.label for item in parts.get("train", [])}
    if trained and len(trained) < len(names):
        lost = names[min(set(names) - trained)]
        raise UserError(f"{where} must have training images of all classes, got none of {lost!r}")
    return Split(*(list(parts.get(part, [])) for part in PARTS), tuple(names[label] for label in sorted(names)))


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


def subset(split: Split, classes: str) -> Split:
    """CoOp's halves of the classes: base is the first ceil(C / 2) labels, new the rest, each relabelled from 0.

    The few-shot sample comes first: CoOp draws it over all classes, so a sample of the base half is another one.

    Args:
        classes: all, base or new.
    """
    if classes == "all":
        return split
    if classes not in ("base", "new"):
        raise UserError(f"classes must be all, base or new, got {classes!r}")
    total = len(split.classnames)
    half = (total + 1) // 2
    first, end = (0, half) if classes == "base" else (half, total)
    if first == end:
        raise UserError(f"classes {classes} needs at least two classes, got {total}")
    kept = {
        part: [item._replace(label=item.label - first) for item in getattr(split, part) if first <= item.label < end]
        for part in PARTS
    }
    return replace(split, **kept, classnames=split.classnames[first:end])
