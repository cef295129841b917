"""The trainable parts: a low-rank branch beside a product, and an adapter behind a module. Both share their down-
projection between text and image, so that routing costs no parameters."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmt_kernels import routed_low_rank

from .config import RoutedAdapterConfig, RoutedLoRAConfig
from .context import VisualContext
from .functions import route

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "identity": lambda x: x}


class LowRank(nn.Module):
    """delta(x) = scale * route(A drop(x), A drop(x_R)) B^T, A (r, in), B (out, r), or both of `parts` stacked.

    With split A is U_t A_t for the text and U_v A_v for the image: A_t, A_v (r / 4, in), U_t, U_v (r, r / 4).

    parts: how many products are routed in one joint bottleneck: A is then (parts * r, in), B (parts, out, r), and the
        result (B, T, parts * out).
    """

    def __init__(
        self, in_features: int, out_features: int, config: RoutedLoRAConfig, context: VisualContext, parts: int = 1
    ) -> None:
        super().__init__()
        self.function, self.scale, self.dropout, self.context = config.function, config.scale, config.dropout, context
        self.relu, self.split = config.relu, config.split
        rank = parts * config.r
        if self.split:
            for name in ("A_text", "A_image"):
                setattr(self, name, nn.Parameter(torch.empty(rank // 4, in_features)))
            for name in ("U_text", "U_image"):
                setattr(self, name, nn.Parameter(torch.empty(rank, rank // 4)))
        else:
            self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(parts, out_features, config.r))

    def reset(self, random: torch.Generator) -> None:
        """kaiming_uniform(a=sqrt(5)) for all but B, zeros for B."""
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name == "B":
                    p.zero_()
                    continue
                bound = 1 / math.sqrt(p.shape[1])
                p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=random))

    def downs(self) -> tuple[Tensor, Tensor]:
        """The ways down of text and image, (parts * r, in) each: one and the same A, unless split."""
        return (self.U_text @ self.A_text, self.U_image @ self.A_image) if self.split else (self.A, self.A)

    def _down(self, x: Tensor, side: str) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        if not self.split:
            return F.linear(x, self.A)
        return F.linear(F.linear(x, getattr(self, f"A_{side}")), getattr(self, f"U_{side}"))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, parts * out)."""
        x_v = None if self.function == "none" else self._down(self.context.get(x).to(x.dtype), "image")
        if not self.split and not self.relu:
            x = F.dropout(x, self.dropout, self.training)
            return routed_low_rank(x, self.A, self.B, x_v, self.function, self.scale)
        x_t = self._down(x, "text")
        routed = route(self.function, x_t, x_v, self.relu)
        up = torch.einsum("btpr,por->btpo", routed.unflatten(-1, (len(self.B), -1)), self.B).flatten(2)
        return up * self.scale


class Adapter(nn.Module):
    """o = up(act(route(down(h), down(x_R)))) [+ h]; down's bias is in both, before routing."""

    def __init__(self, width: int, config: RoutedAdapterConfig, context: VisualContext) -> None:
        super().__init__()
        self.function, self.act, self.residual = config.function, config.act, config.residual
        self.zero_init, self.context = config.zero_init, context
        self.down, self.up = nn.Linear(width, config.r), nn.Linear(config.r, width)

    def reset(self, random: torch.Generator) -> None:
        """torch's own start of a linear layer; up is zero where `zero_init`."""
        with torch.no_grad():
            for layer in (self.down, self.up):
                bound = 1 / math.sqrt(layer.in_features)
                for p in layer.parameters():
                    p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=random))
            if self.zero_init:
                self.up.weight.zero_()
                self.up.bias.zero_()

    def forward(self, h: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        x_v = None if self.function == "none" else self.down(self.context.get(h).to(h.dtype))
        out = self.up(ACTIVATIONS[self.act](route(self.function, self.down(h), x_v)))
        return out + h if self.residual else out
