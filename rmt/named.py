"""Modules to mask by name, for models that rmt does not know: `MaskConfig(modules=("visual.trunk.blocks.*.qkv",))`.

A pattern is fnmatch's, case-sensitive: `*` also matches dots. Of what it matches, it means the modules whose weights
can be masked: Linear, Conv2d, nn.MultiheadAttention and attention of its shape (a packed `in_proj_weight` and
`out_proj`), and open_clip's AttentionPool2d, which stands for its four projections.
"""

from collections import Counter
from fnmatch import fnmatchcase

from torch import nn

from .config import UserError

POOL_PARTS = ("q_proj", "k_proj", "v_proj", "c_proj")


def is_attention(module: nn.Module) -> bool:
    """Of nn.MultiheadAttention's shape, which open_clip's own `Attention` has too."""
    packed = isinstance(module._parameters.get("in_proj_weight"), nn.Parameter)
    return packed and isinstance(getattr(module, "out_proj", None), nn.Linear)


def is_pool(module: nn.Module) -> bool:
    """OpenAI's attention pooling, whose forward reads the weights of its four Linears and calls none of them."""
    parts = [getattr(module, name, None) for name in POOL_PARTS]
    return type(module).__name__ == "AttentionPool2d" and all(isinstance(part, nn.Linear) for part in parts)


def expanded(model: nn.Module, names: list[str]) -> list[str]:
    """`names` in module order, each attention pool replaced by its parts."""
    pools = {f"{name}.{part}" for name in names if is_pool(model.get_submodule(name)) for part in POOL_PARTS}
    return [name for name, module in model.named_modules() if name in pools or (name in names and not is_pool(module))]


def find_named(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names of the modules that the patterns mean, in module order, an attention pool as its four parts.

    Raises: UserError for a pattern that means nothing, that names a part which only works as a whole, and where
        weights would be masked twice.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    maskable = [n for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d) or is_attention(m) or is_pool(m)]
    found: dict[str, str] = {}
    for pattern in patterns:
        mine = [name for name in maskable if fnmatchcase(name, pattern)]
        if not mine:
            raise UserError(_nothing(modules, pattern))
        for name in mine:
            _need_whole(modules, name, pattern)
            if name in found:
                raise UserError(f"patterns must not match weights twice: {found[name]!r} and {pattern!r} match {name}")
            found[name] = pattern
    shared = Counter(id(weight) for module in modules.values() for weight in module._parameters.values())
    for name in expanded(model, list(found)):
        if any(shared[id(weight)] > 1 for weight in modules[name]._parameters.values() if weight is not None):
            raise UserError(f"{name} has weights that other modules use as well: they cannot be masked for one alone")
    return expanded(model, list(found))


def _need_whole(modules: dict[str, nn.Module], name: str, pattern: str) -> None:
    parent, _, part = name.rpartition(".")
    owner = modules[parent]
    if (is_attention(owner) and part == "out_proj") or (is_pool(owner) and part in POOL_PARTS):
        raise UserError(
            f"pattern {pattern!r} matches {name}, which its parent never calls: write the name of the parent instead, "
            f"{parent} ({type(owner).__name__}), which is masked with all its projections"
        )


def _nothing(modules: dict[str, nn.Module], pattern: str) -> str:
    kinds = sorted({type(module).__name__ for name, module in modules.items() if fnmatchcase(name, pattern)})
    what = f"only {', '.join(kinds)}" if kinds else "no module"
    return (
        f"pattern {pattern!r} must match a Linear, a Conv2d, an attention with in_proj_weight and out_proj or an "
        f"AttentionPool2d, but matches {what}"
    )
