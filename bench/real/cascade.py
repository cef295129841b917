"""Why masks may fail to fit at all: what a run does around the step at which its first bits flip.

    python bench/real/cascade.py --model local-dir:PATH --data FOLDER [FOLDER ...] --json FILE

All scores begin at one value, so that until the first ones reach the threshold the model stays what it was and every
step's gradient is of one and the same model: weights whose gradient keeps its sign arrive together. With `mask.spread`
bits flip from the first step on, and every step sees what the last one did.
"""

import argparse
import itertools

import torch

from rmt.checkpoint import environment, write_json
from rmt.clip import image_format
from rmt.config import MaskConfig, RunConfig, TrainConfig
from rmt.data import TrainBatches
from rmt.evaluate import prepare, sampled
from rmt.schedule import plan
from rmt.train import tune


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--template", default="a photo of a {}.")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.6e-4, 3.2e-4])
    parser.add_argument("--spreads", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--log-every", type=int, default=4)
    parser.add_argument("--json", required=True)
    return parser.parse_args()


def run(args: argparse.Namespace, data: str, rate: float, spread: float, seed: int) -> dict:
    """One tuning run: a row of the file."""
    train = TrainConfig(lr=rate, steps=args.steps, batch=args.batch, log_every=args.log_every)
    config = RunConfig(
        args.model, data=data, template=args.template, shots=args.shots, seed=seed, image_size=args.image_size,
        mask=MaskConfig(spread=spread), train=train,
    )  # fmt: skip
    split = sampled(config)
    setup = prepare(config, split)
    batches = TrainBatches(split.train, *image_format(setup.clip.model), train.batch, seed)
    rows = []
    made = plan(setup.config.train, setup.config.mask, batches.steps_per_epoch, stretch=False)
    tune(setup.clip.model, setup.text, batches, made.rates, setup.config.train, seed=seed, log=rows.append)
    return {
        "dataset": data.rstrip("/").rpartition("/")[2], "rate": rate, "spread": spread, "seed": seed,
        "first_flip": next((row["step"] for row in rows if row["percent_off"] > 0), None),
        "steepest": max((b["percent_off"] - a["percent_off"], b["step"]) for a, b in itertools.pairwise(rows)),
        "percent_off": rows[-1]["percent_off"], "last_task": sum(row["task"] for row in rows[-5:]) / 5,
        "zero_shot_acc1": setup.test(frozen=True).top1, "acc1": setup.test().top1,
        "curve": [{name: row[name] for name in ("step", "task", "batch_acc1", "percent_off")} for row in rows],
    }  # fmt: skip


def main() -> None:
    args, rows = arguments(), []
    for data, spread, rate, seed in itertools.product(args.data, args.spreads, args.rates, args.seeds):
        rows.append(run(args, data, rate, spread, seed))
        shown = {name: value for name, value in rows[-1].items() if name != "curve"}
        print("  ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in shown.items()), flush=True)
    asked = {name: value for name, value in vars(args).items() if name != "json"}
    write_json(args.json, {"command": asked, "rows": rows, "environment": environment(torch.device("cpu"))})


if __name__ == "__main__":
    main()
