"""One call that runs both cotangents through a model and keeps the two gradients of every mask apart until dropout."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import rmt_kernels

from .gradients import GENERAL, TASK, Dropout, Gradients
from .masked import Mask, masks
from .optim import MaskAdam

Loss = Tensor | tuple[Tensor, Tensor]


def backward(
    task: Loss, general: Loss | int | None, model: nn.Module | Iterable[Mask] | MaskAdam, *, strength: float = 1.0,
    seed: int | Tensor = 0, step: int | Tensor = 0, l2: float = 1e-4, retain_graph: bool = False, more: bool = False,
) -> None:  # fmt: skip
    """The gradient of the scores of every masked weight from two losses, with gradient dropout.

    With an optimizer both gradients stay in its buffers, and its next `step` drops out and updates in one pass over
    them; `.grad` is left alone. Where several processes share a batch each gradient is summed over them here, the
    task's while the general pass runs: see `rmt.reduction`. With a model or masks `scores.grad` is set, for any
    optimizer of torch: replaced, not added to, since dropout is nonlinear and the sum of two dropped-out gradients is
    not that of both batches.

    Args:
        task: scalar loss, or a pair (tensor, its cotangent).
        general: the same for the loss that ties the model to zero-shot CLIP; None: no dropout; 0: a loss without a
            gradient, as while no bit is off and student and teacher agree: dropout against zeros, and no second pass.
        model: whose masks are meant, or those masks, or their optimizer. A mask's position is its random stream.
        strength: R-AMT's lambda, in [0, 1]: 1 zeroes dropped elements, 0 is no dropout.
        seed, step: every draw depends on them, the mask's position and the element; 0-d int64 tensors stay on device.
        l2: coefficient of the per-tensor L2 norm (not squared) that joins the task gradient before the dropout.
        retain_graph: keep the graph for another call.
        more: this batch comes in parts, and there are more: gradients are added to the optimizer's buffers, task and
            general apart, until a part without `more`. Losses must be weighted by the parts' shares of the batch.

    Raises: ValueError where nothing masked is reached from `task`, for a strength outside [0, 1], for `more` without an
        optimizer, and for parts of which one has a general loss and
            another none.
    """
    optimizer = model if isinstance(model, MaskAdam) else None
    found = optimizer.masks if optimizer else masks(model) if isinstance(model, nn.Module) else list(model)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength!r}")
    if more and optimizer is None:
        raise ValueError("a batch in parts (more=True) needs an optimizer: its buffers keep the parts' gradients")
    held = optimizer.gradients if optimizer else Gradients(found)
    if optimizer is None or optimizer.parts is None:
        held.clear()
    elif optimizer.parts.general != (general is not None):
        raise ValueError("all parts of a batch must have a general loss, or none")
    losses = {TASK: _pair(task)} | ({} if general is None or _is_zero(general) else {GENERAL: _pair(general)})
    for n, (side, loss) in enumerate(losses.items()):
        if not more:
            held.begin(side)
        _collect(held, side, loss, retain_graph or n + 1 < len(losses))
        if not more:
            held.end(side)
        if side == TASK and not held.live:
            raise ValueError(f"the task loss does not depend on any of the {len(found)} masked weights given")
    held.wait()
    rng = torch.stack([torch.as_tensor(v, dtype=torch.int64, device=found[0].scores.device) for v in (seed, step)])
    dropout = Dropout(general is not None, rng, float(strength), l2)
    if optimizer:
        optimizer.take(dropout, more)
    else:
        _set_grads(held, dropout)


def _is_zero(general: Loss | int) -> bool:
    if isinstance(general, int | float):
        if general != 0:
            raise ValueError(f"general must be a loss, None or 0, got {general!r}")
        return True
    return False


def _pair(loss: Loss) -> tuple[Tensor, Tensor | None]:
    output, cotangent = loss if isinstance(loss, tuple) else (loss, None)
    if not isinstance(output, Tensor) or output.grad_fn is None:
        raise ValueError("a loss must be a tensor with a graph, or a pair (tensor with a graph, cotangent)")
    if cotangent is None and output.numel() != 1:
        raise ValueError(f"a loss without cotangent must be a scalar, got shape {tuple(output.shape)}")
    return output, cotangent


def _collect(held: Gradients, side: int, loss: tuple[Tensor, Tensor | None], keep: bool) -> None:
    """One pass. What autograd returns for scores are gradients that no product has handed over."""
    wanted = [i for i, mask in enumerate(held.masks) if mask.scores.requires_grad]
    if not wanted:
        return
    with held.collecting(side):
        inputs = [held.masks[i].scores for i in wanted]
        got = torch.autograd.grad(loss[0], inputs, loss[1], keep, allow_unused=True)
    with torch.no_grad():
        for i, gradient in zip(wanted, got):
            if gradient is not None:
                held.add_scores(side, i, gradient)


@torch.no_grad()
def _set_grads(held: Gradients, dropout: Dropout) -> None:
    for i in held.live:
        mask = held.masks[i]
        a, b, chained = held.pair(i, dropout.general)
        scores = mask.scores.detach()
        # Compact scores (S,) go as one row: their draws are keyed by the place among the selected.
        a, b, scores = (t if t is None or t.dim() == 2 else t.view(1, -1) for t in (a, b, scores))
        grad = rmt_kernels.gradient_dropout(
            a, b, mask.weight if chained else None, scores, penalty=penalty(scores, dropout.l2), rng=dropout.rng,
            strength=dropout.strength, stream=i,
        )  # fmt: skip
        mask.scores.grad = grad.view_as(mask.scores)
        held.release(i)


def penalty(scores: Tensor, l2: float) -> Tensor | None:
    """() l2 / norm(scores), the L2 term's factor; None where l2 is 0.

    The subgradient at 0 is 0, as torch.norm's: the clamp keeps 0 / 0 out.
    """
    return l2 / scores.norm().clamp_min(torch.finfo(torch.float32).tiny) if l2 else None
