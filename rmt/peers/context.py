"""Learned context vectors in front of class names, in the place of words: what CoOp, CoCoOp and CoOp + masks share.

Zhou et al., IJCV 2022 (arXiv 2109.01134); KaiyangZhou/CoOp, trainers/coop.py. The class name stands last ("end").
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import clip
from ..config import UserError

# Any word of one token: its embedding is replaced.
PLACEHOLDER = "X"
STD = 0.02
USERS = "CoOp and CoCoOp"


class Context(nn.Module):
    """Class vectors as a function of context vectors, which are all of its parameters.

    Args:
        model: an open_clip model whose text tower is open_clip's own; it is called, never changed. tokenizer: its own.
        n_ctx: how many vectors. init: a text of n_ctx tokens whose embeddings they start from; None: normal, std 0.02.
        class_specific: vectors of its own for every class, (C, n_ctx, W), in place of (n_ctx, W) for all; fp32.
        seed: of the random start.

    Raises: UserError for a text tower or a tokenizer of another kind, and for a class name that does not fit in.
    """

    tokens: Tensor

    def __init__(
        self, model: nn.Module, tokenizer: clip.Tokenizer, classnames: Sequence[str], *, n_ctx: int, init: str | None,
        class_specific: bool, seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        embedding, device = token_embedding(model), model.logit_scale.device
        # In a tuple, since it is not a part of this module.
        self._model = (model,)
        self.register_buffer("tokens", _tokens(tokenizer, classnames, n_ctx).to(device), persistent=False)
        if init is None:
            shape = (len(classnames), n_ctx) if class_specific else (n_ctx,)
            rng = torch.Generator().manual_seed(seed)
            start = torch.empty(*shape, embedding.embedding_dim).normal_(std=STD, generator=rng)
        else:
            start = embedding.weight.detach()[_words(tokenizer, init, n_ctx).to(device)].float()
            start = start.repeat(len(classnames), 1, 1) if class_specific else start
        self.vectors = nn.Parameter(start.to(device))

    @property
    def model(self) -> nn.Module:
        """Whose text tower it is."""
        return self._model[0]

    def text(self) -> Tensor:
        """(C, D) fp32 class vectors of length 1, with a graph to the vectors; one text pass over all classes."""
        return encode(self.model, self.tokens, self.vectors)

    def stored(self) -> dict[str, Tensor]:
        """The vectors, fp32: all that must be kept."""
        return {"context": self.vectors.detach().clone()}

    @torch.no_grad()
    def load(self, stored: dict[str, Tensor]) -> None:
        """Takes what `stored` gave. Raises UserError for another shape."""
        got = stored["context"]
        if got.shape != self.vectors.shape:
            want = tuple(self.vectors.shape)
            raise UserError(f"stored context vectors must have shape {want}, got {tuple(got.shape)}: fit them again")
        self.vectors.copy_(got)


def encode(model: nn.Module, tokens: Tensor, vectors: Tensor) -> Tensor:
    """(N, D) fp32 class vectors of length 1: `encode_text(tokens)` with `vectors` for the embeddings 1 .. n_ctx.

    tokens: (N, L) int64. vectors: (n_ctx, W), or (N, n_ctx, W). Other calls of the model, in other threads too, are
    not touched.

    Raises: UserError where the text tower does not embed the tokens that it is given.
    """
    # A copy, known by its address as long as it lives: the hook sees the calls of all threads.
    own, replaced = tokens.clone(), []

    def put(module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        if args[0].data_ptr() != own.data_ptr():
            return None
        replaced.append(True)
        middle = vectors.to(out.dtype).expand(len(out), -1, -1)
        return torch.cat([out[:, :1], middle, out[:, 1 + middle.shape[1] :]], 1)

    handle = token_embedding(model).register_forward_hook(put)
    try:
        features = model.encode_text(own)
    finally:
        handle.remove()
    if not replaced:
        raise UserError(f"{type(model).__name__}.encode_text embeds other tokens than it is given: leave {USERS} out")
    return F.normalize(features.float(), dim=-1)


def token_embedding(model: nn.Module) -> nn.Embedding:
    """That of the text tower. Raises UserError for a tower that is not open_clip's own."""
    for owner in (model, getattr(model, "text", None)):
        found = getattr(owner, "token_embedding", None)
        if isinstance(found, nn.Embedding):
            return found
    raise UserError(
        f"learned context needs open_clip's own text tower, with a token_embedding, and {type(model).__name__} has "
        f"another: take a model that has one, or leave {USERS} out"
    )


def _tokens(tokenizer: clip.Tokenizer, classnames: Sequence[str], n_ctx: int) -> Tensor:
    """(C, L): start, n_ctx placeholders, class name, full stop, end."""
    texts = clip.prompts(classnames, " ".join([PLACEHOLDER] * n_ctx) + " {}.")
    tokens = tokenizer(texts)
    length = tokens.shape[1]
    # What was cut is another text as soon as there is room for one token more.
    fits = (tokenizer(texts, context_length=length + 1)[:, :length] == tokens).all(1)
    for name in (name for name, fit in zip(classnames, fits.tolist(), strict=True) if not fit):
        raise UserError(
            f"{n_ctx} context vectors and the class name {name!r} must fit into the text tower's {length} tokens, "
            "which they do not: shorten the name, or take coop_photo or cocoop, which have 4 vectors"
        )
    words = tokens[:, 1 : 1 + n_ctx]
    if not (words == words[0, 0]).all() or (tokens[:, 0] == words[0, 0]).any():
        raise UserError(f"learned context needs a tokenizer that starts with a token of its own: leave {USERS} out")
    return tokens


def _words(tokenizer: clip.Tokenizer, text: str, n_ctx: int) -> Tensor:
    """(n_ctx,) token ids of a text, without start and end."""
    ids, empty = tokenizer([text])[0], tokenizer([""])[0]
    count = int((ids == empty[1]).int().argmax()) - 1
    if count != n_ctx:
        raise UserError(f"the initial text of {n_ctx} context vectors must have {n_ctx} tokens, {text!r} has {count}")
    return ids[1 : 1 + n_ctx]
