"""Scores and moments sharded over ranks (ZeRO-1): each mask has one owner, which alone updates it.

    torchrun --nproc-per-node 4 -m rmt train --zero ...

Frozen weights, bits and both gradients' buffers stay on every rank. Gradients are summed to the owner of their bucket
(`rmt.reduction`), which takes the whole fused step over its masks: the same draws, since a mask's stream is its
position, and so the same bits as without, wherever the two collectives add in one order: of two ranks always. Then it
tells what the others need of it, bits and their counts. Scores of others' masks are freed, not left stale: in their
place is NaN without storage, which nothing can take for scores (`ScoreStorage.send_away`), and their bits are told and
never packed. At the end every rank has all scores again.

Of S scores a rank keeps (4 + 8) S / ranks bytes in place of 12 S, with fp32 moments. Besides the gradients it hands
over, in each step, 4 times the most words that any rank tells, made even: of each of its masks N * ceil(K / 32) of bits
and 4 of counts. At the end it is once 4 S bytes, and at most 60 for each mask as in `rmt.reduction`.
"""

import os
from typing import Any

import torch
from torch import Tensor

from .masked import Mask
from .reduction import Reduction
from .world import World

COUNTS = 4  # words: two int64


class Shards:
    """Which masks are whose, and what owners tell one another. All calls but `mine` are collective.

    Args:
        world: a larger one than of one rank. masks: those that `reduction`, with owners, sums gradients of.
    """

    def __init__(self, world: World, masks: list[Mask], reduction: Reduction) -> None:
        self.world, self.masks, self.reduction = world, masks, reduction
        self.owners = [reduction.owner(i) for i in range(len(masks))]
        self._owned = [[i for i, owner in enumerate(self.owners) if owner == rank] for rank in range(world.size)]
        words = max(sum(COUNTS + masks[i].bits.numel() for i in owned) for owned in self._owned)
        # Even, since counts are read as int64.
        self._words = words + words % 2
        self._rows: Tensor | None = None

    def mine(self, i: int) -> bool:
        """Whether this rank updates mask i."""
        return self.owners[i] == self.world.rank

    def whole_norms(self, norms: Tensor) -> Tensor:
        """(L,) norms of this rank's masks: whole as they are."""
        return norms

    whole_counts = whole_norms

    def follow(self) -> None:
        """Makes bits those of the scores, all of which are here: after these have been loaded."""
        for mask in self.masks:
            mask.refresh()

    def send_away(self) -> None:
        """Frees the scores of others' masks."""
        for i, mask in enumerate(self.masks):
            if not self.mine(i):
                mask.refresh()
                mask.module.send_away(mask.prefix)
                mask.module.mark_fresh(mask.prefix)

    @torch.no_grad()
    def tell(self, counts: Tensor, norms: Tensor, live: list[int], failed: bool = False) -> None:
        """After an update: others' bits, with their masked weights, and counts (L, 2) become what their owners have.

        norms, live: of no use here, where a mask's norm is its owner's alone and all masks are told.

        failed: this rank's scores became NaN. Raises: ValueError on every other rank then.
        """
        import torch.distributed as dist

        if self._rows is None or self._rows.device != counts.device:
            self._rows = torch.zeros(self.world.size, self._words, dtype=torch.int32, device=counts.device)
        rank = self.world.rank
        mine = self._rows[rank]
        for i, (count, bits) in self._parts(rank).items():
            count.copy_(counts[i].fill_(-1) if failed else counts[i])
            bits.copy_(self._bits(i))
        self.world.sent += mine.numel() * mine.element_size()
        with self.world.talking():
            dist.all_gather_into_tensor(self._rows.view(-1), mine.clone(), group=self.world.group)
        for other in range(self.world.size):
            for i, (count, bits) in self._parts(other).items() if other != rank else ():
                counts[i].copy_(count)
                self._bits(i).copy_(bits)
                self.masks[i].refresh(force=True)
        # Where mask_update_ looks for NaN: on CUDA nobody waits for the device.
        looked = counts.device.type == "cpu" or os.environ.get("RMT_SYNC_ERRORS") == "1"
        if looked and not failed and int(counts.min()) < 0:
            who = {self.owners[i] for i in range(len(self.masks)) if int(counts[i, 0]) < 0}
            raise ValueError(f"scores must not be NaN, but some are on rank {', '.join(map(str, sorted(who)))}")

    def part(self, scores: list[Tensor], state: dict[int, dict[str, Tensor]]) -> tuple[list[Tensor], dict]:
        """Of whole scores, and an optimizer's whole `state` by position, what this rank starts with."""
        return scores, {i: moments for i, moments in state.items() if self.mine(i)}

    def collect(self, scores: list[Tensor], state: dict[int, dict[str, Any]]) -> None:
        """Fills in, on rank 0, what others own: the tensors of `scores`, and of the optimizer's `state` by position."""
        import torch.distributed as dist

        cpu, group = torch.device("cpu"), self.world.group
        for i, owner in enumerate(self.owners):
            with self.world.talking():
                if owner == self.world.rank != 0:
                    box = [scores[i].cpu(), {k: v.cpu() for k, v in state.get(i, {}).items()}]
                    dist.send_object_list(box, group_dst=0, group=group, device=cpu)
                elif self.world.first and owner != 0:
                    box = [None, None]
                    dist.recv_object_list(box, group_src=owner, group=group, device=cpu)
                    scores[i] = box[0]
                    state |= {i: box[1]} if box[1] else {}

    @torch.no_grad()
    def bring_back(self) -> None:
        """Gives every rank all scores, as they are. The task's gradient buffers carry them."""
        import torch.distributed as dist

        for n, owner in enumerate(self.reduction.owners):
            flat, here = self.reduction.bucket(0, n), owner == self.world.rank
            views = {i: self.reduction.buffer(0, i) for i in self.reduction.buckets[n]}
            for i, view in views.items() if here else ():
                view.copy_(self.masks[i].scores)
            self.world.sent += flat.numel() * flat.element_size()
            with self.world.talking():
                dist.broadcast(flat, group_src=owner, group=self.world.group)
            for i, view in views.items() if not here else ():
                self.masks[i].module.bring_back(self.masks[i].prefix, view.clone())

    def _bits(self, i: int) -> Tensor:
        """As they lie there: an owner's after an update, others' until they are told."""
        mask = self.masks[i]
        return mask.module._buffers[mask.prefix + "bits"]

    def _parts(self, rank: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Of each mask of a rank: where its counts (2,) int64 and its bits are in the rank's row."""
        row, owned, found = self._rows[rank], self._owned[rank], {}
        begin = COUNTS * len(owned)
        counts = row[:begin].view(torch.int64).view(-1, 2)
        for count, i in zip(counts, owned):
            bits = self._bits(i)
            found[i] = count, row[begin : begin + bits.numel()].view_as(bits)
            begin += bits.numel()
        return found
