"""What is in a task, layer by layer, and what two tasks have in common. Plain rows, and text tables of them."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .chance import holm, log10_at_least, log10_sum_at_least
from .checkpoint import Task, count_on
from .config import UserError

Row = dict[str, Any]
TOTAL = "total"
P_NOTE = (
    "log10_p: one-sided, as many or more off in both if each task had drawn its weights at random; holm: adjusted for "
    "the {} layers"
)


def facts(task: Task) -> Row:
    """What the masks belong to, without the masks."""
    names = (
        "path", "model", "pretrained", "template", "classnames", "init", "threshold", "bits_sha256", "base_sha256",
        "config",
    )  # fmt: skip
    features = None if task.text_features is None else tuple(task.text_features.shape)
    return {name: getattr(task, name) for name in names} | {"text_features": features, "path": str(task.path)}


def inspect(task: Task) -> list[Row]:
    """A row for every mask, in the order of the layers, and one of their total.

    Keys: key, shape (None in the total), selected (weights that could be switched off), weights, off, percent_off,
    bytes (of the packed words), coded_bytes (of its stream in a task file).
    """
    rows = []
    for key in _in_layer_order(task):
        n, k = task.shapes[key]
        sizes = {"shape": (n, k), "weights": n * k, "selected": task.selected.get(key, n * k)}
        stored = {"bytes": 4 * task.bits[key].numel(), "coded_bytes": task.coded_bytes(key)}
        rows.append({"key": key} | sizes | {"off": task.off(key)} | stored)
    rows.append({"key": TOTAL, "shape": None} | _sums(rows, ("weights", "selected", "off", "bytes", "coded_bytes")))
    return [row | {"percent_off": 100 * row["off"] / row["weights"]} for row in rows]


def diff(a: Task, b: Task) -> list[Row]:
    """A row for every mask of two tasks on one base model, and one of their total.

    Keys: key, weights, selected (weights that could be switched off), both (off in both), only_a, only_b, by_chance:
    how many would be off in both, on average, had each task drawn as many at random of the selected weights; lift
    (both / by_chance), jaccard (both / off in any), log10_p: of the one-sided test whether so many or more would be off
    in both by chance, and holm: the same after Holm's adjustment for the number of layers. lift and jaccard are None
    where they would be 0 / 0. A layer's p is exact, the total's a saddlepoint approximation over independent layers:
    see `rmt.chance`.

    A file says how many weights were selected, not which. The test takes the smaller selection to lie in the larger,
    and draws from the larger: exact for equal ones, and for others p errs to the large side only.

    Raises: UserError for tasks of other masks, shapes or base weights.
    """
    need_comparable(a, b)
    rows, layers = [], []
    for key in _in_layer_order(a):
        n, k = a.shapes[key]
        off_a, off_b, both = a.off(key), b.off(key), n * k - count_on(a.bits[key] | b.bits[key])
        # A file that says less than it has off is wrong, and no reason to fail.
        population = max(off_a, off_b, *(task.selected.get(key, n * k) for task in (a, b)))
        layers.append((population, off_a, off_b))
        counts = {"both": both, "only_a": off_a - both, "only_b": off_b - both}
        expected = off_a * off_b / max(population, 1)
        rows.append({"key": key, "weights": n * k, "selected": population} | counts | {"by_chance": expected})
    p = [log10_at_least(*layer, row["both"]) for layer, row in zip(layers, rows)]
    total = _sums(rows, ("weights", "selected", "both", "only_a", "only_b", "by_chance"))
    p.append(log10_sum_at_least(layers, total["both"]))
    adjusted = [*holm(p[:-1]), None]
    return [
        row | {"lift": _lift(row), "jaccard": _jaccard(row), "log10_p": value, "holm": more}
        for row, value, more in zip([*rows, {"key": TOTAL} | total], p, adjusted)
    ]


def matrix(tasks: Sequence[Task]) -> dict[str, Any]:
    """How every two of some tasks overlap in all: names, and (T, T) lists of jaccard, lift and log10_p, as in `diff`.

    On the diagonal jaccard is 1, the others None: a task with itself is no question. Raises: UserError, as `diff`.
    """
    size = len(tasks)
    if size < 2:
        raise UserError(f"an overlap is of two tasks or more, got {size}")
    found = {name: [[1.0 if name == "jaccard" and i == j else None for j in range(size)] for i in range(size)]
             for name in ("jaccard", "lift", "log10_p")}  # fmt: skip
    for i, j in itertools.combinations(range(size), 2):
        total = diff(tasks[i], tasks[j])[-1]
        for name, table in found.items():
            table[i][j] = table[j][i] = total[name]
    return {"names": distinct_names(tasks)} | found


def task_name(path: Path) -> str:
    """What people call a task: its folder, or for a run's, the run."""
    folder = path.parent if path.suffix == ".safetensors" else path
    return (folder.parent.name if folder.name == "task" else "") or folder.name or str(path)


def distinct_names(tasks: Sequence[Task]) -> list[str]:
    """`task_name` of each, numbered where two would be the same."""
    names = [task_name(task.path) for task in tasks]
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _lift(row: Row) -> float | None:
    return row["both"] / row["by_chance"] if row["by_chance"] else None


def _in_layer_order(task: Task) -> list[str]:
    """Block 2 before block 10; a file has its keys in another order."""
    parts = {
        key: [(part.isdigit(), int(part) if part.isdigit() else part) for part in key.split(".")] for key in task.bits
    }
    return sorted(parts, key=parts.get)


def _sums(rows: Sequence[Row], names: Sequence[str]) -> Row:
    return {name: sum(row[name] for row in rows) for name in names}


def _jaccard(row: Row) -> float | None:
    union = row["both"] + row["only_a"] + row["only_b"]
    return row["both"] / union if union else None


def need_comparable(a: Task, b: Task) -> None:
    """Raises UserError for tasks of other masks, shapes or base weights."""
    hashes = f"base weights with sha256 {a.base_sha256} ({a.path}) and {b.base_sha256} ({b.path})"
    if odd := sorted(key for key in {*a.shapes, *b.shapes} if a.shapes.get(key) != b.shapes.get(key)):
        was = f"{odd[0]} is {a.shapes.get(odd[0], 'missing')} and {b.shapes.get(odd[0], 'missing')}"
        raise UserError(f"two tasks must have the same masks to be compared, but {was}; {hashes}")
    if a.base_sha256 != b.base_sha256:
        raise UserError(f"two tasks must be of one base model to be compared, got {hashes}")


def format_rows(rows: Sequence[Row]) -> str:
    """A text table of rows with the same keys: names to the left, numbers to the right, the total under a line."""
    cells = [list(rows[0])] + [[cell_text(name, value) for name, value in row.items()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in cells]
    rule = "-" * len(lines[0])
    body = [*lines[1:-1], rule, lines[-1]] if rows[-1].get("key") == TOTAL else lines[1:]
    return "\n".join(line.rstrip() for line in [lines[0], rule, *body])


def format_matrix(names: Sequence[str], table: Sequence[Sequence[float | None]], digits: int) -> str:
    """A text table with the names at both sides; - where there is no number."""
    cells = [["", *names]] + [
        [name, *("-" if value is None else f"{value:,.{digits}f}" for value in row)] for name, row in zip(names, table)
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names) + 1)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def cell_text(name: str, value: Any) -> str:
    """One cell of a row, as text tables and pages show it."""
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.3f}" if name == "jaccard" else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else value
