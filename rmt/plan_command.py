"""`rmt plan`: prints what a training step needs, see `rmt.plan`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .config import PRESETS, TARGETS, TOWERS, MaskConfig, TrainConfig, UserError
from .devices import PRECISIONS, Device, device

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from .plan import StepPlan

GIB = 2**30


def options(parser: "ArgumentParser") -> None:
    """Of plan."""
    add = parser.add_argument
    add("--model", type=str, required=True, help="open_clip name or local-dir:PATH; only its configuration is read")
    add("--batch", type=int, default=32, help="images a step")
    add("--accumulate", type=int, default=1, help="equal parts that a batch is cut into, to save memory")
    add("--image-size", type=int | None, help="side in pixels (default: the model's own)")
    add("--classes", type=int, default=100, help="how many classes the images are of")
    add("--precision", type=Literal[PRECISIONS], default="fp32", help="of the towers' products")
    add("--adam", type=Literal["fp32", "bf16", "8bit"], default="fp32", help="format of Adam's moments")
    add("--preset", type=Literal[tuple(PRESETS)], default="ramt", help="which weights get masks, as for train")
    add("--targets", type=str, nargs="+", help=f"some of {', '.join(TARGETS)}, in place of the preset's")
    add("--towers", type=str, nargs="+", default=["image"], help=f"some of {', '.join(TOWERS)}")
    add("--device", type=str, default="H200", help="one that rmt/devices.json knows, or here: this machine, measured")
    add("--fit", action="store_true", help="find the largest batch that fits in the device's memory")
    add("--json", type=str, metavar="FILE", help="write the plan to this file as well")


def command(args: "Namespace") -> None:
    """Plans and prints. Raises UserError."""
    from .files import write_json
    from .plan import plan_step

    target = device(args.device, args.precision)
    preset = PRESETS[args.preset]
    mask = MaskConfig(targets=_names(args.targets) or preset.targets, towers=_names(args.towers))
    # tf32 changes how a product of fp32 tensors is computed, no tensor.
    precision = "bf16" if args.precision == "bf16" else "fp32"
    strength = 1.0 if preset.strength is None else preset.strength

    def planned(batch: int) -> "StepPlan":
        train = TrainConfig(
            batch=batch, accumulate=args.accumulate, precision=precision, strength=strength, adam=args.adam
        )
        return plan_step(args.model, mask, train, image_size=args.image_size, classes=args.classes)

    batch = args.batch
    if args.fit:
        batch = largest_batch(lambda n: planned(n).total <= target.memory, args.accumulate, args.batch)
        if not batch:
            gib = f"{target.memory / GIB:.1f} GiB"
            raise UserError(f"not even a batch of {args.accumulate} fits in the {gib} of {target.title}")
    plan = planned(batch)
    print(as_text(plan, target, f"{args.model}, batch {batch}, {args.precision}, {', '.join(mask.targets)}"))
    if args.json:
        row = dataclasses.asdict(plan) | {"total": plan.total, "device": dataclasses.asdict(target)}
        asked = {
            name: getattr(args, name) for name in ("model", "precision", "adam", "image_size", "accumulate", "classes")
        }
        write_json(Path(args.json), asked | {"batch": batch} | row | {"floor_ms": plan.floor(target)})


def _names(given: list[str] | None) -> tuple[str, ...]:
    return tuple(name for value in given or () for name in value.split(",") if name)


def largest_batch(fits: Callable[[int], bool], least: int, start: int) -> int:
    """The largest batch from `least` up that `fits`, found by doubling and halving; 0 where `least` does not."""
    if not fits(least):
        return 0
    low, high = least, max(start, 2 * least)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def as_text(plan: "StepPlan", device: Device, title: str) -> str:
    """The plan for people."""
    from .plan import KINDS, ROLES

    mib, giga = 2**20, 1e9
    lines = [f"{title}: {plan.masks} masked tensors, {plan.masked:,} of {plan.weights:,} weights", ""]
    lines += [f"Memory where most is alive ({plan.peak}), MiB"]
    lines += [f"  {kind:20}{plan.bytes[kind] / mib:12,.1f}" for kind in KINDS]
    lines += [f"  {'total':20}{plan.total / mib:12,.1f}", "", "Products of a step, GFLOP"]
    lines += [f"  {role:20}{plan.flops[role] / giga:12,.1f}" for role in ROLES]
    lines += [f"  {'total':20}{sum(plan.flops.values()) / giga:12,.1f}", "", "Weight-sized bytes moved, MB"]
    lines += [f"  {op:20}{moved / 1e6:12,.1f}" for op, moved in _shown(plan.moved)]
    lines += [f"  {'total':20}{sum(plan.moved.values()) / 1e6:12,.1f}", "", f"Floor on {device.title}, ms"]
    floor = plan.floor(device)
    lines += [
        f"  {'products':20}{floor['products']:12,.2f}  at {device.rate / 1e12:,.4g} TFLOP/s, {device.sources['rate']}"
    ]
    lines += [f"  {'update':20}{floor['update']:12,.2f}  at {device.copy / 1e9:,.4g} GB/s, {device.sources['copy']}"]
    lines += [f"  {'floor':20}{floor['floor']:12,.2f}", ""]
    verdict = "fits in" if plan.total <= device.memory else "does not fit in"
    lines += [f"{plan.total / GIB:,.2f} GiB {verdict} {device.memory / GIB:,.1f} GiB, {device.sources['memory']}"]
    return "\n".join(lines)


def _shown(moved: dict[str, int], least: float = 0.01) -> list[tuple[str, int]]:
    """The ops that move most, and all others together."""
    large = {op: n for op, n in moved.items() if n >= least * sum(moved.values())}
    rest = sum(moved.values()) - sum(large.values())
    return [*sorted(large.items(), key=lambda row: -row[1]), *([("others", rest)] if rest else [])]
