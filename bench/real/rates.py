"""Learning rates for short runs: the authors' times some factors, by accuracy on validation images.

    python bench/real/rates.py --model local-dir:PATH --data FOLDER [FOLDER ...] --methods ramt bitfit --factors 2 4 8
        --json bench/results/real/rates_ramt.json

A recipe that is cut to --max-steps moves less than its authors meant; this says by how much its rate is best raised.
Test images are never looked at: the split that is measured has the validation images in their place. Cells are kept in
--runs, so that it can be stopped and called again.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import torch

from rmt.checkpoint import environment
from rmt.config import RunConfig, TrainConfig
from rmt.evaluate import sampled
from rmt.peers.cells import Sample
from rmt.peers.compare import Options, Shared
from rmt.peers.footing import Footing
from rmt.peers.names import parse

# What each method's authors take (parts.py and full_ft.py say which of these are ours).
PUBLISHED = {"ramt": 8e-5, "ramt_spread": 8e-5, "lora": 2e-4, "bitfit": 1e-3, "ln": 1e-3, "full_ft": 1e-5}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--template", default="a photo of a {}.")
    parser.add_argument("--methods", nargs="+", default=list(PUBLISHED))
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 4, 16])
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--runs", default="runs/rates")
    parser.add_argument("--json", required=True)
    return parser.parse_args()


def measured(args: argparse.Namespace, data: str) -> list[dict]:
    """A row for each method and factor: accuracy on the validation images of one data set."""
    train = TrainConfig(
        steps=args.max_steps, batch=args.batch, precision=args.precision, log_every=args.max_steps
    )  # fmt: skip
    config = RunConfig(
        args.model, data=data, template=args.template, shots=args.shots, seed=args.seed, image_size=args.image_size,
        train=train,
    )  # fmt: skip
    shared, rows = Shared.load(config), []
    split = sampled(config)
    split = dataclasses.replace(split, val=[], test=split.val)
    for factor in args.factors:
        rates = {name: PUBLISHED[name] * factor for name in args.methods}
        options = Options(max_steps=args.max_steps, rates=rates)
        footing = Footing(
            config, shared.loaded, split, shared.text, shared.template, shared.shelf, shared.cache, **vars(options)
        )
        out = Path(args.runs) / shared.dataset / f"times{factor:g}"
        sample = Sample(footing, out, shared.dataset, shared.model_sha256, options, "")
        for name in args.methods:
            result = sample.result(parse(name))
            rows.append({"dataset": shared.dataset, "method": name, "factor": factor, "rate": rates[name],
                         "val_acc1": result["metrics"]["acc1"], "n": len(split.test)})  # fmt: skip
            print(rows[-1], flush=True)
            sample.forget([])
    return rows


def main() -> None:
    args = arguments()
    rows = [row for data in args.data for row in measured(args, data)]
    chosen = {}
    print(f"\n{'':8}" + "".join(f"{f'x{factor:g}':>8}" for factor in args.factors))
    for name in args.methods:
        means = [statistics.mean(r["val_acc1"] for r in rows if (r["method"], r["factor"]) == (name, factor))
                 for factor in args.factors]  # fmt: skip
        # Of equal means the smaller rate: nearer to the authors'.
        chosen[name] = PUBLISHED[name] * args.factors[means.index(max(means))]
        print(f"{name:8}" + "".join(f"{mean:8.1f}" for mean in means) + f"   {chosen[name]:g}")
    command = {key: value for key, value in vars(args).items() if key not in ("json", "runs")}
    result = {"command": command, "chosen": chosen, "rows": rows, "environment": environment(torch.device("cpu"))}
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
