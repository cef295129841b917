"""One whole training step, timed: python bench/train_step.py [--model ViT-B-32] [--batch 32] [--precision bf16]

Student forward, teacher forward, both backward passes, dropout, Adam, repack. Compared are R-AMT's op sequence as
published, the same with a teacher without a graph, that under torch.compile, rmt, and the floor: the step's products
with nothing in between (floor.py). As published always runs in fp32, the others in the run's precision. Random weights;
2.5 % of the bits are off, and flip as training goes. Every variant's scores are checked first (step_check.py): a
difference ends the run. Columns of the rows: bench/README.md.
"""

import argparse
import time
from functools import partial

import harness
import step_profile
import torch
from floor import Floor, record
from step_check import STEPS, NotEqual, check, judge
from step_memory import in_its_own_process
from step_variants import (
    COMPILED,
    EAGER,
    FIRST,
    MAKE,
    NAMES,
    PUBLISHED,
    RMT,
    Problem,
    Rmt,
    Setup,
    Skipped,
    Variant,
    runs_in,
)
from step_verdict import verdicts

FLOOR, OWN_FLOOR = "floor", "rmt's own floor"
QUICK = Setup("ViT-S-32-alt", 2, size=64, layers=2)


def checked(problem: Problem, names: list[str]) -> dict[str, Variant]:
    """The variants that can run here, each after STEPS steps that were found right."""
    starts, made = {}, {}
    for name in names:
        try:
            variant = MAKE[name](problem)
        except Skipped as reason:
            print(f"{name}: skipped, {reason}")
            continue
        usual = name != FIRST
        if usual not in starts:
            starts[usual] = judge(problem, usual)
        start = time.perf_counter()
        try:
            verdict = check(problem, name, variant, starts[usual])
        except torch._dynamo.exc.TorchDynamoException as error:
            print(f"{name}: skipped, the compiler failed: {str(error).strip().splitlines()[0]}")
            continue
        took = f", {time.perf_counter() - start:.0f} s with compilation" if name == COMPILED else ""
        print(f"{name}: {runs_in(problem.setup, name)}, {STEPS} steps equal: {verdict}{took}", flush=True)
        made[name] = variant
    return made


def check_formulas(setup: Setup, names: list[str]) -> None:
    """The same in fp32: 16 bits hide a wrong formula behind their rounding. Compiled code is not built twice."""
    exact = Problem(Setup(**vars(setup) | {"precision": "fp32"}))
    checked(exact, [name for name in names if name not in (PUBLISHED, COMPILED)])


def floors(problem: Problem, made: dict[str, Variant]) -> dict[str, Floor]:
    """The floor of the bench, and that of rmt's own step. Each records one step of a variant."""
    low = torch.bfloat16 if problem.setup.precision == "bf16" else None
    eager = made.get(EAGER) or MAKE[EAGER](problem)
    recorded = {FLOOR: eager} | ({OWN_FLOOR: made[RMT]} if RMT in made else {})
    return {name: Floor(record(partial(v.run, *problem.batches[0]), low), v.tf32) for name, v in recorded.items()}


def timed(problem: Problem, made: dict[str, Variant], seconds: float, least: int) -> tuple[dict, dict[str, Floor]]:
    """Quantiles of every variant and floor, which take turns."""
    problem.drawn.clear()
    replays = floors(problem, made)
    if FIRST in made:
        made[FIRST].hold()
    steps = {name: partial(variant.run, *problem.batches[0]) for name, variant in made.items()}
    return harness.time_all(steps | replays, problem.device, seconds, least), replays


def memory(setup: Setup, names: list[str]) -> dict[str, dict]:
    peaks = {}
    for name in names:
        try:
            peaks[name] = in_its_own_process(setup, name)
        except Skipped as reason:
            print(f"{name}: no memory row, {reason}")
    return peaks


def rows_of(setup: Setup, times: dict, peaks: dict, replays: dict[str, Floor]) -> list[dict]:
    base = harness.provenance(torch.device(setup.device)) | {"bench": "train_step"} | vars(setup)
    published = times.get(PUBLISHED, (None,) * 3)[1]
    added = peaks.get(PUBLISHED, {}).get("added_mib")
    rows = []
    for name in [*times, *(n for n in peaks if n not in times)]:
        row = base | {"variant": name, "runs_in": runs_in(setup, name)}
        if name in times:
            row["ms"] = dict(zip(("p20", "median", "p80"), times[name]))
            row["over_floor"] = times[name][1] / times[FLOOR][1]
            row["published_over"] = published / times[name][1] if published else None
        if name in replays:
            row |= {"products": len(replays[name].calls), "gflop": replays[name].flops / 1e9}
        if name in peaks:
            row |= peaks[name] | {"of_published": peaks[name]["added_mib"] / added if added else None}
        rows.append(row)
    return rows


def print_rows(rows: list[dict]) -> None:
    def number(row: dict, *path: str, digits: int = 2, unit: str = "") -> str:
        for key in path:
            row = row.get(key) if row else None
        return "" if row is None else f"{row:.{digits}f}{unit}"

    lines = [
        [
            r["variant"], number(r, "ms", "median", digits=1), number(r, "ms", "p20", digits=1),
            number(r, "ms", "p80", digits=1), number(r, "over_floor", unit="x"), number(r, "published_over", unit="x"),
            number(r, "added_mib", digits=0), number(r, "of_published", unit="x"),
        ]
        for r in rows
    ]  # fmt: skip
    header = ["", "ms", "20 %", "80 %", "of floor", "published / it", "peak MiB added", "of published"]
    harness.print_table(header, lines)


def profile(problem: Problem, made: dict[str, Variant], steps: int) -> list[dict]:
    """Prints, and returns as rows, where the time goes."""
    rows, base = [], {"bench": "train_step_profile"} | vars(problem.setup)
    names = [name for name in (PUBLISHED, EAGER, RMT, FIRST) if name in made]
    for name in names:
        parts = step_profile.phases(problem, made[name], steps)
        rows.append(base | {"variant": name, "phase_ms": parts})
    header = [*dict.fromkeys(part for row in rows for part in row["phase_ms"] if part != "step"), "step"]
    print("\nphases, ms")
    harness.print_table(
        ["", *header], [[r["variant"], *(f"{r['phase_ms'].get(p, 0.0):.1f}" for p in header)] for r in rows]
    )
    for name in [name for name in (EAGER, RMT) if name in made]:
        outside, inside = step_profile.operators(problem, made[name])
        total = sum(ms for _, ms, _ in outside)
        print(f"\n{name}: {inside:.1f} ms in products, {total:.1f} ms in {len(outside)} other operators; the longest:")
        harness.print_table(["operator", "ms", "calls"], [[k, f"{ms:.2f}", str(n)] for k, ms, n in outside[:12]])
        rows.append(base | {"variant": name, "products_ms": inside, "others_ms": total, "operators": outside[:30]})
    if isinstance(made.get(RMT), Rmt):
        times = step_profile.weight_sized(problem, made[RMT], harness.time_all)
        ours, theirs = times["rmt"][1], times["official"][1]
        print(f"\nweight-sized work of all layers: official {theirs:.1f} ms, rmt {ours:.1f} ms, {theirs / ours:.1f}x")
        rows.append(base | {"variant": RMT, "weight_sized_ms": times})
    return [harness.provenance(problem.device) | row for row in rows]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip name with a ViT image tower")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16"), help="tf32 on cuda only")
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled variant out")
    parser.add_argument("--seconds", type=float, default=60.0, help="timing, all variants together, after the checks")
    parser.add_argument("--quick", action="store_true", help="a toy, in seconds, without the compiler")
    parser.add_argument("--profile", action="store_true", help="where the time over the floor goes")
    parser.add_argument("--memory", default="yes", choices=("yes", "no", "only"), help="peaks, in child processes")
    kept = "keep freed memory, as rmt commands do, or the system's default; alike for all variants"
    parser.add_argument("--malloc", default="kept", choices=("kept", "default"), help=kept)
    parser.add_argument("--cotangents", action="store_true", help="bench/cotangents.py in place of all this")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    args = parser.parse_args()
    if args.precision == "tf32" and args.device != "cuda":
        parser.error("tf32 is a mode of CUDA's products: it needs --device cuda")
    return args


def main() -> None:
    args = arguments()
    if args.cotangents:
        import cotangents

        cotangents.main(["--quick"] * args.quick + (["--json", args.json] if args.json else []))
        return
    setup = Setup(args.model, args.batch, args.device, args.precision, malloc=args.malloc)
    if args.quick:
        setup = Setup(**vars(QUICK) | {"device": args.device, "precision": args.precision})
        print("--quick: a toy that shows that the benchmark runs. Its numbers mean nothing.")
    if args.quick or args.no_compile:
        args.variants = [name for name in args.variants if name != COMPILED]
    times, replays, extra = {}, {}, []
    if args.memory != "only":
        problem = Problem(setup)
        try:
            if args.precision != "fp32":
                check_formulas(setup, args.variants)
            made = checked(problem, args.variants)
        except NotEqual as error:
            raise SystemExit(str(error)) from None
        least = 2 if args.quick else 5
        times, replays = timed(problem, made, 1.0 if args.quick else args.seconds, least)
        extra = profile(problem, made, 2) if args.profile else []
        del problem, made
    counted = (PUBLISHED, RMT) if args.quick else NAMES
    counted = [n for n in args.variants if n in counted and (not times or n in times)]
    peaks = memory(setup, counted) if args.memory != "no" else {}
    rows = rows_of(setup, times, peaks, replays)
    where = f"{rows[0]['device_name']}, torch {torch.__version__}"
    print(f"\n{setup.model}, batch {setup.batch}, {setup.precision}, {where}, malloc {setup.malloc}")
    print_rows(rows)
    for name, replay in replays.items():
        print(f"{name}: {len(replay.calls)} products, {replay.flops / 1e9:.1f} GFLOP of them counted by torch")
    for line in verdicts(rows) if not args.quick else []:
        print(line)
    if args.json:
        harness.write_json(args.json, rows + extra)


if __name__ == "__main__":
    main()
