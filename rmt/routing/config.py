"""What an injection of routed modules is made of: frozen dataclasses that check themselves."""

import math
from dataclasses import dataclass
from typing import Literal

from ..config import UserError
from .functions import FUNCTIONS

Function = Literal["none", "add", "mul", "expand", "gram"]
SOURCES = ("mean", "tokens", "first")


def _need(good: bool, what: str, got: object) -> None:
    if not good:
        raise UserError(f"{what}, got {got!r}")


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class RoutedConfig:
    """What routed LoRA and routed adapters have in common.

    Args:
        function: none, add, mul, expand or gram: `rmt.routing.functions`.
        r: width of the bottleneck. layers: which blocks, by number; None: all.
        source: what of the host's image tokens is routed: their mean, all of them (gram alone) or the first. A host
            with one visual feature of its own (a pooler's output) gives that, whatever stands here.
        seed: of the initial values.
    """

    function: Function = "mul"
    r: int = 128
    layers: tuple[int, ...] | None = None
    source: Literal["mean", "tokens", "first"] = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        _need(self.function in FUNCTIONS, f"function must be one of {', '.join(FUNCTIONS)}", self.function)
        _need(_count(self.r), "r must be an integer of at least 1", self.r)
        good = self.layers is None or (isinstance(self.layers, tuple) and all(type(n) is int for n in self.layers))
        _need(good and self.layers != (), "layers must be numbers of blocks, or None for all", self.layers)
        _need(self.source in SOURCES, f"source must be one of {', '.join(SOURCES)}", self.source)
        one = self.source != "tokens" or self.function in ("gram", "none")
        _need(one, "source tokens needs the function gram: the others take one visual token", self.function)


@dataclass(frozen=True)
class RoutedLoRAConfig(RoutedConfig):
    """y = x W^T + b + (alpha / r) B route(A drop(x), A drop(x_R)); A kaiming-uniform, B zero: a no-op at first.

    Args:
        alpha: of the scale alpha / r; None: r, so that the scale is 1, as in the paper's scripts.
        dropout: of x and x_R, drawn independently.
        sites: which products: self.q, self.k, self.v and, where a host has them, cross.q and cross.v.
        couple_qv: q and v routed in one joint bottleneck of 2 r, as the official GPT-2 code does in its fused
            projection. The same for none, add and mul; for expand and gram sums run over both.
        relu: of gram: (relu(x_t) relu(x_v)^T) x_v, as the official add_relu.
        split: text and image each with a way down of its own, in two steps: x_t = U_t A_t drop(x) and
            x_v = U_v A_v drop(x_R), A (r/4, d) and U (r, r/4), all four kaiming-uniform. As the official VLLinearSplit
            and, coupled, MergedLinearSplit, which route by gram alone (deviation: any function here).
        after_b: a dead end that raises: see `rmt.routing.functions`.
    """

    alpha: float | None = None
    dropout: float = 0.0
    sites: tuple[str, ...] = ("self.q", "self.v")
    couple_qv: bool = False
    relu: bool = False
    split: bool = False
    after_b: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        good = self.alpha is None or (isinstance(self.alpha, int | float) and math.isfinite(self.alpha))
        _need(good, "alpha must be a finite number, or None for r", self.alpha)
        _need(
            isinstance(self.dropout, int | float) and 0 <= self.dropout < 1, "dropout must be in [0, 1)", self.dropout
        )
        known = ("self.q", "self.k", "self.v", "cross.q", "cross.v")
        good = isinstance(self.sites, tuple) and self.sites and all(site in known for site in self.sites)
        _need(bool(good), f"sites must be some of {', '.join(known)}", self.sites)
        _need(len(set(self.sites)) == len(self.sites), "sites must name each site once", self.sites)
        pair = {"self.q", "self.v"} <= set(self.sites)
        _need(not self.couple_qv or pair, "couple_qv needs the sites self.q and self.v", self.sites)
        _need(not self.relu or self.function == "gram", "relu is of the function gram alone", self.function)
        _need(not self.split or self.function != "none", "split needs a function that routes an image", self.function)
        _need(not self.split or self.r % 4 == 0, "split needs an r that 4 divides", self.r)
        if self.after_b:
            raise UserError(
                "after_b cannot be trained: routing behind B is of third order in B, which begins at 0, so that all "
                "gradients are exactly 0 and no step leaves it. Route before B, which is the default"
            )

    @property
    def scale(self) -> float:
        """alpha / r."""
        return 1.0 if self.alpha is None else self.alpha / self.r


@dataclass(frozen=True)
class RoutedAdapterConfig(RoutedConfig):
    """o = W_up act(route(W_dn h + b_dn, W_dn x_R + b_dn)) + b_up, after attention and MLP, inside the residual branch.

    Args:
        act: of the bottleneck, after routing: gelu, relu or identity.
        residual: add h to o, as the paper's GPT-2 adapters; its RoBERTa adapters do not.
        zero_init: W_up and b_up zero, so that a residual adapter begins as a no-op. Deviation: the official code draws
            them.
        share: one adapter for attention and MLP of a block, as the official GPT-2 code.
    """

    r: int = 64
    act: Literal["gelu", "relu", "identity"] = "gelu"
    residual: bool = True
    zero_init: bool = True
    share: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(self.act in ("gelu", "relu", "identity"), "act must be gelu, relu or identity", self.act)
