"""CLIP-BART: an encoder of text and image tokens together, whose own states are what its layers are routed by.

No code of it was published with the paper; its repository has only unused layers (TextLinear, TextLinearCross, at
e91d826) that show the recipe: x_R is the mean, over tokens that are not padding, of an encoder layer's own input, and
of the encoder's output in the decoder. The host is put together as VL-Adapter's VL-BART.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import UserError
from .hf import Output, check_text, checkpointing, pretrained
from .hosts import Block, Host, Site


def pooled(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, d) -> (B, 1, d): the mean over tokens that are seen.

    mask: as a layer is given it: None (all); (B, T), 0 for padding; or (B, 1, Q, T), True or 0.0 where a key is seen.

    Raises: UserError for a mask of another kind (flex attention's).
    """
    if mask is None:
        return x.mean(1, keepdim=True)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] != x.shape[1]:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(f"a layer's mask must be (B, {x.shape[1]}) or (B, 1, Q, {x.shape[1]}), got {got}")
    if mask.dim() == 4:
        mask = (mask == 0 if mask.is_floating_point() else mask.bool()).flatten(1, 2).any(1)
    seen = mask.to(x.dtype)[..., None]
    return (x * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Pool:
    """Of a call of a layer, x_R of two of its arguments, each known by name and place."""

    states: tuple[str, int]
    mask: tuple[str, int]

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """x_R (B, 1, d)."""
        return pooled(*(args[n] if n < len(args) else kwargs.get(name) for name, n in (self.states, self.mask)))


# The same places in all versions.
ENCODER = Pool(("hidden_states", 0), ("attention_mask", 1))
DECODER = Pool(("encoder_hidden_states", 2), ("encoder_attention_mask", 3))


class CLIPBart(nn.Module):
    """[text; image tokens] -> BART. Frozen but `project`: Linear, LayerNorm, from the image's width to BART's.

    Args:
        bart: transformers' BartForConditionalGeneration.
        vision: CLIPVisionModel (any with patch tokens after one class token); None: images are given as features.
        features: width of these, where vision is None.
        grid: its patch tokens are max-pooled to grid ** 2 (VL-BART: 6, that is 36); None: all tokens, the class too.
    """

    new_parts = ("project",)

    def __init__(
        self, bart: nn.Module, vision: nn.Module | None = None, features: int | None = None, grid: int | None = None
    ) -> None:
        super().__init__()
        if (vision is None) == (features is None):
            raise UserError("expected a vision model, or the width of features, and not both")
        if grid is not None and vision is None:
            raise UserError("grid is of a vision model's patches: features are taken as they are")
        self.width, self.grid = bart.config.d_model, grid
        self.features = features or vision.config.hidden_size
        self.vision = None if vision is None else vision.requires_grad_(False)
        self.project = nn.Sequential(nn.Linear(self.features, self.width), nn.LayerNorm(self.width))
        self.project.train(bart.training)
        self.text = bart.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, bart: str, vision: str | None = None, features: int | None = None, grid: int | None = None
    ) -> "CLIPBart":  # fmt: skip
        """E.g. ("facebook/bart-base", "openai/clip-vit-base-patch16"), or folders."""
        seen = None if vision is None else pretrained("CLIPVisionModel", vision)
        return cls(pretrained("BartForConditionalGeneration", bart), seen, features, grid)

    def routing_host(self) -> Host:
        """q_proj and v_proj (and k_proj) of self- and cross-attention; adapters behind each attention and fc2. x_R is
        of each layer's own arguments, so that HF's generate, its beams and its cache need nothing more."""
        blocks = []
        for layer in self.text.model.encoder.layers:
            blocks.append(
                Block((layer,), _sites("self", layer.self_attn, "qkv"), (layer.self_attn, layer.fc2), ENCODER)
            )
        for layer in self.text.model.decoder.layers:
            sites = _sites("self", layer.self_attn, "qkv") | _sites("cross", layer.encoder_attn, "qv")
            blocks.append(Block((layer,), sites, (layer.self_attn, layer.encoder_attn, layer.fc2), DECODER))
        return Host(self.width, self, tuple(blocks), lambda args, kwargs: None)

    def see(self, image: Tensor) -> Tensor:
        """(B, C, H, W), or features (B, V, features) -> image tokens (B, V, d)."""
        if self.vision is None:
            if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[-1] != self.features:
                got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise UserError(f"image must be features (B, V, {self.features}), got {got}")
            return self.project(image)
        tokens = self.vision(pixel_values=image).last_hidden_state
        if self.grid is not None:
            side = round((tokens.shape[1] - 1) ** 0.5)
            if side**2 != tokens.shape[1] - 1 or side < self.grid:
                raise UserError(f"grid {self.grid} needs a square of patches that holds it, got {tokens.shape[1] - 1}")
            patches = tokens[:, 1:].mT.unflatten(2, (side, side))
            tokens = F.adaptive_max_pool2d(patches, self.grid).flatten(2).mT
        return self.project(tokens)

    def forward(
        self, image: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Output:  # fmt: skip
        """image as `see`, input_ids (B, T), mask 0 for padding, labels (B, L), -100 ignored, or decoder_input_ids
        (B, L) -> logits (B, L, words), where row i is of label i; the loss is the mean cross-entropy."""
        if (labels is None) == (decoder_input_ids is None):
            raise UserError("expected labels or decoder_input_ids, and not both")
        given = self._encoded(image, input_ids, attention_mask)
        out = self.text(**given, labels=labels, decoder_input_ids=decoder_input_ids, use_cache=False)
        return Output(out.logits, out.loss)

    @torch.no_grad()
    def generate(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **options) -> Tensor:
        """transformers' generate: num_beams, max_new_tokens and others; (B, L) tokens, the decoder's start first."""
        if self.training:
            raise UserError("generate needs model.eval(): dropout and checkpointing have no part in it")
        return self.text.generate(**self._encoded(image, input_ids, attention_mask), **options)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Of BART, in training."""
        checkpointing(self.text, enable)

    def _encoded(self, image: Tensor, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        tokens = self.see(image)
        if mask is None and isinstance(ids, Tensor):
            mask = (ids != self.text.config.pad_token_id).to(torch.int64)
        limit = self.text.config.max_position_embeddings
        mask = check_text(ids, mask, len(tokens), limit, tokens.shape[1])
        words = self.text.get_input_embeddings()(ids)
        return {
            "inputs_embeds": torch.cat([words, tokens.to(words.dtype)], 1),
            "attention_mask": F.pad(mask, (0, tokens.shape[1]), value=1),
        }  # fmt: skip


def _sites(of: str, attention: nn.Module, parts: str) -> dict[str, Site]:
    return {f"{of}.{part}": Site(getattr(attention, f"{part}_proj"), "linear") for part in parts}
