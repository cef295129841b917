"""A user's own data: ImageFolders, CSV files and split JSONs.

Images are .jpg, .jpeg, .png, .webp and .bmp files, in the order of their sorted names:
    FOLDER/{train,val,test}/{class name}/*.jpg     val may be missing
    FOLDER/{class name}/*.jpg                      no split: rmt makes its own, 50 / 20 / 30 % of every class, from a
                                                   shuffle that depends on the class's name alone, never on the seed
    FILE.csv     a header path,classname[,label][,split], paths relative to the file's folder: see `read_csv`
    FILE.json    CoOp's form, {"train": [[path, label, class name], ...], "val": ..., "test": ...}
"""

import csv
import io
import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config import UserError
from ..files import write_whole
from .images import SUFFIXES, files_in, missing, need_utf8, read_text
from .items import PARTS, Item, Split, make_split


def read_data(path: str | Path) -> Split:
    """Reads a folder, a CSV or a split JSON. Raises UserError for what is missing, empty, damaged or contradictory."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    if path.is_file() and path.suffix.lower() in (".csv", ".json"):
        return read_csv(path) if path.suffix.lower() == ".csv" else read_json(path)
    got = "no such file" if path.is_file() else "missing"
    raise UserError(f"data must be a folder of images, a .csv or a split .json, got {str(path)!r}, which is {got}")


def read_folder(folder: str | Path) -> Split:
    """Reads either layout. Raises UserError for a missing or empty folder, or parts that differ in their classes."""
    folder = Path(folder)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "missing"
        raise UserError(f"data must be a folder, got {str(folder)!r}, which is {got}")
    if not any((folder / part).is_dir() for part in PARTS):
        classes = read_classes(folder)
        return own_split(_items(classes, tuple(classes)))
    parts = {part: read_classes(folder / part) for part in PARTS if part != "val" or (folder / part).is_dir()}
    classnames = tuple(parts["train"])
    for part, classes in parts.items():
        if tuple(classes) != classnames:
            odd = sorted(set(classes) ^ set(classnames))
            raise UserError(f"{folder / part} must have the classes of {folder / 'train'}; only one of them has {odd}")
    return Split(*(_items(parts.get(part, {}), classnames) for part in PARTS), classnames)


def read_classes(folder: Path) -> dict[str, list[str]]:
    """Class name -> sorted image paths, of a folder that holds a folder for each class. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"data needs the folder {folder}, which is missing")
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."]
    names = need_utf8(folder, sorted(names))
    if not names:
        raise UserError(f"{folder} must hold a folder for each class, got none")
    classes = {}
    for name in names:
        files = files_in(folder / name)
        if not files:
            raise UserError(f"{folder / name} must hold images ({', '.join(SUFFIXES)}), got none")
        classes[name] = [str(folder / name / file) for file in files]
    return classes


def _items(classes: Mapping[str, list[str]], classnames: Sequence[str]) -> list[Item]:
    return [Item(path, label, name) for label, name in enumerate(classnames) for path in classes.get(name, [])]


def own_split(items: Sequence[Item]) -> Split:
    """50 / 20 / 30 % of every class, as CoOp divides a data set that comes without a split."""
    classes: dict[tuple[int, str], list[str]] = {}
    for item in items:
        classes.setdefault((item.label, item.classname), []).append(item.path)
    parts: dict[str, list[Item]] = {part: [] for part in PARTS}
    for (label, name), paths in sorted(classes.items()):
        if len(paths) < 4:
            raise UserError(
                f"class {name!r} needs at least 4 images to be split into train, val and test, got {len(paths)}"
            )
        paths = random.Random(f"rmt split of {name}").sample(paths, len(paths))
        train = round(0.5 * len(paths))
        val = train + max(1, round(0.2 * len(paths)))
        for part, chosen in zip(PARTS, (paths[:train], paths[train:val], paths[val:])):
            parts[part] += [Item(path, label, name) for path in sorted(chosen)]
    return make_split(parts, "data")


def read_csv(path: str | Path) -> Split:
    """Reads a CSV file with a header that names, in any order, path, classname, label and split.

    One of classname and label is enough: classes are then numbered in the order of their sorted names, whatever these
    are. With both, label is the number, from 0. split is train, val or test; without that column rmt makes its own,
    as for a folder.

    Raises: UserError with the number of the line for what is missing, unknown, contradictory or there twice.
    """
    path = Path(path)
    rows = _csv_rows(path)
    if "label" in rows[0][1] and "classname" in rows[0][1]:
        numbers = {row["label"]: _number(row["label"], f"{path} line {line}") for line, row in rows}
    else:
        rows = [(line, row | {"label": row.get("classname", row.get("label"))}) for line, row in rows]
        numbers = {name: number for number, name in enumerate(sorted({row["label"] for _, row in rows}))}
    seen: dict[str, int] = {}
    parts: dict[str, list[Item]] = {}
    for line, row in rows:
        if seen.setdefault(row["path"], line) != line:
            raise UserError(f"{path} line {line}: {row['path']} is on line {seen[row['path']]} already")
        if row.get("split", "train") not in PARTS:
            raise UserError(f"{path} line {line}: split must be train, val or test, got {row['split']!r}")
        item = Item(str(path.parent / row["path"]), numbers[row["label"]], row.get("classname", row["label"]))
        parts.setdefault(row.get("split", ""), []).append(item)
    lines = {str(path.parent / name): line for name, line in seen.items()}
    for lost in missing(list(lines)):
        raise UserError(f"{path} line {lines[lost]}: there is no file {lost}")
    return own_split(make_split({"train": parts[""]}, str(path)).train) if "" in parts else make_split(parts, str(path))


def _csv_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, column -> text) of every row, none of them empty."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    known, rows = ("path", "classname", "label", "split"), []
    try:
        header = [name.strip() for name in next(reader, [])]
        classes = {"classname", "label"} & set(header)
        if "path" not in header or not classes or not set(header) <= set(known) or len(set(header)) < len(header):
            raise UserError(f"{path} line 1 must be a header of path, classname or label, and split, got {header}")
        for row in reader:
            fields = [field.strip() for field in row]
            if fields and (len(fields) != len(header) or not all(fields)):
                raise UserError(f"{path} line {reader.line_num} must have {', '.join(header)}, got {row}")
            if fields:
                rows.append((reader.line_num, dict(zip(header, fields))))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} must be CSV: {error}") from error
    if not rows:
        raise UserError(f"{path} must have a line for each image, got none")
    return rows


def _number(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{where}: label must be a number beside a classname, got {text!r}") from error


def write_csv(path: str | Path, split: Split) -> None:
    """Writes what `read_csv` reads as the same split, with paths relative to the file's folder."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label", "classname", "split"))
    for part in PARTS:
        for item in getattr(split, part):
            relative = Path(os.path.relpath(item.path, Path(path).parent)).as_posix()
            writer.writerow((relative, item.label, item.classname, part))
    write_whole(path, text.getvalue().encode())


def read_json(path: str | Path, images: str | Path | None = None) -> Split:
    """Reads a split in CoOp's form. images: the folder its paths start from; None: the file's own.

    Raises: UserError for what is no such file, for labels that make no sense, and for files that are not there.
    """
    path, images = Path(path), Path(images or Path(path).parent)
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} must be JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(part), list) for part in PARTS):
        raise UserError(f"{path} must be an object with lists train, val and test")
    parts = {part: [_entry(e, f"{path}: {part}[{n}]", images) for n, e in enumerate(found[part])] for part in PARTS}
    split = make_split(parts, str(path))
    if lost := missing([item.path for part in PARTS for item in parts[part]]):
        first = ", ".join(os.path.relpath(p, images) for p in lost[:3])
        raise UserError(f"{path} names {len(lost)} files that are not in {images}: {first}{', ...' * (len(lost) > 3)}")
    return split


def _entry(entry: object, where: str, images: Path) -> Item:
    kinds = [type(value) for value in entry] if isinstance(entry, list) else None
    if kinds != [str, int, str]:
        raise UserError(f"{where} must be [path, label, class name], got {entry!r}")
    return Item(str(images / entry[0]), entry[1], entry[2])
