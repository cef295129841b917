"""The processes of one run: their ranks, what they tell one another, and how none of them waits for ever.

    torchrun --nproc-per-node 2 -m rmt train ...        torchrun --nproc-per-node 2 --no-python rmt train ...

A `World` of one rank, the default everywhere, does nothing and imports nothing of torch.distributed. In a larger one
all calls here but `share` and `quiet` are collective: every rank makes them, in one order. Nothing is decided by a
clock, a file or an exception of one rank alone before the others have heard of it.

torch's `DistributedDataParallel` is not used, since it cannot do this step: it hooks `AccumulateGrad` and averages
`.grad`, once a backward pass, while here one graph is walked twice and the two gradients of a mask must be summed
apart, each before the sign test that is not linear in them, in buffers that products fill and in no `.grad`. What it
would bring, buckets that are reduced while the pass goes on, is `rmt.reduction`, over torch.distributed's collectives.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import OutOfMemoryError, Tensor

from .config import UserError

T = TypeVar("T")
# What one rank alone may run into while all prepare: the others are told.
ALONE_FAILURES = (UserError, OSError, OutOfMemoryError)


@dataclass
class World:
    """This process among those of its run.

    Args:
        rank, size: of `size` processes this is number `rank`, from 0.
        reduce: what gradients are summed in, fp32 or bf16, the latter for half the traffic.
        zero: whether scores and moments are sharded, so that each rank updates its own masks alone: see `rmt.shards`.
        shard: whether rows of every mask are, and frozen weights and gradients too: see `rmt.fully_sharded`.
        sent: bytes of the tensors that this rank has handed to collectives so far; what is told at the start of a run,
            and a resume file that is handed round, are not counted.
    """

    rank: int = 0
    size: int = 1
    reduce: str = "fp32"
    zero: bool = False
    shard: bool = False
    sent: int = 0
    group: Any = dataclasses.field(default=None, repr=False)

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of `count` things are this rank's: neighbours, in the order of the ranks, as equal as can be."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def need(self, count: int, what: str) -> None:
        """Raises UserError, on every rank, where one of them would have nothing of `count` things to do."""
        if not self.alone and count < self.size:
            raise UserError(
                f"every rank needs something to do, but {self.size} ranks share {count} {what}: start at most {count}"
            )

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, no rank but the first prints on stdout."""
        if self.first:
            yield
            return
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield

    def together(self, work: Callable[[], T]) -> T:
        """`work()` on every rank. Where it fails on one, each rank raises UserError with what went wrong there."""
        if self.alone:
            return work()
        value = problem = cause = None
        try:
            value = work()
        except ALONE_FAILURES as error:
            problem, cause = str(error) or type(error).__name__, error
        found = self._gather(problem)
        if any(found):
            raise UserError(_by_rank(found)) from cause
        return value

    def from_first(self, work: Callable[[], T]) -> T:
        """`work()` on rank 0 alone; every rank gets its value, which must pickle, or raises UserError as it did."""
        if self.alone:
            return work()
        import torch.distributed as dist

        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = work()
            except ALONE_FAILURES as error:
                box[1] = str(error) or type(error).__name__
        with self.talking():
            dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]

    def agree(self, facts: Callable[[], Mapping[str, str]]) -> None:
        """Raises UserError, on every rank, where a fact is not the same text on all. A rank alone asks for none."""
        if self.alone:
            return
        rows = self._gather(self.together(lambda: dict(facts())))
        odd = {name: [row.get(name) for row in rows] for name in rows[0] if len({row.get(name) for row in rows}) > 1}
        if odd:
            texts = [f"{name} ({_by_value(values)})" for name, values in odd.items()]
            raise UserError(
                f"all ranks must run the same: they differ in {', '.join(texts)}. Give every rank the same config, "
                "code, weights, images and number of threads"
            )

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of a few numbers, summed over ranks in fp64."""
        return list(values) if self.alone else self.sum_(torch.tensor(values, dtype=torch.float64)).tolist()

    def sum_(self, tensor: Tensor) -> Tensor:
        """A tensor of the CPU, summed over ranks in place."""
        if not self.alone:
            self._reduce(tensor, "SUM")
        return tensor

    def alike(self, number: int) -> bool:
        """Whether a number below 2^63 is the same on all ranks; 16 bytes a rank."""
        if self.alone:
            return True
        both = torch.tensor([number, -number])
        self._reduce(both, "MAX")
        return int(both[0]) == -int(both[1])

    def start_sum_(self, tensor: Tensor, owner: int | None = None) -> Callable[[], None]:
        """Begins to sum a tensor of the model's device over ranks, in place; what is returned waits for the end.

        owner: the one rank that gets the sum, where not all do; what others then hold has no meaning.
        """
        import torch.distributed as dist

        self.sent += tensor.numel() * tensor.element_size()
        with self.talking():
            if owner is None:
                work = dist.all_reduce(tensor, group=self.group, async_op=True)
            else:
                work = dist.reduce(tensor, group_dst=owner, group=self.group, async_op=True)

        def wait() -> None:
            with self.talking():
                work.wait()

        return wait

    def start_scatter(self, out: Tensor, tensor: Tensor) -> Callable[[], None]:
        """Begins to sum `tensor` (R c, ...) over R ranks, rank r's part (c, ...) into its `out`; returns a wait."""
        import torch.distributed as dist

        self.sent += tensor.nbytes
        with self.talking():
            work = dist.reduce_scatter_tensor(out, tensor, group=self.group, async_op=True)

        def wait() -> None:
            with self.talking():
                work.wait()

        return wait

    @contextlib.contextmanager
    def talking(self) -> Iterator[None]:
        """Turns what torch.distributed raises, a lost rank or a time-out, into UserError."""
        try:
            yield
        except RuntimeError as error:
            raise UserError(
                f"rank {self.rank} of {self.size} lost the others: one of them has ended, and says why itself, or has "
                f"not answered in time (--timeout); the same command goes on from the last resume file: {error}"
            ) from error

    def _reduce(self, tensor: Tensor, how: str) -> None:
        import torch.distributed as dist

        self.sent += tensor.numel() * tensor.element_size()
        with self.talking():
            dist.all_reduce(tensor, getattr(dist.ReduceOp, how), group=self.group)

    def _gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with self.talking():
            dist.all_gather_object(found, value, group=self.group)
        return found


def _by_rank(problems: Sequence[str | None]) -> str:
    """`rank 1: no such file`; what all ranks say is said once."""
    if len(set(problems)) == 1:
        return problems[0]
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None)


def _by_value(values: Sequence[str | None]) -> str:
    """`rank 0, 2: a; rank 1: b`."""
    ranks: dict[str | None, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    return "; ".join(f"rank {', '.join(who)}: {value}" for value, who in ranks.items())
