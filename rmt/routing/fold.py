"""One image's update folded into a plain model: for decoding at the host's own cost.

For one x_R the branch of a site is an affine map of its input, so that with M, c of `functions.matrix`

    W <- W + scale * B M A        b <- b + scale * B c        (c of add alone)

A coupled q and v have one M over their joint bottleneck, of which each takes its own rows. With split A is U_t A_t,
and x_v is of the image's own U_v A_v. All products are formed in float64 and rounded once.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UserError
from .attention import PARTS, PREFIX
from .functions import matrix
from .layers import LowRank


def fold(routed: Any, image: Tensor | None, x: Tensor | None) -> nn.Module:
    """`Routed.fold_for`: a plain copy of the routed model, in eval mode."""
    stack = routed.stack
    if any(other.kind == "adapter" for other in stack):
        raise UserError(
            "an adapter cannot be folded: its activation lies between the image's update and the output, so that it is "
            "no change of a weight. Fold routed LoRA alone, or decode with the routed model"
        )
    if routed.config.relu:
        raise UserError("relu cannot be folded: with it a branch is no linear map of its input")
    if (image is None) == (x is None):
        raise UserError("fold_for takes one image, or x, its visual feature")
    _need_own_weights(routed)
    twin = copy.deepcopy(routed.model).eval()
    mine = twin.__dict__["_rmt_routed"][stack.index(routed)]
    with torch.no_grad():
        x_r = _feature(mine, image, x)
        updates = [(parent, name, _update(getattr(parent, name), x_r)) for parent, name in mine.children]
        mine.remove()
        for parent, name, update in updates:
            _add(parent, name.removeprefix(PREFIX), *update)
    return twin


def _feature(routed: Any, image: Tensor | None, x: Tensor | None) -> Tensor:
    """x_R (1, V, d)."""
    if image is not None:
        encode = routed.host.encode
        if encode is None:
            raise UserError("this host does not say how it encodes an image: give x, the visual feature, (1, V, d)")
        image = image[None] if image.dim() == 3 else image
        if len(image) != 1:
            raise UserError(f"fold_for takes one image, got {len(image)}: an update of weights is one image's")
        return routed.context_of_calls.check(routed.reduced(encode(image)))
    x = x[None] if isinstance(x, Tensor) and x.dim() == 1 else x
    x = routed.context_of_calls.check(x)
    if len(x) != 1:
        raise UserError(f"fold_for takes the feature of one image, got {len(x)}: an update of weights is one image's")
    return x


def _update(branch: LowRank, x_r: Tensor) -> tuple[Tensor, Tensor]:
    """(parts, out, in) of the weight, (parts, out) of the bias, in float64."""
    down_t, down_v = (w.double() for w in branch.downs())
    m, c = matrix(branch.function, x_r.double().to(down_v.device) @ down_v.mT)
    parts, _, rank = branch.B.shape
    up, m, c = branch.B.double() * branch.scale, m[0].view(parts, rank, -1), c[0].view(parts, rank, 1)
    return up @ (m @ down_t), (up @ c)[..., 0]


def _add(module: nn.Module, parts: str, weights: Tensor, biases: Tensor) -> None:
    packed = hasattr(module, "in_proj_weight")
    weight = module.in_proj_weight if packed else module.weight
    flipped = not packed and not isinstance(module, nn.Linear)  # Hugging Face's Conv1D
    whole = weight.mT if flipped else weight
    rows = weights.shape[1]
    name = "in_proj_bias" if packed else "bias"
    if getattr(module, name, None) is None and biases.any():
        setattr(module, name, nn.Parameter(weight.new_zeros(len(whole)), requires_grad=weight.requires_grad))
    bias = getattr(module, name, None)
    for n, part in enumerate(parts):
        own = slice(None) if rows == len(whole) else slice(PARTS[part] * rows, (PARTS[part] + 1) * rows)
        whole[own] = (whole[own].double() + weights[n]).to(whole.dtype)
        if bias is not None:
            bias[own] = (bias[own].double() + biases[n]).to(bias.dtype)


def _need_own_weights(routed: Any) -> None:
    """A weight that two modules share would be changed for both."""
    owners: dict[int, set[nn.Module]] = {}
    for module in routed.model.modules():
        for p in module._parameters.values():
            owners.setdefault(id(p), set()).add(module)
    for parent, _ in routed.children:
        weight = parent.in_proj_weight if hasattr(parent, "in_proj_weight") else parent.weight
        if len(owners[id(weight)]) > 1:
            raise UserError("a routed weight is shared with another module, which folding would change as well")
