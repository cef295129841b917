"""Means over seeds and data sets of the cells of `rmt compare`, as the report shows them."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .report_cells import Cell, Shots, shots_order

ZERO = "zeroshot"
COSTS = {
    "trained_parameters": "trained", "stored_bytes": "stored", "training_seconds": "training, s",
    "peak_bytes": "memory, MB", "images_per_second": "images / s",
}  # fmt: skip


class Point(NamedTuple):
    """A mean; sd: the sample deviation (n - 1) over the seeds, None for a single one; n: how many seeds."""

    mean: float
    sd: float | None
    n: int


# Accuracies of one data set, or of the average: method -> number of shots -> Point.
Curves = Mapping[str, Mapping[Shots, Point]]


def point(values: Iterable[float]) -> Point:
    """Of one value a seed."""
    values = list(values)
    return Point(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def seeds(cells: Sequence[Cell]) -> dict[str, dict[str, dict[Shots, dict[int, Cell]]]]:
    """panel -> method -> shots -> seed -> cell. Zero-shot trains nothing: its first cell stands at all shots."""
    table: dict = {}
    for cell in cells:
        table.setdefault(cell.panel, {}).setdefault(cell.method, {}).setdefault(cell.shots, {})[cell.seed] = cell
    for methods in table.values():
        if ZERO in methods:
            first = next(cell for by_seed in methods[ZERO].values() for cell in by_seed.values())
            methods[ZERO] = {k: {first.seed: first} for k in all_shots(methods)}
    return table


def all_shots(methods: Mapping[str, Mapping[Shots, object]]) -> list[Shots]:
    """In order."""
    return sorted({k for shots in methods.values() for k in shots}, key=shots_order)


def per_panel(table: Mapping) -> dict[str, Curves]:
    """Means over the seeds of each data set."""
    return {
        panel: {
            method: {k: point(c.acc1 for c in by_seed.values()) for k, by_seed in shots.items()}
            for method, shots in methods.items()
        }
        for panel, methods in table.items()
    }


def average(table: Mapping) -> tuple[Curves, dict[Shots, list[str]]]:
    """Over the data sets that have every method of the page at that number of shots, and the seeds that all have.

    The deviation is that of the seeds' averages. Returns it and the data sets by number of shots; numbers of shots
    with fewer than two such data sets are left out.
    """
    every = {method for methods in table.values() for method in methods}
    curves: dict[str, dict[Shots, Point]] = {}
    used: dict[Shots, list[str]] = {}
    for k in sorted({k for methods in table.values() for k in all_shots(methods)}, key=shots_order):
        panels = [p for p, methods in table.items() if all(k in methods.get(m, ()) for m in every)]
        trained = [set(table[p][m][k]) for p in panels for m in every if m != ZERO]
        common = sorted(set.intersection(*trained)) if trained else []
        if len(panels) < 2 or (trained and not common):
            continue
        used[k] = panels
        for method in every:
            cells = [table[panel][method][k] for panel in panels]
            if method == ZERO:
                values = [statistics.fmean(next(iter(by_seed.values())).acc1 for by_seed in cells)]
            else:
                values = [statistics.fmean(by_seed[seed].acc1 for by_seed in cells) for seed in common]
            curves.setdefault(method, {})[k] = point(values)
    return curves, used


def costs(cells: Iterable[Cell]) -> dict[str, float | None]:
    """Means of what a method costs; None where a cell has no number."""
    cells, found = list(cells), {}
    for key in COSTS:
        values = [cell.result.get(key) for cell in cells]
        found[key] = None if not values or None in values else statistics.fmean(values)
    return found


def ranked(curves: Curves) -> list[str]:
    """The methods, best first at the largest number of shots; those without it last."""
    top = all_shots(curves)[-1]
    return sorted(curves, key=lambda m: (top in curves[m], curves[m][top].mean if top in curves[m] else 0.0, m))[::-1]
