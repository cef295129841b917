"""A whole run in a folder: zero-shot accuracy, tuning, tuned accuracy, files.

config.yaml     what was asked for; `rmt train --config RUN/config.yaml --out NEW` does it again
fewshot.json    the training images, in order
metrics.jsonl   a line for every `log_every` steps
last.pt         the resume file: a run that was killed goes on from here and ends with the same bits
task/           the masks, packed: what is shared
result.json     accuracies, hashes, versions, machine: written last, so that it stands for a finished run

Several processes may share a run's batches (`rmt.world`): rank 0 alone writes here, and what can go wrong on one of
them is said on all.
"""

import dataclasses
import functools
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from torch import Tensor

from . import clip
from .agreement import selection_sha256, what_is_asked, what_is_there
from .checkpoint import Task, environment, save_task, write_json, write_whole
from .config import RunConfig, UserError, from_yaml, meaning, to_yaml
from .data import Split, TrainBatches, indices_sha256
from .evaluate import CONFIG_FILE, RESULT_FILE, TASK_FOLDER, Accuracy, Setup, prepare, sampled
from .files import open_rows
from .masking import per_layer
from .progress import progress
from .resume import Resume
from .schedule import Plan, plan
from .select import Selection, clip_loss, select
from .train import tune
from .world import World

METRICS_FILE, RESUME_FILE, FEWSHOT_FILE = "metrics.jsonl", "last.pt", "fewshot.json"


def run(
    config: RunConfig, out: str | Path, known: dict[tuple, Accuracy] | None = None, world: World | None = None
) -> dict:
    """Runs, goes on with, or reads back the run of `config` in `out`. Returns what `result.json` holds.

    A finished run is not run again; one that was killed goes on where its last resume file stands.

    Args:
        known: zero-shot accuracies, by what they belong to: read, and added to. One for all runs of a command saves the
            measurements that would give the same numbers.
        world: the processes that share the run, each of which calls this and gets the same.

    Raises: UserError for what the user can mend, and where `out` holds another run; in a world on every rank.
    """
    out, world = Path(out), world or World()
    world.agree(lambda: what_is_asked(config, world))
    if (finished := world.from_first(lambda: _finished(config, out))) is not None:
        print(f"finished   {out / RESULT_FILE} is read back; give another --out to run again")
        return finished
    setup, batches, made = world.together(lambda: _prepared(config, world))
    world.need(batches.batch, "images of a batch")
    there = world.together(lambda: what_is_there(setup, batches))
    world.agree(lambda: there)
    world.from_first(lambda: _write_inputs(config, setup.split, out))
    _say_what_follows(setup, made, batches)
    zero_shot = _zero_shot(setup, {} if known is None else known, world)
    print(f"zero-shot  {zero_shot}", flush=True)
    seconds = tune_masks(setup, setup.config, made, batches, there, out, world)
    world.from_first(lambda: _save(setup, out) and None)  # before it is measured
    tuned = setup.test(world=world)
    return world.from_first(lambda: _finish(setup, out, zero_shot, tuned, seconds, made, world))


def _finished(config: RunConfig, out: Path) -> dict | None:
    """What the run in `out` has ended with. Raises UserError where it is another run's."""
    _need_same_run(config, out)
    path = out / RESULT_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def _prepared(config: RunConfig, world: World) -> tuple[Setup, TrainBatches, Plan]:
    split = sampled(config)
    setup = prepare(config, split, choose if config.select.criterion else None)
    batches = _batches(setup.clip, split, setup.config, None if world.alone else world.share)
    train, mask = setup.config.train, setup.config.mask
    return setup, batches, plan(train, mask, batches.steps_per_epoch, stretch=config.train.epochs is None)


def _write_inputs(asked: RunConfig, split: Split, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / CONFIG_FILE, to_yaml(asked).encode())
    write_json(out / FEWSHOT_FILE, {"train": [i.path for i in split.train], "val": [i.path for i in split.val]})


def _batches(
    loaded: clip.Clip, split: Split, config: RunConfig, share: Callable[[int], slice] | None = None
) -> TrainBatches:
    form, train = clip.image_format(loaded.model), config.train
    return TrainBatches(split.train, *form, train.batch, config.seed, flip=train.flip, share=share)


def choose(loaded: clip.Clip, split: Split, text: Tensor, config: RunConfig) -> Selection:
    """The weights that `config.select` names, by the task loss on the first training batches; prints the report."""
    wanted = config.select
    batches = _batches(loaded, split, config)
    device = text.device
    selection = select(
        loaded.model, ([t.to(device) for t in batches(step)] for step in range(wanted.batches)),
        criterion=wanted.criterion, budget=wanted.budget, scope=wanted.scope, unit=wanted.unit, config=config.mask,
        loss=clip_loss(text),
    )  # fmt: skip
    print(selection.report(), flush=True)
    return selection


def _need_same_run(config: RunConfig, out: Path) -> None:
    path = out / CONFIG_FILE
    if path.is_file() and meaning(earlier := from_yaml(path.read_text())) != meaning(config):
        odd = [name for name in vars(config) if getattr(config, name) != getattr(earlier, name)]
        raise UserError(f"out must be a new folder or this run's own, but {out} holds a run that differs in {odd}")


def _say_what_follows(setup: Setup, made: Plan, batches: TrainBatches) -> None:
    weights = sum(mask.scores.numel() for mask in setup.masks)
    print(f"masks      {len(setup.masks)} tensors, {weights:,} weights with scores")
    print(
        f"train      {len(batches.items)} images, {len(setup.split.classnames)} classes, {len(made.rates)} steps of "
        f"{batches.batch}"
    )
    if made.message:
        print(f"schedule   {made.message}")


def _zero_shot(setup: Setup, known: dict[tuple, Accuracy], world: World) -> Accuracy:
    """Of the frozen model. Its modules round in ways of their own where they have masks: which do is in the key."""
    config, split = setup.config, setup.split
    key = (
        config.model, config.pretrained, config.image_size, str(setup.device), setup.template, split.classnames,
        tuple((str(item.path), item.label) for item in split.test),
        tuple((mask.key, mask.selected is None) for mask in setup.masks),
    )  # fmt: skip
    if key not in known:
        known[key] = setup.test(frozen=True, world=world)
    return known[key]


def tune_masks(
    setup: Setup, config: RunConfig, made: Plan, batches: TrainBatches, there: Mapping[str, str], out: Path,
    world: World | None = None,
) -> float:  # fmt: skip
    """The loop with a resume file and metrics.jsonl in `out`. Returns the seconds that it took, of all calls.

    there: what `what_is_there` says of setup and batches, before any step.
    """
    world = world or World()
    fingerprint = {
        "config": to_yaml(config), "images": indices_sha256(setup.split.train, config), "steps": str(len(made.rates)),
        "selection": selection_sha256(setup.masks), "weights": there["weights"], "contents": there["images"],
        "classes": there["classes"],
    }  # fmt: skip
    resume = Resume(out / RESUME_FILE, fingerprint, config.train.save_every, world)
    done = resume.steps_done
    if done:
        print(f"resume     from step {done} of {len(made.rates)}")
    rows = open_rows(out / METRICS_FILE, done) if world.first else io.StringIO()
    with rows as file, progress("step", len(made.rates), done) as advance:
        log = functools.partial(_log, file, advance)
        tune(
            setup.clip.model, setup.text, batches, made.rates, config.train,
            seed=config.seed, log=log, tick=advance, resume=resume, world=world,
            total=None if world.alone else batches.batch,
        )  # fmt: skip
    return resume.seconds


def _log(file: TextIO, advance: Callable, row: dict) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()
    shown = {key: f"{row[key]:.3g}" for key in ("lr", "task", "general", "batch_acc1", "percent_off")}
    text = "  ".join(f"{key} {value}" for key, value in shown.items())
    advance(row["step"], f"{text}  flips {row['flips']:,}  layers {_bars(row['layers'])}")


def _bars(values: list[float]) -> str:
    """One block character a layer, in eighths of the largest value."""
    top = max(values) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * value / top))] for value in values)


def _save(setup: Setup, out: Path, numbers: dict[str, float] | None = None) -> Task:
    text = setup.text.features() if setup.config.text_features else None
    return save_task(
        out / TASK_FOLDER, setup.masks, setup.split.classnames, setup.config, setup.template, numbers, text
    )


def _finish(
    setup: Setup, out: Path, zero_shot: Accuracy, tuned: Accuracy, seconds: float, made: Plan, world: World
) -> dict:
    """Writes the numbers into the task and result.json, and prints. Keys as CLIP_benchmark's, where it has them."""
    config, folder = setup.config, out / TASK_FOLDER
    task = _save(setup, out, {"zero-shot top-1, %": zero_shot.top1, "tuned top-1, %": tuned.top1})
    layers = per_layer(setup.masks)
    off, total = sum(row[1] for row in layers), sum(row[2] for row in layers)
    size = (folder / "mask.safetensors").stat().st_size
    print(f"tuned      {tuned}, {seconds:.1f} s of tuning")
    print(f"off        {100 * off / total:.2f} % ({off:,} of {total:,} weights)")
    print(f"task file  {folder}, {size:,} bytes", flush=True)
    result = {
        "dataset": config.dataset or Path(config.data).stem, "task": "zeroshot_classification",
        "model": config.model, "pretrained": config.pretrained, "split": "test",
        "metrics": tuned.metrics(), "zero_shot": zero_shot.metrics(),
        "percent_off": 100 * off / total, "off": off, "masked": total,
        "scored": sum(mask.scores.numel() for mask in setup.masks),
        "per_layer": layers, "task_bytes": size, "tuning_seconds": seconds,
        "indices_sha256": indices_sha256(setup.split.train, config),
        "bits_sha256": task.bits_sha256, "base_sha256": task.base_sha256,
        "classnames": list(setup.split.classnames), "confusion": tuned.confusion.tolist(),
        "config": dataclasses.asdict(config), "environment": environment(setup.masks[0].scores.device),
        "steps": len(made.rates), "schedule": made.message,
        "ranks": world.size, "reduce": world.reduce, "zero": world.zero, "shard": world.shard,
    }  # fmt: skip
    write_json(out / RESULT_FILE, result)
    return result
