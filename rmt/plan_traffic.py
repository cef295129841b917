"""What travels between N ranks that share a training step, by arithmetic alone: bytes, calls, and their time on a link.

Collectives are rings, in which a rank sends S (N - 1) / N bytes in N - 1 messages to gather S bytes or to reduce them
to their owners, and twice both to all-reduce them (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009).
Libraries that know a better way at many ranks, trees or switches that add, wait for fewer messages. The layouts are
those of `rmt.plan_world`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from .config import UserError
from .plan import StepPlan
from .reduction import BUCKET, SPLIT, bucket_bytes

LAYOUTS = ("replicated", "zero", "sharded")
FP32, BYTE = 4, 8  # bytes of a score, its gradient or a weight; packed bits to a byte
SIDES = 2  # task and general
# Bytes that a logged row takes: three fp64 sums, and the checksum of the bits and its negative. See `rmt.train.Meter`.
METRICS = (24, 16)
SUMS = 24  # bytes of a mask's norm and its two counts, in fp64
PASSES = 4  # in which a sharded layout gathers weights: teacher, student, both backward passes


@dataclass(frozen=True)
class Link:
    """What carries bytes between ranks.

    Args:
        bandwidth: bytes/s that a rank sends while it receives as many. latency: seconds of one message.
        overlap: share of what could travel beside products that does: 1 where other hardware sends, 0 where sending
            takes the very cores that compute.
    """

    bandwidth: float
    latency: float
    overlap: float = 1.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise UserError(f"link must be a number of GB/s above 0, got {self.bandwidth / 1e9:g}")
        if not self.latency >= 0:
            raise UserError(f"latency must be a number of us of at least 0, got {1e6 * self.latency:g}")
        if not 0 <= self.overlap <= 1:
            raise UserError(f"overlap must be a number from 0 to 1, got {self.overlap!r}")


@dataclass(frozen=True)
class Sharing:
    """How ranks share a step.

    Args:
        layout: one of LAYOUTS. reduce: what gradients travel in, fp32 or bf16.
        width: bytes of a weight that is gathered in a sharded layout: 2 in bf16.
        accumulate: parts of a rank's share, of which only the last one's passes hide what travels.
        log_every: steps between two rows of numbers, which travel too.
    """

    layout: str = "replicated"
    reduce: str = "fp32"
    width: int = FP32
    accumulate: int = 1
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")


class Travel(NamedTuple):
    """Calls of one collective in a step. rounds: 2 for all-reduce, 1 for the others. calls: whole tensors' bytes.

    every: how many steps there are to one that has these calls. gathered: a rank hands over its share alone.
    """

    kind: str
    rounds: int
    calls: list[int]
    every: int = 1
    gathered: bool = False

    def handed(self, ranks: int) -> float:
        """Bytes of the tensors that a rank hands to the collective, a step."""
        return sum(self.calls) / self.every / (ranks if self.gathered else 1)

    def wire(self, ranks: int) -> float:
        """Bytes that a rank sends, a step; it receives as many."""
        return self.rounds * (ranks - 1) / ranks * sum(self.calls) / self.every

    def seconds(self, ranks: int, link: Link) -> tuple[float, float]:
        """Of a step's calls one after the other: what the bytes take, and what the messages do."""
        messages = self.rounds * (ranks - 1) * len(self.calls) / self.every
        return self.wire(ranks) / link.bandwidth, messages * link.latency


def owned(plan: StepPlan, ranks: int) -> tuple[list[int], float]:
    """Buckets of a side in zero, in bytes, and the share of all scores that the rank with the most of them owns.

    The largest goes first, to the rank that has least; no rank can own less than a mask.
    """
    buckets = bucket_bytes(plan.sizes, min(BUCKET, FP32 * plan.masked // (SPLIT * ranks)))
    held = [0] * ranks
    for nbytes in sorted(buckets, reverse=True):
        held[held.index(min(held))] += nbytes
    return buckets, max(held) / sum(buckets)


def traffic(plan: StepPlan, ranks: int, sharing: Sharing) -> list[Travel]:
    """What travels in a step. plan: of any number of images. Rows are taken to be a multiple of the ranks."""
    if ranks == 1:
        return []
    zero = sharing.layout == "zero"
    buckets, share = owned(plan, ranks) if zero else (bucket_bytes(plan.sizes), 1 / ranks)
    if sharing.layout == "sharded":
        buckets = [FP32 * size for size in plan.sizes]
    buckets = [n // 2 if sharing.reduce == "bf16" else n for n in buckets] * SIDES
    metrics = Travel("metrics", 2, list(METRICS), every=sharing.log_every)
    if sharing.layout == "replicated":
        return [Travel("gradients", 2, buckets), metrics]
    gradients = Travel("gradients", 1, buckets)
    if zero:
        return [gradients, Travel("bits", 1, [ranks * math.ceil(share * plan.masked / BYTE)], gathered=True), metrics]
    weights = Travel("weights", 1, [sharing.width * size for size in plan.blocks] * PASSES, gathered=True)
    bits = Travel("bits", 1, [math.ceil(plan.masked / BYTE)], gathered=True)
    sums = Travel("norms and counts", 2, [SUMS * plan.masks + BYTE * ranks])
    return [gradients, weights, bits, sums, metrics]
