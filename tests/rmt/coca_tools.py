"""A random open_clip CoCa that takes milliseconds."""

import open_clip
import torch

SIZE, WORDS, CONTEXT, WIDTH = 16, 100, 8, 32
CONFIG = {
    "embed_dim": WIDTH,
    "vision_cfg": {
        "image_size": SIZE, "patch_size": 8, "width": WIDTH, "layers": 1, "head_width": 16, "attentional_pool": True,
        "attn_pooler_heads": 2, "attn_pooler_queries": 5, "output_tokens": True,
    },
    "text_cfg": {
        "context_length": CONTEXT, "vocab_size": WORDS, "width": WIDTH, "heads": 2, "layers": 1, "embed_cls": True,
        "output_tokens": True, "no_causal_mask": False,
    },
    "multimodal_cfg": {
        "context_length": CONTEXT, "vocab_size": WORDS, "width": WIDTH, "heads": 2, "layers": 2, "n_queries": 5,
        "attn_pooler_heads": 2,
    },
}  # fmt: skip


def coca(seed: int = 0, dtype: torch.dtype = torch.float32) -> open_clip.CoCa:
    """2 decoder layers of width 32, 4 image tokens for the decoder."""
    torch.manual_seed(seed)
    model = open_clip.CoCa(**CONFIG)
    # open_clip leaves it uninitialised, and never calls what would.
    torch.nn.init.normal_(model.text_decoder.text_projection, std=WIDTH**-0.5)
    return model.to(dtype).eval()


def batch(size: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32):
    """image (B, 3, 16, 16), text (B, 7) int64."""
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 3, SIZE, SIZE, generator=random, dtype=dtype)
    return image, torch.randint(1, WORDS, (size, CONTEXT - 1), generator=random)
