"""A bank of tasks against its alternatives: python bench/bank.py [--model ViT-B-32] [--tasks 1 4 16 64] [--quick]

Three questions, on random weights and random masks (2.56 % off) of the attention and the patch convolution:

mixed   one batch with --images images a task: the bank, with and without invariant answers; a swap and a call for each
        task, with kept weights and without; one merged model a task; and the plain model over the same batch, which is
        what no task at all would cost.
swap    `set_adapter`, from the bits alone and with kept weights, between two such tasks, and between two of which one
        thousandth differs.
memory  what a bank and its tasks add to the resident memory of a process of its own, over backbone and packed bits.
"""

import argparse
import ctypes
import gc
import json
import logging
import subprocess
import sys
from pathlib import Path

import harness
import torch
from step_memory import resident
from torch import Tensor, nn

import rmt
import rmt_kernels as rk
from rmt.checkpoint import Task
from rmt.masking import find_targets
from rmt.skeleton import skeleton

OFF = 0.0256
MODELS_IN_MEMORY = 16


def make_model(name: str) -> nn.Module:
    """Random weights, without the text tower, which serving does not need."""
    import open_clip

    logging.disable(logging.WARNING)  # of random weights
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval().requires_grad_(False)
    model.transformer = nn.Identity()
    return model


def image_size(model: nn.Module) -> tuple[int, int]:
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else size


def shapes_of(name: str) -> dict[str, tuple[int, int]]:
    """Of the weights that R-AMT masks."""
    model, shapes = skeleton(name), {}
    for module in find_targets(model, rmt.MaskConfig()):
        for weight, value in model.get_submodule(module).named_parameters():
            if weight.endswith("weight"):
                shapes[f"{module}.{weight}"] = (value.shape[0], value[0].numel())
    return shapes


def make_task(shapes: dict[str, tuple[int, int]], seed: int, off: float = OFF) -> Task:
    generator = torch.Generator().manual_seed(seed)
    bits = {key: rk.pack_bits(torch.rand(shape, generator=generator) >= off) for key, shape in shapes.items()}
    return Task(
        path=Path(f"random {seed}"), bits=bits, shapes=shapes, selected={}, init=1e-2, threshold=5e-3, bits_sha256="",
        base_sha256="", model=None, pretrained=None, classnames=(), template=None, config={},
    )  # fmt: skip


def filled(model: nn.Module, tasks: list[Task], **options: bool) -> rmt.TaskBank:
    bank = rmt.TaskBank(model, **options)
    for i, task in enumerate(tasks):
        bank.add(str(i), task, allow_base_mismatch=True)
    return bank


def mixed(args: argparse.Namespace, base: dict) -> list[dict]:
    shapes, rows = shapes_of(args.model), []
    tasks = [make_task(shapes, seed) for seed in range(max(args.tasks))]
    size = image_size(make_model(args.model))
    for count in args.tasks:
        plain = make_model(args.model)
        banks = {
            "bank": filled(make_model(args.model), tasks[:count]),
            "bank, invariant": filled(make_model(args.model), tasks[:count], invariant=True),
            "swap each": filled(make_model(args.model), tasks[:count]),
            "swap each, kept": filled(make_model(args.model), tasks[:count], kept=True),
        }
        names = [str(i) for i in range(count) for _ in range(args.images)]
        x = torch.randn(len(names), 3, *size)
        variants = {
            "plain model": lambda plain=plain, x=x: _plain(plain, x),
            "bank": lambda b=banks["bank"], x=x, names=names: b.encode_image(x, names),
            "bank, invariant": lambda b=banks["bank, invariant"], x=x, names=names: b.encode_image(x, names),
            "swap each": lambda b=banks["swap each"], x=x, n=args.images: _swap(b, x, n),
            "swap each, kept": lambda b=banks["swap each, kept"], x=x, n=args.images: _swap(b, x, n),
        }
        if count <= MODELS_IN_MEMORY:
            merged = [banks["bank"].merge_and_unload(str(i)) for i in range(count)]
            variants["a model each"] = lambda m=merged, x=x, n=args.images: _each(m, x, n)
        want = variants["swap each"]()
        for name, run in variants.items():
            error = float((run() - want).norm() / want.norm())
            assert name == "plain model" or error < 1e-4, f"{name} gives other answers: {error}"
        times = harness.time_all(variants, torch.device("cpu"), args.seconds, least=3)
        ms = {name: dict(zip(("p20", "median", "p80"), values)) for name, values in times.items()}
        row = {"question": "mixed", "model": args.model, "tasks": count, "images_each": args.images, "ms": ms}
        rows.append(base | row)
        bank = ms["bank"]["median"]
        ratios = {name: f"{value['median'] / bank:.2f}" for name, value in ms.items()}
        print(f"{count} tasks x {args.images}:", *(f"{n} {ms[n]['median']:.1f} ms ({r})" for n, r in ratios.items()))
    return rows


@torch.no_grad()
def _plain(model: nn.Module, x: Tensor) -> Tensor:
    return model.encode_image(x)


def _swap(bank: rmt.TaskBank, x: Tensor, each: int) -> Tensor:
    parts = []
    for i, images in enumerate(x.split(each)):
        bank.set_adapter(str(i))
        parts.append(bank.encode_image(images))
    return torch.cat(parts)


@torch.no_grad()
def _each(models: list[nn.Module], x: Tensor, each: int) -> Tensor:
    return torch.cat([model.encode_image(images) for model, images in zip(models, x.split(each))])


def swaps(args: argparse.Namespace, base: dict) -> list[dict]:
    rows = []
    for model in ("ViT-B-32",) if args.quick else ("ViT-B-32", "ViT-B-16"):
        shapes = shapes_of(model)
        one, other = make_task(shapes, 0), make_task(shapes, 1)
        flips = make_task(shapes, 2, 1e-3)
        near = make_task(shapes, 0)
        for key, words in flips.bits.items():
            n, k = shapes[key]
            near.bits[key] = near.bits[key] ^ (words ^ rk.pack_bits(torch.ones(n, k, dtype=torch.bool)))
        for kept in (False, True):
            for what, second in (("another task", other), ("0.1 % of the weights", near)):
                bank = filled(make_model(model), [one, second], kept=kept)

                def swap(bank: rmt.TaskBank = bank) -> None:
                    bank.set_adapter("1" if bank.active == "0" else "0")

                values = harness.time_all({"swap": swap}, torch.device("cpu"), args.seconds / 2)["swap"]
                ms = dict(zip(("p20", "median", "p80"), values))
                weights = sum(n * k for n, k in shapes.values())
                row = {"question": "swap", "model": model, "kept": kept, "differs": what, "weights": weights, "ms": ms}
                rows.append(base | row)
                print(f"swap {model}, {'kept' if kept else 'bits alone'}, {what}: {ms['median']:.2f} ms")
    return rows


def memory(args: argparse.Namespace, base: dict) -> list[dict]:
    command = [sys.executable, __file__, "--model", args.model, "--hold", str(max(args.tasks))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    row["over_the_least"] = row["resident_bytes"] / row["least_bytes"]
    print(
        f"memory: {row['tasks']} tasks, {row['resident_bytes'] / 2**20:.0f} MiB resident, {row['over_the_least']:.3f}x "
        f"of backbone and packed bits ({row['least_bytes'] / 2**20:.0f} MiB)"
    )
    return [base | {"question": "memory", "model": args.model} | row]


def trim() -> None:
    """Gives freed memory back to the system, so that what is resident is what is held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def hold(name: str, count: int) -> dict[str, float]:
    """In a process that has done nothing else: resident bytes that a bank with tasks has added, after a mixed call."""
    shapes = shapes_of(name)
    x = torch.randn(4, 3, *image_size(skeleton(name)))
    # The libraries' own memory comes with their first use.
    torch.nn.functional.linear(torch.randn(64, 64), torch.randn(64, 64))
    trim()
    before = resident("VmRSS")
    bank = rmt.TaskBank(make_model(name))
    for seed in range(count):
        bank.add(str(seed), make_task(shapes, seed), allow_base_mismatch=True)
    bank.encode_image(x, [str(i % count) for i in range(4)])
    trim()
    now = resident("VmRSS")
    bits = sum(4 * n * -(-k // 32) for n, k in shapes.values())
    held = bank.memory()
    return {
        "tasks": count, "resident_bytes": (now - before) * 2**20, "backbone_bytes": held["backbone"],
        "least_bytes": held["backbone"] + count * bits, "tasks_bytes": held["tasks"], "active_bytes": held["active"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32", help="open_clip name; its weights are random")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--images", type=int, default=1, help="of each task in the mixed batch")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--seconds", type=float, default=20, help="time for each number of tasks")
    parser.add_argument("--quick", action="store_true", help="two numbers of tasks, one model, less time")
    parser.add_argument("--json", metavar="FILE", help="write the rows with their provenance here")
    parser.add_argument("--hold", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hold:
        print(json.dumps(hold(args.model, args.hold)))
        return
    if args.quick:
        args.tasks, args.seconds = [1, 8], 4
    rmt.keep_freed_memory()
    base = harness.provenance(torch.device("cpu")) | {"bench": "bank", "command": "python bench/bank.py"}
    print(f"{base['device_name']}, torch {base['torch']}, {args.model}, {100 * OFF} % off")
    rows = [row for question in args.only for row in QUESTIONS[question](args, base)]
    if args.json:
        harness.write_json(args.json, rows)


QUESTIONS = {"mixed": mixed, "swap": swaps, "memory": memory}

if __name__ == "__main__":
    main()
