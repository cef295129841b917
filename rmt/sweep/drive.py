"""A sweep from its file to its table: which runs there are, which are finished, and an engine for the rest.

OUT/sweep.json     the sweep's runs, by folder; OUT/data.json: content hashes that are kept
OUT/runs/...       a folder a run, see `rmt.sweep.jobs`
OUT/results.jsonl  the table, see `rmt.sweep.table`
OUT/sweep.lock     while a sweep is at work here, see `rmt.sweep.lock`
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import UserError
from ..files import write_json
from ..progress import progress
from .identity import Contents, identify
from .jobs import Job
from .lock import Lock, locked
from .spec import Run, read_spec
from .table import Table

SWEEP_FILE = "sweep.json"
ENGINES = ("local", "ray", "slurm")


@dataclasses.dataclass(frozen=True)
class Engine:
    """What runs the runs. workers: most at once; None: what fits. retries: of a run whose process or node was lost.

    cpus, gpus: that a run takes on a Ray cluster. address: of that. hold: one backbone for all runs on a device there.
    slurm: parameters of submitit's.
    """

    name: str = "local"
    workers: int | None = None
    retries: int = 2
    cpus: float = 1.0
    gpus: float = 0.0
    address: str | None = None
    slurm: dict[str, Any] = dataclasses.field(default_factory=dict)
    hold: bool = False

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise UserError(f"engine must be one of {', '.join(ENGINES)}, got {self.name!r}")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers must be at least 1, got {self.workers}")
        if self.retries < 0:
            raise UserError(f"retries must be at least 0, got {self.retries}")
        if not (0 < self.cpus < float("inf") and 0 <= self.gpus < float("inf")):
            raise UserError(f"a run needs more than 0 cpus and at least 0 gpus, got {self.cpus} and {self.gpus}")

    def outcomes(self, jobs: Sequence[Job], out: Path, sweep: Sequence[Job]) -> Iterator[dict[str, Any] | int]:
        """Rows of runs that ended and, in between, how many are running. jobs: those of the sweep's that are left."""
        common = {"workers": self.workers, "retries": self.retries}
        if self.name == "local":
            from . import local

            return local.outcomes(jobs, out, sweep=sweep, **common)
        if self.name == "ray":
            from . import ray

            resources = {"cpus": self.cpus, "gpus": self.gpus, "hold": self.hold}
            return ray.outcomes(jobs, out, address=self.address, **resources, **common)
        from . import slurm

        return slurm.outcomes(jobs, out, parameters=self.slurm, **common)


def sweep(spec: str | Path, out: str | Path, engine: Engine | None = None) -> list[dict[str, Any]]:
    """Runs what is not finished of a sweep's file. Returns the table's rows; those that failed among them.

    Raises: UserError for a bad file, data that cannot be read, or a folder where another sweep is at work.
    """
    out, engine = Path(out), engine or Engine()
    runs = read_spec(spec)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out) as lock:
        jobs = _jobs(runs, out, Contents(out))
        for job in jobs:
            job.write()
        write_json(out / SWEEP_FILE, {"kind": "sweep", "runs": [job.folder.name for job in jobs]})
        table = Table(out, jobs)
        todo = [job for job in jobs if job.id not in table.rows]
        print(
            f"sweep      {len(jobs)} runs, {len(table.rows)} finished, {len(todo)} to do on {engine.name}", flush=True
        )
        if todo:
            _follow(engine.outcomes(todo, out, jobs), table, lock, len(jobs))
    rows = [table.rows[job.id] for job in jobs]
    failed = sum(row["status"] == "failed" for row in rows)
    print(f"table      {table.path}: {len(rows) - failed} done, {failed} failed", flush=True)
    return rows


def planned(spec: str | Path, out: str | Path) -> list[tuple[Job, str]]:
    """The runs of a file and how they stand: finished, started, failed or new. Writes nothing. Raises UserError."""
    out, found = Path(out), []
    for job in _jobs(read_spec(spec), out, Contents(out, write=False)):
        state = "finished" if job.result() is not None else job.state().get("status", "new")
        found.append((job, "started" if state == "running" else state))
    return found


def _jobs(runs: Sequence[Run], out: Path, contents: Contents) -> list[Job]:
    """Raises UserError where two runs are one: values that mean the same, such as a preset and its targets."""
    jobs: dict[str, Job] = {}
    for run in runs:
        job = Job.make(run, identify(run, contents), out)
        if (same := jobs.setdefault(job.id, job)) is not job:
            raise UserError(f"two runs of the sweep are the same run: {same.run.label} and {run.label}")
    return list(jobs.values())


def _follow(outcomes: Iterator[dict[str, Any] | int], table: Table, lock: Lock, total: int) -> None:
    start, ended, running = time.monotonic(), 0, 0
    with progress("runs", total, len(table.rows)) as advance:
        for one in outcomes:
            lock.beat()
            if isinstance(one, int):
                running = one
                advance(len(table.rows), None)
                continue
            if not table.add(one):
                continue
            ended += 1
            left = total - len(table.rows)
            pace = (time.monotonic() - start) / ended
            advance(len(table.rows), f"{_said(one)}  [{_counts(table)}, {min(running, left)} running, ETA "
                    f"{_clock(pace * left)}]")  # fmt: skip


def _counts(table: Table) -> str:
    failed = sum(row["status"] == "failed" for row in table.rows.values())
    return f"{len(table.rows) - failed} done, {failed} failed"


def _said(row: dict[str, Any]) -> str:
    name = row["run"].rpartition("-")[0]
    if row["status"] == "failed":
        return f"{name}: failed: {row['why']}"
    seconds = "" if row["seconds"] is None else f" in {row['seconds']:.1f} s"
    return f"{name}: {row['acc1']:.2f} %{seconds}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
