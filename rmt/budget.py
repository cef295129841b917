"""Choosing by score under a budget: exact counts, and of equal scores those that come first."""

import torch
from torch import Tensor

# First parts of names in the text towers of open_clip, of its CustomTextCLIP, and of Hugging Face.
_TEXT = ("transformer.", "text.", "text_model.")


def pools_of(keys: list[str], scope: str) -> list[list[int]]:
    """Places of the weights that share one budget: all (global), each alone (layer), or a tower's (modality)."""
    names = {"global": lambda key: "", "layer": lambda key: key, "modality": lambda key: key.startswith(_TEXT)}
    pools: dict = {}
    for i, key in enumerate(keys):
        pools.setdefault(names[scope](key), []).append(i)
    return list(pools.values())


def _count(budget: float, total: int) -> int:
    return max(1, round(budget * total))


def single(scores: list[Tensor], pools: list[list[int]], budget: float) -> list[Tensor]:
    """(N, K) bool each: the best single weights of every pool."""
    chosen: list = [None] * len(scores)
    for pool in pools:
        mine = [scores[i] for i in pool]
        for i, places in zip(pool, top(mine, _count(budget, sum(s.numel() for s in mine)))):
            chosen[i] = places
    return chosen


def top(scores: list[Tensor], count: int) -> list[Tensor]:
    """bool each: the `count` largest of all elements, of equal ones those that come first."""
    if not count:
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    bound = _nth_largest(scores, count)
    left = count - sum(int((s > bound).sum()) for s in scores)
    chosen = []
    for s in scores:
        equal = s == bound
        if left < int(equal.sum()):
            equal &= (equal.flatten().cumsum(0) <= left).view_as(equal)
        left -= int(equal.sum())
        chosen.append((s > bound) | equal)
    return chosen


def _nth_largest(scores: list[Tensor], count: int) -> float:
    """Value of the `count`-th largest element of all, exact, without putting them into one tensor or sorting.

    Floats from 0 up are ordered as their bits are: two histograms, of the upper and of the lower 16 bits, find it.
    """
    upper = 0
    for lower in (False, True):
        counts = 0
        for s in scores:
            bits = s.abs().flatten().view(torch.int32)  # no -0.0
            bits = bits[bits >> 16 == upper] & 0xFFFF if lower else bits >> 16
            counts = counts + torch.bincount(bits, minlength=1 << 16).cpu()
        above = counts.flip(0).cumsum(0).flip(0)  # elements in this bin and in those over it
        place = int((above >= count).nonzero()[-1])
        count -= int(above[place] - counts[place])
        upper, last = (upper, place) if lower else (place, 0)
    return torch.tensor(upper << 16 | last, dtype=torch.int32).view(torch.float32).item()


def whole(values: list[float], sizes: list[int], pools: list[list[int]], budget: float) -> set[int]:
    """Places of the matrices that are taken whole: from the best on what fits into the pool's budget of weights, and
    the best one in any case."""
    taken: set[int] = set()
    for pool in pools:
        room = _count(budget, sum(sizes[i] for i in pool))
        for rank, i in enumerate(sorted(pool, key=lambda i: (-values[i], i))):
            if sizes[i] <= room or rank == 0:
                room -= sizes[i]
                taken.add(i)
    return taken
