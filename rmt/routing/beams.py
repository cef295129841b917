"""Beam search over any decoder that can run one step; with one beam it is greedy search."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import UserError


def beam_search(
    first: Tensor, step: Callable[[Tensor, Tensor], Tensor], beams: int, max_length: int, eos: int | None,
    length_penalty: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The best continuation of each image: by log-probability / length ** length_penalty, the end token counted.

    The rules are transformers' (`early_stopping=False`): an end counts where it is among the `beams` best candidates of
    its step; an image is done with `beams` ends of which the worst beats the best open beam at its present length.

    Args:
        first: (B, V) logits of the first token.
        step: tokens (N,), rows (N,) -> (N, V) logits of what follows. rows: which beam of the last step each continues,
            image by image, B beams at first: what is kept per beam (a cache, the image) must be taken at them.
        eos: the end token; None: all have max_length.

    Returns:
        (B, L) the tokens, filled up with eos, L <= max_length; (B,) their scores.

    Raises: UserError for no beams or no length.
    """
    if beams < 1 or max_length < 1:
        raise UserError(f"beams and max_length must be at least 1, got {beams} and {max_length}")
    batch, words = first.shape
    scores, tokens = first.new_zeros(batch, 1, dtype=torch.float32), first.new_empty(batch, 1, 0, dtype=torch.int64)
    ends: list[list[tuple[float, list[int]]]] = [[] for _ in range(batch)]
    done, logits = [False] * batch, first
    for length in range(1, max_length + 1):
        open_ = scores.shape[1]
        logp = logits.float().log_softmax(-1).unflatten(0, (batch, open_)) + scores[..., None]
        if eos is not None:
            best, at = logp.flatten(1).topk(min(beams, open_ * words))
            for image, n in (at % words == eos).nonzero().tolist():
                if not done[image]:
                    ids = tokens[image, at[image, n] // words].tolist()
                    ends[image].append((best[image, n].item() / length**length_penalty, [*ids, eos]))
                    ends[image] = sorted(ends[image], key=lambda end: -end[0])[:beams]
            logp[..., eos] = -torch.inf
        scores, at = logp.flatten(1).topk(min(beams, open_ * (words - (eos is not None))))
        parent = at // words
        tokens = torch.cat([tokens.gather(1, parent[..., None].expand(-1, -1, length - 1)), (at % words)[..., None]], 2)
        for image, score in enumerate((scores[:, 0] / length**length_penalty).tolist()):
            done[image] |= len(ends[image]) == beams and ends[image][-1][0] >= score
        if all(done) or length == max_length:
            break
        rows = parent + open_ * torch.arange(batch, device=parent.device)[:, None]
        logits = step(tokens[..., -1].flatten(), rows.flatten())
    for image in range(batch):
        if not done[image]:
            found = zip((scores[image] / length**length_penalty).tolist(), tokens[image].tolist())
            ends[image] = sorted([*ends[image], *found], key=lambda end: -end[0])
    best_ends = [found[0] for found in ends]
    longest = max(len(ids) for _, ids in best_ends)
    filled = [ids + [eos] * (longest - len(ids)) for _, ids in best_ends]
    return tokens.new_tensor(filled), scores.new_tensor([score for score, _ in best_ends])
