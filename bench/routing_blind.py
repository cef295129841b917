"""The blind visual question: what each routing function sees of an image that reaches the model through it alone.

    python bench/routing_blind.py --json bench/results/cpu_routing_blind.json

Rows: share of right answers over every question about every image (chance: 0.5), by seed, with images of mean 0 and
with a constant added to all of them. The task and its training are those of tests/rmt/blind_tools.py.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "rmt")]

import blind_tools  # noqa: E402

from rmt.checkpoint import environment  # noqa: E402
from rmt.files import write_json  # noqa: E402
from rmt.routing import FUNCTIONS  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", nargs="+", default=list(FUNCTIONS), choices=FUNCTIONS)
    parser.add_argument("--means", type=float, nargs="+", default=[0.0, 1.0], help="length of the added constant")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=blind_tools.STEPS)
    parser.add_argument("--batch", type=int, default=blind_tools.BATCH)
    parser.add_argument("--json", help="file for the rows")
    return parser.parse_args()


def main() -> None:
    args, rows = arguments(), []
    print("| function | mean | lowest | highest | by seed | seconds a run |\n|---|---|---|---|---|---|")
    for mean in args.means:
        for function in args.functions:
            start = time.monotonic()
            found = [blind_tools.accuracy(function, seed, mean, args.steps, args.batch) for seed in range(args.seeds)]
            seconds = (time.monotonic() - start) / args.seeds
            rows.append({"function": function, "mean": mean, "accuracy": found, "seconds": round(seconds, 2)})
            by_seed = " ".join(f"{value:.4f}" for value in found)
            print(
                f"| {function} | {mean:g} | {min(found):.4f} | {max(found):.4f} | {by_seed} | {seconds:.1f} |",
                flush=True,
            )
    if args.json:
        command = {key: value for key, value in vars(args).items() if key != "json"}
        write_json(args.json, {"command": command, "rows": rows, "environment": environment(torch.device("cpu"))})


if __name__ == "__main__":
    main()
