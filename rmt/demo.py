"""The main job on anyone's machine, with no network and no file from elsewhere: `rmt demo`.

Trains a small CLIP on drawn pictures (`rmt.upstream`), writes the handwritten digits that scikit-learn ships as images,
and tunes masks on 16 of them a class through the public path, `rmt.run` and `rmt.protocols`.

OUT/upstream/     the model, an open_clip local-dir            OUT/digits/      ImageFolder and digits.json, its split
OUT/{amt,ramt}/   the few-shot runs, a folder for each seed    OUT/b2n_{amt,ramt}/   tuned on 0 to 4, tested on all
OUT/result.json   all numbers                                  OUT/report.html  the same, with figures
"""

import dataclasses
import json
import random
import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from . import clip, figures, upstream
from .checkpoint import write_json, write_whole
from .config import PRESETS, RunConfig, TrainConfig, UserError
from .data import eval_batches
from .evaluate import load_run, read_run, sampled
from .pictures import NUMBERS
from .probe import Probe, features, linear_probe
from .progress import progress
from .protocols import base_to_new, grid, spread
from .report import Figure, Section, Table, provenance, read_metrics, read_result, run_sections, write_report

TEMPLATE = "a photo of the number {}."
METHODS = {"amt": "AMT", "ramt": "R-AMT"}
# The recipes for all digits and for base to new: chosen with other upstream models and other seeds, on images that
# those runs had not been tuned on and that are no test images. Strengths are the official code's: 0.3 for 16 shots of
# all classes, 1 in its base-to-new script.
ALL = TrainConfig(lr=1e-4, steps=250, strength=0.3, flip=False)
HALVES = TrainConfig(lr=4e-5, steps=300, strength=1.0, flip=False)


@dataclasses.dataclass(frozen=True)
class Size:
    """Upstream steps, steps of each run (None: the recipe's), seeds, images a class (None: the rest)."""

    upstream: int
    steps: int | None
    seeds: int
    train: int
    val: int
    test: int | None


FULL = Size(upstream=2500, steps=None, seeds=3, train=50, val=40, test=None)
QUICK = Size(upstream=20, steps=4, seeds=1, train=16, val=4, test=6)


@upstream.one_thread()
def demo(out: str | Path, seed: int = 1, quick: bool = False) -> dict:
    """Runs it all into `out` and prints as it goes. Returns what `out`/result.json holds.

    seed: of the upstream model, and the first of the few-shot seeds. quick: tests the path; its numbers say nothing.

    Raises: UserError where `out` holds anything already, or a run failed.
    """
    start, out, size = time.perf_counter(), Path(out), QUICK if quick else FULL
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out must be a new or an empty folder, got {str(out)!r}, which has content")
    config = RunConfig(
        model=_upstream(out / "upstream", size.upstream, seed),
        data=str(write_digits(out / "digits", size)),
        template=TEMPLATE, shots=16, device="cpu",
    )  # fmt: skip
    seeds = range(seed, seed + size.seeds)
    few, halves = {}, {}
    for preset, name in METHODS.items():
        print(f"\n{name}: {config.shots} shots, all classes, then base to new")
        few[name] = _whole(grid(_tuned(config, preset, ALL, size), out / preset, [16], seeds))["rows"][0]
        halves[name] = _whole(base_to_new(_tuned(config, preset, HALVES, size), out / f"b2n_{preset}", seeds))["rows"]
    print("\nlinear probe", flush=True)
    probes = [_probe(dataclasses.replace(config, seed=s)) for s in seeds]
    result = _result(few, halves, probes) | {
        "seeds": list(seeds), "recipe": recipe(), "quick": quick,
        "task_bytes": read_result(_run_folder(out, "ramt", seed))["task_bytes"],
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    write_json(out / "result.json", result)
    for table in tables(result).values():
        _print(table)
    report = _report(out, result, seed, quick)
    print(f"\nrecipe     {result['recipe']}\ntask file  {result['task_bytes']:,} bytes\nreport     {report}")
    print(f"seconds    {time.perf_counter() - start:.0f}", flush=True)
    return result


def _upstream(folder: Path, steps: int, seed: int) -> str:
    print(f"upstream   a CLIP from nothing: {steps} batches of drawn characters and shapes", flush=True)
    with progress("upstream", steps) as advance:
        every = max(1, steps // 10)
        model = upstream.train(
            steps, seed,
            progress=lambda step, loss: advance(step, f"loss {loss:.3f}" if step % every == 0 else None),
        )  # fmt: skip
    return upstream.save(model, folder)


def write_digits(folder: Path, size: Size = FULL) -> Path:
    """scikit-learn's 1,797 digits of 8 x 8 pixels as {train,val,test}/{name}/NNNN.png, four times as wide and high.

    Source: the test part of UCI's Optical Recognition of Handwritten Digits; NNNN is the place in scikit-learn's list.
    The split is fixed: no seed changes it. Returns the split's JSON, whose labels are the digits' values, so that the
    base half of the classes is 0 to 4.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    split: dict[str, list] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(NUMBERS):
        places = np.flatnonzero(digits.target == label).tolist()
        # The recipes were chosen on the first 80 places of this very shuffle: test images start at place 90.
        random.Random(f"d {name}").shuffle(places)
        ends = size.train, size.train + size.val, size.test and size.train + size.val + size.test
        parts = places[: ends[0]], places[ends[0] : ends[1]], places[ends[1] : ends[2]]
        for part, chosen in zip(split, parts):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for place in sorted(chosen):
                pixels = (digits.images[place] * (255 / 16)).round().astype(np.uint8)
                path, file = f"{part}/{name}/{place:04}.png", BytesIO()
                Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(file, "png")
                (folder / path).write_bytes(file.getvalue())
                split[part].append([path, label, name])
    write_whole(folder / "digits.json", json.dumps(split).encode())
    return folder / "digits.json"


def _tuned(config: RunConfig, preset: str, train: TrainConfig, size: Size) -> RunConfig:
    steps = size.steps or train.steps
    strength = train.strength if PRESETS[preset].strength is None else PRESETS[preset].strength
    train = dataclasses.replace(train, steps=steps, strength=strength, log_every=max(1, steps // 20))
    return dataclasses.replace(config, preset=preset, train=train)


def _whole(table: dict) -> dict:
    for path, why in table["failed"].items():
        raise UserError(f"{path}: {why}")
    return table


def _run_folder(out: Path, preset: str, seed: int) -> Path:
    return out / preset / "shots16" / f"seed{seed}"


def _probe(config: RunConfig) -> Probe:
    """The linear probe on the images that the masks were tuned on."""
    split, loaded = sampled(config), clip.load(config.model, None, None, torch.device("cpu"))
    parts = (features(loaded.model, eval_batches(p, loaded.preprocess)) for p in (split.train, split.val, split.test))
    return linear_probe(*(tensor for part in parts for tensor in part))


def recipe() -> str:
    """What was done, so that nobody takes it for the paper's recipe."""
    return (
        f"Adam with a cosine in batches of {ALL.batch}: {ALL.steps} steps from {ALL.lr:g} on all digits, "
        f"{HALVES.steps} from {HALVES.lr:g} in base to new; gradient dropout of strength {ALL.strength:g} and "
        f"{HALVES.strength:g}, as in the official code, and none for AMT; no mirrored "
        "images. The official rate, 8e-5, is for longer runs. Rates and lengths were chosen with other upstream models "
        "and other seeds, on images that are no test images, after a first choice had shown itself poor on test images."
    )


def _result(few: Mapping, halves: Mapping, probes: Sequence[Probe]) -> dict:
    zero = next(iter(few.values()))["zero_shot"]["mean"]
    accuracies = {"zero-shot": spread([zero]), "linear probe": spread([p.test.top1 for p in probes])}
    accuracies |= {name: row["acc1"] for name, row in few.items()}
    return {
        "few_shot": accuracies,
        "base_to_new": {"zero-shot": next(iter(halves.values()))["zero_shot"]}
        | {name: row["tuned"] for name, row in halves.items()},
        "percent_off": {name: row["percent_off"] for name, row in few.items()},
    }


def tables(result: Mapping) -> dict[str, Table]:
    """Few-shot and base-to-new, as they are printed and shown in the report."""
    off = result["percent_off"]
    rows = [(name, _pm(value), _pm(off[name]) if name in off else "") for name, value in result["few_shot"].items()]
    halves = [
        (name, _pm(row["base"]), _pm(row["new"]), f"{row['harmonic_of_means']:.2f}")
        for name, row in result["base_to_new"].items()
    ]
    return {
        "Ten digits, 16 shots": Table(
            ("top-1 on the test images, %", "all ten", "weights off, %"), rows, len(rows) - 1
        ),
        "Base to new": Table(("tuned on 0 to 4", "0 to 4", "5 to 9", "harmonic mean"), halves, len(halves) - 1),
    }


def _pm(value: Mapping) -> str:
    return f"{value['mean']:.2f}" if value["sd"] is None else f"{value['mean']:.2f} ± {value['sd']:.2f}"


def _print(table: Table) -> None:
    lines = [table.head, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    print()
    for first, *rest in lines:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]))


def _report(out: Path, result: dict, seed: int, quick: bool) -> Path:
    runs = {name: _run_folder(out, preset, seed) for preset, name in METHODS.items()}
    shown = tables(result)
    texts = {
        "Ten digits, 16 shots": f"Means and deviations over the few-shot seeds {', '.join(map(str, result['seeds']))}; "
        "the upstream model and the test images are the same in all.",
        "Base to new": "Tuned on the digits 0 to 4 alone; each half is told apart among its own five names.",
    }
    sections = [Section(title, texts[title], table) for title, table in shown.items()]
    caption = "Test images: what the model saw without masks, then with R-AMT's; orange where that is wrong."
    sections.append(Section("Examples", figures=[Figure(_examples(runs["R-AMT"]), caption)]))
    sections += run_sections(runs["R-AMT"], {name: read_metrics(folder) for name, folder in runs.items()})
    sections.append(Section("Recipe", result["recipe"]))
    lead = (
        "A small CLIP, trained on this machine on drawn characters and shapes, meets handwritten digits. Its weights "
        f"stay as they are: masks switch some off, and one task is a file of {result['task_bytes']:,} bytes."
    )
    source = provenance(read_result(runs["R-AMT"]), f"rmt demo --seed {seed}" + " --quick" * quick)
    return write_report(out / "report.html", "Mask tuning, from nothing", lead, sections, source)


def _examples(folder: Path, count: int = 20) -> str:
    from PIL import Image

    config, task = read_run(folder)
    setup = load_run(config, task)
    split = setup.split
    items = split.test[:: max(1, len(split.test) // count)][:count]
    image = torch.cat([batch for batch, _ in eval_batches(items, setup.clip.preprocess)])
    with torch.no_grad():
        guesses = [
            compute(setup.clip.model, image, setup.text.zero_shot).argmax(-1).tolist()
            for compute in (clip.frozen_logits, clip.logits)
        ]
    titles = [f"{split.classnames[before]} → {split.classnames[after]}" for before, after in zip(*guesses)]
    right = [after == item.label for after, item in zip(guesses[1], items)]
    return figures.examples([np.asarray(Image.open(item.path).convert("RGB")) for item in items], titles, right)
