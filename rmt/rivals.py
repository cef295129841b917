"""What gradient dropout is compared with: three other ways to make one gradient of the task's and the general one.

For experiments (`--train.dropout`, `rmt ablate dropout`), in plain PyTorch, elementwise, on the gradients of a mask's
scores: a of the task, with the L2 term, and b of the general loss. lambda is the strength, U the method's own draw,
Philox's uniform for (seed, step, mask, element), so that a run is a function of its config.

    agreement   g = ((1 - lambda) + lambda 1[P > U]) a         P = (1 + sgn(a) (a + b) / (|a| + |b| + eps)) / 2
    random      g = ((1 - lambda) + lambda 1[mean(P) > U]) a   as many kept, of any sign
    sign        g = ((1 - lambda) + lambda 1[sgn(a) sgn(b) >= 0]) a    no chance
    kl          g = a + b                                      the general loss added to the task's, with weight 1

agreement is the method and runs fused in the optimizer, not here. While no bit is off b = 0, and by these formulas sign
keeps everything, kl is the task gradient, and random keeps the share mean(P) of nearly 1, as the method itself.

Source of P: rmt_kernels/reference.py, the official code's formula. The rivals are ours, the plainest of their kind.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import rmt_kernels

from .gradients import Dropout
from .optim import MaskAdam

Rule = Callable[[Tensor, Tensor, Dropout, int], Tensor]


def drop(optimizer: MaskAdam, rival: str) -> None:
    """Lets the next step of `optimizer` take the gradient of `rival`, a key of RIVALS, once `rmt.backward` is done."""
    optimizer.combine(RIVALS[rival])


def random(a: Tensor, b: Tensor, dropout: Dropout, stream: int) -> Tensor:
    """Keeps a share of mean(P) of the elements, P the method's keep probability, without regard to their agreement.

    The mean over a mask of the probabilities, not the share that agreement's own draws would keep: each element is then
    drawn alone, as in the method, and the two shares differ by less than 1 / sqrt(elements). One for each mask, so that
    layers that agree more lose less, as in the method.
    """
    # In fp64: in fp32 the sum's order, and with it the number of threads, would decide draws.
    rate = rmt_kernels.keep_probability(a, b).mean(dtype=torch.float64)
    return _leak(a, rate > rmt_kernels.philox_uniform(dropout.rng, stream, a.shape), dropout.strength)


def sign(a: Tensor, b: Tensor, dropout: Dropout, stream: int) -> Tensor:
    """Drops where the signs are opposed.

    An element without a general gradient, b = 0, is kept, where the method has P near 1; otherwise nothing would move
    while no bit is off, and no bit would ever go off.
    """
    return _leak(a, a.sign() * b.sign() >= 0, dropout.strength)


def kl(a: Tensor, b: Tensor, dropout: Dropout, stream: int) -> Tensor:
    """Drops nothing; strength has no part in it."""
    return a + b


def _leak(a: Tensor, kept: Tensor, strength: float) -> Tensor:
    return torch.where(kept, a, (1 - strength) * a)


RIVALS: dict[str, Rule] = {"random": random, "sign": sign, "kl": kl}
