"""Frozen Hugging Face models put together as hosts of routed modules: what the hosts share, captioning, and VQA.

As in the official code (e91d826) of Qu, Tuytelaars and Moens, ECCV 2024: x_R is the ViT's pooled output, tanh of a
linear map of its class token, raw, the same for all layers; it is also put before the text as one token.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import UserError
from .beams import beam_search
from .hosts import Block, Host, Site

PAIRS = "ViT-B (768) goes with gpt2, roberta-base and bart-base, ViT-L (1024) with gpt2-medium and roberta-large"


class Output(NamedTuple):
    """logits, and the loss where labels were given."""

    logits: Tensor
    loss: Tensor | None = None


def need_transformers() -> Any:
    """The package. Raises UserError without it."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("Hugging Face hosts need transformers: pip install 'rmt[routing]'") from error
    return transformers


def pretrained(kind: str, name: str, drawn: bool = False, **options: Any) -> nn.Module:
    """transformers' class `kind` from a checkpoint, a name or a folder.

    Raises: UserError without transformers, or where the checkpoint lacks weights; drawn: those are drawn at random.
    """
    model, info = getattr(need_transformers(), kind).from_pretrained(name, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing and not drawn:
        raise UserError(
            f"{name} has no weights for {', '.join(missing[:3])} of {kind}: take a checkpoint that has them (a ViT's "
            "pooler: google/vit-base-patch16-224-in21k; RoBERTa's: drawn=True draws it, by torch's seed)"
        )
    return model.eval()


def same_width(vit: nn.Module, text: nn.Module) -> int:
    """d of both, which share A. Raises UserError where they differ, or the ViT has no pooler."""
    if getattr(vit, "pooler", None) is None:
        raise UserError("x_R is the ViT's pooler_output: it was built without a pooler")
    ours, theirs = vit.pooler.dense.out_features, text.config.hidden_size
    if ours != theirs:
        raise UserError(
            f"image and text share a down-projection, so that the ViT's width must be the text model's: got {ours} and "
            f"{theirs}. {PAIRS}"
        )
    return theirs


def check_text(ids: Tensor, mask: Tensor | None, batch: int, limit: int, others: int) -> Tensor:
    """The mask (B, T), all ones for None. limit: of positions, of which `others` go to no text token."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or len(ids) != batch:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise UserError(f"input_ids must be int64 ({batch}, T), one row per image, got {got}")
    if ids.shape[1] + others > limit:
        raise UserError(f"the text model has {limit} positions, got {ids.shape[1]} tokens and {others} others")
    if mask is not None and mask.shape != ids.shape:
        raise UserError(f"attention_mask must be {tuple(ids.shape)} as input_ids, got {tuple(mask.shape)}")
    return torch.ones_like(ids) if mask is None else mask


def checkpointing(model: nn.Module, enable: bool) -> None:
    """Of transformers' model, in training: of the kind that routed modules can follow."""
    # Renamed in transformers 5, where the old name warns.
    start = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    stop = getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)
    if enable:
        start({"use_reentrant": False})
    else:
        stop()


class Text(nn.Module):
    """A text model that is called with x_R (B, 1, d) besides its own arguments: where routed modules see it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_r: Tensor, **arguments: Any) -> Any:
        """The text model's output."""
        return self.model(**arguments)


class ViTHost(nn.Module):
    """A frozen ViT with pooler, `vit`, beside a frozen text model, `text.model`."""

    new_parts: tuple[str, ...] = ()

    def __init__(self, vit: nn.Module, text: nn.Module, prefix: bool) -> None:
        super().__init__()
        self.width = same_width(vit, text)
        self.vit, self.text, self.prefix = vit.requires_grad_(False), Text(text.requires_grad_(False)), prefix

    def see(self, image: Tensor) -> Tensor:
        """(B, C, H, W), normalised as the ViT's processor does -> x_R (B, 1, d)."""
        channels = self.vit.config.num_channels
        if not isinstance(image, Tensor) or image.dim() != 4 or image.shape[1] != channels:
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise UserError(f"image must be (B, {channels}, H, W), got {got}")
        try:
            return self.vit(pixel_values=image).pooler_output[:, None]
        except ValueError as error:
            raise UserError(f"the ViT takes no image of {tuple(image.shape)}: {error}") from error

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Of the text model, in training."""
        checkpointing(self.text.model, enable)

    def _host(self, blocks: list[Block]) -> Host:
        def visual(args: tuple, kwargs: dict[str, Any]) -> Tensor:
            return args[0] if args else kwargs["x_r"]

        return Host(self.width, self.text, tuple(blocks), visual, self.see)


class ViTGPT2(ViTHost):
    """Captioning: [x_R; text] -> GPT-2.

    Args:
        vit: transformers' ViTModel with pooler. gpt2: GPT2LMHeadModel, of the same width.
        prefix: put x_R before the text, as one token; else only routed modules see the image.
    """

    def __init__(self, vit: nn.Module, gpt2: nn.Module, prefix: bool = True) -> None:
        super().__init__(vit, gpt2, prefix)

    @classmethod
    def from_pretrained(cls, vit: str, gpt2: str, prefix: bool = True) -> "ViTGPT2":
        """E.g. ("google/vit-base-patch16-224-in21k", "gpt2"), or folders."""
        return cls(pretrained("ViTModel", vit), pretrained("GPT2LMHeadModel", gpt2), prefix)

    def routing_host(self) -> Host:
        """Fused c_attn; adapters behind attn and mlp."""
        blocks = []
        for layer in self.text.model.transformer.h:
            sites = {f"self.{part}": Site(layer.attn.c_attn, "linear", part) for part in "qkv"}
            blocks.append(Block((layer,), sites, (layer.attn, layer.mlp)))
        return self._host(blocks)

    def forward(
        self, image: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        ignore_index: int = -100,
    ) -> Output:  # fmt: skip
        """image (B, C, H, W), input_ids (B, T), padded on the right, labels (B, T) -> logits (B, T + 1, V), (B, T, V)
        without prefix: row i is of the token that follows position i. Labels are of input_ids, not shifted; the mean is
        over those that are not ignore_index (0 in the official code). Without a mask, ids below 0 are padding.
        """
        x_r = self.see(image)
        if attention_mask is None and isinstance(input_ids, Tensor):
            attention_mask = (input_ids >= 0).to(torch.int64)
        mask = check_text(input_ids, attention_mask, len(x_r), self._limit, self.prefix)
        arguments = self._embedded(x_r, input_ids, mask)
        logits = self.text(x_r, **arguments, use_cache=False).logits
        if labels is None:
            return Output(logits)
        labels = F.pad(labels, (int(self.prefix), 0), value=ignore_index)
        return Output(logits, F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], ignore_index=ignore_index))

    @torch.no_grad()
    def generate(
        self, image: Tensor, prompt: Tensor | None = None, beams: int = 1, max_length: int = 50,
        eos: int | None = None, length_penalty: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """The best caption found: (B, L) new tokens, filled up with eos, L <= max_length. See `beam_search`.

        Args:
            prompt: (B, T) tokens before it, all of one length; None: GPT-2's bos_token_id.
            eos: the end token; None: GPT-2's eos_token_id.

        Raises: UserError in training mode, and for what the decoder has no positions for.
        """
        if self.training:
            raise UserError("generate needs model.eval(): dropout and checkpointing have no part in it")
        config, x_r = self.text.model.config, self.see(image)
        if prompt is None:
            prompt = torch.full((len(x_r), 1), config.bos_token_id, device=x_r.device)
        mask = check_text(prompt, None, len(x_r), self._limit, self.prefix + max_length)
        out = self.text(x_r, **self._embedded(x_r, prompt, mask), use_cache=True)
        state = {"x_r": x_r, "cache": out.past_key_values}

        def step(tokens: Tensor, rows: Tensor) -> Tensor:
            state["x_r"], state["cache"] = state["x_r"][rows], reordered(state["cache"], rows)
            out = self.text(state["x_r"], input_ids=tokens[:, None], past_key_values=state["cache"], use_cache=True)
            state["cache"] = out.past_key_values
            return out.logits[:, -1]

        eos = config.eos_token_id if eos is None else eos
        return beam_search(out.logits[:, -1], step, beams, max_length, eos, length_penalty)[0]

    @property
    def _limit(self) -> int:
        return self.text.model.config.max_position_embeddings

    def _embedded(self, x_r: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        words = self.text.model.get_input_embeddings()(ids.clamp(min=0))
        if not self.prefix:
            return {"inputs_embeds": words, "attention_mask": mask}
        return {
            "inputs_embeds": torch.cat([x_r.to(words.dtype), words], 1), "attention_mask": F.pad(mask, (1, 0), value=1)
        }  # fmt: skip


def reordered(cache: Any, rows: Tensor) -> Any:
    """A decoder's cache with the batch rows (N,), of transformers' Cache or the tuples before it."""
    if hasattr(cache, "reorder_cache"):
        cache.reorder_cache(rows)
        return cache
    return tuple(tuple(t.index_select(0, rows) for t in layer) for layer in cache)


class ViTRoberta(ViTHost):
    """VQA: [x_R; question] -> RoBERTa -> its pooler, of the image's position -> head -> answers.

    Args:
        vit: transformers' ViTModel with pooler. roberta: RobertaModel with pooler, of the same width.
        answers: how many. head: Linear(d, 2 d), LayerNorm, GELU, Linear(2 d, answers), trained.
        double_embeddings: as the official code: the text has positions, token types and LayerNorm before x_R is put
            before it, and again after. Else once, together.
    """

    new_parts = ("head",)

    def __init__(self, vit: nn.Module, roberta: nn.Module, answers: int, double_embeddings: bool = False) -> None:
        super().__init__(vit, roberta, True)
        if getattr(roberta, "pooler", None) is None:
            raise UserError("the answer is read from RoBERTa's pooler: it was built without one")
        d, self.double_embeddings = self.width, double_embeddings
        self.head = nn.Sequential(nn.Linear(d, 2 * d), nn.LayerNorm(2 * d), nn.GELU(), nn.Linear(2 * d, answers))
        self.head.train(self.vit.training)

    @classmethod
    def from_pretrained(
        cls, vit: str, roberta: str, answers: int, double_embeddings: bool = False, drawn: bool = False
    ) -> "ViTRoberta":
        """E.g. ("google/vit-base-patch16-224-in21k", "roberta-base", 3129), or folders. The hub's RoBERTa has no pooler
        of late: drawn=True draws it."""
        return cls(
            pretrained("ViTModel", vit), pretrained("RobertaModel", roberta, drawn), answers, double_embeddings
        )  # fmt: skip

    def routing_host(self) -> Host:
        """query, key and value; adapters before residual and LayerNorm."""
        blocks = []
        for layer in self.text.model.encoder.layer:
            own, names = layer.attention.self, {"q": "query", "k": "key", "v": "value"}
            sites = {f"self.{part}": Site(getattr(own, name), "linear") for part, name in names.items()}
            blocks.append(Block((layer,), sites, (layer.attention.output.dense, layer.output.dense)))
        return self._host(blocks)

    def forward(
        self, image: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Output:
        """image (B, C, H, W), input_ids (B, T), mask 0 for padding, labels (B, answers) soft targets -> logits
        (B, answers); the loss is the mean of binary cross-entropies. Without a mask, the pad token is padding."""
        model, x_r = self.text.model, self.see(image)
        if attention_mask is None and isinstance(input_ids, Tensor):
            attention_mask = (input_ids != model.config.pad_token_id).to(torch.int64)
        limit = model.config.max_position_embeddings - model.config.pad_token_id - 1
        mask = check_text(input_ids, attention_mask, len(x_r), limit, 1)
        words = model.embeddings(input_ids) if self.double_embeddings else model.embeddings.word_embeddings(input_ids)
        embeds = torch.cat([x_r.to(words.dtype), words], 1)
        out = self.text(x_r, inputs_embeds=embeds, attention_mask=F.pad(mask, (1, 0), value=1), use_cache=False)
        logits = self.head(out.pooler_output)
        loss = None if labels is None else F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return Output(logits, loss)
