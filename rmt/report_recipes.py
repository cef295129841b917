"""Whose recipe each method of a comparison follows, and how much of it was taken."""

from collections.abc import Mapping, Sequence

from .report import Section, Table
from .report_cells import Cell
from .report_means import ZERO


def recipes(cells: Sequence[Cell], titles: Mapping[str, str]) -> list[Section]:
    """A line for each method: steps taken and its authors' steps over all cells, what was noted, the source."""
    rows, cut, any_known = [], [], False
    for method, title in titles.items():
        mine = [cell.result for cell in cells if cell.method == method]
        taken = [result.get("steps") or 0 for result in mine]
        published = [result.get("published_steps") for result in mine]
        if any(theirs is not None and ours < theirs for ours, theirs in zip(taken, published)):
            cut.append(title)
        known = [theirs for theirs in published if theirs is not None]
        any_known |= bool(known)
        notes = dict.fromkeys(note for result in mine for note in result.get("notes") or ())
        sources = dict.fromkeys(text for result in mine for text in (result.get("sources") or {}).values())
        rows.append((title, _range(taken), _range(known) if known else "-", "; ".join(notes), "; ".join(sources)))
    if all(method == ZERO for method in titles):
        return []
    text = "Gradient steps over all data sets, shots and seeds. "
    if cut:
        text += f"Fewer than their authors take: {', '.join(cut)}."
    elif any_known:
        text += "No recipe was cut short."
    head = ("method", "steps", "authors' steps", "notes", "source")
    return [Section("Recipes", text, Table(head, rows, words=True))]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
