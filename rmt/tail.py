"""The last block's tail on the class token alone: nothing else of its output reaches the features.

Of the last block's twelve units of products (in-projection 3, out-projection 1, MLP 8) nine then run for one token of
an image instead of all. Equal in exact arithmetic; a GEMM of fewer rows may round differently, as between batch sizes.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from .attention import FusedMaskedMultiheadAttention


@contextlib.contextmanager
def class_token_tail(model: nn.Module) -> Iterator[bool]:
    """Inside, the last block of `model.visual` returns its first token only, where that is all the tower pools.

    So it is in open_clip's vision transformers with pool_type "tok" and plain blocks. Everywhere else nothing changes.
    Yields whether it is so here.
    """
    block = _last_block(getattr(model, "mask_root", model))
    if block is None:
        yield False
        return
    block.forward = lambda x, *args, **kwargs: _forward(block, x, *args, **kwargs)
    try:
        yield True
    finally:
        del block.forward


def _last_block(model: nn.Module) -> nn.Module | None:
    visual = getattr(model, "visual", None)
    plain = (
        type(visual).__name__ == "VisionTransformer"
        and getattr(visual, "pool_type", "") == "tok"
        and getattr(visual, "attn_pool", None) is None
        and not getattr(visual, "output_tokens", False)
        # A checkpointed block runs again in the backward pass, when the context is over.
        and not visual.transformer.grad_checkpointing
        and len(visual.transformer.resblocks)
    )
    block = visual.transformer.resblocks[-1] if plain else None
    # fully_shard puts its name before a class's.
    if (
        type(block).__name__.removeprefix("FSDP") != "ResidualAttentionBlock"
        or hasattr(block, "ln_1_kv")
        or "forward" in block.__dict__
    ):
        return None
    known = isinstance(block.attn, nn.MultiheadAttention) and not _hooked(block.attn)
    return block if known else None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _forward(block: nn.Module, x: Tensor, k_x=None, v_x=None, attn_mask: Tensor | None = None) -> Tensor:
    """(B, L, E) -> (B, 1, E), or (L, B, E) -> (1, B, E): ResidualAttentionBlock's, for the first token."""
    h = block.ln_1(x)
    dim = 1 if block.attn.batch_first else 0
    first = _attention(block.attn, h, attn_mask, dim)
    x = x.narrow(dim, 0, 1) + block.ls_1(first)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _attention(attn: nn.MultiheadAttention, h: Tensor, attn_mask: Tensor | None, dim: int) -> Tensor:
    if type(attn) is FusedMaskedMultiheadAttention:
        return attn._self_attention(h, attn_mask, queries=1)
    mask = None if attn_mask is None else attn_mask.to(h.dtype).narrow(-2, 0, 1)
    return attn(h.narrow(dim, 0, 1), h, h, need_weights=False, attn_mask=mask)[0]
