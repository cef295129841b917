"""Rows of every mask on each rank, as `fully_shard` gives out rows of its weight: scores, moments, gradients, updates.

    torchrun --nproc-per-node 4 -m rmt train --shard ...

Rank r of R has rows [r c, r c + c) of an (N, K) mask, c = ceil(N / R); the last ranks may have fewer, or none. Products
need no scores, and those never travel: bits, 1/32 of a weight, are whole on every rank, and told after each update. A
gradient is summed to the owners of its rows as soon as a product hands it over, and its buffer is free again. Draws are
those of the whole mask, at the rows' offset in it. The one number that is not a row's own is the norm in the L2 term:
squares of the rows' norms are summed, in fp64, and so scores equal those of one process to rounding.

Of S scores a rank keeps (4 + 8) S / R bytes with fp32 moments, and 8 S / R of summed gradients in place of 8 S. In a
step it hands over 4 bytes a score to each side's reduce-scatter (2 in bf16; rows that make N a multiple of R count),
4 c ceil(K / 32) of bits for each mask, and 24 for each mask and 8 for each rank of norms, counts and failures.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rmt_kernels

from .config import UserError
from .masked import Mask, MaskedModule
from .world import World

DRAWS, BLOCK = 4, rmt_kernels.reference.MOMENT_BLOCK  # weights that share a draw, and an exponent of 8-bit moments


@dataclass(frozen=True)
class Rows:
    """A rank's rows of one mask: what its optimizer sees in the mask's place.

    Args:
        whole: the mask. begin, chunk: first row, and how many rows a rank has that is not one of the last.
        scores: (n, K) fp32, this rank's.
    """

    whole: Mask
    begin: int
    chunk: int
    scores: nn.Parameter

    @property
    def key(self) -> str:
        """State-dict name of the whole weight."""
        return self.whole.key

    @property
    def module(self) -> MaskedModule:
        """Of the whole mask."""
        return self.whole.module

    @property
    def shape(self) -> torch.Size:
        """(N, K) of the whole mask."""
        return self.whole.shape

    @property
    def size(self) -> int:
        """Weights of the whole mask."""
        return self.whole.size

    @property
    def offset(self) -> int:
        """Flat index of the first element in the whole mask."""
        return self.begin * self.shape[1]

    @property
    def weight(self) -> Tensor:
        """(n, K), frozen: the local part of a sharded weight, or these rows of a whole one. Not during a pass."""
        weight = self.module._parameters[self.whole.prefix + "weight"].detach()
        if hasattr(weight, "to_local"):
            return weight.to_local().flatten(1)
        return weight.flatten(1)[self.begin : self.begin + len(self.scores)]

    @property
    def bits(self) -> Tensor:
        """(n, ceil(K / 32)) int32, rows of the mask's own tensor."""
        return self.whole.bits[self.begin : self.begin + len(self.scores)]

    selected = kept = None

    def refresh(self, force: bool = False) -> None:
        """Bits are rewritten with the scores, and no masked weight is kept."""

    mark_fresh = refresh


def need_rows(masks: Sequence[Mask], ranks: int, adam: str) -> None:
    """Raises UserError for masks that cannot be cut: of selected weights, or where a draw's group would be.

    adam: format of the moments; those of 8 bits share an exponent in groups.
    """
    group = BLOCK if adam == "8bit" else DRAWS
    for mask in masks:
        if mask.selected is not None:
            raise UserError("--shard needs a score for every masked weight: leave the selection out, or take --zero")
        rows, columns = mask.scores.shape
        mine = -(-rows // ranks) * columns
        if mine % group:
            raise UserError(
                f"--shard cuts {mask.key} {rows, columns} into {mine} weights a rank, which must be a multiple of "
                f"{group} with moments in {adam}: start another number of ranks, or take --zero"
            )


class RowShards:
    """The rows of `masks` that are this rank's, and what ranks tell one another. All calls but `mine` are collective.

    From here to `bring_back` the masks' own scores are away (`ScoreStorage.send_away`), and products make the masked
    weight anew each time. masks: such as `need_rows` lets pass, with bits that are up to date.
    """

    def __init__(self, world: World, masks: Sequence[Mask]) -> None:
        self.world = world
        self.rows = [self._cut(mask) for mask in masks]
        for mask in masks:
            mask.module.send_away(mask.prefix, keep=False)
            mask.module.forget_kept()
        self._words = [row.chunk * row.whole.bits.shape[1] for row in self.rows]

    def _cut(self, mask: Mask) -> Rows:
        rows = len(mask.scores)
        chunk = -(-rows // self.world.size)
        begin = min(rows, self.world.rank * chunk)
        return Rows(mask, begin, chunk, nn.Parameter(mask.scores.detach()[begin : begin + chunk].clone()))

    def mine(self, i: int) -> bool:
        """Whether this rank has any row of mask i."""
        return len(self.rows[i].scores) > 0

    def whole_norms(self, norms: Tensor) -> Tensor:
        """(L,) norms of rows -> of whole masks."""
        return self._sum(norms.double() ** 2).sqrt().to(norms.dtype)

    def whole_counts(self, counts: Tensor) -> Tensor:
        """Counts over rows -> over whole masks."""
        return self._sum(counts)

    @torch.no_grad()
    def tell(self, counts: Tensor, norms: Tensor, live: list[int], failed: bool = False) -> None:
        """After an update of masks `live`: bits, counts (L, 2) and norms (L,) become those of the whole masks.

        failed: this rank's scores became NaN. Raises: ValueError on every other rank then.
        """
        here = torch.tensor([self.mine(i) for i in live], device=norms.device)
        problems = torch.zeros(self.world.size, dtype=torch.float64, device=norms.device)
        problems[self.world.rank] = float(failed)
        # Counts are exact in fp64 up to 2^53.
        mine = torch.stack([*counts[live].double().T, norms[live].double() ** 2]).where(here, 0)
        total = self._sum(torch.cat([mine.flatten(), problems]))
        *whole, squares = total[: mine.numel()].view_as(mine)
        counts[live], norms[live] = torch.stack(whole, 1).long(), squares.sqrt().float()
        problems = total[mine.numel() :]
        self._tell_bits()
        # Where mask_update_ looks for NaN: on CUDA nobody waits for the device.
        looked = counts.device.type == "cpu" or os.environ.get("RMT_SYNC_ERRORS") == "1"
        if looked and not failed and problems.any():
            who = ", ".join(str(rank) for rank in problems.nonzero().flatten().tolist())
            raise ValueError(f"scores must not be NaN, but some are on rank {who}")

    @torch.no_grad()
    def follow(self) -> None:
        """Makes bits those of the scores, on all ranks: after these have been loaded."""
        for row in self.rows:
            if len(row.scores):
                row.bits.copy_(rmt_kernels.pack_scores(row.scores.detach(), row.module.threshold))
        self._tell_bits()

    def _tell_bits(self) -> None:
        import torch.distributed as dist

        mine = torch.zeros(sum(self._words), dtype=torch.int32, device=self.rows[0].scores.device)
        for row, words in zip(self.rows, mine.split(self._words)):
            words[: row.bits.numel()].copy_(row.bits.flatten())
        told = mine.new_empty(self.world.size, len(mine))
        self.world.sent += mine.nbytes
        with self.world.talking():
            dist.all_gather_into_tensor(told.view(-1), mine, group=self.world.group)
        for row, words in zip(self.rows, told.split(self._words, dim=1)):
            bits = row.whole.bits
            bits.copy_(words.reshape(-1, bits.shape[1])[: len(bits)])

    def part(self, scores: list[Tensor], state: dict[int, dict[str, Tensor]]) -> tuple[list[Tensor], dict]:
        """This rank's rows of whole scores, and of an optimizer's whole `state` by position."""
        cut = [self._take(row, whole) for row, whole in zip(self.rows, scores)]
        mine = {i: row for i, row in enumerate(self.rows) if i in state and self.mine(i)}
        return cut, {i: {k: self._take(row, v, k) for k, v in state[i].items()} for i, row in mine.items()}

    def _take(self, row: Rows, tensor: Tensor, name: str = "") -> Tensor:
        if name == "norm":
            return tensor
        count = row.scores.numel()
        if not name.endswith("_scale"):
            return tensor.flatten()[row.offset : row.offset + count].view(row.scores.shape)
        return tensor[row.offset // BLOCK : -(-(row.offset + count) // BLOCK)]

    def collect(self, scores: list[Tensor], state: dict[int, dict[str, Any]]) -> None:
        """Makes rows whole, on rank 0: the tensors of `scores`, and of the optimizer's `state` by position."""
        import torch.distributed as dist

        cpu, group = torch.device("cpu"), self.world.group
        for i in range(len(self.rows)):
            box = [scores[i].cpu(), {k: v.cpu() for k, v in state.get(i, {}).items()}]
            found = [box]
            with self.world.talking():
                if not self.world.first:
                    dist.send_object_list(box, group_dst=0, group=group, device=cpu)
                    continue
                for rank in range(1, self.world.size):
                    theirs = [None, None]
                    dist.recv_object_list(theirs, group_src=rank, group=group, device=cpu)
                    found.append(theirs)
            scores[i] = torch.cat([part for part, _ in found])
            if state.get(i):
                held = [moments for _, moments in found if moments]
                state[i] = {k: v if k == "norm" else torch.cat([h[k] for h in held]) for k, v in held[0].items()}

    @torch.no_grad()
    def bring_back(self) -> None:
        """Gives every rank all scores, as they are."""
        import torch.distributed as dist

        for row in self.rows:
            mine = row.scores.new_zeros(row.chunk, row.shape[1])
            mine[: len(row.scores)] = row.scores
            whole = mine.new_empty(self.world.size * row.chunk, row.shape[1])
            self.world.sent += mine.nbytes
            with self.world.talking():
                dist.all_gather_into_tensor(whole, mine, group=self.world.group)
            row.module.bring_back(row.whole.prefix, whole[: row.shape[0]].contiguous())

    def _sum(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self.world.start_sum_(tensor)()
        return tensor
