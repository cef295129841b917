"""What is known of CoOp's data sets, and whether a folder holds them."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from ..config import UserError
from .datasets import DATASETS, Dataset, find, read_dataset
from .items import PARTS, Split


@dataclass(frozen=True)
class Report:
    """Of one data set. problems: what keeps its results from being CoOp's; notes: what is only worth knowing."""

    key: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def listing() -> list[dict]:
    """A row for every data set: where it is expected, and what it holds. None: not known or not there."""
    return [
        {
            "dataset": key, "folder": " or ".join((d.folder, *d.aliases)), "images": " or ".join(d.images),
            "files": ", ".join(d.files) or None, "classes": d.classes,
            **dict(zip(PARTS, d.counts or (None, None, None))), "template": d.template,
        }
        for key, d in DATASETS.items()
    ]  # fmt: skip


def check(root: str | Path, key: str) -> Report:
    """Looks for a data set under `root`, without opening an image. Raises UserError for an unknown key or root."""
    dataset, notes = find(root, key), []
    place = dataset.place(root)
    if problems := dataset.lost(root):
        return Report(key, problems)
    if place != Path(root) / dataset.folder:
        notes.append(f"read from {place}, where CoOp has {dataset.folder}")
    try:
        split = read_dataset(root, key)
    except UserError as error:
        return Report(key, [str(error)], notes)
    notes.append(", ".join(f"{len(getattr(split, part))} {part}" for part in PARTS))
    return Report(key, _differences(dataset, split, place), notes)


def _differences(dataset: Dataset, split: Split, place: Path) -> list[str]:
    """Between what was read and what CoOp's files hold."""
    found = []
    if len(split.classnames) != dataset.classes:
        found.append(f"{place} has {len(split.classnames)} classes, expected {dataset.classes}")
    counts = tuple(len(getattr(split, part)) for part in PARTS)
    if dataset.counts not in (None, counts):
        found.append(f"{place} has {counts} images to train, val and test, expected {dataset.counts}")
    if both := {item.path for item in split.test} & {item.path for item in (*split.train, *split.val)}:
        found.append(f"{len(both)} test images are in another part too, the first is {min(both)}")
    if not found and dataset.sha256:
        file = place / dataset.files[0]
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if not digest.startswith(dataset.sha256):
            found.append(f"{file} is not CoOp's own: sha256 {digest[:12]}, expected {dataset.sha256}")
    return found
