"""Training of what stands on frozen features: no image passes the backbone here."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .footing import Footing
from .method import State

WARMUP_LR = 1e-5


def dassl_rates(lr: float, steps: int, epochs: int) -> list[float]:
    """One rate a step, of the schedule of CoOp's and CLAP's configurations: an epoch at 1e-5, then a cosine from lr.

    The rate changes with the epoch, and the cosine begins after the first one, so that it does not reach 0. Fewer steps
    than the authors' make the epochs shorter.

    Source: KaiyangZhou/Dassl.pytorch, dassl/optim/lr_scheduler.py, ConstantWarmupScheduler over CosineAnnealingLR.
    """
    numbers = (step * epochs // steps for step in range(steps))
    return [lr * (1 + math.cos(math.pi * (n - 1) / epochs)) / 2 if n else WARMUP_LR for n in numbers]


def augmented(footing: Footing, state: State, epochs: int) -> Callable[[int], Tensor]:
    """Epoch, below `epochs` -> (n, D) features of the augmented training images that it sees.

    All are computed here, before training shows its own progress.
    """
    views = [footing.features(state, "train", view) for view in range(min(epochs, footing.views))]
    return lambda epoch: views[epoch % len(views)]


def shuffled(
    features: Tensor, labels: Tensor, size: int, random: torch.Generator, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass in an order that `random` (of the CPU) draws, in batches of `size`, the last one smaller; at most
    `limit` batches."""
    order = torch.randperm(len(labels), generator=random).to(labels.device)
    for chosen in order.split(size)[:limit]:
        yield features[chosen], labels[chosen]


def train_head(
    footing: Footing, optimizer: torch.optim.Optimizer, rates: Sequence[float],
    epoch: Callable[[int], Iterable[tuple[Tensor, Tensor]]], logits: Callable[[Tensor], Tensor], label: str,
    after: Callable[[int], None] = lambda number: None,
) -> None:  # fmt: skip
    """One step of `optimizer` for each rate, on the cross-entropy of `logits`.

    Args:
        epoch: number, from 0 -> batches of (B, D) features and (B,) labels. logits: (B, D) -> (B, C), with a graph.
        label: of the progress bar. after: called with an epoch's number behind its last step.

    Raises: UserError for a loss that is not finite.
    """
    step = number = 0
    with footing.training(label, len(rates)) as done:
        while step < len(rates):
            for (x, y), rate in zip(epoch(number), rates[step:]):
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss = F.cross_entropy(logits(x), y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                done(step, loss.item())
                step += 1
            after(number)
            number += 1
