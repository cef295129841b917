"""Regularized mask tuning of a CLIP model: the loop, and a run around it that leaves a folder.

    rmt train --model local-dir:PATH --data FOLDER --template "a photo of a {}." --shots 16 --seed 1 --out RUN

RUN/config.json        what was asked for           RUN/task.safetensors   the masks, packed
RUN/fewshot.json       the training images          RUN/metrics.jsonl      a line for every `log_every` steps
RUN/result.json        accuracy, percent off, seconds, hashes, versions, machine: written last
"""

import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TextIO

import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import rmt_kernels as rk

from . import clip
from .backward import backward
from .checkpoint import environment, save_task, write_json, write_whole
from .config import MaskConfig, RunConfig, TrainConfig, UserError, to_json
from .data import TrainBatches, few_shot
from .evaluate import CONFIG_FILE, RESULT_FILE, TASK_FILE, Accuracy, Setup, prepare
from .masked import Mask, masks
from .masking import count_off, percent_off
from .optim import MaskAdam


def learning_rates(config: TrainConfig, steps_per_epoch: int) -> list[float]:
    """The rate of every step: torch's CosineAnnealingLR, stepped once an epoch, as in the official code.

    With `steps`, the cosine spans the ceil(steps / steps_per_epoch) epochs that they need, the last one cut short.
    """
    steps = config.steps or config.epochs * steps_per_epoch
    epochs = math.ceil(steps / steps_per_epoch)
    return [config.lr * (1 + math.cos(math.pi * (step // steps_per_epoch) / epochs)) / 2 for step in range(steps)]


def warn_flip_budget(rates: list[float], config: MaskConfig) -> None:
    """Warns where no mask can flip: a score has init - threshold to fall, and Adam moves it by about lr a step."""
    if sum(rates) < config.init - config.threshold:
        warnings.warn(
            f"no mask can flip: the learning rates of {len(rates)} steps sum to {sum(rates):.2g}, and a score has "
            f"{config.init - config.threshold:.2g} to fall from init to threshold. Take more steps or a larger --lr",
            stacklevel=2,
        )


def tune(
    model: nn.Module, text: Tensor, batches: Callable[[int], tuple[Tensor, Tensor]], rates: Collection[float],
    config: TrainConfig, log: Callable[[dict], None],
) -> None:  # fmt: skip
    """Tunes the masks of `model` in place, one step for each of `rates`.

    text: (C, D) from `clip.text_features`. batches: step -> image (B, 3, H, W), label (B,). log: gets a row of numbers
    every `log_every` steps and after the last. No loss is scaled: the sign test has an absolute constant, GDR_EPS.
    """
    found = masks(model)
    optimizer = MaskAdam(found, lr=config.lr)
    for step, rate in enumerate(rates):
        image, label = (t.to(text.device) for t in batches(step))
        teacher = clip.frozen_logits(model, image, text)  # (B, C), of the same augmented images
        logits = clip.logits(model, image, text)  # (B, C)
        g_task, g_general = rk.logit_cotangents(logits.detach(), teacher, label, config.temperature)
        backward(
            (logits, g_task), (logits, g_general), found,
            strength=config.strength, seed=config.seed, step=step, l2=config.l2,
        )  # fmt: skip
        optimizer.param_groups[0]["lr"] = rate
        try:
            optimizer.step()
        except ValueError as error:
            _measure(logits.detach(), teacher, label, config, found)  # a loss that is not finite says so itself
            raise UserError(f"step {step + 1}: {error}") from error
        if (step + 1) % config.log_every == 0 or step + 1 == len(rates):
            log({"step": step + 1, "lr": rate, **_measure(logits.detach(), teacher, label, config, found)})


def _measure(z: Tensor, teacher: Tensor, label: Tensor, config: TrainConfig, found: list[Mask]) -> dict[str, float]:
    """Both losses and the accuracy on the batch just trained on, before its step; percent off after it."""
    t = config.temperature
    general = F.kl_div((z / t).log_softmax(-1), (teacher / t).softmax(-1), reduction="batchmean") * t * t
    task = F.cross_entropy(z, label).item()
    if not math.isfinite(task):
        raise UserError(f"the loss must be finite, got {task}: is the learning rate too large?")
    hits = (z.argmax(-1) == label).float().mean().item()
    return {"task": task, "general": general.item(), "batch_acc1": 100 * hits, "percent_off": percent_off(found)}


def run(config: RunConfig, out: str | Path) -> dict:
    """A whole run: zero-shot accuracy, tuning, tuned accuracy, files. Returns what `result.json` holds.

    Raises: UserError for what the user can mend, and where `out` holds a task file already.
    """
    out = Path(out)
    if (out / TASK_FILE).exists():
        raise UserError(f"out must be a new folder, but {out} holds the task file of an earlier run")
    setup = prepare(config)
    train, val = setup.split.train, setup.split.val
    if config.shots is not None:
        train, val = few_shot(train, val, config.shots, config.train.seed)
    batches = TrainBatches(train, *clip.image_format(setup.clip.model), config.train.batch, config.train.seed)
    rates = learning_rates(config.train, batches.steps_per_epoch)
    warn_flip_budget(rates, config.mask)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / CONFIG_FILE, to_json(config).encode())
    write_json(out / "fewshot.json", {"train": [item.path for item in train], "val": [item.path for item in val]})
    print(f"masks      {len(setup.masks)} tensors, {count_off(setup.masks)[1]:,} weights")
    print(
        f"train      {len(train)} images, {len(setup.split.classnames)} classes, {len(rates)} steps of {batches.batch}"
    )
    zero_shot = setup.test(frozen=True)
    print(f"zero-shot  {zero_shot}", flush=True)
    start = time.perf_counter()
    with open(out / "metrics.jsonl", "w") as file, tqdm(rates, unit="step", disable=None) as bar:
        log = functools.partial(_log, file=file, bar=bar)
        tune(setup.clip.model, setup.text, batches, bar, config.train, log)
    result = _finish(setup, config, out, zero_shot, time.perf_counter() - start)
    write_json(out / RESULT_FILE, result)
    return result


def _finish(setup: Setup, config: RunConfig, out: Path, zero_shot: Accuracy, seconds: float) -> dict:
    """Saves the task first, then measures and prints. Keys as CLIP_benchmark's, where it has them."""
    task = save_task(out / TASK_FILE, setup.masks, setup.split.classnames, config)
    tuned = setup.test()
    off, total = count_off(setup.masks)
    size = task.path.stat().st_size
    print(f"tuned      {tuned}, {seconds:.1f} s of tuning")
    print(f"off        {100 * off / total:.2f} % ({off:,} of {total:,} weights)")
    print(f"task file  {task.path}, {size:,} bytes", flush=True)
    return {
        "dataset": Path(config.data).name, "task": "zeroshot_classification",
        "model": config.model, "pretrained": config.pretrained,
        "metrics": {"acc1": tuned.top1, "mean_per_class_recall": tuned.mean_per_class},
        "zero_shot": {"acc1": zero_shot.top1, "mean_per_class_recall": zero_shot.mean_per_class},
        "percent_off": 100 * off / total, "off": off, "masked": total, "task_bytes": size, "tuning_seconds": seconds,
        "bits_sha256": task.bits_sha256, "base_sha256": task.base_sha256, "environment": environment(setup.text.device),
    }  # fmt: skip


def _log(row: dict, file: TextIO, bar: tqdm) -> None:
    """A line of metrics.jsonl, and the bar on a terminal, a printed line elsewhere."""
    file.write(json.dumps(row) + "\n")
    file.flush()
    shown = {key: f"{row[key]:.3g}" for key in ("lr", "task", "general", "batch_acc1", "percent_off")}
    if bar.disable:
        print(f"step {row['step']}/{bar.total}  " + "  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
    bar.set_postfix(shown)
