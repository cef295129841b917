"""One cell of a report's tables, one that is missing, and what lets cells stand side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .config import UserError

Shots = int | str


class Cell(NamedTuple):
    """One method, data set, number of shots and seed. path: of the file, or None; result: all that is in it.

    panel: the data set, with the model's name where the page has several models.
    """

    panel: str
    method: str
    shots: Shots
    seed: int
    result: dict
    path: Path
    folder: Path | None

    @property
    def acc1(self) -> float:
        """Top-1 on the test images, %."""
        return self.result["metrics"]["acc1"]


class Missing(NamedTuple):
    """A cell that was asked for and is not there."""

    panel: str
    method: str
    shots: Shots
    seed: int
    why: str


def shots_order(shots: Shots) -> tuple[bool, int]:
    """Numbers first, then `all`."""
    return (True, 0) if isinstance(shots, str) else (False, shots)


def panels(cells: Sequence[Cell]) -> list[Cell]:
    """A data set measured with several base models is several panels."""
    bases = {(c.panel, c.result["base_sha256"]): c.result.get("model") for c in cells}
    several = {panel for panel, _ in bases if sum(other == panel for other, _ in bases) > 1}

    def name(cell: Cell) -> str:
        base = cell.result["base_sha256"]
        return f"{cell.panel} ({bases[cell.panel, base] or 'base'} {base[:6]})" if cell.panel in several else cell.panel

    return [cell._replace(panel=name(cell)) for cell in cells]


def side_by_side(cells: Sequence[Cell]) -> list[Cell]:
    """Each cell once, all of a panel, shots and seed on the same training images. Raises UserError."""
    kept: dict[tuple, Cell] = {}
    samples: dict[tuple, Cell] = {}
    for cell in cells:
        same = kept.setdefault((cell.panel, cell.method, cell.shots, cell.seed), cell)
        where = f"{cell.panel}, {cell.shots} shots, seed {cell.seed}"
        if same.acc1 != cell.acc1:
            raise UserError(f"{cell.method} on {where} is there twice with other numbers: {same.path}, {cell.path}")
        if same.folder is None and cell.folder is not None:
            kept[cell.panel, cell.method, cell.shots, cell.seed] = cell  # a folder has examples and task, a bundle none
        first = samples.setdefault((cell.panel, cell.shots, cell.seed), cell)
        if first.result["indices_sha256"] != cell.result["indices_sha256"]:
            raise UserError(
                f"{first.method} and {cell.method} on {where} saw other training images ({first.path}, {cell.path}): "
                "they cannot stand side by side, give each its own report"
            )
    return sorted(kept.values(), key=lambda c: (c.panel, c.method, shots_order(c.shots), c.seed))
