"""One sweep a folder: a lock that says whose it is, with a sign of life, and is taken over from a process that died."""

import contextlib
import json
import os
import platform
import socket
import time
import uuid
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from ..config import UserError
from ..files import write_json

LOCK_FILE, GUARD_FILE = "sweep.lock", ".sweep.guard"
# Seconds that two clocks may differ, and between two signs of life.
SKEW, BEAT = 30.0, 10.0


def need_past(moment: float, what: str) -> None:
    """Raises UserError where a time that another clock wrote is ahead of this one's."""
    ahead = moment - time.time()
    if ahead > SKEW:
        raise UserError(
            f"the clock of {socket.gethostname()} or of another machine is off: {what} is from {ahead:,.0f} s in the "
            f"future, and {SKEW:.0f} s are allowed. Set the clocks, or delete what is wrong"
        )


class Lock:
    """The lock that is held. `beat()` writes a sign of life where one is due."""

    def __init__(self, path: Path, owner: dict) -> None:
        self.path, self.owner = path, owner

    def beat(self) -> None:
        """Raises UserError where the lock is not ours any more: somebody deleted it and started another sweep."""
        if time.time() - self.owner["beat"] < BEAT:
            return
        found = _read(self.path)
        if found is None or found.get("token") != self.owner["token"]:
            raise UserError(f"{self.path} is not this sweep's any more: it was deleted or taken, so this one stops")
        self.owner["beat"] = time.time()
        write_json(self.path, self.owner)


@contextlib.contextmanager
def locked(folder: Path, say=print) -> Iterator[Lock]:
    """Holds the lock of `folder`. Raises UserError, naming the owner, where another sweep has it."""
    now = time.time()
    owner = {
        "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "space": _space(),
        "since": now, "beat": now, "token": uuid.uuid4().hex,
    }  # fmt: skip
    path = folder / LOCK_FILE
    with _guard(folder):
        _take(path, owner, say)
    try:
        yield Lock(path, owner)
    finally:
        if (_read(path) or {}).get("token") == owner["token"]:
            path.unlink(missing_ok=True)


def _take(path: Path, owner: dict, say) -> None:
    if (other := _read(path)) is not None:
        _need_stale(path, other, owner)
        say(f"lock       {path} was of process {other['pid']}, which is dead: taken over")
        path.unlink()
    try:
        with open(path, "x") as file:
            json.dump(owner, file)
    except FileExistsError as error:  # a process on another machine, whose lock our guard does not keep out
        raise UserError(
            f"two sweeps want {path.parent} at the same moment: try again when the other is done"
        ) from error


def _need_stale(path: Path, other: dict, owner: dict) -> None:
    try:
        pid, host, since, beat = int(other["pid"]), other["host"], float(other["since"]), float(other["beat"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: delete it if no sweep runs in {path.parent}") from error
    need_past(max(since, beat), f"{path}, of process {pid} on {host},")
    here = host == owner["host"] and other.get("space") == owner["space"]
    if here and _started(pid) != other.get("started"):
        return
    began = datetime.fromtimestamp(since, timezone.utc).isoformat(timespec="seconds")
    last = time.time() - beat
    remedy = "wait for it or stop it" if here else f"if it is dead, delete {path}"
    raise UserError(
        f"another sweep is at work in {path.parent}: process {pid} on {host} since {began}, last sign of life "
        f"{max(last, 0):.0f} s ago; {remedy}, or give another --out"
    )


def _read(path: Path) -> dict | None:
    """None without a file; an empty object where it is damaged."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _started(pid: int) -> str | None:
    """When a process began, as the system counts it, so that a new process with an old number is told apart."""
    if platform.system() != "Linux":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "alive"
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie is dead, though it has a number still.
    return None if fields[0] in "ZX" else fields[19]


def _space() -> str:
    """Where process numbers are counted: a container has its own, and so has the time after a restart."""
    parts = []
    for read in (lambda: os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text):
        with contextlib.suppress(OSError):
            parts.append(read().strip())
    return " ".join(parts)


@contextlib.contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Keeps two processes of one machine from taking one stale lock over at once. The system frees it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / GUARD_FILE, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
