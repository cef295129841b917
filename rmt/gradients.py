"""The two gradients of every mask, task and general, kept apart until the dropout.

Buffers are made once and filled by the products' own backward: it hands over its rows, and `rmt_kernels.weight_grad_`
writes g.T @ x where it belongs. What is kept is the gradient of the masked weight ("chained": the factor W of the chain
rule is still missing); `mask_update_` or `gradient_dropout` multiplies while it reads.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import rmt_kernels

from .masked import Mask
from .reduction import Reduction

TASK, GENERAL = 0, 1


@dataclass(frozen=True)
class Dropout:
    """What the weight-sized half of a step needs besides the gradients.

    general: whether there is a general loss. rng: (2,) int64 [seed, step]. l2: coefficient of the scores' norm.
    """

    general: bool
    rng: Tensor
    strength: float
    l2: float


class Gradients:
    """Both gradients of `masks`, a pair of buffers each: (N, K) fp32, or (S,) where S weights are selected.

    reduction: sums them over ranks, where there are several; it has the buffers then.
    """

    def __init__(self, masks: list[Mask]) -> None:
        self.masks = masks
        self.reduction: Reduction | None = None
        self._buffers: list[list[Tensor | None]] = [[None] * len(masks) for _ in (TASK, GENERAL)]
        self._chained = [[False] * len(masks) for _ in (TASK, GENERAL)]
        self.clear()

    def clear(self) -> None:
        """Forget what has arrived; buffers stay."""
        self._arrived = [[False] * len(self.masks) for _ in (TASK, GENERAL)]

    @property
    def live(self) -> list[int]:
        """Positions of the masks that the task loss has reached."""
        return [i for i, arrived in enumerate(self._arrived[TASK]) if arrived]

    def parts(self, batch: Tensor, count: int, total: int | None) -> Sequence[Tensor]:
        """This rank's share of `total` images in at most `count` parts; None: all are here.

        Ranks may have different numbers of them: what travels does so once a step.
        """
        return batch.chunk(count)

    @contextlib.contextmanager
    def collecting(self, side: int) -> Iterator[None]:
        """Inside, products over these masks add their weight gradients to the buffers of `side`, TASK or GENERAL."""
        sinks = {mask.scores: self._sink(side, i) for i, mask in enumerate(self.masks) if mask.selected is None}
        with rmt_kernels.weight_gradients_to(sinks):
            yield

    def begin(self, side: int) -> None:
        """Before the last pass of a step over `side`: what is complete in it may go to the other ranks."""
        if self.reduction:
            self.reduction.begin(side)

    def end(self, side: int) -> None:
        """After that pass, and after what autograd itself has returned."""
        if self.reduction:
            self.reduction.end(self._arrived[side])

    def wait(self) -> None:
        """Until all that was sent is the sum over ranks."""
        if self.reduction:
            self.reduction.wait()

    def buffers(self) -> list[Tensor]:
        """What is kept from step to step."""
        return [t for side in self._buffers for t in side if t is not None]

    def add_scores(self, side: int, i: int, gradient: Tensor) -> None:
        """Adds a gradient of mask i's scores themselves: of compact ones, or where the scores are used otherwise."""
        self._unchain(side, i)
        self._add(side, i, gradient)

    def pair(self, i: int, general: bool) -> tuple[Tensor, Tensor | None, bool]:
        """Task and general gradient of mask i, and whether both are chained. general: without one, zeros stand in."""
        if not general:
            return self._buffers[TASK][i], None, self._chained[TASK][i]
        if not self._arrived[GENERAL][i]:
            self._buffer(GENERAL, i).zero_()
            self._chained[GENERAL][i] = self._chained[TASK][i]
        if self._chained[TASK][i] != self._chained[GENERAL][i]:
            self._unchain(TASK, i)
            self._unchain(GENERAL, i)
        return self._buffers[TASK][i], self._buffers[GENERAL][i], self._chained[TASK][i]

    def replace(self, i: int, gradient: Tensor) -> None:
        """Puts one gradient of mask i's scores in the place of its task gradient."""
        self._buffer(TASK, i).copy_(gradient)
        self._chained[TASK][i] = False

    def release(self, i: int) -> None:
        """Gives mask i's buffers back."""
        for buffers in self._buffers:
            buffers[i] = None

    def _sink(self, side: int, i: int) -> Callable[[Tensor, Tensor | None], None]:
        def take(g: Tensor, x: Tensor | None) -> None:
            """Rows g (M, N) and x (M, K) of a product, or without x a gradient g (N, K) of the masked weight."""
            if self._arrived[side][i] and not self._chained[side][i]:
                gradient = g.float() if x is None else g.float().T @ x.float()
                self._add(side, i, gradient * self.masks[i].weight)
                return
            self._chained[side][i] = True
            if x is None:
                self._add(side, i, g)
                return
            rmt_kernels.weight_grad_(self._buffer(side, i), g, x, accumulate=self._arrived[side][i])
            self._arrive(side, i)

        return take

    def _add(self, side: int, i: int, gradient: Tensor) -> None:
        buffer = self._buffer(side, i)
        buffer.add_(gradient) if self._arrived[side][i] else buffer.copy_(gradient)
        self._arrive(side, i)

    def _arrive(self, side: int, i: int) -> None:
        self._arrived[side][i] = True
        if self.reduction:
            self.reduction.handed(i)

    def _unchain(self, side: int, i: int) -> None:
        if self._arrived[side][i] and self._chained[side][i]:
            self._buffers[side][i].mul_(self.masks[i].weight)
        self._chained[side][i] = False

    def _buffer(self, side: int, i: int) -> Tensor:
        buffer, scores = self._buffers[side][i], self.masks[i].scores
        if buffer is None or buffer.device != scores.device:
            # Never as an inference tensor: the next step must be able to write it.
            with torch.inference_mode(False):
                made = self.reduction.buffer(side, i) if self.reduction else None
                buffer = torch.empty_like(scores, requires_grad=False) if made is None else made
                self._buffers[side][i] = buffer
        return buffer
