"""`routed_low_rank`: the routed product in the order of fewest multiplications. Formulas: `routing.py`.

expand and gram are of rank V in the tokens, whatever r is. Multiplied out in another order they need no bottleneck:

    expand   (x a^T 1) x_v b^T     = (x (1^T a)^T) (x_v b^T)         two vectors of an image, K + N products a token
    gram     (x a^T x_v^T) x_v b^T = (x (x_v a)^T) (x_v b^T)         the same for each of V visual tokens
             (x_t x_v^T) x_v       = x_t (x_v^T x_v)                 for many of them, over a small bottleneck

Equal but for rounding, and plain PyTorch: autograd, torch.compile and autocast take it as they take the reference.
Where each pays, and why no kernel does: `python bench/routed_low_rank.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .routing import FUNCTIONS, MANY, route, up

# A thin product runs at about half the rate of one over a bottleneck: it must save half of the multiplications.
GAIN = 2


def routed_low_rank(
    x: Tensor, a: Tensor, b: Tensor, x_v: Tensor | None, function: str, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """out + scale * route(function, x a^T, x_v) b^T, (B, T, P N). Differentiable in x, a, b, x_v and out.

    Args:
        x: (B, T, K). a: (P r, K). b: (N, r), or (P, N, r) for P products that share a bottleneck.
        x_v: (B, V, P r), the image brought down by a, once for all tokens; V = 1 but for gram. none takes None.
        function: none, add, mul, expand or gram: `routing.route`.
        out: (B, T, P N), what the branch is beside; not changed.

    Raises: ValueError, TypeError.
    """
    _need(x, a, b, x_v, function, out)
    scale = checks.need_finite("scale", scale)
    if thin(function, x, a, b, x_v):
        t = x @ (a.sum(0)[:, None] if function == "expand" else (x_v @ a).mT)
        v = _scaled(up(x_v, b), scale)
        # autocast would bring a wider out down.
        if out is not None and out.dtype == t.dtype == v.dtype:
            return torch.baddbmm(out, t, v)
        delta = t @ v
    else:
        x_t = F.linear(x, a)
        routed = x_t @ (x_v.mT @ x_v) if square(function, x, a, x_v) else route(function, x_t, x_v)
        delta = up(_scaled(routed, scale), b)
    return delta if out is None else out + delta


def thin(function: str, x: Tensor, a: Tensor, b: Tensor, x_v: Tensor | None) -> bool:
    """Whether the way without a bottleneck is taken: where it needs at most a GAIN-th of the multiplications."""
    if function not in ("expand", "gram"):
        return False
    (_, tokens, k), (rank, _), n = x.shape, a.shape, b.shape[-2]
    ends = rank * (k + n)
    return GAIN * x_v.shape[1] * (ends + tokens * (k + rank // b.shape[-1] * n)) <= tokens * ends


def square(function: str, x: Tensor, a: Tensor, x_v: Tensor | None) -> bool:
    """Whether gram goes over x_v^T x_v, (P r)^2 of an image, and not over (T, V) products of text and image."""
    if function != "gram":
        return False
    tokens, images, rank = x.shape[1], x_v.shape[1], a.shape[0]
    return GAIN * rank**2 * (images + tokens) <= 2 * tokens * images * rank


def _scaled(t: Tensor, scale: float) -> Tensor:
    return t if scale == 1 else t * scale


def _need(x, a, b, x_v, function, out) -> None:
    """Shapes. dtypes and devices are left to the products, which autocast may change."""
    if function not in FUNCTIONS:
        raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}, got {function!r}")
    checks.need_matrix("a", a)
    if not isinstance(b, Tensor) or b.dim() not in (2, 3) or b.numel() == 0:
        raise ValueError(f"b must be a non-empty (N, r) or (P, N, r), got {checks.describe(b)}")
    products = 1 if b.dim() == 2 else len(b)
    if a.shape[0] != products * b.shape[-1]:
        want = products * b.shape[-1]
        raise ValueError(f"a must have {want} rows for b {tuple(b.shape)}, got {tuple(a.shape)}")
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != a.shape[1]:
        raise ValueError(f"x must be (B, T, {a.shape[1]}), got {checks.describe(x)}")
    if function != "none":
        batch, rank = x.shape[0], a.shape[0]
        if not isinstance(x_v, Tensor) or x_v.dim() != 3 or (x_v.shape[0], x_v.shape[2]) != (batch, rank):
            raise ValueError(f"{function} needs x_v ({batch}, V, {rank}), got {checks.describe(x_v)}")
        if x_v.shape[1] != 1 and function not in MANY:
            raise ValueError(f"{function} takes one visual token, got {x_v.shape[1]}: take their mean, or gram")
    if out is not None:
        want = (*x.shape[:2], products * b.shape[-2])
        if not isinstance(out, Tensor) or tuple(out.shape) != want:
            raise ValueError(f"out must be {want}, got {checks.describe(out)}")
