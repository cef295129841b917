"""What is known of CoOp's data sets, and whether a folder holds them, or captions, or questions."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from ..config import UserError
from .captions import read_captions
from .datasets import DATASETS, Dataset, find, read_dataset
from .items import PARTS, Split
from .vqa import read_vqa

# Data sets with text beside the images, read by `rmt.data.captions` and `vqa`: key -> folders below the root, and what
# the whole of it holds. Sizes: Karpathy's split; the official download page of VQA.
TEXTS = {
    "coco_captions": (("coco", "mscoco", "MSCOCO"), {"train": 113287, "val": 5000, "test": 5000}),
    "vqav2": (("vqav2", "VQAv2"), {"train": 443757, "val": 214354}),
}


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
    if key in TEXTS:
        return _check_texts(root, key)
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


def check_captions(folder: str | Path) -> Report:
    """Reads a caption folder as `read_captions`, without opening an image: what is wrong is a problem."""
    try:
        split = read_captions(folder)
    except UserError as error:
        return Report(str(folder), [str(error)])
    captions = sum(len(item.captions) for part in PARTS for item in getattr(split, part))
    counts = ", ".join(f"{len(getattr(split, part))} {part}" for part in PARTS)
    empty = [f"there are no {part} images" for part in ("train", "val") if not getattr(split, part)]
    return Report(str(folder), empty[:1] if not split.train else [], [f"{counts} images, {captions} captions", *empty])


def _check_texts(root: str | Path, key: str) -> Report:
    folders, sizes = TEXTS[key]
    place = next((Path(root) / name for name in folders if (Path(root) / name).is_dir()), Path(root) / folders[0])
    try:
        split = (read_vqa if key == "vqav2" else read_captions)(place)
    except UserError as error:
        return Report(key, [str(error)])
    counts = {part: len(getattr(split, part)) for part in sizes}
    problems = [] if counts == sizes else [f"{place} has {counts}, expected {sizes}"]
    return Report(key, problems, [", ".join(f"{count} {part}" for part, count in counts.items())])


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
