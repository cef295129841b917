"""What a training step needs of each of N ranks that share its batch: memory, traffic and time, by arithmetic alone.

    rmt plan --model ViT-B-16 --batch 4096 --world 1024 --link 50 --latency 5

A rank's own part is a plan of its share of the batch (`rmt.plan`). The rest is of the layout:

- replicated, what `rmt train` does by itself (`rmt.reduction`): all is on every rank, both gradients are all-reduced;
- zero (`rmt.shards`): scores and moments in shares of whole masks. Gradients are reduced to the owner of their bucket,
  which updates its masks alone; bits are gathered, as many a rank as the heaviest tells, and make masked weights anew;
- sharded (`rmt.fully_sharded`): rows of scores, moments and gradients in equal shares, and weights of blocks, which
  travel for teacher, student and both backward passes. Every product makes its masked weight anew.

A step takes: its images, shared by all; the weight-sized work, the same whatever the share; and of what travels what
no product hides: bandwidth and latency. The batch is one, so N ranks are compared with one rank that has all of it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .config import UserError
from .devices import Device
from .plan import StepPlan
from .plan_traffic import BYTE, FP32, SIDES, Link, Sharing, Travel, owned, traffic
from .reduction import bucket_bytes
from .row_gradients import IN_FLIGHT

TERMS = ("images", "update", "bandwidth", "latency")
# Q K^T and A V forward, by student and teacher, of those and five products in each backward pass: `rmt.plan`'s counts.
ATTENTION_BACKWARD = 10 / 14
PRODUCTS = 3  # that make a sharded layer's masked weight: the student's, and a cotangent's in each backward pass


@dataclass(frozen=True)
class Rates:
    """Seconds of one device alone: for each image, and for each step however few images it has."""

    image: float
    fixed: float

    @classmethod
    def floor(cls, plan: StepPlan, images: int, device: Device) -> "Rates":
        """The least: products at the device's rate, weight-sized passes at its bandwidth. plan: of `images`."""
        floor = plan.floor(device)
        return cls(floor["products"] / 1e3 / images, floor["update"] / 1e3)

    @classmethod
    def fit(cls, steps: Sequence[tuple[int, float]], floor: "Rates") -> "Rates":
        """Of measured steps of one device, (images, seconds): the line of least squares, no term of it below 0.

        Steps of one batch alone are split as the floor is.
        """
        if not steps or any(not (b >= 1 and s > 0) for b, s in steps):
            raise UserError(f"measured steps must be images of at least 1 and times above 0, got {list(steps)}")
        mean_b, mean_s = (sum(column) / len(steps) for column in zip(*steps))
        if len({b for b, _ in steps}) == 1:
            factor = mean_s / (floor.image * mean_b + floor.fixed)
            return cls(floor.image * factor, floor.fixed * factor)
        image = sum((b - mean_b) * (s - mean_s) for b, s in steps) / sum((b - mean_b) ** 2 for b, _ in steps)
        if image <= 0:
            raise UserError(f"measured steps must take the longer the more images they have, got {list(steps)}")
        fixed = mean_s - image * mean_b
        if fixed < 0:
            return cls(sum(b * s for b, s in steps) / sum(b * b for b, _ in steps), 0.0)
        return cls(image, fixed)


@dataclass(frozen=True)
class RankPlan:
    """One of `ranks` that share a batch, the one with the most images.

    bytes: by kind, where most is alive. handed, wire: bytes a step by kind, given to collectives and sent. seconds: of
    a step, by TERMS.
    """

    ranks: int
    images: int
    bytes: dict[str, int]
    handed: dict[str, float] = field(default_factory=dict)
    wire: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.bytes.values())

    @property
    def step(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())

    def efficiency(self, alone: "RankPlan") -> float:
        """Against one rank that takes the whole batch in the same way: 1 where N ranks are N times as fast."""
        return alone.step / (self.ranks * self.step)


def columns(batch: int, world: int) -> list[int]:
    """1, 2, 4, ... and `world` ranks. Raises UserError for none of them, or for more than images."""
    if world < 1:
        raise UserError(f"world must be an integer of at least 1, got {world}")
    if world > batch:
        raise UserError(f"every rank needs an image, but {world} ranks share {batch}: --batch at least {world}")
    return sorted({2**n for n in range(world.bit_length())} | {world})


def plan_world(
    share: Callable[[int], StepPlan], batch: int, world: int, sharing: Sharing, link: Link, rates: Rates
) -> list[RankPlan]:
    """A row for each of `columns`. share: images -> the plan of a rank that has so many. Raises: UserError as it."""
    rows = []
    for ranks in columns(batch, world):
        images = -(-batch // ranks)
        rows.append(plan_rank(share(images), ranks, images, sharing, link, rates))
    return rows


def bend(rows: Sequence[RankPlan]) -> tuple[RankPlan, str] | None:
    """The first row whose images take less than half of its step, and the largest other term; None: there is none."""
    for row in rows:
        if 2 * row.seconds["images"] < row.step:
            return row, max(TERMS[1:], key=row.seconds.__getitem__)
    return None


def plan_rank(
    plan: StepPlan, ranks: int, images: int, sharing: Sharing, link: Link, rates: Rates
) -> RankPlan:  # fmt: skip
    """One rank's row. plan: of its own `images`."""
    going, products = traffic(plan, ranks, sharing), rates.image * images
    handed = {travel.kind: travel.handed(ranks) for travel in going}
    wire = {travel.kind: travel.wire(ranks) for travel in going}
    takes = {"images": products, "update": rates.fixed * weight_sized(plan, ranks, sharing)}
    takes |= {"bandwidth": 0.0, "latency": 0.0}
    for travel, left in zip(going, unhidden(plan, ranks, sharing, link, products)):
        bandwidth, latency = travel.seconds(ranks, link)
        takes["bandwidth"] += left * bandwidth
        takes["latency"] += left * latency
    return RankPlan(ranks, images, memory(plan, ranks, sharing), handed, wire, takes)


def memory(plan: StepPlan, ranks: int, sharing: Sharing) -> dict[str, int]:
    """Bytes of a rank by kind, where most is alive. plan: of its own images."""
    found = dict(plan.bytes)
    if ranks == 1:
        return found
    buckets, share, kinds = bucket_bytes(plan.sizes), 1 / ranks, ("scores", "moments")
    if sharing.layout == "zero":
        buckets, share = owned(plan, ranks)
    if sharing.layout == "sharded":
        return _sharded_memory(plan, ranks, sharing)
    found["gradients"] += SIDES * (sum(buckets) - FP32 * plan.masked)
    for kind in kinds if sharing.layout != "replicated" else ():
        found[kind] = math.ceil(share * found[kind])
    if sharing.reduce == "bf16":
        # At most: copies of all buckets of both sides, on their way until both passes are over.
        found["reduction copies"] = SIDES * sum(buckets) // 2
    return found


def _sharded_memory(plan: StepPlan, ranks: int, sharing: Sharing) -> dict[str, int]:
    found = dict(plan.bytes)
    for kind in ("scores", "moments"):
        found[kind] = math.ceil(found[kind] / ranks)
    found["weights"] -= math.floor(FP32 * plan.sharded * (1 - 1 / ranks))
    # A block as it arrives, and as its layers read it; and one product's masked weight.
    found["gathered"] = 2 * sharing.width * max(plan.blocks, default=0)
    found["masked weight"] = sharing.width * max(plan.sizes)
    # Sums of both sides' rows; whole gradients on their way, those that came back among them, and one being made.
    travelling = min(plan.masked, IN_FLIGHT // FP32) + max(plan.sizes)
    found["gradients"] = math.ceil(SIDES * FP32 * plan.masked / ranks) + FP32 * travelling
    if sharing.reduce == "bf16":
        found["reduction copies"] = FP32 * travelling // 2
    return found


def weight_sized(plan: StepPlan, ranks: int, sharing: Sharing) -> float:
    """Weight-sized bytes that a rank moves, over those of one that is alone."""
    alone = sum(plan.moved.values())
    if ranks == 1 or sharing.layout == "replicated" or not alone:
        return 1.0
    update = plan.moved.get("mask_update_", 0)
    # The frozen weight and bits read, the masked weight written.
    anew = plan.masked * (FP32 + 1 / BYTE) + plan.bytes["masked weight"]
    if sharing.layout == "sharded":
        return (alone + (1 / ranks - 1) * update + PRODUCTS * anew) / alone
    share = owned(plan, ranks)[1]
    return (alone + (1 - share) * (anew - update)) / alone


def unhidden(plan: StepPlan, ranks: int, sharing: Sharing, link: Link, products: float) -> list[float]:
    """Of each `traffic` the share of its time in which the rank does nothing else. products: their seconds."""
    going = traffic(plan, ranks, sharing)
    whole = {travel.kind: sum(travel.seconds(ranks, link)) for travel in going}
    hidden = {"gradients": 0.0}
    if sharing.layout == "sharded":
        # A block's weights come when it is called, and not ahead of it: nothing hides them.
        gradients = whole.get("gradients", 0.0)
        hidden["gradients"] = min(1.0, products / gradients) if gradients else 0.0
    elif whole.get("gradients"):
        tail = gradients_tail(plan, ranks, link, products / sharing.accumulate, going[0])
        hidden["gradients"] = 1 - tail / whole["gradients"]
    return [1 - link.overlap * hidden.get(travel.kind, 0.0) for travel in going]


def gradients_tail(plan: StepPlan, ranks: int, link: Link, products: float, travel: Travel) -> float:
    """Seconds from the end of both backward passes to that of the last bucket's sum.

    Buckets travel one after the other, each from when its pass has filled it. A pass fills them evenly: after half of
    it half of the gradients are there.
    """
    total = sum(plan.flops.values())
    back = plan.flops["input cotangents"] + plan.flops["weight gradients"]
    back += ATTENTION_BACKWARD * plan.flops["attention"]
    a_pass = products * back / total / SIDES if total else 0.0
    a_side, filled, free = sum(travel.calls) / SIDES, 0.0, 0.0
    for call in travel.calls:
        filled += call
        one = Travel(travel.kind, travel.rounds, [call])
        free = max(free, a_pass * filled / a_side) + sum(one.seconds(ranks, link))
    return max(0.0, free - SIDES * a_pass)
