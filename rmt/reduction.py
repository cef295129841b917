"""The two gradients of every mask, summed over ranks while the backward passes are still going on.

The sign test is not linear: a and b are each summed over all ranks before it. A side's buffers lie in buckets, flat and
in the order in which a pass fills them, from the last mask to the first. A bucket's sum starts as soon as every product
over its masks has handed over its gradient. How many a mask has of them is counted in the side's first pass, which
sends all its buckets at its end; so the task gradients travel during the general pass in any case. Buckets start in one
order on every rank, whatever the order of arrivals, and all of them in every pass: a rank that left one out would hang
the others.

A step with both passes hands 2 * (masked scores) * 4 bytes a rank to all_reduce, half of it in bf16; and at most 60
bytes for each mask whose number of scores is no multiple of 16. Where each rank updates its own masks alone
(`World.zero`) a bucket has an owner, which alone gets its sums: as many bytes go to reduce, of which a ring carries
half as much.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .masked import Mask
from .world import World

BUCKET = 25 << 20  # bytes, as torch's DDP
ALIGN = 16  # elements: a cache line
SPLIT = 4  # buckets that each owner gets at least, masks allowing: so that all own about as much


class Reduction:
    """The buffers of both sides, TASK and GENERAL, and their sums over the ranks of `world`.

    Args:
        bucket: bytes of the buffers that are summed in one call; at least one mask.

    owners: the rank that gets the sums of each bucket; empty: all get all.
    """

    def __init__(self, world: World, masks: Sequence[Mask], bucket: int = BUCKET) -> None:
        self.world, self.masks = world, list(masks)
        sizes = [mask.scores.numel() for mask in masks]
        if world.zero:
            bucket = min(bucket, 4 * sum(sizes) // (SPLIT * world.size))
        self.buckets = _buckets(sizes, bucket)
        self.owners = _owners([sum(sizes[i] for i in row) for row in self.buckets], world.size) if world.zero else []
        self._place = {i: (n, begin) for n, row in enumerate(self.buckets) for i, begin in row.items()}
        self._flat: dict[tuple[int, int], Tensor] = {}
        # Hand-overs of each mask in a pass, by side; None before the first.
        self._expected: dict[int, list[int]] = {}
        self._side: int | None = None
        self._waits: list[Callable[[], None]] = []

    def owner(self, i: int) -> int:
        """Of mask i, where buckets have owners."""
        return self.owners[self._place[i][0]]

    def buffer(self, side: int, i: int) -> Tensor:
        """Of mask i, fp32, in its scores' shape: a part of its bucket."""
        (n, begin), scores = self._place[i], self.masks[i].scores
        return self.bucket(side, n)[begin : begin + scores.numel()].view_as(scores)

    def begin(self, side: int) -> None:
        """Before a pass after which this rank has all its gradients of `side`."""
        self._side, self._sent = side, 0
        self._counts = [0] * len(self.masks)
        self._open = [set(row) for row in self.buckets]
        for i, count in enumerate(self._expected.get(side, ())):
            if count == 0:
                self._open[self._place[i][0]].discard(i)

    def handed(self, i: int) -> None:
        """Tells of a gradient that is in mask i's buffer now; outside of a pass that is to be sent it means nothing."""
        if self._side is None:
            return
        n = self._place[i][0]
        if n < self._sent:
            raise RuntimeError(
                f"{self.masks[i].key} got a gradient after its sum over ranks had begun: it had "
                f"{self._expected[self._side][i]} in the passes before. A model must take the same products every step"
            )
        self._counts[i] += 1
        if self._side in self._expected and self._counts[i] == self._expected[self._side][i]:
            self._open[n].discard(i)
            self._send_what_is_full()

    def end(self, arrived: Sequence[bool]) -> None:
        """After the pass: sends what is left. arrived: the masks that hold a gradient; the others travel as zeros."""
        for i, there in enumerate(arrived):
            if not there and self._place[i][0] >= self._sent:
                self.buffer(self._side, i).zero_()
        self._expected.setdefault(self._side, self._counts)
        while self._sent < len(self.buckets):
            self._send()
        self._side = None

    def wait(self) -> None:
        """Until every buffer that was sent holds the sum over ranks."""
        while self._waits:
            self._waits.pop(0)()

    def _send_what_is_full(self) -> None:
        while self._sent < len(self.buckets) and not self._open[self._sent]:
            self._send()

    def _send(self) -> None:
        side, n = self._side, self._sent
        self._sent += 1
        flat, owner = self.bucket(side, n), self.owners[n] if self.owners else None
        if self.world.reduce == "fp32":
            self._waits.append(self.world.start_sum_(flat, owner))
            return
        low = flat.bfloat16()
        wait = self.world.start_sum_(low, owner)

        def widen() -> None:
            wait()
            flat.copy_(low)

        self._waits.append(widen)

    def bucket(self, side: int, n: int) -> Tensor:
        """Flat, fp32: the buffers of its masks at their places, and zeros between."""
        last, begin = list(self.buckets[n].items())[-1]
        flat, scores = self._flat.get((side, n)), self.masks[last].scores
        if flat is None or flat.device != scores.device:
            # Zeros: gaps travel too. Never as an inference tensor: the next step must be able to write it.
            with torch.inference_mode(False):
                flat = self._flat[side, n] = scores.new_zeros(begin + scores.numel(), requires_grad=False)
        return flat


def bucket_bytes(sizes: Sequence[int], bucket: int = BUCKET) -> list[int]:
    """Of a side, what each call sums in fp32, gaps included. sizes: of the masks' scores."""
    rows = (list(row.items())[-1] for row in _buckets(sizes, bucket))
    return [4 * (begin + sizes[i]) for i, begin in rows]


def _buckets(sizes: Sequence[int], limit: int) -> list[dict[int, int]]:
    """Masks from the last to the first, each with its first element's place in its bucket."""
    made: list[dict[int, int]] = []
    end = limit
    for i in reversed(range(len(sizes))):
        if not made or 4 * (end + sizes[i]) > limit:
            made.append({})
            end = 0
        made[-1][i] = end
        end += -(-sizes[i] // ALIGN) * ALIGN
    return made


def _owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """A rank for each bucket, the largest first to who has least so far."""
    held, owners = [0] * ranks, [0] * len(sizes)
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        owners[n] = min(range(ranks), key=held.__getitem__)
        held[owners[n]] += sizes[n]
    return owners
