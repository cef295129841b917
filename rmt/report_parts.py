"""Parts of the report beside the accuracies: masks over depth, overlap, worst classes, protocols' tables, sources."""

import base64
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

from . import compare_figures, figures, table_figures
from .checkpoint import MASK_FILE, load_task
from .compare_tasks import matrix
from .config import UserError
from .evaluate import TASK_FOLDER
from .report import Figure, Section, Table
from .report_cells import Cell, shots_order
from .report_data import Found
from .report_data import Table as Protocol
from .report_means import ZERO, Point

# Heat maps of one page, pixels along a thumbnail's longer side, tasks of one overlap.
MAPS, THUMB, TASKS = 12, 96, 12


def masks(cells: Sequence[Cell], titles: Mapping[str, str]) -> list[Section]:
    """Percent off over depth and module, then the overlap of the tasks of the first method with masks."""
    masked = [cell for cell in cells if cell.result.get("per_layer")]
    methods = sorted({cell.method for cell in masked}, key=lambda m: (compare_figures.rank(m), m))
    maps, seen = {}, set()
    for method in methods:
        for panel in dict.fromkeys(cell.panel for cell in masked):
            some = _largest([c for c in masked if (c.panel, c.method) == (panel, method)])
            # tip+ramt has ramt's very masks: one map is enough.
            bits = {cell.result.get("bits_sha256") for cell in some}
            if some and not bits <= seen:
                maps[f"{panel}\n{titles[method]}\n{_whole(some)}"] = _layers(cell.result["per_layer"] for cell in some)
                seen |= bits - {None}
    return [*depth(maps), *_overlap(masked, methods, titles)]


def depth(maps: Mapping[str, Sequence[tuple[str, float]]]) -> list[Section]:
    """The heat maps' section, if there are any."""
    if not maps:
        return []
    text = "At the largest number of shots, mean over the seeds. An empty place is a weight without a mask."
    if len(maps) > MAPS:
        text += f" The first {MAPS} of {len(maps)} maps."
    caption = "Percent of the weights that are off, for every block from the input down and every module across."
    shown = Figure(table_figures.depth(dict(list(maps.items())[:MAPS])), caption, True)
    return [Section("Where weights are off", text, figures=[shown])]


def _largest(cells: Sequence[Cell]) -> list[Cell]:
    top = max((cell.shots for cell in cells), key=shots_order, default=None)
    return [cell for cell in cells if cell.shots == top]


def _whole(cells: Sequence[Cell]) -> str:
    off = statistics.fmean(c.result["percent_off"] for c in cells) if "percent_off" in cells[0].result else None
    return compare_figures.shots_text(cells[0].shots) + (f": {off:.1f} %" if off is not None else "")


def _layers(several: Iterable[Sequence]) -> list[tuple[str, float]]:
    shares: dict[str, list[float]] = {}
    for layers in several:
        for key, off, total in layers:
            shares.setdefault(key, []).append(100 * off / total)
    return [(key, statistics.fmean(values)) for key, values in shares.items()]


def _overlap(masked: Sequence[Cell], methods: Sequence[str], titles: Mapping[str, str]) -> list[Section]:
    """Between data sets; with one data set, between its seeds."""
    for method in methods:
        mine = _largest([cell for cell in masked if cell.method == method])
        panels = {cell.panel: cell for cell in reversed(mine)}
        between = {panel: panels[panel] for panel in sorted(panels)}
        what = "data sets, first seed of each"
        if len(panels) == 1:
            between, what = {f"seed {cell.seed}": cell for cell in mine}, "seeds"
        bases = [cell.result["base_sha256"] for cell in between.values()]
        between = {name: cell for name, cell in between.items() if cell.result["base_sha256"] == bases[0]}
        if len(between) < 2:
            continue
        there = {n: c for n, c in between.items() if c.folder and (c.folder / TASK_FOLDER / MASK_FILE).is_file()}
        title = f"Overlap of task masks: {titles[method]}"
        if len(there) < 2:
            return [Section(title, "Not drawn: the files of the masks are not beside the results.")]
        names = list(there)[:TASKS]
        found = matrix([load_task(there[name].folder / TASK_FOLDER) for name in names])
        caption = (
            f"Between {what}, {compare_figures.shots_text(mine[0].shots)}. Left: weights off in both, as a share of "
            "those off in any; right: as a multiple of how many would be off in both by chance."
        )
        shown = Figure(figures.overlap(names, found["jaccard"], found["lift"]), caption)
        return [Section(title, figures=[shown])]
    return []


def worst(cells: Sequence[Cell], titles: Mapping[str, str]) -> list[Section]:
    """For each data set, the worst classes of one method, with images that it got wrong where their files are there."""
    sections = []
    for panel in dict.fromkeys(cell.panel for cell in cells):
        some = [c for c in cells if c.panel == panel and c.result.get("worst") and c.method != ZERO]
        if not some:
            continue
        first = min(_largest(some), key=lambda c: (compare_figures.rank(c.method), c.method, c.seed))
        said = [f"{one['class']}: {one['acc1']:.1f} %" for one in first.result["worst"]]
        cards, lost = [], 0
        for one in first.result["worst"]:
            for image in one.get("images", ()):
                uri = thumbnail(image["path"])
                lost += uri is None
                if uri:
                    seen = f"{one['class']}, seen as {image['predicted']} ({100 * image['confidence']:.0f} %)"
                    cards.append(Figure(uri, seen))
        at = f"{titles[first.method]}, {compare_figures.shots_text(first.shots)}, seed {first.seed}"
        note = (
            f"{lost} more example{'s' * (lost != 1)}: the image files are not here, or cannot be read." if lost else ""
        )
        if lost and not cards:
            note = "No example is shown: the image files are not here, or cannot be read."
        text = f"{at}. Top-1 of the class: {'; '.join(said)}."
        sections.append(Section(f"Worst classes of {panel}", text, cards=cards, note=note))
    return sections


def thumbnail(path: str) -> str | None:
    """The image as a small JPEG's data URI; None where there is no such image."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((THUMB, THUMB))
    file = BytesIO()
    small.save(file, "jpeg", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def tables(found: Found) -> list[Section]:
    """Base to new, grids, ablations."""
    return [*_halves(found.halves), *_grids(found.grids), *(_ablation(one) for one in found.ablations)]


def _halves(some: Sequence[Protocol]) -> list[Section]:
    shown, rows, failed = {}, [], []
    for name, table in zip(_distinct(some), some):
        failed += _failed(table)
        count = len(table.content["seeds"])
        try:
            found = {
                of: {"base": _point(row["base"], count), "new": _point(row["new"], count),
                     "harmonic mean": Point(row["harmonic_of_means"], None, count)}
                for of, row in table.content["rows"].items()
            }  # fmt: skip
        except (KeyError, TypeError) as error:
            raise UserError(f"{table.path} is damaged: a base-to-new row lacks {error}") from error
        if {"zero_shot", "tuned"} <= set(found):
            shown[name] = found
            rows += [
                (name, of.replace("_", "-"), *(_pm(found[of][column]) for column in found[of]), str(count))
                for of in ("zero_shot", "tuned")
            ]  # fmt: skip
    if not shown:
        return [Section("Base to new", _said("No seed has ended.", failed))] if some else []
    text = "Tuned on the first half of the classes, measured on both halves, each among its own classes only."
    caption = "From zero-shot (star) to tuned (dot): base classes, new classes, and the harmonic mean of the two means."
    head = ("data set", "", "base", "new", "harmonic mean", "seeds")
    figure = Figure(table_figures.halves(shown), caption, True)
    return [Section("Base to new", _said(text, failed), Table(head, rows), [figure])]


def _grids(some: Sequence[Protocol]) -> list[Section]:
    sections, maps = [], {}
    for name, table in zip(_distinct(some), some):
        rows = sorted(table.content["rows"], key=lambda row: shots_order(row["shots"]))
        failed = _failed(table)
        if not rows:
            sections.append(Section(f"Masks on {name}", _said("No run has ended.", failed)))
            continue
        curves: dict[str, dict] = {ZERO: {}, "ramt": {}}
        cells = []
        try:
            for row in rows:
                n = len(row["seeds"])
                curves[ZERO][row["shots"]] = _point(row["zero_shot"], 1)._replace(sd=None)
                curves["ramt"][row["shots"]] = _point(row["acc1"], n)
                numbers = [
                    _pm(_point(row[key], n)) for key in ("zero_shot", "acc1", "mean_per_class_recall", "macro_f1")
                ]
                cells.append((str(row["shots"]), *numbers, _pm(_point(row["percent_off"], n)), str(n)))
        except (KeyError, TypeError) as error:
            raise UserError(f"{table.path} is damaged: a grid's row lacks {error}") from error
        head = ("shots", "zero-shot, %", "tuned, %", "mean per class, %", "macro F1, %", "weights off, %", "seeds")
        pictures = []
        if len(rows) > 1:
            uri = compare_figures.over_shots({name: curves}, {ZERO: "zero-shot", "ramt": "tuned masks"})
            caption = "Top-1 against images a class; the band is a sample deviation over the seeds."
            pictures.append(Figure(uri, caption, True))
        sections.append(Section(f"Masks on {name}", _said("", failed), Table(head, cells), pictures))
        runs = [run for run in table.runs if run.get("per_layer") and run.get("shots") == rows[-1]["shots"]]
        if runs:
            maps[f"{name}, {compare_figures.shots_text(rows[-1]['shots'])}"] = _layers(r["per_layer"] for r in runs)
    return sections + [s._replace(title="Where the grids' weights are off") for s in depth(maps)]


def _ablation(table: Protocol) -> Section:
    content = table.content
    rows, keys = content["rows"], {"acc1": "top-1, %", "percent_off": "weights off, %"}
    n = len(content.get("seeds") or ()) or 0
    columns = {
        title: [_point(row[key], n) if row.get(key) else None for row in rows]
        for key, title in keys.items() if any(row.get(key) for row in rows)
    }  # fmt: skip
    labels = [str(row["label"]) for row in rows]
    cells = [(label, *("-" if p is None else _pm(p) for p in some)) for label, *some in zip(labels, *columns.values())]
    text = f"On {content.get('dataset')}." + (f" Means over {n} seeds." if n > 1 else "")
    caption = "Mean and sample deviation over the seeds, in the order of the file."
    figure = Figure(table_figures.ablation(labels, columns), caption, True)
    return Section(f"Ablation: {content.get('what')}", text, Table(("", *columns), cells), [figure] if rows else [])


def _point(value: Mapping, n: int) -> Point:
    return Point(value["mean"], value.get("sd"), n)


def _pm(point: Point) -> str:
    return f"{point.mean:.2f}" if point.sd is None else f"{point.mean:.2f} ± {point.sd:.2f}"


def _distinct(some: Sequence[Protocol]) -> list[str]:
    """Names of tables; with the folder where two have one name."""
    names = [table.name for table in some]
    return [f"{t.name} ({t.path.parent})" if names.count(t.name) > 1 else t.name for t in some]


def _failed(table: Protocol) -> list[str]:
    return [f"{Path(path).name}: {why}" for path, why in table.content.get("failed", {}).items()]


def _said(text: str, failed: Sequence[str]) -> str:
    return " ".join([text, *(["Failed and missing: " + "; ".join(failed) + "."] if failed else [])]).strip()


def sources(found: Found, command: str) -> dict[str, str]:
    """Where the numbers come from; of several values every one, and of dates the first and the last."""
    runs = [run for table in (*found.grids, *found.halves) for run in table.runs]
    results = [*(cell.result for cell in found.cells), *runs]
    made = [
        *found.commands,
        *(result.get("command") for result in results),
        *(t.content.get("command") for t in found.ablations),
    ]
    named: dict[str, str] = {"command": command, "results by": _values(made), "from": _values([*_read(found)])}
    for key in ("model", "pretrained", "base_sha256"):
        named[key] = _values(result.get(key) for result in results)
    named["options"] = _values(
        json.dumps(cell.result.get("options")) for cell in found.cells if cell.result.get("options")
    )
    machines = [result["environment"] for result in results if isinstance(result.get("environment"), dict)]
    for key in dict.fromkeys(key for machine in machines for key in machine):
        values = sorted({str(machine[key]) for machine in machines if machine.get(key)})
        named[key] = f"{values[0]} to {values[-1]}" if key == "date" and len(values) > 1 else _values(values)
    for panel in dict.fromkeys(cell.panel for cell in found.cells):
        mine = [cell for cell in found.cells if cell.panel == panel]
        samples = {(c.shots, c.seed): c.result["indices_sha256"][:12] for c in mine}
        named[f"training images of {panel}, indices_sha256"] = _by_shots(samples)
        for method in sorted({c.method for c in mine if c.result.get("bits_sha256") and "+" not in c.method}):
            some = _largest([c for c in mine if c.method == method])
            bits = {(c.shots, c.seed): c.result.get("bits_sha256", "")[:12] for c in some}
            named[f"masks of {panel}, {method}, bits_sha256"] = _by_shots(bits)
    return {key: value for key, value in named.items() if value}


def _by_shots(values: Mapping[tuple, str]) -> str:
    """(shots, seed) -> hash, as text."""
    order = sorted({shots for shots, _ in values}, key=shots_order)
    seeds = {k: sorted(seed for shots, seed in values if shots == k) for k in order}
    return "; ".join(
        f"{compare_figures.shots_text(k)}: {', '.join(f'seed {seed} {values[k, seed]}' for seed in seeds[k])}"
        for k in order
    )


def _read(found: Found) -> Iterable[str]:
    for cell in found.cells:
        yield str(cell.folder.parents[1] if cell.folder and len(cell.folder.parents) > 1 else cell.path)
    for table in (*found.grids, *found.halves, *found.ablations):
        yield str(table.path)


def _values(values: Iterable, most: int = 12) -> str:
    distinct = list(dict.fromkeys(str(value) for value in values if value))
    return "; ".join(distinct[:most]) + (f"; and {len(distinct) - most} more" if len(distinct) > most else "")
