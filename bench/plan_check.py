"""Memory of a training step, planned against measured: python bench/plan_check.py [--json FILE]

`rmt.plan` plans a step of ViT-B/32 at batch 32 in fp32 without weights; a process of its own then builds the model and
takes STEPS such steps on the CPU. Before them, tiny ones have loaded every library; the model and a batch are there
(`base`). What the steps add to the resident memory (its peak, the kernel's VmHWM, less base) is compared with what the
plan has beside weights and inputs.

glibc keeps freed blocks of up to 32 MiB for later ones and so adds a third to the peak. The process runs with its two
thresholds at 64 KiB, so that a block that is freed leaves the resident memory: what is measured is what is alive.
`--malloc default` shows the difference.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from torch import nn

from rmt.config import MaskConfig, TrainConfig
from rmt.masking import apply_masks
from rmt.optim import MaskAdam
from rmt.plan import plan_step
from rmt.step import gradients

STEPS, CLASSES, STRENGTH, WITHIN = 3, 100, 0.3, 0.05
MASK = MaskConfig(targets=("attention", "conv"))
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "patch_size": 32, "width": 64, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
# Blocks from 64 KiB on are mapped one by one and given back when they are freed.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its highest since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def reset_peak() -> None:
    """Sets VmHWM to what is resident now: building the model has a peak of its own."""
    Path("/proc/self/clear_refs").write_text("5")


def prepare(model: nn.Module, batch: int) -> tuple:
    size = model.visual.image_size
    size = size if isinstance(size, tuple) else (size, size)
    text = F.normalize(torch.randn(CLASSES, model.visual.output_dim), dim=-1)
    return text, torch.randn(batch, 3, *size), torch.randint(CLASSES, (batch,))


def take(model: nn.Module, inputs: tuple, batch: int, precision: str) -> None:
    found = apply_masks(model, MASK)
    optimizer, config = MaskAdam(found), TrainConfig(batch=batch, strength=STRENGTH, precision=precision)
    for step in range(STEPS):
        gradients(model, *inputs, optimizer, config, seed=1, step=step, alike=False)
        optimizer.step()


def measure(name: str, batch: int, precision: str) -> dict:
    import open_clip

    torch.manual_seed(0)
    tiny = open_clip.CLIP(**TINY).eval()
    take(tiny, prepare(tiny, 2), 2, precision)
    model = open_clip.create_model(name, pretrained=None).eval()
    inputs = prepare(model, batch)
    gc.collect()
    reset_peak()
    base = memory("VmRSS")
    take(model, inputs, batch, precision)
    return {"base_mib": base, "peak_mib": memory("VmHWM")}


def in_its_own_process(args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--measure", "--model", args.model, "--batch", str(args.batch)]
    environment = os.environ | (EXACT if args.malloc == "exact" else {})
    done = subprocess.run(
        [*command, "--precision", args.precision], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the row here")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--malloc", choices=("exact", "default"), default="exact", help="what glibc keeps")
    parser.add_argument("--measure", action="store_true", help="only this, in this process")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.model, args.batch, args.precision)))
        return 0
    train = TrainConfig(batch=args.batch, strength=STRENGTH, precision=args.precision)
    plan = plan_step(args.model, MASK, train, classes=CLASSES)
    planned = (plan.total - plan.bytes["weights"] - plan.bytes["inputs"]) / 2**20
    row = in_its_own_process(args)
    added = row["peak_mib"] - row["base_mib"]
    error = planned / added - 1
    print(f"{args.model}, batch {args.batch}, {args.precision}, glibc malloc {args.malloc}; MiB added by a step")
    harness.print_table(
        ["planned", "measured", "planned / measured - 1"], [[f"{planned:.0f}", f"{added:.0f}", f"{100 * error:+.1f} %"]]
    )
    verdict = "within" if abs(error) <= WITHIN else "NOT within"
    print(f"{verdict} {100 * WITHIN:.0f} %")
    if args.json:
        base = harness.provenance(torch.device("cpu")) | {
            "bench": "plan_check", "model": args.model, "batch": args.batch, "steps": STEPS, "dtype": args.precision,
            "malloc": args.malloc,
        }  # fmt: skip
        harness.write_json(args.json, [base | row | {"planned_mib": planned, "added_mib": added, "error": error}])
    return int(abs(error) > WITHIN)


if __name__ == "__main__":
    sys.exit(main())
