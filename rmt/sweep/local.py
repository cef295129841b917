"""Sweeps on this machine: worker processes, each pinned to cores or a GPU, which may die without taking the sweep."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .jobs import Job

TICK = 0.5


def cores() -> list[int]:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def gpus(jobs: Sequence[Job]) -> list[str]:
    """Names, as CUDA_VISIBLE_DEVICES has them, of the GPUs that the runs may take: none where all are on the CPU."""
    if all(job.run.config.device == "cpu" for job in jobs):
        return []
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


class _Worker:
    """One process, its place on the machine, and the job that it has."""

    def __init__(self, number: int, mine: Sequence[int], gpu: str | None, log: Path) -> None:
        self.number, self.cores, self.gpu, self.log = number, mine, gpu, log
        self.job: Job | None = None
        self.process: subprocess.Popen | None = None
        self._text = b""

    def give(self, job: Job) -> None:
        if self.process is None:
            self._start()
        self.job = job
        with contextlib.suppress(BrokenPipeError):  # it died while it waited: `answer` says so
            self.process.stdin.write(f"{job.folder}\n".encode())
            self.process.stdin.flush()

    def _start(self) -> None:
        threads = str(len(self.cores))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        top = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [top, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "rmt.sweep.worker", ",".join(map(str, self.cores))]
        with open(self.log, "ab") as log:
            # A session of its own: Ctrl-C is the driver's, who then ends the workers.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
                start_new_session=True,
            )  # fmt: skip
        self._text = b""

    def answer(self) -> dict | str | None:
        """A row; a text where the process died; None where the answer is not whole yet."""
        part = os.read(self.process.stdout.fileno(), 1 << 16)
        if not part:
            code = self.process.wait()
            self.close()
            died = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
            return f"its process ended {died}{' (out of memory?)' if code == -signal.SIGKILL else ''}, see {self.log}"
        self._text += part
        if not self._text.endswith(b"\n"):
            return None
        text, self._text = self._text, b""
        return json.loads(text)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def outcomes(
    jobs: Sequence[Job], out: Path, *, sweep: Sequence[Job], workers: int | None, retries: int
) -> Iterator[dict[str, Any] | int]:
    """Runs the jobs. Yields a row for each that ended and, in between, how many are running.

    A job whose process died is started again, at most `retries` times.

    Args:
        sweep: all jobs, also those that are finished. The machine is divided among these, evenly: a run's last bits
            depend on its number of threads, which must not depend on the worker or on how many runs are left.
        workers: None: one a GPU, or one a core.
    """
    mine, cards = cores(), gpus(sweep)
    workers = min(workers or len(cards) or len(mine), len(sweep))
    each = max(1, len(mine) // workers)
    logs = out / "workers"
    logs.mkdir(exist_ok=True)
    pool = [
        _Worker(n, mine[n::workers][:each] or [mine[n % len(mine)]], cards[n % len(cards)] if cards else None,
                logs / f"{n}.log")
        for n in range(workers)
    ]  # fmt: skip
    waiting, deaths = deque(jobs), Counter[str]()
    try:
        while waiting or any(worker.job for worker in pool):
            for worker in pool:
                if worker.job is None and waiting:
                    worker.give(waiting.popleft())
            for worker in _ready(pool):
                answer, job = worker.answer(), worker.job
                if answer is None:
                    continue
                worker.job = None
                if isinstance(answer, dict):
                    yield answer
                elif deaths[job.id] < retries:
                    deaths[job.id] += 1
                    waiting.append(job)
                else:
                    yield job.failed_row(f"{answer}, {deaths[job.id] + 1} times")
            yield sum(worker.job is not None for worker in pool)
    finally:
        for worker in pool:
            worker.close()


def _ready(pool: Sequence[_Worker]) -> list[_Worker]:
    """Workers at work with something to read, after at most TICK seconds."""
    with selectors.DefaultSelector() as selector:
        for worker in pool:
            if worker.job is not None:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        return [key.data for key, _ in selector.select(TICK)]
