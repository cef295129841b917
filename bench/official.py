"""R-AMT's own op sequence for one layer (wuw2019/R-AMT at 07f8d2c, transcribed): the baseline "as published"."""

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLD, L2, EPS = 5e-3, 1e-4, 1e-8


def effective_weight(weight: Tensor, scores: Tensor) -> Tensor:
    """Binarizer, then the product with the frozen weight: clone, le, fill, gt, fill, mul."""
    mask = scores.clone()
    mask[scores.le(THRESHOLD)] = 0
    mask[scores.gt(THRESHOLD)] = 1
    return mask * weight


def forward(x: Tensor, weight: Tensor, scores: Tensor, bias: Tensor) -> Tensor:
    """One training forward: the mask is made anew every time."""
    return F.linear(x, effective_weight(weight, scores), bias)


def score_gradients(x: Tensor, g_task: Tensor, g_general: Tensor, weight: Tensor, scores: Tensor) -> tuple:
    """The two backward passes of one layer, up to the scores: two products, two chain rules, the norm's gradient."""
    return chain_rule(g_task.T @ x, g_general.T @ x, weight, scores)


def chain_rule(grad_task: Tensor, grad_general: Tensor, weight: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """From the weight gradients to the scores' own, with the gradient of 1e-4 * norm(scores)."""
    b = (grad_general * weight).clone()
    norm = torch.norm(scores, 2)
    penalty = (scores / norm * L2).masked_fill_(norm == 0, 0)
    return penalty + grad_task * weight, b


def gradient_dropout(a: Tensor, b: Tensor, strength: float, uniform: Tensor | None = None) -> Tensor:
    """graddrop_backward_and_update: 16 elementwise passes. `uniform` replaces torch.rand where a check needs it."""
    grad = a.clone()
    purity = torch.div(torch.sign(grad) * (grad + b), torch.abs(grad) + torch.abs(b) + EPS)
    probability = (purity + 1) / 2
    uniform = torch.rand(grad.shape, device=grad.device) if uniform is None else uniform
    keep = torch.gt(probability, uniform)
    return ((1 - strength) + strength * keep) * grad


def adam(scores: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, lr: float) -> None:
    """torch.optim.Adam's single-tensor update: seven passes."""
    exp_avg.lerp_(grad, 0.1)
    exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=0.001)
    denom = (exp_avg_sq.sqrt() / (1 - 0.999**step) ** 0.5).add_(1e-8)
    scores.addcdiv_(exp_avg, denom, value=-lr / (1 - 0.9**step))


def epilogue_and_update(grad_task, grad_general, weight, scores, exp_avg, exp_avg_sq, strength: float) -> None:
    """Everything weight-sized after the two products."""
    a, b = chain_rule(grad_task, grad_general, weight, scores)
    adam(scores, gradient_dropout(a, b, strength), exp_avg, exp_avg_sq, 1, 0.0)
