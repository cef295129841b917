"""What criteria look at: each candidate weight's gradients, batch by batch, and what flows into it."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UserError

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A weight that could get a mask: its state-dict name, the parameter, and the module that was named for it."""

    key: str
    weight: nn.Parameter
    module: nn.Module

    def matrix(self) -> Tensor:
        """(N, K) fp32, without a graph."""
        return self.weight.detach().flatten(1).float()


def gradients(model: nn.Module, found: list[Candidate], batches: Iterable, loss: Loss) -> Iterator[list[Tensor]]:
    """(N, K) fp32 gradients of every batch's loss. Raises UserError where one is missing or not finite."""
    for number, batch in enumerate(batches):
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise UserError(f"the loss must be a scalar tensor with a graph, got {value!r} for batch {number}")
        taken = torch.autograd.grad(value, [c.weight for c in found], allow_unused=True)
        for c, g in zip(found, taken):
            if g is None:
                raise UserError(f"the loss must depend on every candidate weight, but it does not on {c.key}")
            if not g.isfinite().all():
                raise UserError(
                    f"gradients must be finite, but {c.key}'s is not for batch {number}, loss {value.item():g}"
                )
        yield [g.flatten(1).float() for g in taken]


def samples(batches: Iterable) -> Iterator[tuple[Tensor, ...]]:
    """Every sample of tuples of tensors of one length, as batches of one. Raises UserError for other batches."""
    for batch in batches:
        tensors = isinstance(batch, tuple | list) and all(isinstance(t, Tensor) and t.dim() for t in batch)
        if not tensors or len({len(t) for t in batch}) != 1:
            kinds = [type(t).__name__ for t in batch] if isinstance(batch, tuple | list) else type(batch).__name__
            raise UserError(f"criterion fisher needs batches that are tuples of tensors of one length, got {kinds}")
        yield from zip(*(t.split(1) for t in batch))


def input_squares(model: nn.Module, found: list[Candidate], batches: Iterable, loss: Loss) -> list[Tensor]:
    """Sum of x_k^2 over all rows that a weight (N, K) multiplies in `loss(model, batch)`: (K,) float64 for each.

    A convolution's rows are its patches. Padding after a text's last token is left out in open_clip's own text towers.
    Runs without a graph. Products of other threads through torch.nn.functional wait on nothing, but are looked at.

    Raises: UserError for a weight that meets no input (a tower that the loss does not run, cross-attention), for a
        grouped convolution, and for a text tower that adds tokens of its own.
    """
    candidates, seen = {id(c.weight): c for c in found}, set()
    sums = {i: torch.zeros(c.matrix().shape[1], dtype=torch.float64, device=c.weight.device)
            for i, c in candidates.items()}  # fmt: skip

    def looking(function: Callable, squares: Callable) -> Callable:
        @functools.wraps(function)
        def called(input: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
            candidate = candidates.get(id(weight))
            if candidate is not None:
                seen.add(id(weight))
                sums[id(weight)] += squares(padding, candidate, input, *args, **kwargs)
            return function(input, weight, *args, **kwargs)

        return called

    with (
        torch.no_grad(),
        _Padding(model) as padding,
        _replaced(looking(F.linear, _linear), looking(F.conv2d, _convolution)),
    ):
        for batch in batches:
            loss(model, batch)
    missed = [c.key for c in found if id(c.weight) not in seen]
    if missed:
        raise UserError(f"criterion multiflow needs each candidate's inputs, but {missed[0]} met none in the loss")
    return list(sums.values())


@contextlib.contextmanager
def _replaced(linear: Callable, conv2d: Callable) -> Iterator[None]:
    # Attention reads its projections' weights past any module hook. Every product goes by these two names, once
    # torch's fused inference kernel for attention is out of the way.
    before, fast = (F.linear, F.conv2d), torch.backends.mha.get_fastpath_enabled()
    try:
        F.linear, F.conv2d = linear, conv2d
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        F.linear, F.conv2d = before
        torch.backends.mha.set_fastpath_enabled(fast)


class _Padding(contextlib.ExitStack):
    """Knows, while it is entered, which tokens of the text that is being encoded are padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tower = getattr(model, "text", model)
        transformer = getattr(tower, "transformer", None)
        self.keep: Tensor | None = None
        self.inside = {id(m) for m in transformer.modules()} if isinstance(transformer, nn.Module) else set()
        # open_clip before 2.25 runs its blocks over (L, B, D).
        self.batch_first, self.pad = getattr(transformer, "batch_first", False), getattr(tower, "pad_id", 0)
        if isinstance(getattr(tower, "token_embedding", None), nn.Embedding):
            self.callback(tower.token_embedding.register_forward_pre_hook(self._tokens).remove)

    def _tokens(self, module: nn.Module, args: tuple[Tensor]) -> None:
        # CLIP's padding 0 is a word as well: what another token follows is none.
        self.keep = args[0].flip(1).ne(self.pad).cumsum(1).flip(1).gt(0)

    def rows(self, candidate: Candidate, x: Tensor) -> Tensor:
        """x (..., K) as rows, those of padded text tokens left out."""
        rows = x.reshape(-1, x.shape[-1])
        if self.keep is None or id(candidate.module) not in self.inside:
            return rows
        if len(rows) != self.keep.numel():
            raise UserError(
                f"criterion multiflow cannot tell padding among {len(rows)} rows of {candidate.key} for tokens "
                f"{tuple(self.keep.shape)}"
            )
        # nn.MultiheadAttention works on (L, B, D) inside, whatever comes in.
        length_first = isinstance(candidate.module, nn.MultiheadAttention) or not self.batch_first
        return rows[(self.keep.T if length_first else self.keep).flatten()]


def _linear(text: _Padding, candidate: Candidate, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return text.rows(candidate, x).double().square().sum(0)


def _convolution(
    text: _Padding, candidate: Candidate, x: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1
) -> Tensor:
    if groups != 1 or isinstance(padding, str):
        raise UserError(
            f"criterion multiflow needs convolutions of one group and padding in numbers, got groups={groups} and "
            f"padding={padding!r} for {candidate.key}"
        )
    # Unfolding is linear: the sum over images comes first and keeps the patches small.
    squares = x.double().square().sum(0, keepdim=True)
    return F.unfold(squares, candidate.weight.shape[2:], dilation, padding, stride).sum((0, 2))
