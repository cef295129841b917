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
from .checkpoint import count_on
from .config import TrainConfig, UserError
from .data import prefetch
from .graph import CapturedStep
from .masked import Mask, masks
from .optim import MaskAdam
from .resume import Resume
from .step import Step

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
    lr = torch.tensor(rates[0], device=found[0].scores.device) if config.graph else rates[0]
    optimizer = MaskAdam(found, lr=lr, state=config.adam, capturable=config.graph)
    take = (CapturedStep if config.graph else Step)(model, text, optimizer, config, seed=seed)
    steps = range(resume.steps_done if resume else 0, len(rates))
    meter = Meter(found, config.temperature, resume.load(optimizer) if resume else None)
    for step, (image, label) in zip(steps, prefetch(batches, steps)):
        optimizer.set_lr(rates[step])
        try:
            outputs = take(image, label, step)
        except ValueError as error:
            if take.outputs:
                meter.losses(*take.outputs)  # a loss that is not finite says so itself
            raise UserError(f"step {step + 1}: {error}") from error
        last = step + 1 == len(rates)
        if (step + 1) % config.log_every == 0 or last:
            log({"step": step + 1, "lr": rates[step], **meter.losses(*outputs), **meter.masks()})
        tick(step + 1)
        if resume:
            resume.save(optimizer, step + 1, meter.logged, last=last)


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
