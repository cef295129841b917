"""A run's folder in a sweep: what it is, how it stands, and whether it is finished.

OUT/runs/{label}-{id}/run.json    what the run is: configuration, method, identity; written before it starts
                      state.json  running, done or failed; how often it was started, where, and the table's row
                      log.txt     what the run printed
                      ...         the run's own files: those of `rmt train`, or of `rmt compare` with one cell
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from ..config import RunConfig, UserError, build
from ..files import write_json
from .spec import Run

RUNS, JOB_FILE, STATE_FILE, LOG_FILE = "runs", "run.json", "state.json", "log.txt"
RESULT_FILE = "result.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """A run with its folder and identity. Two jobs of one folder are one job."""

    run: Run
    folder: Path
    identity: dict[str, str]

    @classmethod
    def make(cls, run: Run, identity: dict[str, str], out: Path) -> "Job":
        """Its folder has a name that people can read, and an end that is the run's own."""
        name = re.sub(r"[^\w.+=-]+", "-", run.label)[:80]
        return cls(run, out / RUNS / f"{name}-{identity['id'][:16]}", identity)

    @property
    def id(self) -> str:
        return self.identity["id"]

    @property
    def result_path(self) -> Path:
        """Written last, by the run, so that it stands for a finished one."""
        if self.run.method is None:
            return self.folder / RESULT_FILE
        config = self.run.config
        return self.folder / self.run.method / f"shots{config.shots}-seed{config.seed}" / RESULT_FILE

    def result(self) -> dict | None:
        """What the run's result file holds, or None where it is missing or not whole."""
        found = read_object(self.result_path)
        good = found is not None and isinstance(found.get("metrics"), dict)
        return found if good and isinstance(found["metrics"].get("acc1"), int | float) else None

    def state(self) -> dict:
        """Empty where the run was never started, or where its file is damaged."""
        return read_object(self.folder / STATE_FILE) or {}

    def write(self) -> None:
        """Makes the folder and run.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        run = self.run
        write_json(self.folder / JOB_FILE, {
            "identity": self.identity, "label": run.label, "config": dataclasses.asdict(run.config),
            "method": run.method, "options": run.options and dataclasses.asdict(run.options),
            "settings": [list(pair) for pair in run.settings],
        })  # fmt: skip

    @classmethod
    def read(cls, folder: str | Path) -> "Job":
        """Of a folder that `write` made. Raises UserError where it is missing or damaged."""
        path = Path(folder) / JOB_FILE
        found = read_object(path)
        if found is None:
            raise UserError(f"{path} is missing or damaged: start the sweep again, which writes it")
        options = found["options"]
        if options is not None:
            from ..peers.compare import Options

            options = Options(**options)
        settings = tuple((name, value) for name, value in found["settings"])
        run = Run(build(RunConfig, found["config"], str(path)), found["method"], options, settings)
        return cls(run, Path(folder), found["identity"])

    def row(self, status: str, **more: Any) -> dict[str, Any]:
        """The table's row: what the run is, then how it ended."""
        run = self.run
        return {
            "id": self.id, "run": self.folder.name, "status": status, "kind": "compare" if run.method else "train",
            "dataset": run.dataset, "method": run.method or "train", "shots": run.config.shots, "seed": run.config.seed,
            "settings": dict(run.settings), **more,
        }  # fmt: skip

    def done_row(self, result: dict) -> dict[str, Any]:
        """Of a finished run, from its result file and its state."""
        state, zero = self.state(), result.get("zero_shot", {})
        return self.row(
            "done", acc1=result["metrics"]["acc1"], acc5=result["metrics"].get("acc5"), zero_shot=zero.get("acc1"),
            mean_per_class_recall=result["metrics"].get("mean_per_class_recall"),
            training_seconds=result.get("tuning_seconds", result.get("training_seconds")),
            seconds=state.get("seconds"), host=state.get("host"), attempt=state.get("attempt"),
        )  # fmt: skip

    def failed_row(self, why: str) -> dict[str, Any]:
        """Of a run that gave up, with the reason."""
        state = self.state()
        return self.row("failed", why=why, seconds=state.get("seconds"), host=state.get("host"),
                        attempt=state.get("attempt"))  # fmt: skip


def read_object(path: Path) -> dict | None:
    """A JSON object, or None where there is no such file or it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError, UnicodeDecodeError):
        return None
    return found if isinstance(found, dict) else None
