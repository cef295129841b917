"""Counters, gauges and histograms in Prometheus' text format 0.0.4 (prometheus.io, "Exposition formats")."""

import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _labels(names: Sequence[str], values: Sequence[str]) -> str:
    inside = ",".join(f'{name}="{_escape(value)}"' for name, value in zip(names, values))
    return f"{{{inside}}}" if inside else ""


def _number(value: float) -> str:
    if math.isinf(value) or math.isnan(value):
        return {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, "NaN")
    return str(int(value)) if value == int(value) else repr(float(value))


class Counter:
    """Only grows. labels: names of the label values that `add` takes, in order."""

    kind = "counter"

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name, self.text, self.labels = name, text, tuple(labels)
        self._lock = threading.Lock()
        # Without labels there is one series, and it is there from the start.
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, *values: str, by: float = 1.0) -> None:
        """Of the series with these label values."""
        with self._lock:
            self._values[values] = self._values.get(values, 0.0) + by

    def lines(self) -> list[str]:
        """Samples, sorted by label values."""
        with self._lock:
            found = sorted(self._values.items())
        return [f"{self.name}{_labels(self.labels, key)} {_number(value)}" for key, value in found]


class Gauge:
    """A number that is asked for when it is read."""

    kind = "gauge"

    def __init__(self, name: str, text: str, read: Callable[[], float]) -> None:
        self.name, self.text, self.read = name, text, read

    def lines(self) -> list[str]:
        """One sample."""
        return [f"{self.name} {_number(self.read())}"]


class Histogram:
    """Cumulative buckets, sum and count. bounds: rising upper bounds, inclusive; +Inf is added."""

    kind = "histogram"

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name, self.text, self.bounds = name, text, tuple(bounds)
        self._lock = threading.Lock()
        self._counts, self._sum = [0] * (len(self.bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """One observation."""
        with self._lock:
            self._counts[bisect_left(self.bounds, value)] += 1
            self._sum += value

    def lines(self) -> list[str]:
        """Buckets, sum and count, of one moment."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        lines, below = [], 0
        for bound, count in zip((*self.bounds, math.inf), counts):
            below += count
            lines.append(f'{self.name}_bucket{{le="{_number(bound)}"}} {below}')
        return [*lines, f"{self.name}_sum {_number(total)}", f"{self.name}_count {below}"]


class Metrics:
    """All that `rmt serve` counts. queue_depth and tasks are read when the text is made."""

    def __init__(self, queue_depth: Callable[[], float], tasks: Callable[[], float]) -> None:
        self.requests = Counter("rmt_requests_total", "Answered requests.", ("method", "route", "status"))
        self.images = Counter("rmt_images_total", "Images that were decoded.")
        self.rows = Counter("rmt_rows_total", "Answers: one for every image and task.")
        self.rejected = Counter("rmt_rejected_total", "Refused requests to classify.", ("reason",))
        self.batch = Histogram("rmt_batch_rows", "Rows of one forward.", ROWS)
        self.mixed = Histogram("rmt_batch_tasks", "Different tasks in one forward.", ROWS)
        self.queued = Histogram("rmt_queue_seconds", "From a row's arrival to its forward.", SECONDS)
        self.forward = Histogram("rmt_forward_seconds", "One forward of a batch.", SECONDS)
        self.request = Histogram(
            "rmt_request_seconds", "A request to classify, from its headers to its answer.", SECONDS
        )
        self.depth = Gauge("rmt_queue_rows", "Rows accepted and not answered yet.", queue_depth)
        self.tasks = Gauge("rmt_tasks", "Loaded tasks.", tasks)

    def text(self) -> str:
        """The exposition, ended by a line feed."""
        lines = []
        for one in vars(self).values():
            lines += [f"# HELP {one.name} {one.text}", f"# TYPE {one.name} {one.kind}", *one.lines()]
        return "\n".join(lines) + "\n"
