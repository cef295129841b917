"""All methods on several data sets: `rmt compare` for each, and one file of all cells.

    python bench/real/compare.py --model local-dir:PATH --data FOLDER [FOLDER ...] --rates bench/results/real/rates.json
        --json bench/results/real/compare.json

Goes on where it was stopped, and takes a finished cell as it is. `rmt report bench/results/real/compare.json -o
report.html` draws the file; `--collect` only gathers what is there.
"""

import argparse
import itertools
import json
import shlex
import sys
from pathlib import Path

from rmt.checkpoint import write_json
from rmt.config import RunConfig, TrainConfig
from rmt.peers.compare import Options, compare
from rmt.peers.names import DEFAULT

# Large, or of this machine alone.
LEFT_OUT = ("confusion", "classnames", "worst", "config", "options", "command", "sources", "reused")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--template", default="a photo of a {}.")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT))
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", nargs="+", default=[], help="files of bench/real/rates.py: their chosen rates")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-steps", type=int, default=120)
    parser.add_argument("--max-feature-steps", type=int)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--runs", nargs="+", default=["runs/compare"], help="written into the first, gathered from all")
    parser.add_argument("--json", required=True)
    parser.add_argument("--collect", action="store_true", help="gather finished cells, run nothing")
    return parser.parse_args()


def run(args: argparse.Namespace, data: str) -> None:
    """One comparison, into RUNS/{data set}."""
    rates: dict[str, float] = {}
    for path in args.rates:
        rates |= json.loads(Path(path).read_text())["chosen"]
    # R-AMT without gradient dropout moves as R-AMT does.
    rates |= {"amt": rates["ramt"]} if "ramt" in rates else {}
    train = TrainConfig(batch=args.batch, precision=args.precision, log_every=args.max_steps)
    config = RunConfig(args.model, data=data, template=args.template, image_size=args.image_size, train=train)
    options = Options(max_steps=args.max_steps, max_feature_steps=args.max_feature_steps, rates=rates)
    out = Path(args.runs[0]) / Path(data).name
    compare(config, out, args.methods, args.shots, args.seeds, options, "python bench/real/compare.py")


def last_row(folder: Path) -> dict:
    """What training through the image tower logged last: how far the method fitted its own images."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return {}
    row = json.loads(path.read_text().splitlines()[-1])
    return {"last_row": {name: row[name] for name in ("step", "task", "loss", "general", "batch_acc1") if name in row}}


def main() -> None:
    args = arguments()
    for data in () if args.collect else args.data:
        run(args, data)
    cells = []
    for data, runs in itertools.product(args.data, args.runs):
        found = sorted((Path(runs) / Path(data).name).glob("*/shots*-seed*/result.json"))
        cells += [json.loads(path.read_text()) | last_row(path.parent) for path in found]
    for cell in cells:
        # Cells of before 2026-11-22 asked for the limit as a length, and took that for the authors'.
        if cell["config"]["train"]["steps"] is not None:
            del cell["published_steps"]
    cells = [{key: value for key, value in cell.items() if key not in LEFT_OUT} for cell in cells]
    asked = {key: value for key, value in vars(args).items() if key not in ("json", "runs", "collect")}
    command = f"python bench/real/compare.py {shlex.join(sys.argv[1:])}"
    write_json(args.json, {"kind": "compare_bundle", "command": command, "asked": asked, "cells": cells})
    print(f"{len(cells)} cells   {args.json}")


if __name__ == "__main__":
    main()
