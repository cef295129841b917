"""A whole routing run in a folder: a host tuned on captions or on questions, measured before and after.

config.yaml     what was asked for; `rmt route train --config RUN/config.yaml --out NEW` does it again
before.json     the held-out loss of the host as it came, and a hash of its weights
metrics.jsonl   a line for every `log_every` steps
last.pt         the resume file: a run that was killed goes on from here and ends with the same bits
routed/         what was trained: `rmt.routing.load_routed`
beside.safetensors   what was trained besides: an answer head, LayerNorms, biases; and a pooler that was drawn
answers.json    of questions: the answers that the head's rows stand for
result.json     losses, accuracy, captions' scores, versions, machine: written last, so that it stands for a whole run
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import nn

from ..config import UserError, build
from ..files import environment, open_rows, sha256, write_folder, write_json, write_whole
from ..progress import progress
from .base import base_of
from .beside import FILE, beside, load, to_bytes
from .inject import Routed, inject_routed_adapter, inject_routed_lora, load_routed
from .resume import RoutingResume
from .run_config import RouteConfig, read_yaml, to_yaml
from .tasks import Task, task_of

CONFIG_FILE, BEFORE_FILE, METRICS_FILE, RESUME_FILE = "config.yaml", "before.json", "metrics.jsonl", "last.pt"
ROUTED_FOLDER, RESULT_FILE = "routed", "result.json"


def run_routing(config: RouteConfig, out: str | Path) -> dict:
    """Runs, goes on with, or reads back the run of `config` in `out`. Returns what `result.json` holds.

    Raises: UserError for what the user can mend, and where `out` holds another run.
    """
    out = Path(out)
    _need_same_run(config, out)
    if (out / RESULT_FILE).is_file():
        print(f"finished   {out / RESULT_FILE} is read back; give another --out to run again")
        return json.loads((out / RESULT_FILE).read_text())
    kind = task_of(config)
    parts = kind.parts(config)
    part, measured = _held_out_part(parts, config)
    task = kind.new(config, parts["train"])
    model, batches = task.model, task.batches(parts["train"])
    steps = len(config.training().rates(batches.steps_per_epoch))
    weights = base_of(dict(model.named_parameters())).weights
    # A config that the host cannot take leaves no folder behind, which the mended one would then not go into.
    trial = inject(model, config)
    beside(model, config)
    trial.remove()
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / CONFIG_FILE, to_yaml(config).encode())
    before = _before(task, measured, weights, out)
    print(f"host       {task.said(before)} on {len(measured)} {part} {task.unit}", flush=True)
    routed = inject(model, config)
    others = beside(model, config)
    routed.print_trainable_parameters()
    tuned = [sum(p.numel() for p in ps if p.requires_grad) for ps in (routed.parameters(), others.values())]
    if tuned[1]:
        print(f"beside     {tuned[1]:,} parameters more are trained")
    counts = f"{len(parts['train'])} {task.unit}, {task.counted(batches)}, {steps} steps of {batches.batch}"
    print(f"train      {counts}")
    if config.checkpointing:
        task.set_grad_checkpointing()
    seconds = _train(task, routed, batches, config, out, steps, weights)
    routed.save(out / ROUTED_FOLDER)
    write_folder(out, {**task.files, **({FILE: to_bytes(others)} if others else {})})
    after = task.measure(measured)
    print(f"routed     {task.said(after)}, {seconds:.1f} s of tuning", flush=True)
    result = {
        **task.about(), "dataset": Path(config.data).name, "split": part, task.unit: len(measured), "before": before,
        "after": after, "steps": steps, "tuning_seconds": seconds, "trainable": sum(tuned),
        "routed_sha256": sha256(routed.state_dict()), **({"beside_sha256": sha256(others)} if others else {}),
        "config": dataclasses.asdict(config), "environment": environment(next(model.parameters()).device),
    }  # fmt: skip
    result |= task.show(measured)
    write_json(out / RESULT_FILE, result)
    return result


def inject(model: nn.Module, config: RouteConfig) -> Routed:
    """What `config` asks for, put into the model."""
    made = config.injection()
    return inject_routed_lora(model, made) if config.kind == "lora" else inject_routed_adapter(model, made)


def evaluate_routing(config: RouteConfig, run: str | Path, part: str | None = None) -> dict:
    """Measures a run's parameters on one part of its data, by default the last that there is; prints as `run_routing`.

    Raises: UserError where the run has none yet, the host's weights are others by now, or the data has no such part.
    """
    folder = Path(run) / ROUTED_FOLDER
    if not folder.is_dir():
        raise UserError(f"{run} has no {ROUTED_FOLDER}: it must be a folder that rmt route train has finished")
    kind = task_of(config)
    parts = kind.parts(config)
    part = part or list(parts)[-1]
    items = parts.get(part, [])[: config.limit]
    if not items:
        raise UserError(f"{config.data} has no {part} {kind.unit} to measure on")
    task = kind.of_run(config, Path(run))
    # First, since load_routed compares what is frozen, a pooler that was drawn too.
    if others := beside(task.model, config):
        load(others, Path(run) / FILE)
    load_routed(task.model, folder)
    found = task.measure(items)
    print(f"routed     {task.said(found)} on {len(items)} {part} {task.unit}", flush=True)
    return {"split": part, task.unit: len(items), **found, **task.show(items)}


def _need_same_run(config: RouteConfig, out: Path) -> None:
    path = out / CONFIG_FILE
    if not path.is_file():
        return
    earlier = build(RouteConfig, read_yaml(path), str(path))
    if odd := [name for name in vars(config) if getattr(config, name) != getattr(earlier, name)]:
        raise UserError(f"out must be a new folder or this run's own, but {out} holds a run that differs in {odd}")


def _held_out_part(parts: Mapping[str, list], config: RouteConfig) -> tuple[str, list]:
    unit = task_of(config).unit
    if not parts["train"]:
        raise UserError(f"{config.data} has no training {unit}")
    for part in ("val", "test"):
        if parts.get(part):
            return part, parts[part][: config.limit]
    raise UserError(f"{config.data} must have val or test {unit} to measure on, got training {unit} alone")


def _before(task: Task, items: Sequence, weights: str, out: Path) -> dict:
    """Of the host as it came, its answer head as drawn: measured once, and read back where the run goes on.

    Raises: UserError where it was measured on a host with other weights; an older file says nothing of them.
    """
    path = out / BEFORE_FILE
    if not path.is_file():
        write_json(path, {"weights": weights, **task.measure(items)})
    found = json.loads(path.read_text())
    if (theirs := found.pop("weights", weights)) != weights:
        raise UserError(f"{path} is another host's: weights was {theirs!r}, now it is {weights!r}: give another --out")
    return found


def _train(task: Task, routed: Routed, batches: Any, config: RouteConfig, out: Path, steps: int, weights: str) -> float:
    # Images are known by path alone: to read those of MSCOCO at every start would take minutes.
    fingerprint = {"config": to_yaml(config), **task.fingerprint(batches), "steps": str(steps), "weights": weights}
    resume = RoutingResume(out / RESUME_FILE, fingerprint, config.save_every)
    if resume.steps_done:
        print(f"resume     from step {resume.steps_done} of {steps}")
    with open_rows(out / METRICS_FILE, resume.steps_done) as file, progress("step", steps, resume.steps_done) as tick:
        log = functools.partial(_log, file, tick)
        task.train(routed, batches, log=log, tick=tick, resume=resume)
    return resume.seconds


def _log(file: TextIO, tick: Callable, row: dict) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()
    tick(row["step"], "  ".join(f"{key} {row[key]:.3g}" for key in ("lr", "loss", "grad_norm")))
