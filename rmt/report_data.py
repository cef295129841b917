"""What `rmt report` reads: result files of every kind that rmt writes, found below the paths given, as plain records.

Nothing is estimated here: a cell without a finished result is listed as missing, with its reason where one is known.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .checkpoint import MASK_FILE
from .config import UserError
from .evaluate import RESULT_FILE, TASK_FOLDER
from .peers.cells import FIT_FILE
from .peers.compare import TABLE_FILE as COMPARE_FILE
from .protocols import TABLE_FILE
from .report_cells import Cell, Missing, Shots, panels, shots_order, side_by_side
from .report_sweep import Sweep, panel_of, read_sweep, with_settings

ABLATION_FILE = "ablation.json"
# Below a path that was given: OUT/{data set}/{method}/{cell} is three, one more for a folder of several such.
DEPTH, FOLDERS = 6, 20_000
CELL_FOLDER = re.compile(r"shots(\d+|all)-seed(\d+)")
# What the page cannot do without.
CELL_KEYS = {
    "dataset": str, "method": str, "title": str, "shots": (int, str), "seed": int, "metrics": dict,
    "trained_parameters": int, "stored_bytes": int, "training_seconds": (int, float), "indices_sha256": str,
    "base_sha256": str,
}  # fmt: skip


class Table(NamedTuple):
    """A table of `rmt.protocols`, or of an ablation. runs: results of the runs below it, by number of shots."""

    name: str
    path: Path
    content: dict
    runs: tuple[dict, ...] = ()


@dataclass
class Found:
    """Everything on the page. ordinary: folders of runs and tasks, and hub ids, in the order given."""

    cells: list[Cell] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    grids: list[Table] = field(default_factory=list)
    halves: list[Table] = field(default_factory=list)
    ablations: list[Table] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    ordinary: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    @property
    def tables(self) -> bool:
        """Whether there is more than ordinary runs and tasks."""
        return bool(self.cells or self.grids or self.halves or self.ablations or self.sweeps)


def find(paths: Sequence[str | Path]) -> Found:
    """Reads what lies at and below the paths; a path that is nowhere is left to `ordinary`, whose reader names it.

    Raises: UserError for a damaged file, one of an unknown kind, a folder with nothing in it, and for cells that
        cannot stand side by side.
    """
    found, unfinished = Found(), []
    for given in paths:
        path = Path(given)
        if path.is_file() and path.suffix == ".json":
            _file(path, found)
        elif path.is_dir():
            before = _size(found)
            for folder in _folders(path):
                _folder(folder, str(given) if folder == path else str(folder), found, unfinished)
            if _size(found) == before:
                raise UserError(
                    f"a report needs a finished run, but {path / RESULT_FILE} is missing, and no folder below has a "
                    f"{RESULT_FILE}, {COMPARE_FILE} or {TABLE_FILE}"
                )
        else:
            found.ordinary.append(str(given))
    found.cells = side_by_side(panels(found.cells))
    found.missing = _missing(found, unfinished)
    return found


def _size(found: Found) -> int:
    kinds = (found.cells, found.missing, found.grids, found.halves, found.ablations, found.sweeps, found.ordinary)
    return sum(map(len, kinds))


def _folders(top: Path) -> Iterator[Path]:
    """`top` and the folders below that may hold results, in order of name; what holds a result is not entered."""
    seen, waiting = 0, [(top, 0)]
    while waiting:
        folder, depth = waiting.pop()
        seen += 1
        if seen > FOLDERS:
            raise UserError(f"{top} has more than {FOLDERS:,} folders: name those that the report is about")
        yield folder
        whole = any((folder / name).is_file() for name in (RESULT_FILE, TABLE_FILE, MASK_FILE))
        if depth == DEPTH or whole:
            continue
        if (sweep := read_sweep(folder)) is not None:
            waiting += [(path, DEPTH) for path in reversed(sweep.cells())]
            continue
        below = [Path(e.path) for e in os.scandir(folder) if e.is_dir(follow_symlinks=False) and e.name[0] != "."]
        waiting += [(path, depth + 1) for path in sorted(below, reverse=True) if path.name != TASK_FOLDER]


def _folder(folder: Path, given: str, found: Found, unfinished: list) -> None:
    for path in (folder / COMPARE_FILE, folder / ABLATION_FILE):
        if path.is_file():
            _file(path, found)
    if (sweep := read_sweep(folder)) is not None:
        found.sweeps.append(sweep)
        found.missing += [
            Missing(with_settings(r["dataset"], r["settings"]), r["method"], r["shots"], r["seed"], r["why"])
            for r in sweep.failed_cells()
        ]
    elif (folder / RESULT_FILE).is_file():
        _file(folder / RESULT_FILE, found, given)
    elif (folder / TABLE_FILE).is_file():
        _file(folder / TABLE_FILE, found)
    elif (folder / MASK_FILE).is_file():
        found.ordinary.append(given)
    elif (match := CELL_FOLDER.fullmatch(folder.name)) and not (folder / FIT_FILE).is_file():
        # With a fit alone it may be but a part of another method that nobody asked for.
        unfinished.append((folder, _shots(match[1]), int(match[2])))


def _file(path: Path, found: Found, given: str | None = None) -> None:
    content = read_json(path)
    kind = content.get("kind")
    rows = content.get("rows")
    if kind == "compare":
        found.cells.append(_cell(content, path, path.parent))
    elif kind == "compare_bundle":
        cells = [_cell(cell, path, None) for cell in _list(content, "cells", path)]
        found.cells += cells
        found.missing += _absent(content, path, cells[0].panel if cells else "")
        found.commands += filter(None, [content.get("command")])
    elif kind == "compare_table":
        found.missing += _absent(content, path, content.get("dataset", ""))
    elif kind == "ablation":
        found.ablations.append(
            Table(f"{content.get('what')}, {content.get('dataset')}", path, _ablation(content, path))
        )
        found.commands += filter(None, [content.get("command")])
    elif kind is None and isinstance(rows, dict) and isinstance(content.get("seeds"), dict):
        found.halves.append(_table(path, content, "seed*"))
    elif kind is None and isinstance(rows, list) and all("shots" in row and "zero_shot" in row for row in rows):
        found.grids.append(_table(path, content, "shots*/seed*"))
    elif kind is None and "run" in content and path.name == TABLE_FILE:
        return  # a run's table of other data sets (rmt xd): its numbers are of no kind that the page has
    elif kind is None and path.name == RESULT_FILE and "metrics" in content:
        found.ordinary.append(given or str(path.parent))
    else:
        raise UserError(
            f"{path} is of no kind that a report knows: expected what rmt compare, train or b2n writes, or a file "
            f"of kind compare_bundle or ablation, got kind {kind!r}"
        )


def _cell(result: dict, path: Path, folder: Path | None) -> Cell:
    if not isinstance(result, dict):
        raise UserError(f"{path} is damaged: expected an object a cell, got {result!r:.80}")
    for key, kind in CELL_KEYS.items():
        if not isinstance(result.get(key), kind):
            raise UserError(f"{path} is damaged: {key} of a cell is {result.get(key)!r:.80}")
    if not isinstance(result["metrics"].get("acc1"), int | float):
        raise UserError(f"{path} is damaged: a cell has no accuracy, metrics are {result['metrics']!r:.80}")
    panel = panel_of(result["dataset"], path)
    return Cell(panel, result["method"], result["shots"], result["seed"], result, path, folder)


def _absent(content: dict, path: Path, panel: str) -> list[Missing]:
    rows = content.get("missing", [])
    try:
        return [Missing(r.get("dataset", panel), r["method"], r["shots"], r["seed"], r["why"]) for r in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: its list of missing cells needs method, shots, seed and why") from error


def _ablation(content: dict, path: Path) -> dict:
    for row in _list(content, "rows", path):
        if not isinstance(row, dict) or "label" not in row or "mean" not in (row.get("acc1") or ()):
            raise UserError(f"{path} is damaged: a row of an ablation needs label and acc1.mean, got {row!r:.80}")
    return content


def _list(content: dict, key: str, path: Path) -> list:
    if not isinstance(content.get(key), list):
        raise UserError(f"{path} is damaged: {key} must be a list, got {content.get(key)!r:.80}")
    return content[key]


def _runs(path: Path, pattern: str) -> Iterator[dict]:
    for file in sorted(path.parent.glob(f"{pattern}/{RESULT_FILE}")):
        content = read_json(file)
        match = re.search(r"shots(\w+)", str(file.parent.relative_to(path.parent)))
        yield content | ({"shots": _shots(match[1])} if match else {})


def _table(path: Path, content: dict, pattern: str) -> Table:
    runs = tuple(_runs(path, pattern))
    return Table(runs[0]["dataset"] if runs and "dataset" in runs[0] else path.parent.name, path, content, runs)


def _shots(text: str) -> Shots:
    return int(text) if text.isdecimal() else text


def _missing(found: Found, unfinished: Sequence[tuple[Path, Shots, int]]) -> list[Missing]:
    """Those that the tables name, folders without a result, and what other methods of the panel have."""
    there = {cell[:4] for cell in found.cells}
    named = {one[:4]: one for one in reversed(found.missing)}
    for folder, shots, seed in unfinished:
        top = folder.absolute().parents[1]
        near = [c.panel for c in found.cells if c.folder and c.folder.absolute().parents[1] == top]
        key = (near[0] if near else top.name, folder.absolute().parent.name, shots, seed)
        named.setdefault(key, Missing(*key, f"not finished: {folder} has no {RESULT_FILE}"))
    for panel in {cell.panel for cell in found.cells}:
        mine = [cell for cell in found.cells if cell.panel == panel]
        for shots, seed in {(cell.shots, cell.seed) for cell in mine}:
            # Zero-shot is one number, whatever the shots: one cell of it is enough.
            for method in {cell.method for cell in mine} - {"zeroshot"}:
                key = (panel, method, shots, seed)
                named.setdefault(key, Missing(*key, "no result file among those given"))
    rest = [one for key, one in named.items() if key not in there]
    return sorted(rest, key=lambda m: (m.panel, m.method, shots_order(m.shots), m.seed))


def read_json(path: Path) -> dict:
    """An object from a file. Raises UserError."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: expected an object, got {type(content).__name__}")
    return content
