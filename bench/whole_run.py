"""A whole run of EuroSAT's size, timed from the command to its report: python bench/whole_run.py [--device cuda]

`rmt train` and `rmt report`, as a user calls them, in processes of their own: start, tuning, both measurements on the
test images, task file, report. The images are synthetic, as many as CoOp's EuroSAT has at 16 shots (10 classes, 8,100
test images of 64 x 64 pixels); an open_clip model without `--pretrained` gets a file of random weights. Both cost what
real ones do, and the accuracy says nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

CLASSES, SIZE = 10, 64
EUROSAT = {"train": 16, "val": 4, "test": 810}  # images a class
QUICK = {"train": 2, "val": 1, "test": 3}


def write_images(folder: Path, each: dict[str, int]) -> None:
    """FOLDER/{part}/class_N/*.jpg: soft noise around a colour of the class."""
    random = np.random.default_rng(0)
    colours = random.integers(64, 192, (CLASSES, 3))
    with harness.progress(CLASSES * sum(each.values()), "images") as bar:
        for part, count in each.items():
            for label in range(CLASSES):
                here = folder / part / f"class_{label}"
                here.mkdir(parents=True)
                for number in range(count):
                    coarse = np.clip(random.normal(colours[label], 50, (16, 16, 3)), 0, 255).astype(np.uint8)
                    image = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                    image.save(here / f"{number:04}.jpg", quality=90)
                    bar.update()


def random_weights(model: str, folder: Path) -> str:
    """A file of the weights that open_clip starts a model from."""
    path = folder / "random.safetensors"
    save_file({name: value.contiguous() for name, value in open_clip.create_model(model).state_dict().items()}, path)
    return str(path)


def timed(*arguments: str) -> float:
    """Seconds of one `rmt` command, whose output is shown; its failure ends this one."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "rmt", *arguments], check=True)
    return time.perf_counter() - start


def measure(args: argparse.Namespace, folder: Path) -> dict:
    each, run = QUICK if args.quick else EUROSAT, folder / "run"
    write_images(folder / "images", each)
    asked = ["--model", args.model, "--data", str(folder / "images"), "--template", "a centered satellite photo of {}.",
             "--device", args.device, "--train.precision", args.precision, "--out", str(run)]  # fmt: skip
    weights = args.pretrained if args.pretrained or ":" in args.model else random_weights(args.model, folder)
    asked += ["--pretrained", weights] if weights else []
    asked += ["--train.steps", "2"] if args.quick else []
    seconds = {"train": timed("train", *asked), "report": timed("report", str(run))}
    result = json.loads((run / "result.json").read_text())
    return {
        "bench": "whole_run", "model": args.model, "pretrained": args.pretrained, "precision": args.precision,
        "images": {part: CLASSES * count for part, count in each.items()}, "steps": result["steps"],
        "seconds": sum(seconds.values()), "train_seconds": seconds["train"], "report_seconds": seconds["report"],
        "tuning_seconds": result["tuning_seconds"], "off": result["off"], "quick": args.quick,
    } | harness.provenance(torch.device(args.device))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="an open_clip name, or local-dir:PATH")
    parser.add_argument("--pretrained")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--quick", action="store_true", help="the same path in seconds; its numbers mean nothing")
    parser.add_argument("--json", metavar="FILE", help="write the row here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(args, Path(folder))
    names = ("seconds", "train_seconds", "tuning_seconds", "report_seconds")
    print()
    line = [row["model"], str(row["steps"]), *(f"{row[name]:.1f}" for name in names)]
    harness.print_table(["model", "steps", *names], [line])
    if args.json:
        harness.write_json(args.json, [row])


if __name__ == "__main__":
    main()
