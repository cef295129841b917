"""What the routes call: who is let in, images decoded beside the model's thread, tasks loaded and removed."""

import asyncio
import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import UserError
from ..evaluate import TASK_FOLDER, task_path
from .batching import BASE, Batcher, Job
from .images import Limits, decode
from .metrics import Metrics
from .refusals import Refused

if TYPE_CHECKING:
    from torch import Tensor

TOP = 5
INFO = ("name", "classnames", "template", "bytes", "off", "weights", "percent_off")


@dataclass(frozen=True)
class Options:
    """Of a server.

    max_batch: rows of one forward. max_wait_ms: how long a row waits for others while the model is free.
    queue: rows under way, accepted and not answered. limits: of an image. decoders: threads that decode images.
    roots: folders below which tasks may be loaded over HTTP. allow_hub: whether hub ids may. read_only: nothing may be
    loaded or removed over HTTP.
    """

    max_batch: int = 32
    max_wait_ms: float = 2.0
    queue: int = 256
    limits: Limits = field(default_factory=Limits)
    decoders: int = 2
    roots: tuple[Path, ...] = ()
    allow_hub: bool = False
    read_only: bool = False

    @property
    def max_body(self) -> int:
        """Bytes of a request: one image of the largest size in base64, or several smaller ones."""
        return self.limits.max_bytes * 2 + (64 << 10)


def default_name(folder: Path) -> str:
    """Of a task folder: its own, or its run folder's."""
    return (folder.parent if folder.name == TASK_FOLDER else folder).name


class Ticket:
    """A request's place among the rows under way."""

    def __init__(self, service: "Service") -> None:
        self.service, self.rows = service, 0

    def take(self, rows: int) -> None:
        """Room for `rows` in all. Raises Refused: 422 where there never will be, 429 where there is none now."""
        service, more = self.service, rows - self.rows
        if rows > service.options.queue:
            message = f"images x tasks must be at most {service.options.queue}, got {rows}"
            raise Refused(422, "too_many_rows", message)
        if service.depth + more > service.options.queue:
            message = f"the server has {service.depth} of at most {service.options.queue} answers under way"
            raise Refused(429, "busy", message, retry_after=service.retry_after())
        self.rows, service.depth = rows, service.depth + more


class Service:
    """A bank behind admission, decoding and the worker. Its coroutines belong to one event loop.

    Args:
        bank: a `rmt.TaskBank`. base_classes: those that `bank.set_classes` was given, for `__base__`.
        device: where its model is.
    """

    def __init__(
        self, bank: Any, options: Options, base_classes: Sequence[str] | None = None, device: Any = "cpu"
    ) -> None:
        self.bank, self.options, self.stopping, self.depth, self.in_flight = bank, options, False, 0, 0
        self.base = base_classes is not None
        # Counting a task's bits takes milliseconds: once is enough.
        self._infos = {name: self._info(name) for name in bank.tasks}
        if base_classes is not None:
            self._infos[BASE] = {"classnames": tuple(base_classes)}
        self.metrics = Metrics(lambda: self.depth, lambda: len(bank.tasks))
        self.batcher = Batcher(bank, self._finish, self.metrics, options.max_batch, options.max_wait_ms / 1e3, device)
        self._decoders = ThreadPoolExecutor(options.decoders, "rmt-decode")
        self._files = ThreadPoolExecutor(1, "rmt-files")

    def start(self) -> None:
        """Starts the worker."""
        self.batcher.start()

    def close(self) -> None:
        """Answers what was accepted and ends the threads."""
        self._decoders.shutdown()
        self.batcher.stop()
        self._files.shutdown()

    def retry_after(self) -> int:
        """Seconds until the rows under way are answered, at the measured rate; 1 to 60."""
        rate = self.batcher.rows_per_s
        return 1 if rate is None else max(1, min(60, math.ceil(self.depth / rate)))

    @contextlib.contextmanager
    def ticket(self) -> Iterator[Ticket]:
        """A place for one row, before a byte of its image is read; given back on leaving. Raises Refused, 429."""
        ticket = Ticket(self)
        ticket.take(1)
        try:
            yield ticket
        finally:
            self.depth -= ticket.rows

    async def classify(
        self, ticket: Ticket, images: Sequence[Callable[[], bytes]], tasks: Sequence[str] | None, top_k: int
    ) -> list[list[dict[str, Any]]]:
        """For every image, for every task: a dict of task, class, probability and top. Raises Refused.

        Args:
            images: what gives the bytes of each; called in a thread. tasks: None is all that are loaded.
        """
        # A task that is being loaded is in the bank before its description is here.
        loaded = [name for name in self._infos.copy() if name != BASE]
        names = list(dict.fromkeys(loaded if tasks is None else tasks))
        if not names:
            raise Refused(422, "no_task", "a task must be asked for, or one be loaded, got none")
        if unknown := [name for name in names if name not in self._infos]:
            known = ", ".join(self._infos) or "none"
            raise Refused(404, "unknown_task", f"a task must be one of the loaded ones ({known}), got {unknown[0]!r}")
        rows = [(i, name) for i in range(len(images)) for name in names]
        ticket.take(len(rows))
        loop = asyncio.get_running_loop()
        prepared = [loop.run_in_executor(self._decoders, self._prepare, read) for read in images]
        done = await asyncio.gather(*prepared, return_exceptions=True)
        for i, one in enumerate(done):
            if isinstance(one, Refused) and len(done) > 1:
                raise Refused(one.status, one.reason, f"image {i + 1} of {len(done)}: {one}") from one
            if isinstance(one, BaseException):
                raise one
        self.metrics.images.add(by=len(done))
        answers = await asyncio.wrap_future(self.batcher.submit(Job(done, rows)))
        self.metrics.rows.add(by=len(answers))
        each = [{**one, "top": one["top"][:top_k]} for one in answers]
        return [each[i : i + len(names)] for i in range(0, len(each), len(names))]

    def _prepare(self, read: Callable[[], bytes]) -> "Tensor":
        return self.bank.preprocess(decode(read(), self.options.limits))

    def _finish(self, task: str, probabilities: "Tensor") -> dict[str, Any]:
        """Of one row. The worker calls it, and loads and removes too: the classes are of the task that was run."""
        names = self._infos[task]["classnames"]
        values, order = probabilities.topk(min(TOP, len(names)))
        top = [{"class": names[i], "probability": p} for i, p in zip(order.tolist(), values.tolist())]
        return {"task": task, **top[0], "top": top}

    def _info(self, name: str) -> dict[str, Any]:
        found = self.bank.info(name)
        return {key: found[key] for key in INFO}

    def infos(self) -> list[dict[str, Any]]:
        """Of all loaded tasks: `rmt.serve.schemas.TaskInfo`."""
        return [info for name, info in self._infos.copy().items() if name != BASE]

    async def load(self, path: str | None, hub: str | None, name: str | None, replace: bool) -> dict[str, Any]:
        """Reads a task beside the worker, and has the worker add it. Raises Refused."""
        self._may_change()
        if (path is None) == (hub is None):
            raise Refused(422, "invalid", "exactly one of path and hub must be given")
        if hub is not None and not self.options.allow_hub:
            raise Refused(403, "hub_not_allowed", "tasks from a hub are loaded only by a server with --allow-hub")
        source = self.inside(path) if path is not None else hub
        name = name or (hub.rpartition("/")[2].partition("@")[0] if path is None else default_name(source))
        if name == BASE:
            raise Refused(422, "invalid", f"a task must not be named {BASE}, the model without a mask")
        # Before it is read too: reading takes long.
        if name in self.bank.tasks and not replace:
            raise self._duplicate(name)
        loop = asyncio.get_running_loop()
        task = await loop.run_in_executor(self._files, self._read, source, hub is not None)
        return await asyncio.wrap_future(self.batcher.call(lambda: self._add(name, task, replace)))

    def _read(self, source: Path | str, hub: bool) -> Any:
        from ..checkpoint import load_task

        try:
            if hub:
                from ..hub import resolve

                # With its prefix: a path of this machine that looks like an id would be read instead.
                source = resolve(f"hf-hub:{source}")
            return load_task(source)
        except (UserError, OSError) as error:
            raise Refused(422, "invalid_task", str(error)) from error

    def _add(self, name: str, task: Any, replace: bool) -> dict[str, Any]:
        if name in self.bank.tasks and not replace:
            raise self._duplicate(name)
        try:
            self.bank.add(name, task, replace=replace)
        except UserError as error:
            raise Refused(422, "invalid_task", str(error)) from error
        self._infos[name] = self._info(name)
        return self._infos[name]

    def _duplicate(self, name: str) -> Refused:
        return Refused(409, "duplicate_task", f"a task {name!r} is loaded: replace must be true to put another there")

    async def remove(self, name: str) -> None:
        """Between two batches: rows that wait for it are refused. Raises Refused."""
        self._may_change()
        await asyncio.wrap_future(self.batcher.call(lambda: self._remove(name)))

    def _remove(self, name: str) -> None:
        if name not in self.bank.tasks:
            raise Refused(404, "unknown_task", f"a task must be a loaded one, got {name!r}")
        self.bank.remove(name)
        del self._infos[name]

    def _may_change(self) -> None:
        if self.options.read_only:
            raise Refused(403, "read_only", "this server neither loads nor removes tasks over HTTP (--read-only)")

    def inside(self, path: str) -> Path:
        """The task folder below a root, links followed. Raises Refused: 403 outside of all roots, 404 where none is."""
        from ..checkpoint import MASK_FILE

        outside = True
        for root in map(os.path.realpath, self.options.roots):
            # ValueError: a NUL. OSError: a name longer than the file system takes.
            with contextlib.suppress(OSError, ValueError):
                folder = Path(os.path.realpath(task_path(Path(root) / path)))
                file = Path(os.path.realpath(folder / MASK_FILE))
                if folder.is_relative_to(root) and file.is_relative_to(root):
                    outside = False
                    if file.is_file():
                        return folder
        if outside:
            raise Refused(403, "outside", "a task must be in a folder that the server was started with")
        raise Refused(404, "no_such_task", f"there is no task folder {path!r}")
