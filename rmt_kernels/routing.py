"""Routing in a low-rank bottleneck, in plain PyTorch: the reference of `rmt_kernels.routed_low_rank`.

    x_t = x a^T                                              the text, brought down
    y   = out + scale * route(x_t, x_v) b^T                  routed by the image x_v, and brought up

    none     x_t
    add      x_t + x_v
    mul      x_t * x_v
    expand   (sum_j x_t[j]) x_v
    gram     (x_t x_v^T) x_v

Shapes: B images, T tokens, V visual tokens, K in_features, N out_features, P products, r a product's rank.
    x (B, T, K)   a (P r, K)   b (N, r), P = 1, or (P, N, r)   x_v (B, V, P r), V = 1 but for gram   out, y (B, T, P N)

Source: Qu et al., Introducing Routing Functions to Vision-Language Parameter-Efficient Fine-Tuning with Low-Rank
Bottlenecks, ECCV 2024, arXiv:2403.09377.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FUNCTIONS = ("none", "add", "mul", "expand", "gram")
# Those that take more than one visual token.
MANY = ("gram",)


def route(function: str, x_t: Tensor, x_v: Tensor | None, relu: bool = False) -> Tensor:
    """(B, T, r), (B, V, r) -> (B, T, r). x_v is not looked at by none. relu: of the two that gram's score is made of.

    Raises: ValueError for an unknown function.
    """
    if function == "none":
        return x_t
    if function == "add":
        return x_t + x_v
    if function == "mul":
        return x_t * x_v
    if function == "expand":
        return x_t.sum(-1, keepdim=True) * x_v
    if function == "gram":
        return (x_t.relu() @ x_v.relu().mT if relu else x_t @ x_v.mT) @ x_v
    raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}, got {function!r}")


def up(z: Tensor, b: Tensor) -> Tensor:
    """(B, T, P r) -> (B, T, P N): part p of z times b[p]."""
    if b.dim() == 2:
        return F.linear(z, b)
    parts = [F.linear(part, matrix) for part, matrix in zip(z.chunk(len(b), -1), b)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def routed_low_rank(
    x: Tensor, a: Tensor, b: Tensor, x_v: Tensor | None, function: str, scale: float, out: Tensor | None
) -> Tensor:
    """(B, T, K) -> (B, T, P N): scale * route(function, x a^T, x_v) b^T, added to `out` where there is one."""
    delta = scale * up(route(function, F.linear(x, a), x_v), b)
    return delta if out is None else out + delta
