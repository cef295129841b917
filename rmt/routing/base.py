"""Whose weights an injection was trained on, as a hash that is kept beside it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files import sha256

SHOWN = 12  # digits of a hash that are kept and shown


@dataclass(frozen=True)
class Base:
    """A host's parameters. weights: their hash. dtypes: theirs, by name. without: names of those that are not in it."""

    weights: str
    dtypes: tuple[str, ...]
    without: tuple[str, ...] = ()

    def may_be(self, other: "Base") -> bool:
        """Whether both could be one host's: in another dtype the same weights have another hash, which says nothing."""
        return self.dtypes != other.dtypes or self.weights == other.weights


def base_of(parameters: Mapping[str, Tensor], without: Collection[str] = ()) -> Base:
    """Of a host's own parameters, by name. Reads them all: seconds where the model is large."""
    kept = {name: p.detach() for name, p in parameters.items() if name not in without}
    dtypes = {str(p.dtype).removeprefix("torch.") for p in kept.values()}
    # Bytes, since numpy has no bf16.
    data = {name: p.flatten().view(torch.uint8) for name, p in kept.items()}
    return Base(sha256(data)[:SHOWN], tuple(sorted(dtypes)), tuple(sorted(without)))
