"""A whole routing run in a folder: an open_clip CoCa tuned on a caption folder, measured before and after.

config.yaml     what was asked for; `rmt route train --config RUN/config.yaml --out NEW` does it again
before.json     the held-out loss of the host as it came
metrics.jsonl   a line for every `log_every` steps
last.pt         the resume file: a run that was killed goes on from here and ends with the same bits
routed/         what was trained: `rmt.routing.load_routed`
result.json     losses, captions' scores, versions, machine: written last, so that it stands for a finished run
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TextIO

from torch import nn

from ..config import UserError, build
from ..data.captions import Captioned, CaptionSplit, read_captions
from ..data.text_batches import CaptionBatches
from ..files import environment, open_rows, sha256, write_json, write_whole
from ..progress import progress
from .captioner import Captioner, caption, load_captioner, measure
from .inject import Routed, inject_routed_adapter, inject_routed_lora, load_routed
from .resume import RoutingResume
from .run_config import RouteConfig, read_yaml, to_yaml
from .train import train_captions

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
    split = read_captions(config.captions)
    part, measured = _held_out_part(split, config)
    captioner = load_captioner(config)
    batches = captioner.batches(split.train, config.batch, config.seed)
    steps = len(config.training().rates(batches.steps_per_epoch))
    # A config that the host cannot take leaves no folder behind, which the mended one would then not go into.
    inject(captioner.model, config).remove()
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / CONFIG_FILE, to_yaml(config).encode())
    before = _before(captioner, measured, config, out)
    print(f"host       {_said(before)} on {len(measured)} {part} images", flush=True)
    model = captioner.model
    routed = inject(model, config)
    routed.print_trainable_parameters()
    print(f"train      {len(split.train)} images, {len(batches.pairs)} captions, {steps} steps of {batches.batch}")
    if config.checkpointing:
        model.text_decoder.set_grad_checkpointing(True)
    seconds = _train(captioner, routed, batches, config, out, steps)
    routed.save(out / ROUTED_FOLDER)
    after = measure(captioner, measured, config)
    print(f"routed     {_said(after)}, {seconds:.1f} s of tuning", flush=True)
    result = {
        "model": config.model, "pretrained": config.pretrained, "dataset": Path(config.captions).name, "split": part,
        "images": len(measured), "before": before, "after": after, "steps": steps, "tuning_seconds": seconds,
        "trainable": sum(p.numel() for p in routed.parameters()), "routed_sha256": sha256(routed.state_dict()),
        "config": dataclasses.asdict(config), "environment": environment(next(model.parameters()).device),
    }  # fmt: skip
    if config.generate:
        result |= caption(captioner, measured, config)
    write_json(out / RESULT_FILE, result)
    return result


def inject(model: nn.Module, config: RouteConfig) -> Routed:
    """What `config` asks for, put into the model."""
    made = config.injection()
    return inject_routed_lora(model, made) if config.kind == "lora" else inject_routed_adapter(model, made)


def evaluate_routing(config: RouteConfig, run: str | Path, part: Literal["train", "val", "test"]) -> dict:
    """Measures a run's routed layers on one part of a caption folder; prints as `run_routing` does.

    Raises: UserError where the run has none yet, or the part no image.
    """
    folder = Path(run) / ROUTED_FOLDER
    if not folder.is_dir():
        raise UserError(f"{run} has no {ROUTED_FOLDER}: it must be a folder that rmt route train has finished")
    items = getattr(read_captions(config.captions), part)[: config.limit]
    if not items:
        raise UserError(f"{config.captions} has no {part} images to measure on")
    captioner = load_captioner(config)
    load_routed(captioner.model, folder)
    found = measure(captioner, items, config)
    print(f"routed     {_said(found)} on {len(items)} {part} images", flush=True)
    scores = caption(captioner, items, config) if config.generate else {}
    return {"split": part, "images": len(items), **found, **scores}


def _need_same_run(config: RouteConfig, out: Path) -> None:
    path = out / CONFIG_FILE
    if not path.is_file():
        return
    earlier = build(RouteConfig, read_yaml(path), str(path))
    if odd := [name for name in vars(config) if getattr(config, name) != getattr(earlier, name)]:
        raise UserError(f"out must be a new folder or this run's own, but {out} holds a run that differs in {odd}")


def _held_out_part(split: CaptionSplit, config: RouteConfig) -> tuple[str, list[Captioned]]:
    if not split.train:
        raise UserError(f"{config.captions} has no training images")
    for part in ("val", "test"):
        if getattr(split, part):
            return part, getattr(split, part)[: config.limit]
    raise UserError(f"{config.captions} must have val or test images to measure on, got training images alone")


def _before(captioner: Captioner, items: Sequence[Captioned], config: RouteConfig, out: Path) -> dict:
    """Of the host as it came: measured once, and read back where the run goes on."""
    path = out / BEFORE_FILE
    if not path.is_file():
        write_json(path, measure(captioner, items, config))
    return json.loads(path.read_text())


def _said(found: dict) -> str:
    return f"loss {found['loss']:.4f} nats a token, perplexity {found['perplexity']:.2f} ({found['tokens']:,} tokens)"


def _train(
    captioner: Captioner, routed: Routed, batches: CaptionBatches, config: RouteConfig, out: Path, steps: int
) -> float:
    pairs = hashlib.sha256(json.dumps(batches.pairs).encode()).hexdigest()
    resume = RoutingResume(
        out / RESUME_FILE, {"config": to_yaml(config), "captions": pairs, "steps": str(steps)}, config.save_every
    )
    if resume.steps_done:
        print(f"resume     from step {resume.steps_done} of {steps}")
    with open_rows(out / METRICS_FILE, resume.steps_done) as file, progress("step", steps, resume.steps_done) as tick:
        log = functools.partial(_log, file, tick)
        train_captions(
            captioner.model, routed, batches, config.training(), pad=captioner.pad, log=log, tick=tick, resume=resume
        )
    return resume.seconds


def _log(file: TextIO, tick: Callable, row: dict) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()
    tick(row["step"], "  ".join(f"{key} {row[key]:.3g}" for key in ("lr", "loss", "grad_norm")))
