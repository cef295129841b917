"""Masked attention: `nn.MultiheadAttention`, and open_clip's own `Attention` of any version."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masked import INIT, THRESHOLD, MaskedModule
from .modules import FusedMaskedLinear, add_masks, mask_by_weight, need_plain, turned_into
from .stacking import guarded


class PackedAttention(nn.MultiheadAttention):
    """The forward of a masked `nn.MultiheadAttention`, over what its class makes of the weights.

    A subclass has `_linear(x, prefix, bias)`, the product over the masked in-projection, and `_masked_weight(prefix)`,
    that weight; `out_proj` is a masked linear layer with the same two.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As `nn.MultiheadAttention.forward`. (L, B, E), or (B, L, E) with batch_first, or (L, E) -> same shape."""
        plain = not need_weights and key_padding_mask is None and not is_causal
        if plain and query is key and key is value and self._is_packed(query):
            return self._self_attention(query, attn_mask), None
        if self.batch_first and query.dim() == 3:
            same = query is key, key is value
            query = query.transpose(0, 1)
            key = query if same[0] else key.transpose(0, 1)
            value = key if same[1] else value.transpose(0, 1)
        out = self.out_proj
        y, weights = F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, self._masked_weight("in_proj_"), self.in_proj_bias,
            self.bias_k, self.bias_v, self.add_zero_attn, self.dropout, out._masked_weight(""), out.bias,
            self.training, key_padding_mask, need_weights, attn_mask, average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )  # fmt: skip
        return (y.transpose(0, 1) if self.batch_first and y.dim() == 3 else y), weights

    def _is_packed(self, x: Tensor) -> bool:
        return x.dim() == 3 and self.bias_k is None and not self.add_zero_attn

    def _self_attention(self, x: Tensor, attn_mask: Tensor | None, queries: int | None = None) -> Tensor:
        """x in the layout of `batch_first`. queries: only the first so many tokens ask; the output then has as many.

        In (B, L, E) nothing is transposed but views: every copy of an activation costs as much as a layer norm. Forward
        results are the host's bit for bit all the same; it adds the bias there after the product, not in it.
        """
        rows = x.transpose(0, 1) if self.batch_first else x
        if rows.is_contiguous() or not self.batch_first:
            packed = self._linear(rows, "in_proj_", self.in_proj_bias)
            packed = packed.transpose(0, 1) if self.batch_first else packed
        else:
            packed = self._linear(x.reshape(-1, x.shape[-1]), "in_proj_", None)
            if self.in_proj_bias is not None:
                bias = self.in_proj_bias.to(packed.dtype)
                # Autograd lets nobody write into a view that an op returned, and some kernels return one.
                owned = not torch.compiler.is_compiling() and not packed._is_view()
                packed = packed.add_(bias) if owned else packed + bias
            packed = packed.view(*x.shape[:-1], -1)
        if attn_mask is not None:
            batch, length = packed.shape[:2] if self.batch_first else packed.shape[1::-1]
            attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", packed.dtype, False)
            attn_mask = attn_mask.view(batch, -1, length, length) if attn_mask.dim() == 3 else attn_mask[None, None]
            attn_mask = attn_mask[..., :queries, :]
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attend(packed, self.num_heads, self.batch_first, attn_mask, dropout, queries))


class FusedMaskedMultiheadAttention(MaskedModule, PackedAttention):
    """`nn.MultiheadAttention` with masks on the packed in-projection (3E, E) and on `out_proj` (E, E).

    Self-attention without returned weights runs the masked linears and scaled-dot-product attention; every other call
    (cross-attention, `need_weights`, key padding) runs `F.multi_head_attention_forward` over the masked weights.
    Arguments are those of `nn.MultiheadAttention`, then init and threshold as for `FusedMaskedLinear`.
    """

    mask_prefixes = ("in_proj_",)
    in_proj_weight = guarded("in_proj_")

    def __init__(self, *args, init: float = INIT, threshold: float = THRESHOLD, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        _mask_packed_attention(self, nn.MultiheadAttention, init, threshold)

    @classmethod
    def from_module(cls, attn: nn.Module, init: float = INIT, threshold: float = THRESHOLD) -> nn.Module:
        """A masked layer on `attn`'s own tensors. Takes `nn.MultiheadAttention`, or a module of the shape of
        open_clip's own `Attention`: a parameter `in_proj_weight`, a Linear `out_proj`, its own forward."""
        if not isinstance(attn, nn.MultiheadAttention):
            return _mask_own_attention(attn, init, threshold)
        need_plain(attn, nn.MultiheadAttention)
        if type(attn).forward is nn.MultiheadAttention.forward:
            return _mask_packed_attention(turned_into(attn, cls), type(attn), init, threshold)
        layer = mask_by_weight(attn, ("in_proj_",), init, threshold)
        # A forward of its own that ends in nn.MultiheadAttention's reads this weight as well, and calls no Linear.
        layer.out_proj = mask_by_weight(attn.out_proj, ("",), init, threshold)
        return layer


def attend(
    packed: Tensor, heads: int, batch_first: bool, mask: Tensor | None, dropout: float, queries: int | None
) -> Tensor:
    """Scaled-dot-product attention of packed rows q, k, v: (B, L, 3E) -> (B, queries, E), or (L, B, ...) likewise.

    On a CPU in fp32, whatever the rows' dtype: torch's backward for bf16 takes several times as long there as fp32's.
    """
    dtype = packed.dtype
    if packed.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        packed, mask = packed.float(), None if mask is None else mask.float()
    # (B, heads, L, E / heads), from either layout.
    order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
    q, k, v = (t.permute(order) for t in packed.unflatten(-1, (3, heads, -1)).unbind(-3))
    with torch.autocast(packed.device.type, enabled=False):  # which would go back to 16 bits
        y = F.scaled_dot_product_attention(q[:, :, :queries], k, v, mask, dropout)
    order = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
    return y.to(dtype).permute(order).flatten(2)


def _mask_packed_attention(layer: nn.Module, host: type, init: float, threshold: float) -> nn.Module:
    if layer.in_proj_weight is None:
        raise ValueError("attention with separate q, k, v weights (kdim or vdim) cannot be masked here")
    # nn.TransformerEncoderLayer's eval fast path reads weights past our forward; it keeps off where this is False.
    add_masks(layer, host, init, threshold, _qkv_same_embed_dim=False)
    layer.out_proj = FusedMaskedLinear.from_linear(layer.out_proj, init, threshold)
    return layer


def _mask_own_attention(attn: nn.Module, init: float, threshold: float) -> nn.Module:
    """open_clip's own `Attention`, of whatever version: its forward runs as it is, and reads the masked weight.

    The in-projection's product is therefore the host's `F.linear` over the masked weight.
    """
    weight, out_proj = getattr(attn, "in_proj_weight", None), getattr(attn, "out_proj", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(out_proj, nn.Linear):
        raise TypeError(
            "from_module takes nn.MultiheadAttention or a module with a parameter in_proj_weight and a Linear "
            f"out_proj, got {type(attn).__name__}"
        )
    layer = mask_by_weight(attn, ("in_proj_",), init, threshold)
    layer.out_proj = FusedMaskedLinear.from_linear(out_proj, init, threshold)
    return layer
