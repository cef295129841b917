"""How the processes of one run meet: torchrun starts them, and each of them joins a `World`."""

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

from .config import UserError
from .world import World

START_S = 60.0  # until all ranks must have found one another
WAIT_S = 300.0  # that one rank waits for another afterwards: loading a model, writing a resume file
_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether torchrun, or what sets its variables, has started this process as one of several."""
    return all(name in os.environ for name in _LAUNCHER) and os.environ["WORLD_SIZE"] != "1"


@contextlib.contextmanager
def joined(
    device: str = "auto",
    *,
    reduce: str = "fp32",
    zero: bool = False,
    shard: bool = False,
    start: float = START_S,
    timeout: float = WAIT_S,
) -> Iterator[World]:
    """Inside, this process is one of those that torchrun has started; without torchrun it is alone.

    gloo carries tensors of the CPU, nccl those of CUDA devices, of which rank r of a machine takes number LOCAL_RANK.

    Args:
        device: a run's: auto, cpu or cuda. reduce, zero, shard: see World, which has no two of the last.
        start, timeout: seconds to wait for the others, until all are there and then in any one call.

    Raises: UserError for a device that torchrun's ranks cannot share, for too few of them, where ranks are missing
        after `start` seconds, and whenever another rank is lost inside.
    """
    if not launched():
        yield World()
        return
    import torch.distributed as dist

    if zero and shard:
        raise UserError("zero and shard are two layouts: --shard shards what --zero does, and frozen weights too")
    if not timeout > 0:
        raise UserError(f"timeout must be a number of seconds above 0, got {timeout!r}")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = _backend(device)
    from torch.distributed.rendezvous import rendezvous

    limit = timedelta(seconds=start)
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=limit)))
        store.set_timeout(limit)
        fresh = dist.PrefixStore(f"rmt/{_meet(store, rank, size, start)}", store)
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=limit)
        # A time-out belongs to a group: a short one to meet, another to work.
        group = dist.new_group(timeout=timedelta(seconds=timeout), backend=backend)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {rank} of {size} has not met the others at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"within {start:g} s: {error}"
        ) from error
    try:
        yield World(rank, size, reduce, zero, shard, group=group)
    finally:
        dist.destroy_process_group()


def _meet(store: Any, rank: int, size: int, seconds: float) -> str:
    """A name for this start of all ranks, which no earlier one has had. Raises RuntimeError where not all are there.

    torchrun keeps its store when it restarts ranks that died, and gloo would find the dead ones' addresses there. So
    each rank brings a number of its own, rank 0 offers what it has read, and an offer holds once all have found their
    own number in it.
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + seconds
    store.set(f"rmt/number/{rank}", mine)
    while time.monotonic() < until:
        if rank == 0:
            offer = " ".join(store.get(f"rmt/number/{r}").decode() for r in range(size))
            store.set("rmt/offer", offer)
        else:
            offer = store.get("rmt/offer").decode()
        if offer.split()[rank : rank + 1] == [mine]:
            name = hashlib.sha256(offer.encode()).hexdigest()
            store.set(f"rmt/{name}/{rank}", "here")
            if store.check([f"rmt/{name}/{r}" for r in range(size)]):
                return name
        time.sleep(0.02)
    raise RuntimeError("some rank has not been started, or has ended")


def _backend(device: str) -> str:
    """Also makes this rank's CUDA device the current one, so that `cuda` means it."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device must be auto, cpu or cuda under torchrun, which numbers the devices, got {device!r}")
    if device == "cpu" or not torch.cuda.is_available():
        return "gloo"
    place, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if place >= there:
        raise UserError(f"local rank {place} needs a CUDA device of its own, but there are {there}: start at most that")
    torch.cuda.set_device(place)
    return "cpu:gloo,cuda:nccl"
