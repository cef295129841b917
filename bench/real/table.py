"""A bundle of bench/real/compare.py as a table: python bench/real/table.py bench/results/real/compare.json --shots 16

Top-1 accuracy, mean and sample deviation over seeds, a row for each method by its average over data sets; the average
stands where a method has all of them. stored: kB, the largest of them. `--pairs` shows X+ramt beside X, `--method M`
its seeds one by one, and the loss of the last batch where training logged one.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

Accuracies = dict[str, dict[str, list[float]]]


def read(path: str, shots: int) -> tuple[Accuracies, dict[str, int]]:
    """method -> data set -> accuracies of the seeds in percent; method -> bytes stored."""
    found: Accuracies = defaultdict(lambda: defaultdict(list))
    stored: dict[str, int] = defaultdict(int)
    for cell in json.loads(Path(path).read_text())["cells"]:
        if cell["shots"] == shots:
            found[cell["method"]][cell["dataset"]].append(cell["metrics"]["acc1"])
            stored[cell["method"]] = max(stored[cell["method"]], cell["stored_bytes"])
    return found, stored


def average(rows: dict[str, list[float]], sets: list[str]) -> float | None:
    """Of the data sets' means; None where one is missing."""
    return statistics.mean(statistics.mean(rows[name]) for name in sets) if all(rows.get(n) for n in sets) else None


def cell(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def seeds(path: str, shots: int, method: str) -> list[str]:
    """A line for each seed of a method: accuracy, and the loss that its training logged last, by data set."""
    cells = [c for c in json.loads(Path(path).read_text())["cells"] if c["shots"] == shots and c["method"] == method]
    sets = sorted({c["dataset"] for c in cells})
    shown = {}
    for c in cells:
        last = c.get("last_row", {})
        loss = last.get("task", last.get("loss"))
        shown[c["seed"], c["dataset"]] = f"{c['metrics']['acc1']:.1f}" + ("" if loss is None else f" ({loss:.3f})")
    lines = [f"| seed | {' | '.join(sets)} |", "|" + "---|" * (len(sets) + 1)]
    for seed in sorted({c["seed"] for c in cells}):
        lines.append(f"| {seed} | {' | '.join(shown.get((seed, name), '-') for name in sets)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--method")
    args = parser.parse_args()
    if args.method:
        print("\n".join(seeds(args.bundle, args.shots, args.method)))
        return
    found, stored = read(args.bundle, args.shots)
    sets = sorted({name for rows in found.values() for name in rows})
    means = {method: average(rows, sets) for method, rows in found.items()}
    if args.pairs:
        print(f"| | {' | '.join(sets)} | average |\n|{'---|' * (len(sets) + 2)}")
        for method in sorted(m for m in found if "+" in m):
            base, _, mask = method.rpartition("+")
            for other in (base, mask):
                gains = {n: statistics.mean(found[method][n]) - statistics.mean(found[other][n]) for n in sets
                         if found[method].get(n) and found[other].get(n)}  # fmt: skip
                shown = [f"{gains[n]:+.1f}" if n in gains else "-" for n in sets]
                total = f"{statistics.mean(gains.values()):+.1f}" if len(gains) == len(sets) else "-"
                print(f"| {method} over {other} | {' | '.join(shown)} | {total} |")
        return
    print(f"| | stored, kB | {' | '.join(sets)} | average |\n|{'---|' * (len(sets) + 3)}")
    for method in sorted(found, key=lambda m: (means[m] is None, -(means[m] or 0))):
        mean = "-" if means[method] is None else f"{means[method]:.1f}"
        row = [cell(found[method].get(name, [])) for name in sets]
        print(f"| {method} | {stored[method] / 1000:,.0f} | {' | '.join(row)} | {mean} |")


if __name__ == "__main__":
    main()
