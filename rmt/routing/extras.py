"""What the paper trains besides the low-rank parts: LayerNorms, biases, and what is new in the host."""

from torch import nn

from ..config import UserError
from .config import RoutedConfig
from .hosts import describe
from .plan import chosen


def trainable_extras(
    model: nn.Module, train_ln: bool = False, train_bias: bool = False, train_new: bool = False,
    layers: tuple[int, ...] | None = None, sites: tuple[str, ...] = ("self.q", "self.v"),
) -> dict[str, nn.Parameter]:  # fmt: skip
    """Makes parameters of a host trainable, after an injection has frozen it, and returns them by name.

    The official code trains the layers' LayerNorms and the biases of the products that have LoRA, not the LayerNorm
    before or after all layers. They are no part of `Routed.state_dict`, and `Routed.remove` leaves them as trained.

    Args:
        train_ln: LayerNorms inside the layers. train_bias: biases of the sites' products; a fused one's whole.
        train_new: modules without pretrained values, `model.new_parts`: an answer head, a projection of the image.
        layers: which blocks, by number; None: all.

    Raises: UserError where `model` is no host, nothing is chosen, or it has nothing of a kind.
    """
    host, found = describe(model), []
    blocks = chosen(host, RoutedConfig(layers=layers))
    if not (train_ln or train_bias or train_new):
        raise UserError("expected at least one of train_ln, train_bias, train_new")
    if train_ln:
        units = [unit for block in blocks for unit in block.units]
        norms = [m for unit in units for m in unit.modules() if isinstance(m, nn.LayerNorm)]
        found.append(("train_ln", [p for m in norms for p in m.parameters(recurse=False)]))
    if train_bias:
        touched = [block.sites[name].module for block in blocks for name in sites if name in block.sites]
        biases = [getattr(m, "in_proj_bias" if hasattr(m, "in_proj_weight") else "bias") for m in touched]
        found.append(("train_bias", [p for p in biases if p is not None]))
    if train_new:
        parts = [getattr(model, name) for name in getattr(model, "new_parts", ())]
        found.append(("train_new", [p for part in parts for p in part.parameters()]))
    for name, parameters in found:
        if not parameters:
            raise UserError(f"{name}: {type(model).__name__} has nothing of the kind")
    ids = {id(p) for _, parameters in found for p in parameters}
    extras = {name: p for name, p in model.named_parameters() if id(p) in ids}
    for p in extras.values():
        p.requires_grad_(True)
    return extras
