"""The loop of every method that trains through the backbone: AdamW or SGD on the task loss, over shared batches."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import clip
from ..data import prefetch
from .footing import Footing


def cosine_rates(lr: float, steps: int, *, floor: float = 0.0, warmup: int = 0, warmup_lr: float = 0.0) -> list[float]:
    """One rate a step: a cosine from lr to floor over all steps, the first `warmup` of them replaced by warmup_lr."""
    curve = (floor + (lr - floor) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps))
    return [warmup_lr if step < warmup else rate for step, rate in enumerate(curve)]


def train(
    footing: Footing, model: nn.Module, optimizer: torch.optim.Optimizer, rates: Sequence[float],
    text: Callable[[], Tensor], label: str,
) -> None:  # fmt: skip
    """One step of `optimizer` for each rate, on the cross-entropy of CLIP's logits, over the footing's batches.

    Args:
        model: whose `encode_image` is trained, in whatever mode it is. text: gives (C, D) class vectors of length 1,
            called in every step, with a graph where they are trained too.
        label: of the progress bar.

    Raises: UserError for a loss that is not finite.
    """
    device, low = footing.device, footing.config.train.precision == "bf16"
    steps = range(len(rates))
    with footing.training(label, len(rates)) as done:
        for step, (image, target) in zip(steps, prefetch(footing.batches(), steps)):
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                logits = clip.logits(model, image.to(device), text())
            loss = F.cross_entropy(logits, target.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            done(step, loss.item())


def count(parameters: Iterable[Tensor]) -> int:
    """How many numbers they are."""
    return sum(p.numel() for p in parameters)
