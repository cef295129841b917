"""Fully sharded training: `fully_shard` (FSDP2) over frozen weights of blocks, and `rmt.row_shards` over masks.

    torchrun --nproc-per-node 4 -m rmt train --shard ...

A block's matrices are gathered before each of its passes, teacher, student and both backward ones, and freed behind it;
so is its masked weight, which products make anew from weight and bits. In bf16 they travel as what products make of
them anyway, rounded. A block is a child of the outermost list of modules of one kind: open_clip's resblocks, timm's
blocks, a Hugging Face model's layers, in all towers. What lies outside of them, embeddings, the patch convolution,
projections, stays whole on every rank, and so do vectors.

torch cannot take `fully_shard` back. So twins of the blocks, with tables of their own, are sharded in the blocks'
place; the blocks' own tensors are emptied meanwhile and filled again at the end.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .masked import MaskedModule, masks
from .modules import turned_into
from .row_shards import RowShards, need_rows
from .world import World


@contextlib.contextmanager
def fully_sharded(
    model: nn.Module, world: World, adam: str = "fp32", precision: str = "fp32"
) -> Iterator[RowShards]:  # fmt: skip
    """Inside, weights of the model's blocks and its masks' scores are sharded; masks must be looked up anew there.

    Afterwards the model is what it was, with the scores of all ranks. After an error it is of no use any more: this
    rank's shares alone are there. All ranks enter and leave together.

    Args:
        adam: format of the moments that will be kept of the rows. precision: of the products, fp32 or bf16.

    Raises: UserError for masks that cannot be cut into rows, before anything is changed.
    """
    found = masks(model)
    need_rows(found, world.size, adam)
    for mask in found:
        mask.refresh()
    blocks = list(blocks_of(model))
    twins = [_sharded_twin(block, world, precision) for _, _, block in blocks]
    for (parent, name, _), twin in zip(blocks, twins):
        parent._modules[name] = twin
    shards = RowShards(world, masks(model))
    yield shards
    shards.bring_back()
    for (parent, name, block), twin in zip(blocks, twins):
        _fill(block, twin, world)
        parent._modules[name] = block


def blocks_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(list, name, block) of the outermost lists of two and more modules of one kind."""
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    inside: set[nn.Module] = set()
    for module in model.modules():
        children = dict(module.named_children())
        alike = len(children) > 1 and len({type(child) for child in children.values()}) == 1
        if module in inside or not isinstance(module, nn.ModuleList | nn.Sequential) or not alike:
            continue
        inside |= set(module.modules())
        for name, child in children.items():
            # What is used elsewhere too must stay whole for it.
            if matrices(child) and all(uses[id(p)] == 1 for p in child.parameters()):
                yield module, name, child


def matrices(block: nn.Module) -> dict[str, nn.Parameter]:
    """What of a block is sharded, by name: its parameters of two and more dimensions, but for scores."""
    found = [module for module in block.modules() if isinstance(module, MaskedModule)]
    scores = {module._parameters[prefix + "scores"] for module in found for prefix in module.mask_prefixes}
    return {name: p for name, p in block.named_parameters() if p.dim() > 1 and p not in scores}


def _sharded_twin(block: nn.Module, world: World, precision: str) -> nn.Module:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    twin, mine = _twin(block), set(matrices(block).values())
    mesh = DeviceMesh.from_group(world.group, next(block.parameters()).device.type)
    # A convolution's gradient would be rounded to its weight's dtype, and other matrices may be read in fp32.
    low = torch.bfloat16 if precision == "bf16" and mine <= _factors(block) else None
    fully_shard(
        twin, mesh=mesh, reshard_after_forward=True, ignored_params=set(block.parameters()) - mine,
        mp_policy=MixedPrecisionPolicy(param_dtype=low, cast_forward_inputs=False),
    )  # fmt: skip
    twin.set_custom_all_gather(_Gather(world))
    for parameter in mine:
        parameter.data = parameter.detach().new_empty(0)
    return twin


def _factors(block: nn.Module) -> set[nn.Parameter | None]:
    """Matrices of linear products alone."""
    names = {nn.Linear: "weight", nn.MultiheadAttention: "in_proj_weight"}
    return {m._parameters.get(name) for m in block.modules() for kind, name in names.items() if isinstance(m, kind)}


def _twin(module: nn.Module) -> nn.Module:
    """A module of the same tensors, at every depth, with tables and hooks of its own, and nothing kept of weights."""
    twin = turned_into(module, type(module))
    twin.__dict__ |= {name: value.copy() for name, value in twin.__dict__.items() if isinstance(value, dict)}
    for name, child in twin._modules.items():
        twin._modules[name] = None if child is None else _twin(child)
    for each in (module, twin) if isinstance(module, MaskedModule) else ():
        each.forget_kept()
    return twin


@torch.no_grad()
def _fill(block: nn.Module, twin: nn.Module, world: World) -> None:
    """Gives a block its tensors back. Collective."""
    mine = dict(block.named_parameters())
    for name, parameter in matrices(twin).items():
        world.sent += parameter.to_local().nbytes
        with world.talking():
            mine[name].data = parameter.full_tensor()


class _Gather:
    """What `fully_shard` gathers weights by: counted, and a lost rank is a UserError."""

    def __init__(self, world: World) -> None:
        self.world = world

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        import torch.distributed as dist

        self.world.sent += input_tensor.nbytes
        # On a CPU a later wait would raise outside of here, and hides nothing.
        later = async_op and input_tensor.device.type != "cpu"
        with self.world.talking():
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=later)
