"""Memory that one training step takes on the CPU: python bench/step_memory.py [--json FILE]

A ViT-B/32 at batch 32, rmt against R-AMT's op sequence as published (official.py), random weights. Each runs in a
process of its own: interpreter, libraries, the plain fp32 model and a batch are there first (`base`); then masks are
made and STEPS steps are taken, and the peak of the resident memory is read (`peak`, the kernel's VmHWM). What a method
adds is peak - base: its scores, moments, second tower, gradients, activations and temporaries.
"""

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path

import harness
import official
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The first step makes Adam's moments; from the second on the peak stays.
STEPS, CLASSES, LR, STRENGTH, TARGET = 3, 100, 8e-5, 0.3, 0.6


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its highest since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def reset_peak() -> None:
    """Sets VmHWM to what is resident now: building the model has a peak of its own."""
    Path("/proc/self/clear_refs").write_text("5")


def steps_of_rmt(model: nn.Module, text: Tensor, image: Tensor, label: Tensor) -> int:
    from rmt.config import MaskConfig, TrainConfig
    from rmt.masking import apply_masks
    from rmt.optim import MaskAdam
    from rmt.step import gradients

    found = apply_masks(model, MaskConfig(targets=("attention", "conv")))
    optimizer, config = MaskAdam(found, lr=LR), TrainConfig(strength=STRENGTH)
    for step in range(STEPS):
        gradients(model, text, image, label, found, config, seed=1, step=step)
        optimizer.step()
    return sum(mask.weight.numel() for mask in found)


def steps_of_published(model: nn.Module, text: Tensor, image: Tensor, label: Tensor) -> int:
    scores = {name: torch.full_like(model.get_parameter(name), 1e-2) for name in official.masked_names(model)}
    tuner = official.Tuner(model, text, scores, LR, STRENGTH)
    for _ in range(STEPS):
        tuner.step(image, label)
    return sum(m.numel() for m in tuner.scores.values())


def measure(variant: str, name: str, batch: int) -> dict:
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None).eval()
    size = model.visual.image_size
    size = size if isinstance(size, tuple) else (size, size)
    image, label = torch.randn(batch, 3, *size), torch.randint(CLASSES, (batch,))
    text = F.normalize(torch.randn(CLASSES, model.visual.output_dim), dim=-1)
    run = {"rmt": steps_of_rmt, "published": steps_of_published}[variant]
    gc.collect()
    reset_peak()
    base = memory("VmRSS")
    masked = run(model, text, image, label)
    return {"base_mib": base, "peak_mib": memory("VmHWM"), "masked": masked}


def in_its_own_process(variant: str, name: str, batch: int) -> dict:
    command = [sys.executable, __file__, "--measure", variant, "--model", name, "--batch", str(batch)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--model", default="ViT-B-32-quickgelu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--measure", choices=("rmt", "published"), help="only this one, in this process")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.model, args.batch)))
        return
    rows = {v: in_its_own_process(v, args.model, args.batch) for v in ("published", "rmt")}
    added = {v: row["peak_mib"] - row["base_mib"] for v, row in rows.items()}
    of_published = {v: mib / added["published"] for v, mib in added.items()}
    lines = [
        [v, *(f"{mib:.0f}" for mib in (row["base_mib"], row["peak_mib"], added[v])), f"{of_published[v]:.2f}x"]
        for v, row in rows.items()
    ]
    print(f"{args.model}, batch {args.batch}, fp32, {rows['rmt']['masked']:,} masked weights, {STEPS} steps; MiB")
    harness.print_table(["", "base", "peak", "added", "of published"], lines)
    print(f"rmt adds {of_published['rmt']:.2f} times what the published sequence adds; target: at most {TARGET}")
    if args.json:
        base = harness.provenance(torch.device("cpu")) | {
            "bench": "step_memory", "model": args.model, "batch": args.batch, "steps": STEPS, "dtype": "fp32",
        }  # fmt: skip
        harness.write_json(args.json, [
            base | {"variant": v} | row | {"added_mib": added[v], "of_published": of_published[v]}
            for v, row in rows.items()
        ])  # fmt: skip


if __name__ == "__main__":
    main()
