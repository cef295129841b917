"""Routing functions: maps in the bottleneck of LoRA or an adapter that let an image steer what the text side does.

Qu, Tuytelaars and Moens, Introducing Routing Functions to Vision-Language Parameter-Efficient Fine-Tuning with Low-Rank
Bottlenecks, ECCV 2024 (arXiv 2403.09377); read in the official code at e91d826. x_t (B, T, r) is the text, x_v
(B, V, r) the image, both brought down by the same A; nothing is normalised, scaled or activated on the way.

    none     x_t                       plain LoRA, or a plain adapter
    add      x_t + x_v                 affine; shifts all tokens alike
    mul      x_t * x_v                 odd in x_v; keeps rank r
    expand   (sum_j x_t[j]) x_v        odd in x_v; every token's output is a multiple of one vector: rank 1
    gram     (x_t x_v^T) x_v           even in x_v: it cannot see the sign of an image feature, so that features with
                                       mean 0 tell it nothing; rank 1 over tokens where V = 1

gram takes any number V of visual tokens, the others one. Official flags: element_add, element_mul, element_mul_expand;
gram is what its parser has no flag for. Deviation: (x_v)^T is a transpose here, and there a reshape, which is the same
for V = 1 alone.

With relu the score of gram is rectified, and the x_v that it weighs is not: (relu(x_t) relu(x_v)^T) x_v. In the
official code its flag does nothing to the other functions.

after_b: routing behind B, in the full width: with y_t = B A x and y_v = B A x_R, (y_t y_v^T) y_v. A dead end, as the
official code says ("does not work"): it is of third order in B, and B begins at 0, so that every gradient is exactly 0
and no step leaves it. It is here to show that, and no configuration has it.
"""

import torch
from torch import Tensor

from rmt_kernels.routing import FUNCTIONS as FUNCTIONS
from rmt_kernels.routing import MANY as MANY
from rmt_kernels.routing import route as route


def after_b(x_t: Tensor, x_v: Tensor, b: Tensor) -> Tensor:
    """gram behind B, a dead end: (B, T, r), (B, V, r), (out, r) -> (B, T, out)."""
    return route("gram", x_t @ b.mT, x_v @ b.mT)


def matrix(function: str, x_v: Tensor) -> tuple[Tensor, Tensor]:
    """The routing function as an affine map of the bottleneck: (B, V, r) -> M (B, r, r), c (B, r).

    route(x_t)[t] = M x_t[t] + c, so that a site's update of its weight is scale * B M A, of its bias scale * B c:
    none M = 1; add M = 1, c = x_v; mul M = diag(x_v); expand M = x_v 1^T; gram M = sum_v x_v x_v^T.
    """
    batch, _, rank = x_v.shape
    eye = torch.eye(rank, dtype=x_v.dtype, device=x_v.device).expand(batch, -1, -1)
    zero = x_v.new_zeros(batch, rank)
    if function == "none":
        return eye, zero
    if function == "add":
        return eye, x_v[:, 0]
    if function == "mul":
        return torch.diag_embed(x_v[:, 0]), zero
    if function == "expand":
        return x_v[:, 0, :, None].expand(-1, -1, rank), zero
    if function == "gram":
        return x_v.mT @ x_v, zero
    raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}, got {function!r}")
