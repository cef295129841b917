"""Which weights of an open_clip model get a mask, and swapping the masked modules in.

    attention   visual.transformer.resblocks.*.attn          in- and out-projection of every block
    mlp         visual.transformer.resblocks.*.mlp.c_fc, c_proj
    conv        visual.conv1                                 the patch convolution

Biases, norms, embeddings and `proj` never get one; nor does the text tower. Default as the official code's R-AMT:
attention and conv. Blocks may hold nn.MultiheadAttention (open_clip 2.24 to 3.3) or open_clip main's own Attention:
both keep the same state-dict names, by which masks are known.
"""

import re

from torch import nn

from .attention import FusedMaskedMultiheadAttention
from .config import MaskConfig, UserError
from .masked import Mask, masks
from .modules import FusedMaskedConv2d, FusedMaskedLinear

_BLOCK = r"visual\.transformer\.resblocks\.\d+\."
PATTERNS = {
    "attention": re.compile(_BLOCK + r"attn"),
    "mlp": re.compile(_BLOCK + r"mlp\.(c_fc|c_proj)"),
    "conv": re.compile(r"visual\.conv1"),
}
MAKERS = {
    "attention": FusedMaskedMultiheadAttention.from_module,
    "mlp": FusedMaskedLinear.from_linear,
    "conv": FusedMaskedConv2d.from_module,
}


def find_targets(model: nn.Module, targets: tuple[str, ...]) -> dict[str, str]:
    """Module name -> target, in module order. Raises UserError for a model without ViT tower or without a target."""
    if hasattr(getattr(model, "visual", None), "trunk") or not hasattr(model, "visual"):
        raise UserError(f"masks need an open_clip model with a native ViT image tower, got {_tower(model)}")
    names = [name for name, _ in model.named_modules()]
    found = {name: target for name in names for target in targets if PATTERNS[target].fullmatch(name)}
    missing = [target for target in targets if target not in found.values()]
    # A ResNet tower has a conv1 as well, but its stem is not a patch convolution: it has no `transformer`.
    if missing or not hasattr(model.visual, "transformer"):
        names = ", ".join(PATTERNS[target].pattern.replace("\\", "") for target in missing) or "visual.transformer"
        raise UserError(
            f"masks need an open_clip model with a native ViT image tower, got {_tower(model)} without {names}"
        )
    return found


def _tower(model: nn.Module) -> str:
    return f"{type(model).__name__} with image tower {type(getattr(model, 'visual', None)).__name__}"


def apply_masks(model: nn.Module, config: MaskConfig) -> list[Mask]:
    """Swaps masked modules in, in place, freezes all but their scores, and returns their masks in module order.

    All bits are one, so that the logits stay as they were. The model goes to eval mode, where training happens too:
    as in the official code no BatchNorm statistic moves and nothing is dropped but gradients.

    Raises: UserError where the model has masks already, or a target that cannot be masked; no module is then swapped.
    """
    if masks(model):
        raise UserError("the model has masks already: load it anew to mask it again")
    made = {}
    for name, target in find_targets(model, config.targets).items():
        module = model.get_submodule(name)
        try:
            made[name] = MAKERS[target](module, init=config.init, threshold=config.threshold)
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{name} ({type(module).__name__}) cannot be masked: {error}") from error
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    model.eval().requires_grad_(False)
    found = masks(model)
    for mask in found:
        mask.scores.requires_grad_(True)
    return found


def count_off(found: list[Mask]) -> tuple[int, int]:
    """(weights whose bit is 0, masked weights), over all masks."""
    on = sum(int((mask.scores > mask.module.threshold).sum()) for mask in found)
    total = sum(mask.weight.numel() for mask in found)
    return total - on, total


def percent_off(found: list[Mask]) -> float:
    """Share of the masked weights that are off, in percent. The official code's measure, up to its `<` for our `<=`."""
    off, total = count_off(found)
    return 100 * off / total
