"""One self-contained HTML page about a run or the demo: tables, figures inside, provenance; no script, no link."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import figures
from .checkpoint import load_task, write_whole
from .config import UserError

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
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .94rem; }
th, td { padding: .38rem 1.4rem .38rem 0; text-align: right; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); }
th:first-child, td:first-child { text-align: left; }
tr.strong td { font-weight: 600; background: var(--wash); }
figure { margin: 1rem 0 1.4rem; }
img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: .85rem; margin-top: .3rem; max-width: 46rem; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: .8rem; }
footer td { text-align: left; white-space: normal; overflow-wrap: anywhere; border: 0; padding: .1rem 1rem .1rem 0; }
footer td:first-child { white-space: nowrap; vertical-align: top; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.table %}
<div class="wide"><table>
<thead><tr>{% for cell in section.table.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.table.rows %}
<tr{% if loop.index0 == section.table.strong %} class="strong"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% for figure in section.figures %}
<figure><img src="{{ figure.uri }}" alt="{{ figure.caption }}"><figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}
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


class Table(NamedTuple):
    """strong: the row that is set off from the others."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: int | None = None


class Figure(NamedTuple):
    """uri: from `rmt.figures`. caption: what is to be seen, for people who do not see it as well."""

    uri: str
    caption: str


class Section(NamedTuple):
    """A heading with a paragraph, a table, figures: what is given of them, in this order."""

    title: str
    text: str = ""
    table: Table | None = None
    figures: Sequence[Figure] = ()


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
