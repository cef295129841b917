"""Bank layers into a model, another task into them, and a plain model out."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

import rmt_kernels as rk

from .bank_layers import (
    BankConv2d,
    BankLinear,
    BankModule,
    BankMultiheadAttention,
    Bits,
    RowByRow,
    all_on,
    by_weight,
    split_tasks,
)
from .config import UserError
from .modules import turned_into
from .named import is_attention, is_pool


def open_weights(model: nn.Module, keys: Iterable[str]) -> None:
    """Puts bank layers in the place of the modules that hold the weights `keys`, where none are yet.

    Raises: UserError for a weight that the model does not have, or that no bank layer can hold; nothing is changed.
    """
    made: dict[str, nn.Module] = {}
    for key in keys:
        owner, _, attribute = key.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            raise UserError(f"the task is for another model: {type(model).__name__} has no module {owner}") from None
        prefix = attribute.removesuffix("weight")
        if module._parameters.get(attribute) is None or not attribute.endswith("weight"):
            raise UserError(f"the task is for another model: {type(model).__name__} has no weight {key}")
        if not isinstance(module, BankModule) and owner not in made:
            made |= _opened(model, owner, prefix)
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        # An attention's out_proj is made beside it, and belongs into the new one.
        holder = made.get(parent) or model.get_submodule(parent)
        holder._modules[child] = module
        # Its forward reads the weights of its parts, and calls none of them.
        if is_pool(holder) and "forward" not in holder.__dict__:
            holder.forward = split_tasks(type(holder).forward).__get__(holder)


def _opened(model: nn.Module, owner: str, prefix: str) -> dict[str, nn.Module]:
    parent_name, _, child = owner.rpartition(".")
    module, parent = model.get_submodule(owner), model.get_submodule(parent_name)
    own = type(module).forward
    if is_attention(parent) and child == "out_proj" and isinstance(parent, nn.MultiheadAttention):
        return _opened(model, parent_name, "in_proj_") if not isinstance(parent, BankModule) else {}
    dim = _batch_dim(model, owner)
    if isinstance(module, nn.MultiheadAttention):
        if own is not nn.MultiheadAttention.forward or module.in_proj_weight is None:
            raise UserError(f"{owner} ({type(module).__name__}) has a forward of its own, or separate q, k, v weights")
        attention = _make(module, BankMultiheadAttention, owner, dim)
        return {owner: attention, f"{owner}.out_proj": _make(module.out_proj, BankLinear, f"{owner}.out_proj", dim)}
    if is_pool(parent):
        return {owner: _make(module, by_weight(type(module), ("",)), owner, 0)}
    if isinstance(module, nn.Linear) and own is nn.Linear.forward:
        return {owner: _make(module, BankLinear, owner, dim)}
    if isinstance(module, nn.Conv2d) and own is nn.Conv2d.forward:
        return {owner: _make(module, BankConv2d, owner, 0)}
    if is_attention(module):
        attention = _make(module, by_weight(type(module), ("in_proj_",)), owner, dim)
        return {owner: attention, f"{owner}.out_proj": _make(module.out_proj, BankLinear, f"{owner}.out_proj", 0)}
    return {owner: _make(module, by_weight(type(module), (prefix,)), owner, dim)}


def _make(module: nn.Module, kind: type, name: str, batch_dim: int) -> nn.Module:
    keys = {prefix: f"{name}.{prefix}weight" for prefix in kind.mask_prefixes}
    return turned_into(module, kind)._open(type(module), keys, batch_dim)


def _batch_dim(model: nn.Module, name: str) -> int:
    """Where a module's input has its batch: as its transformer block's attention has it."""
    while name:
        module = model.get_submodule(name)
        attention = module if isinstance(module, nn.MultiheadAttention) else getattr(module, "attn", None)
        if isinstance(attention, nn.Module) and is_attention(attention):
            return 0 if getattr(attention, "batch_first", True) else 1
        name = name.rpartition(".")[0]
    return 0


def open_invariant(model: nn.Module) -> None:
    """Bank layers for all products of the image tower, as `TaskBank(invariant=True)` needs them.

    Raises: UserError for a tower that has others than linear layers, attention and a patch convolution.
    """
    visual = getattr(model, "visual", None)
    plain = type(visual).__name__ == "VisionTransformer" and getattr(visual, "attn_pool", None) is None
    if not plain or not isinstance(visual.proj, nn.Parameter):
        raise UserError(
            "invariant answers need open_clip's own ViT image tower, with a projection and without attention pooling, "
            f"got {type(visual).__name__}"
        )
    kinds = nn.Linear | nn.Conv2d | nn.MultiheadAttention
    for name in [name for name, module in visual.named_modules() if isinstance(module, kinds)]:
        prefix = "in_proj_" if isinstance(visual.get_submodule(name), nn.MultiheadAttention) else ""
        open_weights(model, [f"visual.{name}.{prefix}weight"])
    visual.proj = RowByRow(visual.proj.detach(), False)


def bank_modules(model: nn.Module) -> list[BankModule]:
    """In module order."""
    return [module for module in model.modules() if isinstance(module, BankModule)]


def activate(modules: Sequence[BankModule], bits: Bits, kept: bool) -> None:
    """Makes a task the one whose bits the layers' buffers hold. In place: shapes and addresses stay.

    One call for all bits, and with kept one for all masked weights, of which only the words that differ are rewritten.
    """
    layers = [(module, prefix, key) for module in modules for prefix, key in module.keys.items()]
    buffers = [module._buffers[prefix + "bits"] for module, prefix, _ in layers]
    weights = [module._weight(prefix) for module, prefix, _ in layers]
    news = []
    for (module, prefix, key), buffer, weight in zip(layers, buffers, weights):
        masked = bits.get(key) is not None
        (module._masking.add if masked else module._masking.discard)(prefix)
        news.append(bits[key] if masked else all_on(*weight.shape, weight.device))
        if kept and prefix not in module._dense:
            module._dense[prefix] = rk.masked_weight(weight, buffer)
    if kept and layers:
        rk.masked_weights_([module._dense[prefix] for module, prefix, _ in layers], weights, news, buffers)
    if layers:
        torch._foreach_copy_(buffers, news)


def plain_copy(model: nn.Module, bits: Bits) -> nn.Module:
    """A copy of the model without bank layers, the masks `bits` merged in: exact in every dtype."""
    memo: dict[int, Any] = {}
    # Children first: a parent takes their copies.
    for module in reversed(list(model.modules())):
        if isinstance(module, BankModule):
            memo[id(module)] = module.plain(bits, memo)
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for name, value in module._parameters.items():
            if isinstance(value, RowByRow):
                module._parameters[name] = nn.Parameter(value.data, requires_grad=False)
        if is_pool(module):
            module.__dict__.pop("forward", None)
    return copied
