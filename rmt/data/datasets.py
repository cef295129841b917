"""CoOp's eleven data sets and four variants of ImageNet, in the folders where CoOp's users have them.

Layout, class names and templates are those of CoOp's DATASETS.md and datasets/*.py. Nothing is downloaded, and no split
file is made where one is missing: another split gives other images and numbers that compare with nothing.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import RunConfig, UserError
from . import imagenet
from .folders import read_classes, read_data, read_json
from .images import missing, read_text
from .items import PARTS, Item, Split, make_split

VARIANTS = ("variants.txt", *(f"images_variant_{part}.txt" for part in PARTS))
PHOTO = "a photo of a {}."


@dataclass(frozen=True)
class Dataset:
    """One data set, as it is expected under the root folder.

    Args:
        folder: below the root. aliases: other names of it that are in use.
        images: the image folder below that; the first is CoOp's, others are accepted.
        files: what must lie in the folder besides: the split file, where there is one.
        template: CoOp's prompt. classes: how many.
        read: (the files, in the order above; the image folder) -> the split, without template.
        counts: images of train, val and test in CoOp's split file; None: not counted by us.
        sha256: start of that of CoOp's split file; None: not known.
    """

    folder: str
    images: tuple[str, ...]
    files: tuple[str, ...]
    template: str
    classes: int
    read: Callable[[list[Path], Path], Split]
    aliases: tuple[str, ...] = ()
    counts: tuple[int, int, int] | None = None
    sha256: str | None = None

    def place(self, root: str | Path) -> Path:
        """The folder, or the first alias where only that is there."""
        names = (self.folder, *self.aliases)
        return next((Path(root) / name for name in names if (Path(root) / name).is_dir()), Path(root) / self.folder)

    def image_folder(self, root: str | Path) -> Path:
        """The image folder, or the first other place where only that is there."""
        place = self.place(root)
        return next((place / name for name in self.images if (place / name).is_dir()), place / self.images[0])

    def lost(self, root: str | Path) -> list[str]:
        """What is not where it is expected, one sentence each."""
        place = self.place(root)
        if not place.is_dir():
            either = f" (or {', '.join(self.aliases)})" if self.aliases else ""
            inside = [name for name in (self.images[0], *self.files) if name != "."]
            return [f"there is no folder {place}{either} with {', '.join(inside)}"]
        files = [place / name for name in self.files]
        found = [f"there is no file {file}, and rmt makes none" for file in files if not file.is_file()]
        if not self.image_folder(root).is_dir():
            found.append(f"there is no folder {self.image_folder(root)}")
        return found


def _read_split(files: list[Path], images: Path) -> Split:
    return read_json(files[0], images)


def _read_variants(files: list[Path], images: Path) -> Split:
    """FGVC Aircraft: a list of class names, in label order, and for each part lines of image number and class name."""
    labels = {line.strip(): label for label, line in enumerate(read_text(files[0]).splitlines())}
    parts: dict[str, list[Item]] = {}
    for part, file in zip(PARTS, files[1:]):
        parts[part] = []
        for number, line in enumerate(read_text(file).splitlines(), 1):
            image, _, name = line.strip().partition(" ")
            if name not in labels:
                raise UserError(f"{file} line {number}: {name!r} is not a class of {files[0].name}")
            parts[part].append(Item(str(images / f"{image}.jpg"), labels[name], name))
    if lost := missing([item.path for part in PARTS for item in parts[part]]):
        raise UserError(f"{files[1].parent} lists {len(lost)} images that are not there, the first is {lost[0]}")
    return make_split(parts, str(files[0].parent))


def _read_imagenet(files: list[Path], images: Path) -> Split:
    """val stays empty: CoOp's is the test split, ImageNet's own val, which nothing may be chosen on."""
    names = imagenet.names()
    train, test = (_of_folders(images.parent / part, names) for part in ("train", "val"))
    return make_split({"train": train, "test": test}, str(images.parent))


def _read_v2(files: list[Path], images: Path) -> Split:
    """Its folders are labels, not ids."""
    names = {str(label): name for label, name in enumerate(imagenet.names().values())}
    return make_split({"test": _of_folders(images, names)}, str(images))


def _read_variant(variant: str) -> Callable[[list[Path], Path], Split]:
    def read(files: list[Path], images: Path) -> Split:
        names = imagenet.names()
        kept = {wnid: names[wnid] for wnid in imagenet.wnids(variant)}
        return make_split({"test": _of_folders(images, kept)}, str(images))

    return read


def _of_folders(folder: Path, names: dict[str, str]) -> list[Item]:
    """The images of the folders that `names` gives class names, in that order, files sorted."""
    classes = read_classes(folder)
    if odd := sorted(set(classes) ^ set(names)):
        shown = f"{', '.join(odd[:3])}{', ...' * (len(odd) > 3)}"
        raise UserError(f"{folder} must have {len(names)} class folders; missing or unknown are {len(odd)}: {shown}")
    return [Item(path, label, name) for label, (key, name) in enumerate(names.items()) for path in classes[key]]


def _coop(folder: str, images: str, split: str, template: str, classes: int, counts: tuple | None = None,
          sha256: str | None = None, alias: str | None = None) -> Dataset:  # fmt: skip
    """One with a split file of CoOp's."""
    aliases = (alias,) if alias else ()
    return Dataset(
        folder, (images,), (f"split_zhou_{split}.json",), template, classes, _read_split, aliases, counts, sha256
    )


def _imagenet(folder: str, images: str, classes: int, read: Callable[[list[Path], Path], Split]) -> Dataset:
    """One that is for testing only."""
    return Dataset(folder, (images,), (), PHOTO, classes, read)


DATASETS = {
    "imagenet": Dataset("imagenet", ("images/train", "train"), (), PHOTO, 1000, _read_imagenet),
    "caltech101": _coop("caltech-101", "101_ObjectCategories", "Caltech101", PHOTO, 100,
                        (4128, 1649, 2465), "52ce83205ff8", "Caltech101"),
    "oxford_pets": _coop("oxford_pets", "images", "OxfordPets", "a photo of a {}, a type of pet.", 37,
                         (2944, 736, 3669), "d7f3ffe65b39", "OxfordPets"),
    "stanford_cars": _coop("stanford_cars", ".", "StanfordCars", PHOTO, 196,
                           (6509, 1635, 8041), "40acee7aa65c", "StanfordCars"),
    "oxford_flowers": _coop("oxford_flowers", "jpg", "OxfordFlowers", "a photo of a {}, a type of flower.", 102,
                            (4093, 1633, 2463), "2f50c42fc1a1", "Flower102"),
    "food101": _coop("food-101", "images", "Food101", "a photo of {}, a type of food.", 101, alias="Food101"),
    "fgvc_aircraft": Dataset("fgvc_aircraft", ("images",), VARIANTS, "a photo of a {}, a type of aircraft.", 100,
                             _read_variants, ("fgvc-aircraft-2013b/data", "fgvc-aircraft-2013b")),
    "sun397": _coop("sun397", "SUN397", "SUN397", PHOTO, 397, alias="SUN397"),
    "dtd": _coop("dtd", "images", "DescribableTextures", "{} texture.", 47,
                 (2820, 1128, 1692), "f26ebeccd2b5", "DTD"),
    "eurosat": _coop("eurosat", "2750", "EuroSAT", "a centered satellite photo of {}.", 10,
                     (13500, 5400, 8100), "541503a77d0b"),
    "ucf101": _coop("ucf101", "UCF-101-midframes", "UCF101", "a photo of a person doing {}.", 101,
                    (7639, 1898, 3783), "d78cb834f7c5", "UCF101"),
    "imagenetv2": _imagenet("imagenetv2", "imagenetv2-matched-frequency-format-val", 1000, _read_v2),
    "imagenet_sketch": _imagenet("imagenet-sketch", "images", 1000, _read_variant("")),
    "imagenet_a": _imagenet("imagenet-adversarial", "imagenet-a", 200, _read_variant("_a")),
    "imagenet_r": _imagenet("imagenet-rendition", "imagenet-r", 200, _read_variant("_r")),
}  # fmt: skip


def find(root: str | Path, key: str) -> Dataset:
    """Raises UserError for an unknown key, or a root that is no folder."""
    if key not in DATASETS:
        raise UserError(f"dataset must be one of {', '.join(DATASETS)}, got {key!r}")
    if not Path(root).is_dir():
        raise UserError(f"root must be a folder of data sets, got {str(root)!r}, which is missing or a file")
    return DATASETS[key]


def read_dataset(root: str | Path, key: str) -> Split:
    """Reads a data set under `root`. Raises UserError that says what is missing and where it is expected."""
    dataset = find(root, key)
    if lost := dataset.lost(root):
        raise UserError(f"{key}: {'; '.join(lost)}")
    files = [dataset.place(root) / name for name in dataset.files]
    return replace(dataset.read(files, dataset.image_folder(root)), template=dataset.template, dataset=key)


def read(config: RunConfig) -> Split:
    """The whole data of a run: neither sampled nor cut to some classes. Raises UserError where it cannot be read."""
    return read_data(config.data) if config.root is None else read_dataset(config.root, config.dataset)


def indices_sha256(items: Sequence[Item], config: RunConfig) -> str:
    """Which images, in which order, wherever they lie: sha256 of their paths, one a line.

    Paths start below the root or the data's folder. For a data set under a root they start with CoOp's name of its
    folder, even where an alias is used: so equal hashes mean CoOp's own sample.
    """
    if config.root is not None:
        dataset = find(config.root, config.dataset)
        base, prefix = dataset.place(config.root), Path(dataset.folder)
    else:
        base, prefix = Path(config.data), Path()
        base = base if base.is_dir() else base.parent
    paths = [(prefix / os.path.relpath(item.path, base)).as_posix() for item in items]
    return hashlib.sha256("\n".join(paths).encode()).hexdigest()
