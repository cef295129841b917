"""Regularized mask tuning of a CLIP model: the step, the loop, and what is measured on the way.

    rmt train --model local-dir:PATH --data FOLDER --template "a photo of a {}." --shots 16 --seed 1 --out RUN

`rmt.run` wraps the loop into a run folder. Every random number is a function of the seed, the step and a place in the
batch or the mask, so that a run can be stopped and taken up again anywhere.
"""

import contextlib
import math
import zlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import clip
from .checkpoint import count_on
from .config import TrainConfig, UserError
from .data import prefetch
from .fully_sharded import fully_sharded
from .graph import CapturedStep
from .masked import Mask, masks
from .optim import MaskAdam
from .reduction import Reduction
from .resume import Resume
from .row_gradients import RowGradients
from .row_shards import RowShards
from .shards import Shards
from .step import Step
from .world import World

Batches = Callable[[int], tuple[Tensor, Tensor]]


def tune(
    model: nn.Module, text: Tensor | clip.Text, batches: Batches, rates: Sequence[float], config: TrainConfig, *,
    seed: int = 1, log: Callable[[dict], None] = lambda row: None, tick: Callable[[int], None] = lambda step: None,
    resume: Resume | None = None, world: World | None = None, total: int | None = None,
) -> None:  # fmt: skip
    """Tunes the masks of `model` in place, one step for each of `rates`.

    Args:
        text: (C, D) text features, or a `clip.Text` where the text tower has masks.
        batches: step -> image (B, 3, H, W), label (B,).
        config: a resolved one; its strength, l2, temperature, accumulate, precision and log_every count here.
        log: gets a row of numbers every `log_every` steps and after the last; tick: the number of steps done.
        resume: where to go on from and to keep the state.
        world, total: the processes that share every batch, of which `batches` gives this one's share, and the images
            of the whole batch. All of them end with the same scores, bit for bit: gradients are summed before the
            dropout, whose draws are the same everywhere. With `world.zero` each keeps scores and moments of its own
            masks alone meanwhile, with `world.shard` those of its rows, and of the weights of blocks too; after an
            error what others had is not there any more.

    Raises: UserError for a loss that is not finite, before that step's scores are kept anywhere; and where another
        process is lost, or its masks are no longer these.
    """
    world = world or World()
    if config.graph and not world.alone:
        raise UserError(f"graph captures the step of one process, got {world.size} ranks: leave it out")
    sharded = world.shard and not world.alone
    with fully_sharded(model, world, config.adam, config.precision) if sharded else contextlib.nullcontext() as rows:
        found = masks(model)
        optimizer = _optimizer(found, rates[0], config, world, rows)
        known = {"seed": seed} if config.graph else {"seed": seed, "total": total}
        take = (CapturedStep if config.graph else Step)(model, text, optimizer, config, **known)
        steps = range(resume.steps_done if resume else 0, len(rates))
        meter = Meter(found, config.temperature, resume.load(optimizer) if resume else None, world, total)
        if world.zero and optimizer.shards:
            optimizer.send_away()
        for step, (image, label) in zip(steps, prefetch(batches, steps)):
            optimizer.set_lr(rates[step])
            try:
                outputs = take(image, label, step)
            except UserError:
                raise
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
        if world.zero and optimizer.shards:
            optimizer.shards.bring_back()


def _optimizer(found: list[Mask], lr: float, config: TrainConfig, world: World, rows: RowShards | None) -> MaskAdam:
    """Of all masks, or of this rank's rows of them; with what sums gradients over ranks."""
    # In double, as on the host: Adam's factors are divided in double before they are rounded.
    lr = torch.tensor(lr, dtype=torch.float64, device=found[0].scores.device) if config.graph else lr
    optimizer = MaskAdam(rows.rows if rows else found, lr=lr, state=config.adam, capturable=config.graph)
    if rows:
        optimizer.gradients, optimizer.shards = RowGradients(world, rows.rows), rows
    elif not world.alone:
        optimizer.gradients.reduction = Reduction(world, found)
        if world.zero:
            optimizer.shards = Shards(world, found, optimizer.gradients.reduction)
    return optimizer


class Meter:
    """Measures the batch just trained on, before its step, and the masks after it.

    Args:
        logged: the bits of the last row, where a run goes on; None at its start.
        world, total: as of `tune`. What is measured is of the whole batch then.
    """

    def __init__(
        self, found: list[Mask], temperature: float, logged: list[Tensor] | None = None, world: World | None = None,
        total: int | None = None,
    ) -> None:  # fmt: skip
        self.found, self.temperature, self.world, self.total = found, temperature, world or World(), total
        self.logged = logged or [mask.bits.cpu().clone() for mask in found]

    def losses(self, z: Tensor, teacher: Tensor, label: Tensor) -> dict[str, float]:
        """Both losses and the accuracy in percent. Raises UserError where the loss is not finite."""
        t = self.temperature
        general = F.kl_div((z / t).log_softmax(-1), (teacher / t).softmax(-1), reduction="batchmean") * t * t
        hits = (z.argmax(-1) == label).float().mean()
        share = len(z) / (self.total or len(z))
        mine = [share * t.item() for t in (F.cross_entropy(z, label), general, hits)]
        task, general, hits = self.world.sum(mine)
        if not math.isfinite(task):
            raise UserError(f"the loss must be finite, got {task}: is the learning rate too large?")
        return {"task": task, "general": general, "batch_acc1": 100 * hits}

    def masks(self) -> dict[str, float | list[float]]:
        """percent_off of all and of each layer, and flips: how many bits differ from the last row's.

        Raises: UserError where the bits are not those of all ranks.
        """
        bits = [mask.bits.cpu().clone() for mask in self.found]
        if not self.world.alone and not self.world.alike(_checksum(bits)):
            raise UserError("the ranks' masks are no longer the same: their machines compute differently")
        sizes = [mask.size for mask in self.found]
        off = [size - count_on(b) for size, b in zip(sizes, bits)]
        flips = sum(count_on(a ^ b) for a, b in zip(bits, self.logged))
        self.logged = bits
        layers = [100 * o / size for o, size in zip(off, sizes)]
        return {"percent_off": 100 * sum(off) / sum(sizes), "flips": flips, "layers": layers}


def _checksum(bits: list[Tensor]) -> int:
    value = 0
    for words in bits:
        value = zlib.crc32(words.contiguous().numpy(), value)
    return value
