"""The few-shot protocol on real images with real weights: zero-shot, AMT and R-AMT, by shots, seeds and strengths.

    python bench/real/fewshot.py --data FOLDER --model local-dir:PATH --json bench/results/real/NAME.json

Runs what is not there yet, so that it can be stopped and called again; prints the table and writes it with every run's
numbers to --json. strength 0 is AMT. The test images are looked at once a run, after its last step.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

from rmt.config import RunConfig, TrainConfig
from rmt.run import run

KEPT = (
    "metrics", "zero_shot", "percent_off", "masked", "task_bytes", "tuning_seconds", "indices_sha256", "bits_sha256",
    "base_sha256", "environment",
)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", help="a folder of images, or:")
    parser.add_argument("--root", help="data sets in CoOp's layout")
    parser.add_argument("--dataset")
    parser.add_argument("--template", default="a photo of a {}.")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.3, 1.0])
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--runs", default="runs/real", help="folder of the single runs (default: %(default)s)")
    parser.add_argument("--json", help="file for the table")
    return parser.parse_args()


def cell(args: argparse.Namespace, shots: int, seed: int, strength: float) -> dict:
    config = RunConfig(
        args.model, data=args.data, root=args.root, dataset=args.dataset, template=args.template, shots=shots,
        seed=seed, image_size=args.image_size,
        train=TrainConfig(
            lr=args.lr, steps=args.steps, strength=strength, precision=args.precision, log_every=args.steps
        ),
    )  # fmt: skip
    name = args.dataset or Path(args.data).name
    out = Path(args.runs) / name / f"shots{shots}-seed{seed}-strength{strength:g}"
    return run(config, out)


def table(rows: list[dict]) -> str:
    """Mean and sample deviation over the seeds, a line for each number of shots and strength."""
    lines = ["| shots | method | zero-shot % | tuned % | weights off % | seconds a run |", "|---|---|---|---|---|---|"]
    for shots, strength in dict.fromkeys((row["shots"], row["strength"]) for row in rows):
        mine = [row for row in rows if (row["shots"], row["strength"]) == (shots, strength)]
        accuracy = [row["metrics"]["acc1"] for row in mine]
        spread = f" ± {statistics.stdev(accuracy):.2f}" if len(mine) > 1 else ""
        off, seconds = (statistics.mean(row[key] for row in mine) for key in ("percent_off", "tuning_seconds"))
        method = "AMT" if strength == 0 else f"R-AMT {strength:g}"
        lines.append(
            f"| {shots} | {method} | {mine[0]['zero_shot']['acc1']:.2f} | {statistics.mean(accuracy):.2f}{spread} | "
            f"{off:.2f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    args, rows = parse(), []
    for shots in args.shots:
        for seed in args.seeds:
            for strength in args.strengths:
                result = cell(args, shots, seed, strength)
                rows.append({"shots": shots, "seed": seed, "strength": strength} | {k: result[k] for k in KEPT})
    print(table(rows))
    if args.json:
        asked = {k: v for k, v in vars(args).items() if k not in ("json", "runs")}
        recipe = dataclasses.asdict(TrainConfig(lr=args.lr, steps=args.steps, precision=args.precision))
        Path(args.json).write_text(json.dumps({"command": asked, "recipe": recipe, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
