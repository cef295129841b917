"""How much memory a method's own work takes, beside what all methods share."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """By how many bytes this process, or torch's allocator on a CUDA device, has grown at most.

    On a CPU that is the kernel's record of resident memory (Linux), reset at the beginning; freed memory that the
    allocator holds is given back first, so that it does not hide growth. None where the system keeps no such record.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._known = self._cuda or (_STATUS.is_file() and _can_reset())
        self._most, self._base = 0, self._reset()

    def bytes(self) -> int | None:
        """At its highest since the beginning; None where it cannot be known."""
        if not self._known:
            return None
        return max(self._most, self._peak() - self._base)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, what is allocated, and what is left of it, does not count."""
        self._most = self.bytes() or 0
        held = self._now() - self._base
        try:
            yield
        finally:
            self._base = self._reset() - held

    def _reset(self) -> int:
        if not self._known:
            return 0
        gc.collect()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            _CLEAR.write_text("5")
        return self._now()

    def _now(self) -> int:
        if not self._known:
            return 0
        return torch.cuda.memory_allocated() if self._cuda else _status("VmRSS")

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")


def _can_reset() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
