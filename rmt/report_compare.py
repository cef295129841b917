"""`rmt report` on anything: comparisons, grids, base to new, ablations, runs and tasks become one page."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import compare_figures, report_parts, report_sweep, table_figures
from .report import Best, Figure, Section, Table, read_metrics, report_tasks, run_sections, write_report
from .report_cells import Missing, Shots, shots_order
from .report_data import Found, find
from .report_means import COSTS, ZERO, Curves, Point, all_shots, average, costs, per_panel, ranked, seeds
from .report_recipes import recipes

# Runs beside tables: each brings pictures of some 100 kB.
RUNS, MISSING = 4, 60


def report(paths: Sequence[str | Path], out: str | Path, command: str = "") -> Path:
    """Writes one page about all that lies at and below the paths to `out`. Returns its path.

    paths: folders of `rmt compare`, `train`, `b2n`, folders of these, bundles of cells (JSON), tasks, hub ids. Runs and
    tasks alone are `report_tasks`'.

    Raises: UserError for what is missing or damaged, and for cells that cannot stand side by side.
    """
    found = find(paths)
    if not found.tables and not found.missing:
        return report_tasks(found.ordinary, out, command)
    sections = [*_compared(found), *report_sweep.sections(found.sweeps), *report_parts.tables(found)]
    for folder in [path for path in found.ordinary if Path(path, "result.json").is_file()][:RUNS]:
        name = Path(folder).name
        of_run = run_sections(folder, {name: read_metrics(folder)})
        sections += [section._replace(title=f"{name}: {section.title.lower()}") for section in of_run]
    sections += _missing(found)
    return write_report(out, _title(found), _lead(found), sections, report_parts.sources(found, command))


def _title(found: Found) -> str:
    panels = sorted({cell.panel for cell in found.cells})
    if not panels:
        return "Mask tuning"
    return f"Mask tuning beside its peers: {panels[0] if len(panels) == 1 else f'{len(panels)} data sets'}"


def _lead(found: Found) -> str:
    parts = []
    if found.cells:
        methods, panels = ({getattr(cell, key) for cell in found.cells} for key in ("method", "panel"))
        trained = [cell for cell in found.cells if cell.method != ZERO] or found.cells
        shots = sorted({cell.shots for cell in trained}, key=shots_order)
        parts.append(
            f"{_count(len(methods), 'method')} on {_count(len(panels), 'data set')}, {_join(shots)} images a class, "
            f"{_seeds(cell.seed for cell in trained)}: {_count(len(found.cells), 'result')}, each "
            "measured on the test images from what the method stored, all methods of a data set, number of shots and "
            "seed on the same training images"
        )
    for name, some in (
        ("grid", found.grids),
        ("base-to-new table", found.halves),
        ("ablation", found.ablations),
        ("sweep", found.sweeps),
    ):
        if some:
            parts.append(_count(len(some), name))
    if found.missing:
        parts.append(f"{_count(len(found.missing), 'result')} missing, listed below")
    return "; ".join(parts) + "."


def _compared(found: Found) -> list[Section]:
    if not found.cells:
        return []
    table = seeds(found.cells)
    panels = per_panel(table)
    titles = {cell.method: cell.result["title"] for cell in found.cells}
    mean, used = average(table)
    usual = _usual(panels, mean)
    sections = []
    head = "Average over data sets"
    if mean:
        covered = _covered(used, len(panels))
        rows = _table(mean, _costs(table, used[all_shots(mean)[-1]], all_shots(mean)[-1]), titles, usual)
        sections.append(Section(head, covered, figures=[_ranking(mean, titles)]))
        sections.append(Section("The average in numbers", table=rows, note=_seeds_note(mean, usual)))
    elif len(panels) > 1:
        why = "There is none: no two data sets have every method at one number of shots, with a seed in common."
        sections.append(Section(head, why))
    shown = ({f"average of {_many(used)} data sets": mean} if mean else {}) | panels
    caption = (
        "Top-1 against images a class. Coloured, each with its own marker and line: what has masks; black, dashed: "
        "zero-shot; grey: the others. The wide panel names its lines, and the look is the same in all. Bands: a sample "
        "deviation over the seeds. What lies far below the coloured lines leaves the panel and stands in the tables."
    )
    if any(len(all_shots(curves)) > 1 for curves in panels.values()):
        figure = Figure(compare_figures.over_shots(shown, titles), caption, True)
        sections.append(Section("Accuracy against shots", figures=[figure]))
    sections.append(_cost(table, panels, mean, used, titles))
    for panel, curves in panels.items():
        top = all_shots(curves)[-1]
        rows = _table(curves, _costs(table, [panel], top), titles, usual)
        pictures = [] if mean else [_ranking(curves, titles)]
        sections.append(Section(panel, table=rows, figures=pictures, note=_seeds_note(curves, usual)))
    sections += report_parts.masks(found.cells, titles) + report_parts.worst(found.cells, titles)
    return sections + recipes(found.cells, titles)


def _ranking(curves: Curves, titles: Mapping[str, str]) -> Figure:
    caption = (
        "Methods in the order of their accuracy at the largest number of shots, with a sample deviation over the seeds "
        "where there are several. Filled and coloured: with masks, six at most; star and dashed line: zero-shot; open "
        "and grey: the others. A triangle at the left edge, with its number, lies further left than the panel reaches. "
        "Every panel has its own scale."
    )
    return Figure(compare_figures.ranking(curves, titles), caption, True)


def _cost(
    table: Mapping, panels: Mapping[str, Curves], mean: Curves, used: Mapping[Shots, list[str]], titles: Mapping
) -> Section:
    """Of the average where there is one, else of the first data set."""
    first = next(iter(panels))
    curves, where = (mean, f"average of {_many(used)} data sets") if mean else (panels[first], first)
    top = all_shots(curves)[-1]
    accuracies = {method: points[top] for method, points in curves.items() if top in points}
    spent = _costs(table, used[top] if mean else [first], top)
    axes = {"stored bytes, beside base model and class names": "stored_bytes", "training, s": "training_seconds"}
    columns = {label: {method: spent[method][key] for method in accuracies} for label, key in axes.items()}
    free = [titles[m] for m in accuracies if m != ZERO and any(column[m] == 0 for column in columns.values())]
    caption = f"{where}, {compare_figures.shots_text(top)}: accuracy against what is kept and what training takes."
    free = [titles[ZERO]] * (ZERO in accuracies) + free
    if free:
        caption += f" A logarithm has no zero: left of the broken line, where it costs nothing, stands {_join(free)}."
    if ZERO in accuracies and accuracies[ZERO].mean < table_figures.bottom_of(accuracies):
        caption += f" {titles[ZERO].capitalize()} lies further down than the panels reach: its number stands beside it."
    return Section(
        "Accuracy against cost", figures=[Figure(table_figures.cost(accuracies, columns, titles), caption, True)]
    )


def _costs(table: Mapping, panels: Sequence[str], shots: Shots) -> dict[str, dict[str, float | None]]:
    """Means over data sets and seeds."""
    methods = {method for panel in panels for method in table[panel]}
    return {
        method: costs(c for panel in panels for c in table[panel].get(method, {}).get(shots, {}).values())
        for method in methods
    }


def _table(curves: Curves, spent: Mapping, titles: Mapping[str, str], usual: int) -> Table:
    """Best in bold, second best with a dagger, by what is printed; costs are those of the largest number of shots."""
    shots, rows = all_shots(curves), []
    printed = {k: sorted({f"{p[k].mean:.2f}" for p in curves.values() if k in p}, key=float)[::-1] for k in shots}
    for method in ranked(curves):
        cells: list[str] = [titles[method]]
        for k in shots:
            point = curves[method].get(k)
            if point is None:
                cells.append("missing")
                continue
            text, places = _pm(point, usual if method != ZERO else 1), printed[k]
            first = f"{point.mean:.2f}" == places[0]
            second = len(places) > 1 and f"{point.mean:.2f}" == places[1]
            cells.append(Best(text) if first else f"{text} †" if second else text)
        rows.append([*cells, *(_cost_text(key, spent[method][key]) for key in COSTS)])
    return Table(("top-1, %", *(compare_figures.shots_text(k) for k in shots), *COSTS.values()), rows)


def _pm(point: Point, usual: int) -> str:
    text = f"{point.mean:.2f}" if point.sd is None else f"{point.mean:.2f} ± {point.sd:.2f}"
    return text if point.n == usual else f"{text} ({point.n})"


def _cost_text(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "peak_bytes":
        return f"{value / 1e6:,.0f}"
    if key == "training_seconds":
        return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    if key == "images_per_second":
        return f"{value:,.1f}"
    unit, name = next(((u, n) for u, n in ((1e6, "M"), (1e3, "k")) if value >= u), (1, ""))
    name = f" {name}" * bool(name) if key != "stored_bytes" else f" {name}B"
    scaled = value / unit
    return f"{scaled:,.{0 if unit == 1 or scaled >= 100 else 1 if scaled >= 10 else 2}f}{name}"


def _usual(panels: Mapping[str, Curves], mean: Curves) -> int:
    """How many seeds most numbers rest on."""
    every = [
        p.n for curves in (*panels.values(), mean) for m, shots in curves.items() if m != ZERO for p in shots.values()
    ]
    return Counter(every).most_common(1)[0][0] if every else 1


def _seeds_note(curves: Curves, usual: int) -> str:
    other = any(p.n != usual for m, shots in curves.items() if m != ZERO for p in shots.values())
    text = f"Each number: {_count(usual, 'seed')}"
    text += ", ± the sample deviation over them" if usual > 1 else ", so that there is no deviation"
    text += "; in brackets: so many seeds instead" * other
    text += "; zero-shot trains nothing and is measured once" * (ZERO in curves)
    return f"{text}. Bold: best; †: second best. Costs: at the largest number of shots; memory: growth while training."


def _covered(used: Mapping[Shots, list[str]], count: int) -> str:
    groups: dict[tuple[str, ...], list[str]] = {}
    for k, panels in used.items():
        groups.setdefault(tuple(panels), []).append(compare_figures.shots_text(k))
    parts = [f"{_join(shots)}: {len(panels)} of {count} ({_join(panels)})" for panels, shots in groups.items()]
    return "Over the data sets that have every method at that number of shots. " + "; ".join(parts) + "."


def _many(used: Mapping[Shots, list[str]]) -> str:
    sizes = sorted({len(panels) for panels in used.values()})
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _missing(found: Found) -> list[Section]:
    if not found.missing:
        return []
    groups: dict[tuple, list[Missing]] = {}
    for one in found.missing:
        groups.setdefault((one.panel, one.method, one.shots, one.why), []).append(one)
    rows = [(p, m, str(k), _join(sorted(o.seed for o in some)), why) for (p, m, k, why), some in groups.items()]
    text = f"{_count(len(found.missing), 'result')} that other methods have, or that were asked for."
    text += f" The first {MISSING} lines of {len(rows)}." * (len(rows) > MISSING)
    return [
        Section(
            "What is missing", text, Table(("data set", "method", "shots", "seeds", "why"), rows[:MISSING], words=True)
        )
    ]


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


def _seeds(values: Iterable[int]) -> str:
    distinct = sorted(set(values))
    return f"seed{'s' * (len(distinct) > 1)} {_join(distinct)}"


def _join(values: Sequence) -> str:
    *rest, last = map(str, values)
    return f"{', '.join(rest)} and {last}" if rest else last
