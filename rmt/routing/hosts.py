"""Where routed modules sit in a host: open_clip's CoCa, or any model that says so itself (`routing_host`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..config import UserError


@dataclass(frozen=True)
class Site:
    """One product y = x W^T. module: that holds it. kind: linear (nn.Linear, or Hugging Face's Conv1D) or packed (an
    attention's in-projection). part: q, k or v, of a packed or fused projection; None: the whole of a Linear."""

    module: nn.Module
    kind: Literal["linear", "packed"]
    part: str | None = None


@dataclass(frozen=True)
class Block:
    """One layer. units: what checkpointing runs again as a whole. sites: by name: self.q, self.k, self.v, cross.q,
    cross.v. adapters: modules behind which an adapter stands, attention and MLP, inside the residual branch. visual: of
    the arguments of a unit -> x_R (B, 1, d), for a host whose layers each have their own; None: that of the call."""

    units: tuple[nn.Module, ...]
    sites: dict[str, Site]
    adapters: tuple[nn.Module, ...]
    visual: Callable[[tuple, dict[str, Any]], Tensor] | None = None


@dataclass(frozen=True)
class Host:
    """width: d of text and image tokens. root: whose call has an image. visual: of its arguments -> (B, V, d) image
    tokens, or None where the user must give them. Or x_R itself, (B, 1, d): then `source` has no part in it. encode:
    images -> what `visual` gives for them, which `Routed.fold_for` asks; None: that takes a feature, no image."""

    width: int
    root: nn.Module
    blocks: tuple[Block, ...]
    visual: Callable[[tuple, dict[str, Any]], Tensor | None]
    encode: Callable[[Tensor], Tensor] | None = None


def describe(model: nn.Module) -> Host:
    """Raises UserError for a model that nobody has described."""
    if hasattr(model, "routing_host"):
        return model.routing_host()
    decoder = getattr(model, "text_decoder", None)
    if decoder is not None and hasattr(decoder, "cross_attn") and hasattr(decoder, "resblocks"):
        return _coca(model, decoder)
    raise UserError(
        f"{type(model).__name__} is no host of routed modules: expected open_clip's CoCa, one of rmt.routing's models, "
        "or a model with a method routing_host that returns a rmt.routing.Host"
    )


def _coca(model: nn.Module, decoder: nn.Module) -> Host:
    """Self-attention of the text decoder; q of its cross-attention. x_R: of the image tokens that it is called with."""
    blocks = []
    for block, cross in zip(decoder.resblocks, decoder.cross_attn):
        sites = {f"self.{part}": Site(block.attn, "packed", part) for part in "qkv"}
        sites["cross.q"] = Site(cross.attn, "packed", "q")
        blocks.append(Block((block, cross), sites, (block.attn, block.mlp)))

    def visual(args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return args[0] if args else kwargs["image_embs"]

    def encode(image: Tensor) -> Tensor:
        return model.visual(image)[1]

    return Host(decoder.resblocks[0].attn.in_proj_weight.shape[1], decoder, tuple(blocks), visual, encode)
