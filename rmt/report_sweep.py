"""A sweep's folder in a report: its table (`rmt.sweep.table`), and where the cells of `rmt compare` in it lie."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .config import UserError
from .protocols import spread
from .report import Section, Table
from .sweep.drive import SWEEP_FILE
from .sweep.jobs import JOB_FILE, RUNS, read_object
from .sweep.table import TABLE_FILE

FAILED = 20


class Sweep(NamedTuple):
    """Rows of the table that belong to the sweep as it was last started, and how many runs that has."""

    path: Path
    rows: tuple[dict[str, Any], ...]
    runs: int

    def cells(self) -> list[Path]:
        """Folders of finished cells of `rmt compare`."""
        return [
            self.path / RUNS / row["run"] / row["method"] / f"shots{row['shots']}-seed{row['seed']}"
            for row in self.rows if row["kind"] == "compare" and row["status"] == "done"
        ]  # fmt: skip

    def failed_cells(self) -> list[dict[str, Any]]:
        """Rows of cells that failed."""
        return [row for row in self.rows if row["kind"] == "compare" and row["status"] == "failed"]


def read_sweep(folder: Path) -> Sweep | None:
    """None where `folder` is no sweep's. Raises UserError where its table is damaged, and says how it is mended."""
    content = read_object(folder / SWEEP_FILE)
    if content is None or content.get("kind") != "sweep":
        return None
    path, rows = folder / TABLE_FILE, []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            row = json.loads(line)
            row["run"], row["status"], row["kind"], row["dataset"], row["method"], row["shots"], row["seed"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is damaged in line {number}: the sweep's command, given again, makes it anew from the runs"
            ) from error
        rows.append(row)
    mine = set(content["runs"])
    return Sweep(folder, tuple(row for row in rows if row["run"] in mine), len(mine))


def panel_of(dataset: str, path: Path) -> str:
    """A data set's name beside others: with the settings that vary, where `path` is a result of a sweep's cell."""
    parents = path.absolute().parents
    job = read_object(parents[2] / JOB_FILE) if len(parents) > 2 else None
    return with_settings(dataset, dict(job["settings"])) if job and job.get("settings") else dataset


def with_settings(dataset: str, settings: dict[str, Any]) -> str:
    """`digits, lr 0.001`."""
    return ", ".join([dataset, *(f"{name.rpartition('.')[2]} {_text(value)}" for name, value in settings.items())])


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def sections(sweeps: Sequence[Sweep]) -> list[Section]:
    """A table for each: a row for data set, method, settings and number of shots, means over the seeds."""
    return [_section(sweep) for sweep in sweeps]


def _section(sweep: Sweep) -> Section:
    groups: dict[tuple, list[dict]] = {}
    for row in sweep.rows:
        key = (row["dataset"], row["method"], json.dumps(row["settings"]), row["shots"])
        groups.setdefault(key, []).append(row)
    names = list(dict.fromkeys(name for row in sweep.rows for name in row["settings"]))
    rows = []
    for (dataset, method, _, shots), some in groups.items():
        done = [row for row in some if row["status"] == "done"]
        settings = [_text(some[0]["settings"].get(name, "")) for name in names]
        numbers = [_pm([row[key] for row in done]) for key in ("acc1", "zero_shot", "seconds")]
        rows.append((dataset, method, *settings, str(shots), str(len(done)), str(len(some) - len(done)), *numbers))
    head = ("data set", "method", *(name.rpartition(".")[2] for name in names), "shots", "seeds", "failed")
    done = sum(row["status"] == "done" for row in sweep.rows)
    text = (
        f"{done} of {sweep.runs} runs done, {len(sweep.rows) - done} failed. Means over seeds, with a sample deviation."
    )
    why = [f"{row['run']}: {row['why']}" for row in sweep.rows if row["status"] == "failed"]
    more = f"; and {len(why) - FAILED} more" if len(why) > FAILED else ""
    table = Table((*head, "top-1, %", "zero-shot, %", "seconds"), rows)
    return Section(f"Sweep {sweep.path.absolute().name}", text, table, note="; ".join(why[:FAILED]) + more)


def _pm(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    found = spread(there)
    return f"{found['mean']:.2f}" + ("" if found["sd"] is None else f" ± {found['sd']:.2f}")
