"""A small decoder of captions that routed LoRA can be put into, and the captions themselves, as numbers."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmt.config import UserError
from rmt.routing import Block, Host, Site

# Of the vocabulary; a padded target is not counted.
START, END, UNKNOWN, IGNORE = 0, 1, 2, -100


class Attention(nn.Module):
    """Causal self-attention with a Linear for each of q, k and v. (B, T, width) -> same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm attention and MLP, dropout behind both. (B, T, width) -> same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.dropout = nn.LayerNorm(width), nn.LayerNorm(width), dropout
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attn(self.ln_1(x)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)


class Decoder(nn.Module):
    """GPT-2's form. The image is seen by routing, and with `prefix` as a token of its own before the text as well."""

    def __init__(self, words: int, width: int, layers: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.width, self.prefix = width, False
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # GPT-2's: what adds to the residual stream begins smaller.
                into = name.endswith(("attn.out.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if into else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor, image: Tensor | None = None) -> Tensor:
        """tokens (B, T), image (B, width) -> logits (B, T, words) of each next token."""
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        if self.prefix:
            x = torch.cat([image[:, None], x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)[:, -tokens.shape[1] :] @ self.words.weight.T

    def routing_host(self) -> Host:
        """q, k and v of each layer's attention; x_R is the image that the decoder is called with."""
        blocks = [
            Block(
                (one,), {f"self.{part}": Site(getattr(one.attn, part), "linear") for part in "qkv"}, (one.attn, one.mlp)
            )
            for one in self.layers
        ]

        def visual(args: tuple, kwargs: dict) -> Tensor | None:
            image = args[1] if len(args) > 1 else kwargs.get("image")
            return None if image is None else image[:, None]

        return Host(self.width, self, tuple(blocks), visual)


def loss(model: nn.Module, tokens: Tensor, image: Tensor | None) -> Tensor:
    """Sum over the next tokens of their negative log-likelihoods, in nats. tokens (B, T) padded with IGNORE."""
    logits = model(tokens[:, :-1].clamp_min(0), image)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


@dataclasses.dataclass(frozen=True)
class Captions:
    """captions: START, words, END, each with the number of its image; features (images, width) of all of them."""

    captions: list[list[int]]
    owners: Tensor
    features: Tensor

    def batches(self, size: int, random: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """tokens (B, T), images (B,): each caption once, with others of about its length; shuffled if `random`."""
        lengths = torch.tensor([len(c) for c in self.captions])
        order = torch.randperm(len(lengths), generator=random) if random else torch.arange(len(lengths))
        order = order[lengths[order].argsort(stable=True)]
        parts = order.split(size)
        turns = torch.randperm(len(parts), generator=random).tolist() if random else range(len(parts))
        for n in turns:
            rows = [torch.tensor(self.captions[i]) for i in parts[n].tolist()]
            yield nn.utils.rnn.pad_sequence(rows, True, IGNORE), self.owners[parts[n]]

    def endless(self, size: int, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Epoch after epoch."""
        while True:
            yield from self.batches(size, random)

    @property
    def targets(self) -> int:
        """Tokens that are predicted."""
        return sum(len(c) - 1 for c in self.captions)


def read(folder: Path, features: dict[str, Tensor], length: int, least: int) -> tuple[dict[str, Captions], dict]:
    """Captions of text (half of the training images), tuning (the other half), val and test; and what was counted.

    least: CLIP's BPE pieces that occur less often in the training captions are one unknown word.
    """
    from open_clip.tokenizer import SimpleTokenizer

    encode, rows = SimpleTokenizer().encode, json.loads((folder / "captions.json").read_text())
    pieces: dict[str, list[tuple[str, list[int]]]] = {"train": [], "val": [], "test": []}
    for row in rows:
        pieces[row["image"].split("/")[0]] += [(row["image"], encode(text)) for text in row["captions"]]
    counts = Counter(piece for _, text in pieces["train"] for piece in text)
    known = {piece: n for n, piece in enumerate(sorted(p for p, c in counts.items() if c >= least), UNKNOWN + 1)}
    if not known:
        raise UserError(f"expected training captions in {folder}/captions.json, found no word {least} times")
    names = list(dict.fromkeys(image for image, _ in pieces["train"]))
    # Every other one: neighbours in the list may be of one photographer.
    halves = {"text": set(names[::2]), "tuning": set(names[1::2])}
    chosen = {half: [pair for pair in pieces["train"] if pair[0] in images] for half, images in halves.items()}
    chosen |= {"val": pieces["val"], "test": pieces["test"]}
    numbers = {name: n for n, name in enumerate(features)}
    stacked = torch.stack(list(features.values()))
    splits, unknown = {}, {}
    for split, pairs in chosen.items():
        texts = [[known.get(piece, UNKNOWN) for piece in text][: length - 1] for _, text in pairs]
        owners = torch.tensor([numbers[image] for image, _ in pairs])
        splits[split] = Captions([[START, *text, END] for text in texts], owners, stacked)
        unknown[split] = sum(text.count(UNKNOWN) for text in texts) / splits[split].targets
    sizes = {k: {"captions": len(v.captions), "targets": v.targets, "unknown": unknown[k]} for k, v in splits.items()}
    return splits, {"words": len(known) + UNKNOWN + 1, "splits": sizes}
