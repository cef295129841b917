"""Which weights of a model get a mask; swapping the masked modules in, and out again.

    tower   target      modules of an open_clip model
    image   attention   visual.transformer.resblocks.*.attn               in- and out-projection of every block
            mlp         visual.transformer.resblocks.*.mlp.c_fc, c_proj
            conv        visual.conv1                                      the patch convolution
    image   attention   visual.attnpool                                   a ResNet's q_proj, k_proj, v_proj, c_proj
            conv        visual.conv*, visual.layer*.*.conv*, .downsample.0
    text    attention   transformer.resblocks.*.attn                      after `text.` where the model has a `text`
            mlp         transformer.resblocks.*.mlp.c_fc, c_proj

Biases, norms, embeddings and `proj` never get one. Default as the official code's R-AMT: attention and conv of the
image tower. A ResNet has no mlp and a text tower no conv: those give nothing there. Blocks may hold
nn.MultiheadAttention (open_clip 2.26 to 3.3) or open_clip main's own Attention: both keep the same state-dict names, by
which masks are known. Other models (timm trunks, Hugging Face) are masked by naming modules: see `rmt.named`.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rmt_kernels import philox_uniform

from .attention import FusedMaskedMultiheadAttention
from .config import PRESETS, MaskConfig, UserError
from .masked import Mask, MaskedModule, masks
from .modules import FusedMaskedConv2d, FusedMaskedLinear, mask_by_weight, to_plain
from .named import expanded, find_named, is_attention, is_pool

_BLOCK = r"transformer\.resblocks\.\d+\."
_VIT = {"attention": _BLOCK + "attn", "mlp": _BLOCK + r"mlp\.(c_fc|c_proj)"}
PATTERNS = {
    "ViT image tower": {t: re.compile(r"visual\." + p) for t, p in (_VIT | {"conv": "conv1"}).items()},
    "ResNet image tower": {
        "attention": re.compile(r"visual\.attnpool"),
        "conv": re.compile(r"visual\.(conv[123]|layer\d\.\d+\.(conv[123]|downsample\.0))"),
    },
    "text tower": {t: re.compile(r"(text\.)?" + p) for t, p in _VIT.items()},
}


# Of the draws of `spread`, which are no run's.
SPREAD_SEED = 0x5350524541440000
EXAMPLE = "MaskConfig(modules=('visual.trunk.blocks.*.qkv',))"


def find_targets(model: nn.Module, config: MaskConfig) -> list[str]:
    """Names of the modules that `config` means, in module order, an attention pool as its four parts.

    Raises: UserError for a model without such a tower, target or module.
    """
    if config.modules:
        return find_named(model, config.modules)
    names, targets = [name for name, _ in model.named_modules()], config.targets or PRESETS["ramt"].targets
    found = []
    for tower in config.towers:
        kind = _tower(model) if tower == "image" else "text tower"
        wanted = {target: PATTERNS[kind][target] for target in targets if target in PATTERNS[kind]}
        mine = {target: [name for name in names if p.fullmatch(name)] for target, p in wanted.items()}
        missing = [target for target in mine if not mine[target]] or (() if mine else targets)
        if missing:
            raise UserError(
                f"{type(model).__name__} has no {', '.join(missing)} to mask in its {kind}: choose other targets, or "
                f"name the modules, as {EXAMPLE}"
            )
        found += [name for matches in mine.values() for name in matches]
    return expanded(model, found)


def _tower(model: nn.Module) -> str:
    visual = getattr(model, "visual", None)
    if isinstance(getattr(visual, "transformer", None), nn.Module):
        return "ViT image tower"
    if all(hasattr(visual, name) for name in ("conv1", "layer4", "attnpool")):
        return "ResNet image tower"
    raise UserError(
        "targets need an open_clip model with a native ViT or ResNet image tower, got "
        f"{type(model).__name__} with image tower {type(visual).__name__}: name its modules instead, as {EXAMPLE}"
    )


def apply_masks(model: nn.Module, config: MaskConfig, selection: Any = None) -> list[Mask]:
    """Swaps masked modules in, in place, freezes all but their scores, and returns their masks in module order.

    All bits are one, so that the logits stay as they were. The model goes to eval mode, where training happens too:
    as in the official code no BatchNorm statistic moves and nothing is dropped but gradients.

    Args:
        selection: what `rmt.select` returns; only weights selected there get a score, and modules without any no mask.

    Raises: UserError where the model has masks already, or a target that cannot be masked; no module is then swapped.
    """
    names, words = find_targets(model, config), None
    if selection is not None:
        known = tuple(f"{name}." for name in names)
        words = {key: value for key, value in selection.words.items() if value.any()}
        strange = [key for key in words if not key.startswith(known)]
        if strange or not words:
            what = f"{strange[0]}, which is none" if strange else "nothing"
            raise UserError(f"the selection must be of weights that the configuration masks, got {what}")
    found = swap_in(model, names, config, words)
    if config.spread:
        spread(found, config)
    return found


@torch.no_grad()
def spread(found: Iterable[Mask], config: MaskConfig) -> None:
    """Draws scores evenly from init plus or minus spread (init - threshold), none at or below the threshold.

    A draw depends on the mask's position and the element alone: all runs, and all ranks, begin alike.
    """
    width = config.spread * (config.init - config.threshold)
    for stream, mask in enumerate(found):
        scores = mask.scores
        rng = torch.tensor([SPREAD_SEED, 0], device=scores.device)
        drawn = config.init + width * (1 - 2 * philox_uniform(rng, stream, tuple(scores.shape)).double())
        lowest = torch.nextafter(torch.tensor(config.threshold), torch.tensor(torch.inf))
        scores.copy_(drawn.float().clamp_(min=lowest.item()))
        mask.refresh()


def apply_keys(model: nn.Module, keys: Iterable[str], config: MaskConfig) -> list[Mask]:
    """`apply_masks` for exactly the weights `keys`, state-dict names, whatever `config` targets: a task file's."""
    modules, names = dict(model.named_modules()), set()
    for key in keys:
        name = key.rpartition(".")[0]
        parent = name.rpartition(".")[0]
        if name not in modules:
            raise UserError(f"the masks are for another model: {type(model).__name__} has no module {name}")
        names.add(parent if parent and is_attention(modules[parent]) else name)
    return swap_in(model, [name for name in modules if name in names], config, dict.fromkeys(keys))


def swap_in(
    model: nn.Module, names: list[str], config: MaskConfig, words: dict[str, Tensor | None] | None
) -> list[Mask]:
    """Masks the modules `names`. words: key -> which weights get a score, None for all; other keys get none at all."""
    if masks(model):
        raise UserError("the model has masks already: load it anew to mask it again")
    _need_unwrapped(model, names)
    made = {}
    for name in names:
        if words is None or any(key.startswith(f"{name}.") for key in words):
            made[name] = _masked(model, name, config)
            _select(made[name], name, words)
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    # What routing has injected and is in training stays so: both are trained jointly.
    routed = [p for routed in model.__dict__.get("_rmt_routed", ()) for p in routed.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    found = masks(model)
    for tuned in [mask.scores for mask in found] + routed:
        tuned.requires_grad_(True)
    return found


def _need_unwrapped(model: nn.Module, names: list[str]) -> None:
    """Raises UserError where a module that is to be masked is an adapter's, or holds one, or lies in one."""
    wrapped = [name for name, module in model.named_modules() if _is_adapter(module)]
    for name in names:
        if any(child.startswith("routed_") for child, _ in model.get_submodule(name).named_children()):
            raise UserError(
                f"{name} cannot be masked: it is routed, and a mask would take its place. remove() the routing first; "
                "or mask other modules, such as the image tower's"
            )
        for other in wrapped:
            if f"{name}.".startswith(f"{other}." if other else "") or other.startswith(f"{name}."):
                state = "merged into it" if getattr(model.get_submodule(other), "merged", False) else "over it"
                raise UserError(
                    f"{name} cannot be masked: {other} has an adapter {state}, and (W + BA) * m is not W * m + BA. "
                    "Mask first and apply the adapter over the masks, or make one model of both (the adapter's "
                    "merge_and_unload) to mask as a base of its own"
                )


def _is_adapter(module: nn.Module) -> bool:
    """peft's layers, and those of others that follow it, by what they have; peft itself need not be there."""
    return isinstance(getattr(module, "base_layer", None), nn.Module) and hasattr(module, "active_adapters")


def _select(module: nn.Module, name: str, words: dict[str, Tensor | None] | None) -> None:
    for mask in masks(module) if words is not None else ():
        chosen = words.get(key := f"{name}.{mask.key}", torch.zeros_like(mask.bits))
        if chosen is not None:
            try:
                mask.module.select(mask.prefix, chosen)
            except ValueError as error:
                raise UserError(f"the selection does not fit {key}: {error}") from error


def _masked(model: nn.Module, name: str, config: MaskConfig) -> nn.Module:
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    options = {"init": config.init, "threshold": config.threshold}
    try:
        if is_pool(parent) or isinstance(parent, nn.TransformerEncoderLayer):
            return mask_by_weight(module, ("",), **options)
        if isinstance(module, nn.Linear):
            return FusedMaskedLinear.from_linear(module, **options)
        if isinstance(module, nn.Conv2d):
            return FusedMaskedConv2d.from_module(module, **options)
        return FusedMaskedMultiheadAttention.from_module(module, **options)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{name} ({type(module).__name__}) cannot be masked: {error}") from error


def remove_masks(model: nn.Module) -> nn.Module:
    """Puts plain modules of their original classes back, in place, with the masked weights merged in. Returns `model`.

    Merging is exact in every dtype: off weights become 0, all others stay bit for bit. A `model` that is itself one
    masked module cannot be changed in place: the plain one is then returned.
    """
    # Children first: a parent's plain twin takes them as it finds them.
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, MaskedModule):
            plain = to_plain(module)
            if not name:
                return plain
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    return model


def count_off(found: Iterable[Mask]) -> tuple[int, int]:
    """(weights whose bit is 0, masked weights), over all masks."""
    rows = per_layer(found)
    return sum(off for _, off, _ in rows), sum(total for _, _, total in rows)


def per_layer(found: Iterable[Mask]) -> list[tuple[str, int, int]]:
    """(key, weights whose bit is 0, weights) of every mask. Weights that were not selected are on, and counted."""
    return [(mask.key, int((~(mask.scores > mask.module.threshold)).sum()), mask.weight.numel()) for mask in found]


def percent_off(found: Iterable[Mask]) -> float:
    """Share of the masked weights that are off, in percent. The official code's measure, up to its `<` for our `<=`."""
    off, total = count_off(found)
    return 100 * off / total
