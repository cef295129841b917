"""Images with captions: a folder of a user's own, and MSCOCO with Karpathy's split.

    FOLDER/captions.json   [{"image": path, "captions": [text, ...], "split": part}, ...]
    FOLDER/captions.csv    a header image,caption[,split], a line for each caption
    ROOT/coco              dataset_coco.json of Karpathy, with train2014/ and val2014/ beside it

Paths start from the folder. split is train, val, test or restval (which is trained on); without it an image below
train/, val/ or test/ belongs there; without either rmt makes a split of its own, 80 / 10 / 10 %, from a shuffle that
depends on the images' names alone.
"""

import csv
import io
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..config import UserError
from .images import missing, read_text
from .items import PARTS

JSON, CSV, COCO = "captions.json", "captions.csv", "dataset_coco.json"
# Karpathy's: what was val2014 and is in neither his val nor his test is trained on, as everyone does.
AS_PART = {**{part: part for part in PARTS}, "restval": "train"}


class Captioned(NamedTuple):
    """One image: its path and its captions, at least one."""

    path: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class CaptionSplit:
    """The images of each part, in file order."""

    train: list[Captioned]
    val: list[Captioned]
    test: list[Captioned]


class _Entry(NamedTuple):
    image: str
    captions: tuple[str, ...]
    part: str | None
    where: str


def read_captions(folder: str | Path) -> CaptionSplit:
    """Reads a caption folder, or MSCOCO's. Raises UserError for what is missing, malformed or there twice."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"captions must be a folder, got {str(folder)!r}, which is {_what(folder)}")
    readers = {COCO: _read_coco, JSON: _read_json, CSV: _read_csv}
    found = [name for name in readers if (folder / name).is_file()]
    if len(found) != 1:
        raise UserError(f"{folder} must hold one of {', '.join(readers)}, got {' and '.join(found) or 'none'}")
    file = folder / found[0]
    return _split(list(readers[found[0]](file)), file)


def _what(path: Path) -> str:
    return "a file" if path.exists() else "missing"


def load_json(path: Path) -> object:
    """Raises UserError that names the file where it is missing or no JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} must be JSON: {error}") from error


def _read_json(file: Path) -> Iterable[_Entry]:
    rows = load_json(file)
    if not isinstance(rows, list):
        raise UserError(f"{file} must be a list of objects with image and captions, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        where = f"{file}: [{number}]"
        if not isinstance(row, dict) or not {"image", "captions"} <= set(row) <= {"image", "captions", "split"}:
            got = sorted(row) if isinstance(row, dict) else row
            raise UserError(f"{where} must have image and captions, and may have split, got {got!r}")
        yield _entry(row["image"], row["captions"], row.get("split"), where)


def _read_coco(file: Path) -> Iterable[_Entry]:
    found = load_json(file)
    if not isinstance(found, dict) or not isinstance(found.get("images"), list):
        raise UserError(f"{file} must be Karpathy's split, an object with a list images")
    for number, row in enumerate(found["images"]):
        where = f"{file}: images[{number}]"
        try:
            captions = [sentence["raw"] for sentence in row["sentences"]]
            image, part = f"{row['filepath']}/{row['filename']}", row["split"]
        except (TypeError, KeyError) as error:
            raise UserError(f"{where} must have filepath, filename, split and sentences with raw: {error}") from error
        if part is None:
            raise UserError(f"{where}: split must be one of {', '.join(AS_PART)}, got None")
        yield _entry(image, captions, part, where)


def _read_csv(file: Path) -> Iterable[_Entry]:
    reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    entries: dict[str, _Entry] = {}
    try:
        header = [name.strip() for name in next(reader, [])]
        if header not in (["image", "caption"], ["image", "caption", "split"]):
            raise UserError(f"{file} line 1 must be the header image,caption or image,caption,split, got {header}")
        for row in filter(None, reader):
            where = f"{file} line {reader.line_num}"
            if len(row) != len(header):
                raise UserError(f"{where} must have {', '.join(header)}, got {row}")
            new = _entry(row[0].strip(), [row[1]], row[2].strip() if len(row) > 2 else None, where)
            known = entries.setdefault(new.image, new._replace(captions=()))
            if known.part != new.part:
                raise UserError(f"{where}: {new.image} is in {known.part} already, got {new.part}")
            entries[new.image] = known._replace(captions=known.captions + new.captions)
    except csv.Error as error:
        raise UserError(f"{file} line {reader.line_num} must be CSV: {error}") from error
    return entries.values()


def _entry(image: object, captions: object, part: object, where: str) -> _Entry:
    if not isinstance(image, str) or not image.strip():
        raise UserError(f"{where}: image must be a path, got {image!r}")
    texts = isinstance(captions, list) and all(isinstance(text, str) and text.strip() for text in captions)
    if not texts or not captions:
        raise UserError(f"{where}: captions must be at least one text, none of them empty, got {captions!r}")
    if part is not None and part not in AS_PART:
        raise UserError(f"{where}: split must be one of {', '.join(AS_PART)}, got {part!r}")
    return _Entry(image, tuple(" ".join(text.split()) for text in captions), part, where)


def _split(entries: list[_Entry], file: Path) -> CaptionSplit:
    if not entries:
        raise UserError(f"{file} must name at least one image, got none")
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.image in seen:
            raise UserError(f"{entry.where}: {entry.image} is at {seen[entry.image]} already")
        seen[entry.image] = entry.where
    paths = {entry.image: str(file.parent / entry.image) for entry in entries}
    if lost := missing(list(paths.values())):
        more = ", ..." * (len(lost) > 3)
        raise UserError(f"{file} names {len(lost)} images that are not there: {', '.join(lost[:3])}{more}")
    parts = [_part_of(entry) for entry in entries]
    if None in parts:
        named = next((entry for entry, part in zip(entries, parts) if part), None)
        if named:
            lacking = entries[parts.index(None)]
            raise UserError(f"{lacking.where} must have a split, as {named.where} has one, or a folder of that name")
        parts = _own_parts([entry.image for entry in entries])
    made: dict[str, list[Captioned]] = {part: [] for part in PARTS}
    for entry, part in zip(entries, parts):
        made[part].append(Captioned(paths[entry.image], entry.captions))
    return CaptionSplit(**made)


def _part_of(entry: _Entry) -> str | None:
    if entry.part is not None:
        return AS_PART[entry.part]
    first = Path(entry.image).parts[0]
    return first if first in PARTS and len(Path(entry.image).parts) > 1 else None


def _own_parts(images: list[str]) -> list[str]:
    if len(images) < 3:
        raise UserError(f"at least 3 images are needed to be split into train, val and test, got {len(images)}")
    order = random.Random("rmt split of captions").sample(sorted(images), len(images))
    tenth = max(1, round(0.1 * len(images)))
    parts = dict.fromkeys(order, "train") | dict.fromkeys(order[:tenth], "val")
    parts |= dict.fromkeys(order[tenth : 2 * tenth], "test")
    return [parts[image] for image in images]
