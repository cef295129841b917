"""`rmt plan`: prints what a training step needs, see `rmt.plan`; with --world of many ranks, see `rmt.plan_world`."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .config import PRESETS, TARGETS, TOWERS, MaskConfig, TrainConfig, UserError
from .devices import PRECISIONS, Device, device

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from .plan import StepPlan
    from .plan_world import RankPlan

GIB = 2**30
MS = 1e3


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
    add("--world", type=int | None, help="ranks that share a batch; a column for 1, 2, 4, ... of them")
    add(
        "--layout",
        type=Literal["replicated", "zero", "sharded"] | None,
        help="of --world: what ranks hold in shares: nothing; scores and moments, as rmt train --zero; weights too, as "
        "--shard (default: replicated)",
    )
    add("--reduce", type=Literal["fp32", "bf16"] | None, help="of --world: what gradients travel in (default: fp32)")
    add("--link", type=float | None, metavar="GB/s", help="of --world: what a rank sends while it receives as much")
    add(
        "--latency", type=float | None, metavar="us", help="of --world: what a message from rank to rank takes at least"
    )
    add(
        "--overlap",
        type=float | None,
        help="of --world: share of the hideable traffic that goes on beside products; 0 where it takes the cores that "
        "compute (default: 1)",
    )
    add(
        "--step-ms",
        type=str,
        nargs="+",
        metavar="IMAGES:MS",
        help="of --world: measured steps of one device, in place of its floor; two batches tell its terms apart",
    )
    add("--measured", type=str, metavar="FILE", help="such steps as JSON rows with batch and step_ms")
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
        # A rank whose share has fewer images than parts takes them one by one.
        parts = args.accumulate if args.world is None else min(args.accumulate, batch)
        train = TrainConfig(batch=batch, accumulate=parts, precision=precision, strength=strength, adam=args.adam)
        return plan_step(args.model, mask, train, image_size=args.image_size, classes=args.classes)

    batch = args.batch
    title = f"{args.precision}, {', '.join(mask.targets)}"
    if args.world is not None:
        return _world(args, target, planned, title)
    for name in ("layout", "reduce", "overlap", "link", "latency", "step_ms", "measured"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} says how several ranks do: it needs --world")
    if args.fit:
        batch = largest_batch(lambda n: planned(n).total <= target.memory, args.accumulate, args.batch)
        if not batch:
            gib = f"{target.memory / GIB:.1f} GiB"
            raise UserError(f"not even a batch of {args.accumulate} fits in the {gib} of {target.title}")
    plan = planned(batch)
    print(as_text(plan, target, f"{args.model}, batch {batch}, {title}"))
    if args.json:
        row = dataclasses.asdict(plan) | {"total": plan.total, "device": dataclasses.asdict(target)}
        asked = {
            name: getattr(args, name) for name in ("model", "precision", "adam", "image_size", "accumulate", "classes")
        }
        write_json(Path(args.json), asked | {"batch": batch} | row | {"floor_ms": plan.floor(target)})


def _world(args: "Namespace", target: Device, planned: Callable[[int], "StepPlan"], title: str) -> None:
    from .files import write_json
    from .plan_traffic import Link, Sharing
    from .plan_world import Rates, columns, plan_world

    if args.fit:
        raise UserError("--fit is of one device, --world of several: give one of them")
    if args.world > 1 and (args.link is None or args.latency is None):
        raise UserError("several ranks need a link: --link GB/s, that a rank sends, and --latency us, of one message")
    overlap = 1.0 if args.overlap is None else args.overlap
    link = Link(1e9 * (1 if args.link is None else args.link), (args.latency or 0) / 1e6, overlap)
    layout, reduce = args.layout or "replicated", args.reduce or "fp32"
    sharing = Sharing(layout, reduce, 2 if args.precision == "bf16" else 4, args.accumulate)
    steps = _steps(args)
    planned = functools.cache(planned)
    known = -(-args.batch // columns(args.batch, args.world)[-1])
    rates = Rates.floor(planned(known), known, target)
    if steps:
        rates = Rates.fit(steps, rates)
    rows = plan_world(planned, args.batch, args.world, sharing, link, rates)
    said = [f"link: {link.bandwidth / 1e9:g} GB/s, {1e6 * link.latency:g} us a message, overlap {link.overlap:g}"]
    said = said if args.world > 1 else []
    if steps:
        said += [f"one device: measured, {', '.join(f'{b} images {MS * s:,.2f} ms' for b, s in steps)}"]
    else:
        rate, copy = f"{target.rate / 1e12:,.4g} TFLOP/s", f"{target.copy / 1e9:,.4g} GB/s"
        said += [f"one device: the floor of {target.title}", f"    {rate}, {target.sources['rate']}"]
        said += [f"    {copy}, {target.sources['copy']}"]
    title = f"{args.model}, batch {args.batch}, {title}, {layout}, gradients in {reduce}"
    print(world_as_text(rows, target, title, said))
    if args.json:
        made = [dataclasses.asdict(row) | {"total": row.total, "efficiency": row.efficiency(rows[0])} for row in rows]
        asked = {name: getattr(args, name) for name in ("model", "batch", "precision", "adam", "image_size", "classes")}
        ways = {"sharing": sharing, "link": link, "rates": rates, "device": target}
        ways = {name: dataclasses.asdict(way) for name, way in ways.items()}
        write_json(Path(args.json), asked | ways | {"world": made})


def _steps(args: "Namespace") -> list[tuple[int, float]]:
    """Measured steps of one device: images, seconds."""
    found = []
    for text in args.step_ms or ():
        images, _, ms = text.partition(":")
        try:
            found.append((int(images), float(ms) / MS))
        except ValueError:
            raise UserError(f"step-ms must be IMAGES:MS, as 32:410.5, got {text!r}") from None
    if args.measured:
        path = Path(args.measured)
        try:
            rows = json.loads(path.read_text())
            rows = [row for row in rows if "step_ms" in row]
            if others := {row["model"] for row in rows} - {args.model}:
                raise UserError(f"{path} has steps of {', '.join(sorted(others))}, not of {args.model}")
            found += [(int(row["batch"]), row["step_ms"] / MS) for row in rows]
        except (OSError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"measured must be JSON rows with model, batch and step_ms, got {path}: {error}") from error
        if not rows:
            raise UserError(f"measured must be JSON rows with model, batch and step_ms, and {path} has none")
    return found


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


def world_as_text(rows: "list[RankPlan]", device: Device, title: str, said: list[str]) -> str:
    """A column for each number of ranks; of each the rank with the most images. said: what it rests on."""
    from .plan_world import TERMS, bend

    def line(name: str, values: list[float], form: str = ",.2f") -> str:
        return f"  {name:20}" + "".join(f"{value:>11{form}}" for value in values)

    def table(of: Callable[["RankPlan"], dict[str, float]], unit: float) -> list[str]:
        kinds = dict.fromkeys(kind for row in rows for kind in of(row))
        lines = [line(kind, [of(row).get(kind, 0) / unit for row in rows]) for kind in kinds]
        return [*lines, line("total", [sum(of(row).values()) / unit for row in rows])]

    lines = [title, "", line("ranks", [row.ranks for row in rows], ","), line("images of a rank", [
        row.images for row in rows], ",")]  # fmt: skip
    lines += ["", "Memory of a rank where most is alive, GiB", *table(lambda row: row.bytes, GIB)]
    lines += ["", "Handed to collectives by a rank, MB a step", *table(lambda row: row.handed, 1e6)]
    lines += ["", "Sent by a rank, MB a step", *table(lambda row: row.wire, 1e6)]
    lines += ["", "Time of a step, ms: what its parts take, and of what travels what is not hidden"]
    lines += [line(term, [MS * row.seconds[term] for row in rows]) for term in TERMS]
    lines += [line("step", [MS * row.step for row in rows]), ""]
    batch = rows[0].images
    lines += [line("images/s", [batch / row.step for row in rows], ",.0f")]
    lines += [line("efficiency", [row.efficiency(rows[0]) for row in rows]), ""]
    fits = [row.ranks for row in rows if row.total <= device.memory]
    memory = f"{device.memory / GIB:,.1f} GiB, {device.sources['memory']}"
    lines += [f"fits from {fits[0]} ranks on in {memory}" if fits else f"no column fits in {memory}"]
    best = min(rows, key=lambda row: row.step)
    lines += [f"fastest with {best.ranks} ranks: {batch / best.step:,.0f} images/s"]
    if bent := bend(rows):
        row, term = bent
        images, other = (100 * row.seconds[name] / row.step for name in ("images", term))
        lines += [f"bends at {row.ranks} ranks: {images:.0f} % of a step for its images, {other:.0f} % for {term}"]
    else:
        lines += ["does not bend: images take more than half of every step"]
    return "\n".join([*lines, *said])


def _shown(moved: dict[str, int], least: float = 0.01) -> list[tuple[str, int]]:
    """The ops that move most, and all others together."""
    large = {op: n for op, n in moved.items() if n >= least * sum(moved.values())}
    rest = sum(moved.values()) - sum(large.values())
    return [*sorted(large.items(), key=lambda row: -row[1]), *([("others", rest)] if rest else [])]
