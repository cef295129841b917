"""Gradients of rows: each product's is summed to the ranks that own the mask's rows, and its buffer is free again."""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import rmt_kernels

from .gradients import Gradients
from .reduction import BUCKET
from .row_shards import Rows
from .world import World

IN_FLIGHT = 4 * BUCKET  # bytes of gradients that may travel at a time


class RowGradients(Gradients):
    """Both gradients of `masks`, of which this rank keeps the sums over ranks of its own rows.

    All ranks take the same products in the same order; autograd walks equal graphs so.
    """

    def __init__(self, world: World, rows: Sequence[Rows]) -> None:
        super().__init__([row.whole for row in rows])
        self.world, self.rows = world, list(rows)
        self._travelling: deque[tuple[Tensor, Callable[[], None]]] = deque()
        self._free: dict[tuple[int, ...], list[Tensor]] = {}

    def parts(self, batch: Tensor, count: int, total: int | None) -> Sequence[Tensor]:
        """Each part's products talk, so that ranks must have the same number: no more than the smallest share allows.

        `chunk` promises no number: 4 images in 3 parts are 2.
        """
        smallest = len(batch) if total is None else total // self.world.size
        return batch.tensor_split(min(count, smallest))

    def add_scores(self, side: int, i: int, gradient: Tensor) -> None:
        """Raises: RuntimeError. A gradient of scores themselves would be of scores that are not here."""
        raise RuntimeError(f"{self.masks[i].key} is sharded: its scores get gradients from eager products alone")

    def wait(self) -> None:
        """Until all that was handed over is summed."""
        while self._travelling:
            self._travelling.popleft()[1]()

    def _sink(self, side: int, i: int) -> Callable[[Tensor, Tensor | None], None]:
        def take(g: Tensor, x: Tensor | None) -> None:
            """Rows g (M, N) and x (M, K) of a product, or without x a gradient g (N, K) of the masked weight."""
            whole = self._whole(i)
            matrix = whole[: self.rows[i].shape[0]]
            matrix.copy_(g) if x is None else rmt_kernels.weight_grad_(matrix, g, x)
            self._chained[side][i] = True
            self._send(side, i, whole)

        return take

    def _send(self, side: int, i: int, whole: Tensor) -> None:
        row, first = self.rows[i], not self._arrived[side][i]
        self._arrived[side][i] = True
        sent = whole if self.world.reduce == "fp32" else whole.bfloat16()
        part = sent.new_empty(row.chunk, whole.shape[1])
        done = self.world.start_scatter(part, sent)

        def finish() -> None:
            done()
            buffer, mine = self._buffer(side, i), part[: len(row.scores)]
            buffer.copy_(mine) if first else buffer.add_(mine)
            self._free.setdefault(tuple(whole.shape), []).append(whole)

        self._travelling.append((sent, finish))
        while sum(tensor.nbytes for tensor, _ in self._travelling) > IN_FLIGHT and len(self._travelling) > 1:
            self._travelling.popleft()[1]()

    def _whole(self, i: int) -> Tensor:
        """(R c, K) fp32, rows from N on 0: one that has come back, or a new one."""
        row = self.rows[i]
        shape = (self.world.size * row.chunk, row.shape[1])
        if self._free.get(shape):
            return self._free[shape].pop()
        # Zeros: padding travels too. Never as an inference tensor: the next step must be able to write it.
        with torch.inference_mode(False):
            return torch.zeros(shape, device=row.scores.device)

    def _buffer(self, side: int, i: int) -> Tensor:
        if self._buffers[side][i] is None:
            with torch.inference_mode(False):
                self._buffers[side][i] = torch.empty_like(self.rows[i].scores, requires_grad=False)
        return self._buffers[side][i]
