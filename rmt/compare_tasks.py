"""What is in a task, layer by layer, and what two tasks have in common. Plain rows, and text tables of them."""

from collections.abc import Sequence
from typing import Any

from .checkpoint import Task, count_on
from .config import UserError

Row = dict[str, Any]
TOTAL = "total"


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

    Keys: key, weights, both (off in both), only_a, only_b, jaccard (both / off in any; None where none is off) and
    by_chance: how many would be off in both, on average, if each task had drawn as many of the layer's weights at
    random, from all of them.

    Raises: UserError for tasks of other masks, shapes or base weights.
    """
    _need_comparable(a, b)
    rows = []
    for key in _in_layer_order(a):
        n, k = a.shapes[key]
        off_a, off_b, both = a.off(key), b.off(key), n * k - count_on(a.bits[key] | b.bits[key])
        counts = {"both": both, "only_a": off_a - both, "only_b": off_b - both}
        rows.append({"key": key, "weights": n * k} | counts | {"by_chance": off_a * off_b / (n * k)})
    rows.append({"key": TOTAL} | _sums(rows, ("weights", "both", "only_a", "only_b", "by_chance")))
    return [row | {"jaccard": _jaccard(row)} for row in rows]


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


def _need_comparable(a: Task, b: Task) -> None:
    hashes = f"base weights with sha256 {a.base_sha256} ({a.path}) and {b.base_sha256} ({b.path})"
    if odd := sorted(key for key in {*a.shapes, *b.shapes} if a.shapes.get(key) != b.shapes.get(key)):
        was = f"{odd[0]} is {a.shapes.get(odd[0], 'missing')} and {b.shapes.get(odd[0], 'missing')}"
        raise UserError(f"two tasks must have the same masks to be compared, but {was}; {hashes}")
    if a.base_sha256 != b.base_sha256:
        raise UserError(f"two tasks must be of one base model to be compared, got {hashes}")


def format_rows(rows: Sequence[Row]) -> str:
    """A text table of rows with the same keys: names to the left, numbers to the right, the total under a line."""
    cells = [list(rows[0])] + [[_text(name, value) for name, value in row.items()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in cells]
    rule = "-" * len(lines[0])
    body = [*lines[1:-1], rule, lines[-1]] if rows[-1].get("key") == TOTAL else lines[1:]
    return "\n".join(line.rstrip() for line in [lines[0], rule, *body])


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.3f}" if name == "jaccard" else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else value
