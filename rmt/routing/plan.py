"""Which branches an injection makes, and where: checked before anything of the host is changed."""

from collections.abc import Callable, Iterator

from torch import nn

from ..config import UserError
from ..masked import MaskedModule
from .attention import ADAPTER, PREFIX, routed_class
from .config import RoutedAdapterConfig, RoutedConfig, RoutedLoRAConfig
from .context import VisualContext
from .hosts import Block, Host, Site
from .layers import Adapter, LowRank

# context -> (module, name of its child, child) of every branch, in the order of layers and sites.
Plan = Callable[[VisualContext], Iterator[tuple[nn.Module, str, nn.Module]]]


def chosen(host: Host, config: RoutedConfig) -> tuple[Block, ...]:
    """The blocks that `config.layers` means. Raises UserError for a number that the host has not."""
    if config.layers is None:
        return host.blocks
    for n in config.layers:
        if not 0 <= n < len(host.blocks):
            raise UserError(f"layers must be from 0 to {len(host.blocks) - 1}, got {n}")
    return tuple(host.blocks[n] for n in sorted(set(config.layers)))


def lora_plan(blocks: tuple[Block, ...], config: RoutedLoRAConfig) -> Plan:
    """Raises UserError for a site that the host lacks, or one that cannot be routed."""
    wanted: list[tuple[Site, str]] = []
    there = dict.fromkeys(name for block in blocks for name in block.sites)
    for name in config.sites:
        if name not in there:
            raise UserError(f"the host has no site {name}: it has {', '.join(there)}")
    for block in blocks:
        # An encoder's layer has no cross-attention, where its decoder's have.
        for name in (name for name in config.sites if name in block.sites):
            part = name.rpartition(".")[2]
            if config.couple_qv and name == "self.v":
                continue
            coupled = config.couple_qv and name == "self.q" and block.sites[name].part is not None
            if config.couple_qv and name == "self.q" and not coupled:
                raise UserError("couple_qv needs a host whose q and v are one projection")
            wanted.append((block.sites[name], "qv" if coupled else part))
    for site, part in wanted:
        if site.kind == "packed":
            routed_class(site.module)
        if isinstance(site.module, MaskedModule):
            raise UserError(
                f"{part} of a {type(site.module).__name__} cannot be routed: its weight is masked. Mask the image "
                "tower alone, or merge_and_unload() the masks first"
            )

    def made(context: VisualContext) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        for site, parts in wanted:
            out, inside = _shape(site)
            yield site.module, PREFIX + parts, LowRank(inside, out, config, context, len(parts) if site.part else 1)

    return made


def adapter_plan(blocks: tuple[Block, ...], config: RoutedAdapterConfig) -> Plan:
    """One adapter behind each module of `Block.adapters`, or one for all of a block."""

    def made(context: VisualContext) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        for block in blocks:
            shared = None
            for module in block.adapters:
                if shared is None or not config.share:
                    shared = Adapter(context.width, config, context)
                yield module, ADAPTER, shared

    return made


def _shape(site: Site) -> tuple[int, int]:
    """(out, in) of one part."""
    if site.kind == "packed":
        out, inside = site.module.in_proj_weight.shape
        return out // 3, inside
    # Hugging Face's Conv1D has its weight the other way round.
    out, inside = site.module.weight.shape if isinstance(site.module, nn.Linear) else site.module.weight.shape[::-1]
    return (out // 3 if site.part else out), inside
