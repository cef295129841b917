"""One run of a sweep, in whatever process an engine gives it: `rmt train`'s run, or one cell of `rmt compare`."""

import contextlib
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from ..config import UserError
from ..files import write_json
from .identity import code_sha256
from .jobs import LOG_FILE, STATE_FILE, Job
from .lock import need_past

# Zero-shot accuracies that runs of one process have in common: see `rmt.run.run`.
KNOWN: dict = {}


def execute(folder: str | Path, where: str | None = None) -> dict[str, Any]:
    """Runs, or goes on with, the run in `folder`. Returns its row of the table, which state.json holds too.

    A mistake of the user's or the machine's makes a row that failed, and so does a fault of ours, whose traceback is in
    log.txt; only what ends the process goes past. where: the node's name, for the table and for messages.
    """
    job, where, start = Job.read(folder), where or socket.gethostname(), time.time()
    before = job.state()
    state = {"attempt": before.get("attempt", 0) + 1, "host": where, "pid": os.getpid(), "time": start}
    with open(job.folder / LOG_FILE, "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        from ..failures import FAILURES

        why = None
        try:
            need_past(before.get("time", 0.0), str(job.folder / STATE_FILE))
            write_json(job.folder / STATE_FILE, {"status": "running", **state})
            need_node(job, where)
            _run(job)
        except FAILURES as error:
            why = " ".join(str(error).split())
        except Exception as error:
            traceback.print_exc()
            why = f"a fault of rmt's, see {LOG_FILE}: {type(error).__name__}: {' '.join(str(error).split())}"
        if why:
            print(f"failed     {why}")
    state |= {"seconds": time.time() - start, "time": time.time(), "status": "failed" if why else "done"}
    write_json(job.folder / STATE_FILE, state)
    row = job.failed_row(why) if why else job.done_row(job.result())
    write_json(job.folder / STATE_FILE, state | {"row": row})
    return row


def need_node(job: Job, where: str) -> None:
    """Raises UserError, naming the node, where it lacks the data or has other code than the sweep was started with."""
    config = job.run.config
    place = config.data if config.root is None else config.root
    if not os.path.exists(place):
        raise UserError(f"node {where} has no data at {place}: mount them there too, or leave the node out")
    if code_sha256() != job.identity["code"]:
        raise UserError(
            f"node {where} has other code than the sweep was started with (rmt, torch, open_clip or numpy at "
            f"{sys.prefix}): install the same versions, or start the sweep again"
        )


def _run(job: Job) -> None:
    """Raises what `rmt.failures` names, and UserError where the run gave no result."""
    run = job.run
    if job.result_path.is_file() and job.result() is None:
        print(f"damaged    {job.result_path} is made anew")
        job.result_path.unlink()
    if run.method is None:
        from ..run import run as train

        train(run.config, job.folder, KNOWN)
    else:
        from ..peers.compare import compare

        config = run.config
        table = compare(config, job.folder, [run.method], [config.shots], [config.seed], run.options, "rmt sweep")
        if table["missing"]:
            raise UserError(table["missing"][0]["why"])
    if job.result() is None:
        raise UserError(f"{job.result_path} is missing or not whole after the run")
