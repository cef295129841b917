"""OUT/results.jsonl: a whole line for each run that ended. One process writes it; the run folders can make it anew."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..files import write_whole
from .jobs import Job

TABLE_FILE = "results.jsonl"


class Table:
    """The rows of this sweep's finished runs, and those that end while it is open. A run has one row.

    Opening it reads the file and checks it against the run folders: damaged lines, rows of other or unfinished runs and
    lost rows are mended, with a message, so that a row never stands for anything but a result that is there.
    """

    def __init__(self, out: Path, jobs: Sequence[Job], say: Callable[[str], None] = print) -> None:
        self.path = out / TABLE_FILE
        kept, damaged = self._read()
        finished = [(job, result) for job in jobs if (result := job.result()) is not None]
        self.rows = {job.id: kept.get(job.id) or job.done_row(result) for job, result in finished}
        text = "".join(_line(row) for row in self.rows.values())
        if damaged:
            say(f"table      {self.path} was damaged in {damaged} lines: made anew from the run folders")
        if not self.path.is_file() or self.path.read_bytes() != text.encode():
            write_whole(self.path, text.encode())

    def add(self, row: dict) -> bool:
        """Appends a row, unless the run has one. Returns whether it did."""
        if row["id"] in self.rows:
            return False
        self.rows[row["id"]] = row
        with open(self.path, "a") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())
        return True

    def _read(self) -> tuple[dict[str, dict], int]:
        """Rows of finished runs by id, and how many lines are no row."""
        if not self.path.is_file():
            return {}, 0
        rows, damaged = {}, 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line)
                whole = line.endswith(b"\n") and isinstance(row["id"], str) and row["status"] in ("done", "failed")
            except (ValueError, TypeError, KeyError):
                whole = False
            damaged += not whole
            if whole and row["status"] == "done":
                rows[row["id"]] = row
        return rows, damaged


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"
