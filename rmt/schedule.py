"""The learning rates of a run, and whether Adam can flip a mask with them.

A score starts at `init`, or `spread` around it, and its weight goes off at `threshold`. Adam moves a score by about the
learning rate a step, whatever the gradient: at the official 8e-5 and 30 epochs a task with three or fewer batches an
epoch provably ends as the zero-shot model. So `--train.schedule auto` adds epochs; `paper` keeps the recipe.
"""

import math
from dataclasses import dataclass, replace

from .config import MaskConfig, TrainConfig

# Sum of learning rates that `auto` asks for, in units of the way to the threshold. The official recipe has 5.7
# on DTD at 16 shots, the smallest of the larger data sets (EuroSAT 1.2, Pets 4.5, then 12 and more).
REACH = 5.0


@dataclass(frozen=True)
class Plan:
    """The rate of every step. message: what there is to say about masks that cannot flip, or None."""

    rates: list[float]
    steps_per_epoch: int
    message: str | None = None


def learning_rates(config: TrainConfig, steps_per_epoch: int) -> list[float]:
    """torch's CosineAnnealingLR, stepped once an epoch, as in the official code.

    With `steps`, the cosine spans the ceil(steps / steps_per_epoch) epochs that they need, the last one cut short.
    """
    steps = config.steps or config.epochs * steps_per_epoch
    epochs = math.ceil(steps / steps_per_epoch)
    return [config.lr * (1 + math.cos(math.pi * (step // steps_per_epoch) / epochs)) / 2 for step in range(steps)]


def adam_reach(rates: list[float], beta1: float = 0.9, beta2: float = 0.999) -> float:
    """Upper bound on how far Adam can move one parameter, whatever its gradients were.

    In step t, |m| / sqrt(v) <= sqrt(sum_i c_i^2 / d_i) by Cauchy-Schwarz, where c_i = (1 - beta1) beta1^(t - i) and d_i
    alike are the weights of the i-th gradient in m and of its square in v; then the bias corrections.
    """
    ratio = beta1**2 / beta2
    total = 0.0
    for t, rate in enumerate(rates, start=1):
        weights = (1 - beta1) ** 2 / (1 - beta2) * (1 - ratio**t) / (1 - ratio)
        total += rate * math.sqrt(weights * (1 - beta2**t)) / (1 - beta1**t)
    return total


def plan(config: TrainConfig, mask: MaskConfig, steps_per_epoch: int, *, stretch: bool) -> Plan:
    """Rates for a resolved config. stretch: epochs may be added, since the user has named no length."""
    rates = learning_rates(config, steps_per_epoch)
    # Of the score that starts lowest: with a spread of 1 there is none, and bits flip from the first step on.
    distance = (mask.init - mask.threshold) * (1 - mask.spread)
    way = f"{distance:.2g} to fall from {'the lowest first score' if mask.spread else 'init'} to threshold"
    stuck = adam_reach(rates) < distance
    # Over E epochs the cosine's rates sum to lr * steps_per_epoch * (E + 1) / 2.
    epochs = math.ceil(2 * REACH * distance / (config.lr * steps_per_epoch)) - 1
    stretch = stretch and config.schedule == "auto" and config.steps is None and epochs > config.epochs
    steps = f"{len(rates)} steps"
    why = (
        f"no mask can flip in {steps}: Adam can move a score by at most {adam_reach(rates):.2g}, and it has {way}"
        if stuck
        else f"few masks can flip in {steps}: their learning rates sum to {sum(rates):.2g}, and a score has {way}"
    )
    if stretch:
        longer = learning_rates(replace(config, epochs=epochs), steps_per_epoch)
        kept = f"stretched to {epochs} epochs, {len(longer)} steps; --train.schedule paper keeps {config.epochs} epochs"
        return Plan(longer, steps_per_epoch, f"{why}: {kept}")
    return Plan(rates, steps_per_epoch, f"{why}. Take more steps or a larger lr" if stuck else None)
