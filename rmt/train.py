"""Regularized mask tuning of a CLIP model: the step, the loop, and what is measured on the way.

    rmt train --model local-dir:PATH --data FOLDER --template "a photo of a {}." --shots 16 --seed 1 --out RUN

`rmt.run` wraps the loop into a run folder. Every random number is a function of the seed, the step and a place in the
batch or the mask, so that a run can be stopped and taken up again anywhere.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import clip
from .backward import backward
from .checkpoint import count_on
from .config import TrainConfig, UserError
from .data import prefetch
from .masked import Mask, masks
from .optim import MaskAdam
from .resume import Resume

Batches = Callable[[int], tuple[Tensor, Tensor]]


def tune(
    model: nn.Module, text: Tensor | clip.Text, batches: Batches, rates: Sequence[float], config: TrainConfig, *,
    seed: int = 1, log: Callable[[dict], None] = lambda row: None, tick: Callable[[int], None] = lambda step: None,
    resume: Resume | None = None,
) -> None:  # fmt: skip
    """Tunes the masks of `model` in place, one step for each of `rates`.

    Args:
        text: (C, D) text features, or a `clip.Text` where the text tower has masks.
        batches: step -> image (B, 3, H, W), label (B,).
        config: a resolved one; its strength, l2, temperature, accumulate, precision and log_every count here.
        log: gets a row of numbers every `log_every` steps and after the last; tick: the number of steps done.
        resume: where to go on from and to keep the state.

    Raises: UserError for a loss that is not finite, before that step's scores are kept anywhere.
    """
    found = masks(model)
    optimizer = MaskAdam(found, lr=rates[0])
    steps = range(resume.steps_done if resume else 0, len(rates))
    meter = Meter(found, config.temperature, resume.load(optimizer) if resume else None)
    for step, (image, label) in zip(steps, prefetch(batches, steps)):
        outputs = gradients(model, text, image, label, found, config, seed=seed, step=step)
        optimizer.param_groups[0]["lr"] = rates[step]
        try:
            optimizer.step()
        except ValueError as error:
            meter.losses(*outputs)  # a loss that is not finite says so itself
            raise UserError(f"step {step + 1}: {error}") from error
        last = step + 1 == len(rates)
        if (step + 1) % config.log_every == 0 or last:
            log({"step": step + 1, "lr": rates[step], **meter.losses(*outputs), **meter.masks()})
        tick(step + 1)
        if resume:
            resume.save(optimizer, step + 1, meter.logged, last=last)


def gradients(
    model: nn.Module, text: Tensor | clip.Text, image: Tensor, label: Tensor, found: list[Mask], config: TrainConfig,
    *, seed: int, step: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One student forward, one teacher forward without a graph and two backward passes, into every `scores.grad`.

    No loss is scaled: the sign test has an absolute constant, GDR_EPS. With `accumulate` the batch comes in parts whose
    gradients are summed, task and general apart, before the test. Returns logits, teacher logits (B, C) and labels.
    """
    device, pending, outputs = found[0].scores.device, [] if config.accumulate > 1 else None, []
    parts = list(zip(image.chunk(config.accumulate), label.chunk(config.accumulate)))
    for n, (x, y) in enumerate(parts):
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            teacher = clip.frozen_logits(model, x, text.teacher() if isinstance(text, clip.Text) else text)
            logits = clip.logits(model, x, text.student() if isinstance(text, clip.Text) else text)
        task, general = losses(logits.float(), teacher.float(), y, config.temperature)
        share = len(x) / len(image)
        backward(
            task * share, general * share, found, strength=config.strength, seed=seed, step=step, l2=config.l2,
            pending=pending, more=n + 1 < len(parts),
        )  # fmt: skip
        outputs.append((logits.detach().float(), teacher.float(), y))
    return tuple(torch.cat(t) for t in zip(*outputs))


def losses(logits: Tensor, teacher: Tensor, label: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Task loss: cross entropy. General loss: T^2 * H(softmax(teacher / T), softmax(logits / T)), official KLLoss.

    logits, teacher: (B, C) fp32. The L2 term joins the task's gradient in `rmt.backward`.
    """
    t = temperature
    general = -((teacher / t).softmax(1) * (logits / t).log_softmax(1)).sum(1).mean() * t * t
    return F.cross_entropy(logits, label), general


class Meter:
    """Measures the batch just trained on, before its step, and the masks after it.

    Args:
        logged: the bits of the last row, where a run goes on; None at its start.
    """

    def __init__(self, found: list[Mask], temperature: float, logged: list[Tensor] | None = None) -> None:
        self.found, self.temperature = found, temperature
        self.logged = logged or [mask.bits.cpu().clone() for mask in found]

    def losses(self, z: Tensor, teacher: Tensor, label: Tensor) -> dict[str, float]:
        """Both losses and the accuracy in percent. Raises UserError where the loss is not finite."""
        t = self.temperature
        general = F.kl_div((z / t).log_softmax(-1), (teacher / t).softmax(-1), reduction="batchmean") * t * t
        task = F.cross_entropy(z, label).item()
        if not math.isfinite(task):
            raise UserError(f"the loss must be finite, got {task}: is the learning rate too large?")
        hits = (z.argmax(-1) == label).float().mean().item()
        return {"task": task, "general": general.item(), "batch_acc1": 100 * hits}

    def masks(self) -> dict[str, float | list[float]]:
        """percent_off of all and of each layer, and flips: how many bits differ from the last row's."""
        bits = [mask.bits.cpu().clone() for mask in self.found]
        sizes = [mask.weight.numel() for mask in self.found]
        off = [size - count_on(b) for size, b in zip(sizes, bits)]
        flips = sum(count_on(a ^ b) for a, b in zip(bits, self.logged))
        self.logged = bits
        layers = [100 * o / size for o, size in zip(off, sizes)]
        return {"percent_off": 100 * sum(off) / sum(sizes), "flips": flips, "layers": layers}
