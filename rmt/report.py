"""One self-contained HTML page: a run, tasks and how they overlap, or the demo; figures inside, no script, no link."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import figures
from .checkpoint import MASK_FILE, Task, load_task, write_whole
from .compare_tasks import P_NOTE, cell_text, diff, distinct_names, matrix
from .config import UserError
from .evaluate import task_path

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2733; --soft: #66707a; --line: #dfe3e7; --page: #fff; --wash: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dde3e9; --soft: #8f99a3; --line: #2d353d; --page: #14191e; --wash: #1b2127; }
}
body { margin: 0 auto; padding: 3rem 1.5rem 4rem; max-width: 62rem; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0 0 .4rem; font-size: 1.75rem; font-weight: 600; letter-spacing: -.01em; }
h2 { margin: 2.6rem 0 .5rem; font-size: 1.1rem; font-weight: 600; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.lead, figcaption, footer { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .36rem 1.1rem .36rem 0; text-align: right; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); }
th:first-child, td:first-child { text-align: left; }
.long th { text-align: left; }
.long td { white-space: normal; min-width: 6rem; text-align: left; vertical-align: top; }
tr.strong td { font-weight: 600; background: var(--wash); }
figure { margin: 1rem 0 1.4rem; }
img { display: block; max-width: 100%; height: auto; }
.paper { overflow-x: auto; }
.paper img { background: #fff; border-radius: 4px; min-width: 34rem; }
.cards { display: flex; flex-wrap: wrap; gap: .9rem 1.1rem; margin: .8rem 0 1.4rem; }
.cards figure { margin: 0; width: 6.5rem; }
.cards img { max-height: 96px; border-radius: 3px; }
.cards figcaption { font-size: .75rem; line-height: 1.35; overflow-wrap: anywhere; }
h1, h2, p, figcaption { overflow-wrap: anywhere; }
figcaption { font-size: .85rem; margin-top: .3rem; max-width: 46rem; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: .8rem; }
footer td { text-align: left; white-space: normal; overflow-wrap: anywhere; border: 0; padding: .1rem 1rem .1rem 0; }
footer td:first-child { min-width: 6rem; max-width: 14rem; vertical-align: top; }
@media (max-width: 40rem) { body { padding: 1.5rem .9rem 3rem; } th, td { padding-right: .9rem; } }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --wash: #f2f2f2; }
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  thead { display: table-header-group; }
  .wide, .paper { overflow: visible; }
  .paper img { min-width: 0; }
  table { font-size: 7.5pt; }
  th, td { padding-right: .7em; }
}
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.table %}
<div class="wide"><table{% if section.table.words %} class="long"{% endif %}>
<thead><tr>{% for cell in section.table.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.table.rows %}
<tr{% if loop.index0 == section.table.strong %} class="strong"{% endif %}>
{%- for cell in row %}
<td>{% if cell.best is defined %}<b>{{ cell }}</b>{% else %}{{ cell }}{% endif %}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% for figure in section.figures %}
<figure{% if figure.paper %} class="paper"{% endif %}>
<img src="{{ figure.uri }}" alt="{{ figure.caption }}"><figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}
{% if section.cards %}
<div class="cards">
{% for card in section.cards %}
<figure><img src="{{ card.uri }}" alt="{{ card.caption }}"><figcaption>{{ card.caption }}</figcaption></figure>
{% endfor %}
</div>
{% endif %}
{% if section.note %}<p class="lead">{{ section.note }}</p>{% endif %}
{% endfor %}
<footer><table>
{% for name, value in provenance.items() %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table></footer>
</body>
</html>
"""
MASKS_CAPTION = (
    "The masks themselves, one picture a weight matrix: rows are outputs, columns inputs, and a cell's shade is the "
    "share of its weights that are off."
)


class Best(str):
    """A table's cell that is set in bold."""

    best = True


class Table(NamedTuple):
    """strong: the row that is set off from the others. words: of sentences, which are broken into lines."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: int | None = None
    words: bool = False


class Figure(NamedTuple):
    """uri: from `rmt.figures`. caption: what is to be seen, for people who do not see it as well.

    paper: it brings a white ground, and is scrolled sideways rather than shrunk until it cannot be read.
    """

    uri: str
    caption: str
    paper: bool = False


class Section(NamedTuple):
    """A heading with a paragraph, a table, figures, small pictures, a note: what is given of them, in this order."""

    title: str
    text: str = ""
    table: Table | None = None
    figures: Sequence[Figure] = ()
    cards: Sequence[Figure] = ()
    note: str = ""


def write_report(
    path: str | Path, title: str, lead: str, sections: Sequence[Section], provenance: Mapping[str, object]
) -> Path:
    """Writes the page, whole or not at all; every text in it is escaped. Returns its path."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE).render(title=title, lead=lead, sections=sections, provenance=provenance)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode())
    return path


def report_run(folder: str | Path, out: str | Path, command: str = "") -> Path:
    """Writes the page about a finished run's folder to `out`, from its files alone. Returns its path.

    Raises: UserError where the run is not finished, or a file of it is missing or damaged.
    """
    result, rows = read_result(folder), read_metrics(folder)
    zero, tuned = result["zero_shot"], result["metrics"]
    names = {"acc1": "top-1, %", "mean_per_class_recall": "mean per class, %", "macro_f1": "macro F1, %"}
    headline = Table(
        ("", *names.values()),
        [(label, *(f"{of[key]:.2f}" for key in names)) for label, of in (("zero-shot", zero), ("tuned", tuned))],
        strong=1,
    )
    lead = (
        f"{len(result['classnames'])} classes, {sum(map(sum, result['confusion'])):,} test images; "
        f"{result['percent_off']:.2f} % of {result['masked']:,} weights off, a task file of "
        f"{result['task_bytes']:,} bytes, {result['tuning_seconds']:.1f} s of tuning."
    )
    sections = [Section("Accuracy on the test images", table=headline), *run_sections(folder, {"this run": rows})]
    return write_report(out, f"Mask tuning on {result['dataset']}", lead, sections, provenance(result, command))


def report_tasks(paths: Sequence[str | Path], out: str | Path, command: str = "") -> Path:
    """Writes the page about tasks and runs of one base model to `out`: what they are, how their masks overlap.

    paths: task folders, run folders or hub ids; one finished run alone is `report_run`'s. Runs' own sections follow.

    Raises: UserError where a task is missing or damaged, or of another base model than the others.
    """
    runs = [Path(path) for path in paths if (Path(path) / "result.json").is_file()]
    if len(paths) == 1 and Path(paths[0]).is_dir() and not Path(paths[0], MASK_FILE).is_file():
        return report_run(paths[0], out, command)
    tasks = [load_task(task_path(path)) for path in paths]
    names = distinct_names(tasks)
    sections = [Section("Tasks", table=_task_table(paths, tasks, names))]
    if len(tasks) > 1:
        sections += _overlap(tasks, names)
    else:
        pictures = Figure(figures.masks(tasks[0].bits, tasks[0].shapes), MASKS_CAPTION)
        sections.append(Section("Masks", figures=[pictures]))
    for path, name in zip(paths, names):
        if Path(path) in runs:
            found = run_sections(path, {name: read_metrics(path)})
            sections += [section._replace(title=f"{name}: {section.title.lower()}") for section in found]
    first = tasks[0]
    weights = sum(n * k for n, k in first.shapes.values())
    lead = f"{len(tasks)} task{'s'[: len(tasks) > 1]} on one base model, {weights:,} masked weights."
    named = {"command": command, "model": first.model, "pretrained": first.pretrained, "base_sha256": first.base_sha256}
    hashes = {f"bits_sha256 of {name}": task.bits_sha256 for name, task in zip(names, tasks)}
    said = {key: str(value) for key, value in (named | hashes).items() if value}
    return write_report(out, "Tuned masks" if len(tasks) == 1 else "How tuned masks overlap", lead, sections, said)


def _task_table(paths: Sequence[str | Path], tasks: Sequence[Task], names: Sequence[str]) -> Table:
    rows = []
    for path, task, name in zip(paths, tasks, names):
        result = read_result(path) if (Path(path) / "result.json").is_file() else None
        measured = ("-", "-") if result is None else [f"{result[of]['acc1']:.2f}" for of in ("zero_shot", "metrics")]
        off, weights = sum(map(task.off, task.shapes)), sum(n * k for n, k in task.shapes.values())
        rows.append((name, f"{len(task.classnames)}", f"{off:,}", f"{100 * off / weights:.2f}", *measured))
    return Table(("", "classes", "weights off", "%", "zero-shot top-1, %", "tuned top-1, %"), rows)


def _overlap(tasks: Sequence[Task], names: Sequence[str]) -> list[Section]:
    found = matrix(tasks)
    caption = (
        "Every two tasks. Left: weights off in both, as a share of those off in any; right: as a multiple of how many "
        "would be off in both if each task had drawn its weights at random."
    )
    shown = Figure(figures.overlap(names, found["jaccard"], found["lift"]), caption)
    rows = [[name, *("-" if p is None else f"{p:.1f}" for p in row)] for name, row in zip(names, found["log10_p"])]
    text = "log10 of the chance that as many or more would be off in both: one-sided, all layers together."
    sections = [Section("Overlap", figures=[shown]), Section("Against chance", text, Table(("", *names), rows))]
    if len(tasks) == 2:
        layers = [{name: cell for name, cell in row.items() if name != "selected"} for row in diff(*tasks)]
        cells = [[figures.short(row["key"]), *(cell_text(*item) for item in list(row.items())[1:])] for row in layers]
        note = P_NOTE.format(len(layers) - 1) + "."
        sections.append(Section("Layer by layer", note, Table(("", *list(layers[0])[1:]), cells, len(layers) - 1)))
    return sections


def run_sections(folder: str | Path, curves: Mapping[str, Sequence[Mapping]]) -> list[Section]:
    """Curves of the named runs; masks and confusion matrix of the run in `folder`."""
    result, task = read_result(folder), load_task(Path(folder) / "task")
    found = []
    if all(curves.values()):
        caption = "While tuning. Losses and accuracy are of the augmented batch just seen, before its step."
        found.append(Section("Training", figures=[Figure(figures.curves(curves), caption)]))
    pictures = [
        Figure(figures.masks(task.bits, task.shapes), MASKS_CAPTION),
        Figure(figures.layers(result["per_layer"]), "Share of every matrix that is off."),
    ]
    found.append(Section("Masks", figures=pictures))
    shown = figures.confusion(result["confusion"], result["classnames"])
    caption = "Rows: the true class; columns: the predicted one; shade: share of the row."
    return [*found, Section("Confusion matrix", figures=[Figure(shown, caption)])]


def provenance(result: Mapping, command: str = "") -> dict[str, str]:
    """What a reader needs to know where the numbers come from: command, model, versions, machine, hashes."""
    hashes = {key: result[key] for key in ("indices_sha256", "bits_sha256", "base_sha256")}
    named = {"command": command, "model": result["model"], "pretrained": result["pretrained"]}
    return {key: str(value) for key, value in {**named, **result["environment"], **hashes}.items() if value}


def read_result(folder: str | Path) -> dict:
    """result.json of a finished run. Raises UserError."""
    return _read(Path(folder) / "result.json", json.loads)


def read_metrics(folder: str | Path) -> list[dict]:
    """The rows of metrics.jsonl. Raises UserError."""
    return _read(Path(folder) / "metrics.jsonl", lambda text: [json.loads(line) for line in text.splitlines()])


def _read(path: Path, parse):
    if not path.is_file():
        raise UserError(f"a report needs a finished run, but {path} is missing")
    try:
        return parse(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
