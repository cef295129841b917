"""Sweeps on SLURM: job arrays through submitit.

No SLURM has run this: its tests use submitit's local executor, which starts the same pickled jobs as
processes here. A driver that is killed, rather than stopped, leaves its array in the queue.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import UserError
from .jobs import Job
from .work import execute

CLUSTERS = ("slurm", "local", "debug")
POLL = 1.0


def outcomes(
    jobs: Sequence[Job], out: Path, *, workers: int | None, retries: int, parameters: Mapping[str, Any],
) -> Iterator[dict[str, Any] | int]:  # fmt: skip
    """Runs the jobs as one array. Yields a row for each that ended and, in between, how many are running.

    A job that ended without an answer (killed, out of memory or time) is sent again, at most `retries` times.

    Args:
        workers: most runs of the array at once.
        parameters: of submitit's AutoExecutor: timeout_min, mem_gb, cpus_per_task, gpus_per_node, slurm_partition, ...;
            and cluster: slurm, or local and debug, which run here.

    Raises: UserError without SLURM or submitit, and for parameters that submitit does not know.
    """
    executor = _executor(out, workers, dict(parameters))
    pending = dict(zip(executor.map_array(execute, [str(job.folder.absolute()) for job in jobs]), jobs))
    lost = Counter[str]()
    try:
        while pending:
            for sent in [one for one in pending if one.done()]:
                job, error = pending.pop(sent), sent.exception()
                if error is None:
                    yield sent.result()
                elif lost[job.id] < retries:
                    lost[job.id] += 1
                    pending[executor.submit(execute, str(job.folder.absolute()))] = job
                else:
                    why = " ".join(str(error).split())[:300]
                    yield job.failed_row(f"its job ended without an answer {lost[job.id] + 1} times: {why}")
            yield sum(one.state == "RUNNING" for one in pending)
            time.sleep(POLL if pending else 0)
    finally:
        for sent in pending:
            sent.cancel()


def _executor(out: Path, workers: int | None, parameters: dict[str, Any]):
    try:
        import submitit
    except ImportError as error:
        raise UserError("--engine slurm needs submitit: pip install 'rmt[slurm]'") from error
    cluster = parameters.pop("cluster", "slurm")
    if cluster not in CLUSTERS:
        raise UserError(f"slurm: cluster must be one of {', '.join(CLUSTERS)}, got {cluster!r}")
    if cluster == "slurm" and not shutil.which("srun"):
        raise UserError(
            "there is no SLURM on this machine (no srun): start the sweep where it is, or try the path out here with "
            "--slurm '{cluster: local}'"
        )
    executor = submitit.AutoExecutor(folder=out / "slurm", cluster=cluster)
    given = {"name": "rmt-sweep", "timeout_min": 24 * 60, "cpus_per_task": 1} | parameters
    if workers is not None:
        given["slurm_array_parallelism"] = workers
    try:
        executor.update_parameters(**given)
    except (NameError, AssertionError, TypeError, ValueError) as error:
        raise UserError(f"submitit takes no such parameters: {' '.join(str(error).split())}") from error
    return executor
