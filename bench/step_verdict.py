"""The targets of a training step, and whether a run of bench/train_step.py reached them. Yes or no, nothing else."""

from step_variants import COMPILED, EAGER, EAGER_TF32, GRAPH, PUBLISHED, RMT

MEMORY = 0.55
# (device, precision) -> variant judged; at most so many times the floor; at least so many times as fast as the others.
TARGETS = {
    ("cpu", "fp32"): (RMT, 1.05, {PUBLISHED: 1.45, EAGER: 1.0, COMPILED: 1.0}),
    ("cpu", "bf16"): (RMT, 1.25, {PUBLISHED: 3.5}),
    ("cuda", "bf16"): (GRAPH, 1.10, {PUBLISHED: 15.0, EAGER_TF32: 2.5, EAGER: 1.5, COMPILED: 1.1}),
    ("cuda", "tf32"): (RMT, None, {EAGER: 1.0}),
}


def verdicts(rows: list[dict]) -> list[str]:
    """One line a target of this device and precision; "not measured" where a variant did not run."""
    by_name = {row["variant"]: row for row in rows}
    who, floor, faster = TARGETS.get((rows[0]["device"], rows[0]["precision"]), (RMT, None, {}))
    mine = by_name.get(who, {})
    lines = []
    if floor is not None:
        lines.append(_line(f"{who} at most {floor}x the floor", mine.get("over_floor"), lambda v: v <= floor))
    for other, times in faster.items():
        medians = [row["ms"]["median"] if row.get("ms") else None for row in (mine, by_name.get(other, {}))]
        ratio = None if None in medians else medians[1] / medians[0]
        # As fast is not faster: where the target is 1, more than 1.
        good = (lambda v, t=times: v >= t) if times > 1 else (lambda v: v > 1)
        what = f"at least {times}x as fast as" if times > 1 else "faster than"
        lines.append(_line(f"{who} {what} {other}", ratio, good))
    added = by_name.get(RMT, {}).get("of_published")
    lines.append(_line(f"{RMT} adds at most {MEMORY}x the memory of {PUBLISHED}", added, lambda v: v <= MEMORY))
    return lines


def _line(what: str, value: float | None, good) -> str:
    return f"{what}: " + ("not measured" if value is None else f"{'yes' if good(value) else 'NO'}, {value:.2f}")
