"""The hooks of an injection. Objects, not closures: a copied or unpickled model has hooks of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from .attention import PREFIX


class Call:
    """Before a call of the host's root: its image becomes current."""

    def __init__(self, routed: Any) -> None:
        self.routed = routed

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.routed.context_of_calls.push(module, lambda: self.routed.visual(args, kwargs))


class Add:
    """Adds one branch to a Linear's output, or to its parts of a fused one."""

    def __init__(self, name: str) -> None:
        self.name, self.parts = name, name.removeprefix(PREFIX)

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        delta = getattr(module, self.name)(args[0])
        if delta.shape[-1] == output.shape[-1]:
            return output + delta
        thirds = list(output.chunk(3, -1))
        for part, piece in zip(self.parts, delta.chunk(len(self.parts), -1)):
            thirds["qkv".index(part)] = thirds["qkv".index(part)] + piece
        return torch.cat(thirds, -1)


class Adapt:
    """Puts an adapter behind a module: behind the first of a tuple."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        adapted = getattr(module, self.name)(first)
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted
