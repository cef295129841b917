"""Packed attention with routed products: `nn.MultiheadAttention`, and open_clip's own `Attention` of any version.

A module changes its class while it is routed and keeps its tensors, their names and its place; the branches are
children of it, so that they move, copy and replicate with it.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import UserError
from ..masked import MaskedModule

# Thirds of the packed in-projection.
PARTS = {"q": 0, "k": 1, "v": 2}
PREFIX = "routed_"
ADAPTER = PREFIX + "adapter"


def add_branches(attn: nn.Module, packed: Tensor, x: Tensor, only: str = "qkv") -> Tensor:
    """`packed` (B, T, n E), of the n parts of `only`, plus what the branches give for the input x (B, T, E)."""
    width, branches = x.shape[-1], dict(attn.named_children())
    parts = list(packed.split(packed.shape[-1] // len(only), -1))
    for name, branch in branches.items():
        wanted = name.removeprefix(PREFIX) if name.startswith(PREFIX) and name != ADAPTER else ""
        if not wanted or not all(part in only for part in wanted):
            continue
        for part, delta in zip(wanted, branch(x).split(width, -1)):
            parts[only.index(part)] = parts[only.index(part)] + delta
    return torch.cat(parts, -1)


class Rebuilt:
    """Pickled and copied by what it was made of: a class made while running has no name to be found by."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _empty, self._made_of, self.__dict__


class RoutedAttention(Rebuilt, nn.MultiheadAttention):
    """`nn.MultiheadAttention` without returned weights, whose q, k and v have routed branches. Arguments as there."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """(B, L, E), or (L, B, E) without batch_first -> (same shape, None)."""
        if need_weights or key_padding_mask is not None or query.dim() != 3:
            raise UserError("routed attention takes batches, without key padding, and returns no weights")
        own = key is query and value is query
        query, key, value = (t if self.batch_first else t.transpose(0, 1) for t in (query, key, value))
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if own:
            packed = add_branches(self, F.linear(query, weight, bias), query)
            q, k, v = packed.chunk(3, -1)
        else:
            weights = weight.chunk(3)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            inputs = zip((query, key, value), weights, biases, "qkv")
            q, k, v = (add_branches(self, F.linear(x, w, b), x, part) for x, w, b, part in inputs)
        heads = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
        if attn_mask is not None:
            attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, False)
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.view(len(query), -1, *attn_mask.shape[1:])
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(*heads, attn_mask, dropout, is_causal and attn_mask is None)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        return (y if self.batch_first else y.transpose(0, 1)), None


class _Products(TorchFunctionMode):
    """Adds the branches to the products of `F.linear` over a module's in-projection, whole or one third of it."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn, self.done = attn, ""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is not F.linear:
            return out
        weight, x = self.attn.in_proj_weight, args[0]
        given = args[1] if len(args) > 1 else kwargs["weight"]
        if given is weight:
            self.done += "qkv"
            return add_branches(self.attn, out, x)
        if given._base is weight and given.shape[0] == weight.shape[0] // 3:
            part = "qkv"[given.storage_offset() // given.numel()]
            self.done += part
            return add_branches(self.attn, out, x, part)
        return out


class RoutedOwnAttention(Rebuilt):
    """What open_clip's own `Attention` becomes: its forward runs as it is, over routed products."""

    def forward(self, *args, **kwargs):
        """As the host's. Raises UserError where it made no product that a branch could be added to."""
        with _Products(self) as products:
            out = super().forward(*args, **kwargs)
        for name, _ in self.named_children():
            if name.startswith(PREFIX) and name != ADAPTER and not set(name.removeprefix(PREFIX)) <= set(products.done):
                raise UserError(f"{type(self).__name__} did not multiply by its in_proj_weight: {name} was left out")
        return out


def routed_class(attn: nn.Module) -> type:
    """The class that a packed attention has while it is routed. Raises UserError for what is not one."""
    if isinstance(attn, MaskedModule):
        raise UserError(
            f"a {type(attn).__name__} cannot be routed: its projections are masked. Mask the image tower alone, or "
            "merge_and_unload() the masks first"
        )
    if isinstance(attn, nn.MultiheadAttention):
        if type(attn).forward is not nn.MultiheadAttention.forward or attn.in_proj_weight is None:
            raise UserError(
                f"{type(attn).__name__} has a forward of its own: routing needs plain nn.MultiheadAttention"
            )
        if attn.bias_k is not None or attn.add_zero_attn:
            raise UserError("routing needs attention without add_bias_kv and add_zero_attn")
        return routed(type(attn), RoutedAttention)
    if isinstance(getattr(attn, "in_proj_weight", None), nn.Parameter):
        return routed(type(attn), RoutedOwnAttention)
    raise UserError(f"expected attention with a packed in_proj_weight, got {type(attn).__name__}")


@functools.cache
def routed(plain: type, kind: type) -> type:
    """`plain` with the forward of `kind`, a subclass of `Rebuilt`."""
    return type("Routed" + plain.__name__, (kind, plain), {"_made_of": (plain, kind)})


def _empty(plain: type, kind: type) -> nn.Module:
    made = routed(plain, kind)
    return made.__new__(made)
