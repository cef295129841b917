"""One thread owns the model: it takes rows (image, task) of all requests and answers them in one forward.

Admission is not here: `rmt.serve.service` bounds how many rows are under way. What a request gets wrong stays its own:
an exception in a forward fails the requests of that batch, a row whose numbers are not finite fails its own request.
"""

import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .refusals import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from .metrics import Metrics

BASE = "__base__"
log = logging.getLogger("rmt.serve")


class Bank(Protocol):
    """What the worker asks of a `rmt.TaskBank`."""

    @property
    def tasks(self) -> tuple[str, ...]: ...

    def probabilities(self, x: "Tensor", adapter_names: Sequence[str]) -> list["Tensor"]: ...


def gone(task: str) -> Refused:
    """A waiting row asks for a task that has been removed."""
    return Refused(410, "task_gone", f"task {task!r} was removed while the request waited")


def failed(message: str) -> Refused:
    """A fault of the server's, with the id that its log gives it."""
    return Refused(500, "failed", message, id=uuid.uuid4().hex[:12])


@dataclass
class Job:
    """One request's rows. images: (3, H, W) each; rows: (which image, task). done: a list of a value for every row."""

    images: list["Tensor"]
    rows: list[tuple[int, str]]
    done: Future = field(default_factory=Future)
    answers: list[Any] = field(default_factory=list)
    since: float = field(default_factory=time.perf_counter)
    taken: int = 0

    def __post_init__(self) -> None:
        self.answers, self.left = [None] * len(self.rows), len(self.rows)

    def fail(self, error: Exception) -> None:
        """Its other rows are passed over."""
        # Its client may have gone, and cancelled it, at any moment.
        with contextlib.suppress(InvalidStateError):
            self.done.set_exception(error)

    def answer(self, row: int, value: Any) -> None:
        """The last one completes it."""
        self.answers[row], self.left = value, self.left - 1
        if self.left == 0:
            with contextlib.suppress(InvalidStateError):
                self.done.set_result(self.answers)


class Batcher:
    """The worker thread and its queue.

    Args:
        finish: (task, (C,) probabilities) -> what a row's answer is; called by the worker, so that it meets the classes
            of the very task that was run.
        max_batch: rows of one forward. max_wait_s: how long a row may wait for others where the worker is free; while
            it is busy, rows gather by themselves.
    """

    def __init__(
        self, bank: Bank, finish: Callable[[str, "Tensor"], Any], metrics: "Metrics", max_batch: int, max_wait_s: float,
        device: Any = "cpu",
    ) -> None:  # fmt: skip
        self.bank, self.finish, self.metrics = bank, finish, metrics
        self.max_batch, self.max_wait_s, self.device = max_batch, max_wait_s, device
        self.rows_per_s: float | None = None
        self._jobs: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._waiting, self._changed, self._stop = 0, threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="rmt-model", daemon=True)

    def start(self) -> None:
        """Starts the worker."""
        self._thread.start()

    def stop(self) -> None:
        """Returns when all that was submitted is answered and the worker has ended."""
        with self._changed:
            self._stop = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, job: Job) -> Future:
        """Its rows, in order of arrival. Raises RuntimeError after `stop`."""
        self._push(self._jobs, job, len(job.rows))
        return job.done

    def call(self, function: Callable[[], Any]) -> Future:
        """Has the worker call it between two batches: nothing else touches the bank meanwhile."""
        done: Future = Future()
        self._push(self._calls, (function, done), 0)
        return done

    def _push(self, queue: deque, item: Any, rows: int) -> None:
        with self._changed:
            if self._stop:
                raise RuntimeError("the server is stopping")
            queue.append(item)
            self._waiting += rows
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._jobs or self._calls or self._stop):
                    self._changed.wait()
                if not (self._jobs or self._calls):
                    return
                batch = [] if self._calls else self._gather()
                calls = [self._calls.popleft() for _ in range(len(self._calls))]
            for function, done in calls:
                _settle(function, done)
            if batch:
                self._run(batch)

    def _gather(self) -> list[tuple[Job, int]]:
        """Under the lock: up to max_batch rows, as soon as there are so many or the oldest has waited long enough."""
        end = self._jobs[0].since + self.max_wait_s
        while self._waiting < self.max_batch and not (self._calls or self._stop):
            if (left := end - time.perf_counter()) <= 0:
                break
            self._changed.wait(left)
        batch: list[tuple[Job, int]] = []
        while self._jobs and len(batch) < self.max_batch:
            job = self._jobs[0]
            room = 0 if job.done.done() else self.max_batch - len(batch)
            rows = range(job.taken, min(job.taken + room, len(job.rows)))
            batch += [(job, row) for row in rows]
            job.taken = rows.stop
            if job.taken == len(job.rows) or job.done.done():
                self._jobs.popleft()
                self._waiting -= len(job.rows) - job.taken
        self._waiting -= len(batch)
        return batch

    def _run(self, batch: list[tuple[Job, int]]) -> None:
        known = {*self.bank.tasks, BASE}
        for job, row in batch:
            if (task := job.rows[row][1]) not in known:
                job.fail(gone(task))
        batch = [(job, row) for job, row in batch if not job.done.done()]
        if not batch:
            return
        # Rows of one task side by side: the bank's kernels run by groups.
        batch.sort(key=lambda pair: pair[0].rows[pair[1]][1])
        names = [job.rows[row][1] for job, row in batch]
        start = time.perf_counter()
        for job, _ in batch:
            self.metrics.queued.add(start - job.since)
        self.metrics.batch.add(len(batch))
        self.metrics.mixed.add(len(set(names)))
        try:
            import torch

            x = torch.stack([job.images[job.rows[row][0]] for job, row in batch]).to(self.device)
            found = self.bank.probabilities(x, names)
            values = [self._value(name, row) for name, row in zip(names, found, strict=True)]
        # The worker must outlive whatever one batch does.
        except Exception as error:
            fault = failed("the model failed")
            log.error("batch of %d rows failed, id %s", len(batch), fault.id, exc_info=error)
            for job, _ in batch:
                job.fail(fault)
            return
        finally:
            took = time.perf_counter() - start
            self.metrics.forward.add(took)
        rate = len(batch) / max(took, 1e-9)
        self.rows_per_s = rate if self.rows_per_s is None else 0.8 * self.rows_per_s + 0.2 * rate
        for (job, row), value in zip(batch, values):
            job.fail(value) if isinstance(value, Exception) else job.answer(row, value)

    def _value(self, task: str, probabilities: "Tensor") -> Any:
        if not probabilities.isfinite().all():
            fault = failed("the model gave numbers that are not finite")
            log.error("a row of task %r is not finite, id %s", task, fault.id)
            return fault
        return self.finish(task, probabilities)


def _settle(function: Callable[[], Any], done: Future) -> None:
    # Who asked may have gone: from here on it cannot be cancelled, so that the worker outlives it.
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(function())
    except Exception as error:
        done.set_exception(error)
