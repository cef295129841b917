"""The layers of a task bank: a model's own weights, and for every group of rows the bits of its task.

A layer holds no scores and no masked weight. Which bits it uses is in the `Plan` of the call, a context variable: calls
of several threads never see each other's. Without a plan, or compiled, a layer uses the bits in its own buffers, which
are rewritten in place when another task becomes active.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import rmt_kernels as rk

from .attention import PackedAttention
from .config import UserError
from .modules import patch_rows, patches, turned_into
from .stacking import guarded

Bits = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which images of a batch belong to which task.

    bits: one a group, {key: (N, ceil(K / 32)) int32}, of a key that is missing every weight is on. ends: images before
    each group, and their number. invariant: as for `rmt_kernels.grouped_masked_linear`. kept: the layers' own masked
    weights are this task's; a layer that came after the last swap has none, and goes by the bits.
    """

    bits: tuple[Bits, ...]
    ends: tuple[int, ...]
    invariant: bool = False
    kept: bool = False

    def groups(self, key: str) -> tuple[list[Tensor | None], list[int]]:
        """Bits and ends of one weight, neighbours of the same bits taken together."""
        words: list[Tensor | None] = []
        ends = [0]
        for bits, end in zip(self.bits, self.ends[1:]):
            mine = bits.get(key)
            if words and mine is words[-1]:
                ends[-1] = end
            else:
                words.append(mine)
                ends.append(end)
        return words, ends

    def alone(self) -> Iterator[tuple[int, int, "Plan"]]:
        """First image, number of images and plan of every group by itself."""
        for bits, (first, end) in zip(self.bits, pairwise(self.ends)):
            yield first, end - first, Plan((bits,), (0, end - first), self.invariant)


_PLAN: ContextVar[Plan | None] = ContextVar("rmt_bank_plan", default=None)


def _plan() -> Plan | None:
    return None if torch.compiler.is_compiling() else _PLAN.get()


@contextlib.contextmanager
def running(plan: Plan) -> Iterator[None]:
    """Inside, in this thread, the layers follow `plan`."""
    token = _PLAN.set(plan)
    try:
        yield
    finally:
        _PLAN.reset(token)


class BankModule:
    """What a bank's layers share. `{prefix}bits`: buffers of the active task; `keys`: state-dict names by prefix."""

    mask_prefixes: tuple[str, ...] = ("",)

    def _open(self, host: type, keys: dict[str, str], batch_dim: int) -> "BankModule":
        self._host = host, frozenset(self.__dict__)
        self.requires_grad_(False)
        # _masking: prefixes of which the active task has something off.
        self.keys, self._batch_dim, self._dense, self._masking = keys, batch_dim, {}, set()
        for prefix in self.mask_prefixes:
            weight = self._weight(prefix)
            self.register_buffer(prefix + "bits", all_on(*weight.shape, weight.device).clone(), persistent=False)
        return self

    def _weight(self, prefix: str) -> Tensor:
        """(N, K), the plain weight."""
        return self._parameters[prefix + "weight"].flatten(1)

    def _own(self, prefix: str) -> Plan:
        bits = {self.keys[prefix]: self._buffers[prefix + "bits"]} if prefix in self._masking else {}
        return Plan((bits,), (0, 0))

    def _linear(self, x: Tensor, prefix: str, bias: Tensor | None) -> Tensor:
        weight, device = self._weight(prefix), x.device.type
        if torch.compiler.is_compiling():
            return rk.masked_linear(x, weight, self._buffers[prefix + "bits"], bias)
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        plan = _plan() or self._own(prefix)
        if plan.kept and prefix in self._dense and x.dtype == weight.dtype:
            return rk.reference.linear(x, self._dense[prefix], bias)
        words, ends = plan.groups(self.keys[prefix])
        if words == [None] and not plan.invariant and x.dtype == weight.dtype:
            return rk.reference.linear(x, weight, bias)
        batch_dim = self._batch_of(x, prefix)
        rows = x.movedim(batch_dim, 0)
        lead, rows = rows.shape[:-1], rows.reshape(-1, x.shape[-1])
        offsets = [0, len(rows)] if len(words) == 1 else [end * (len(rows) // ends[-1]) for end in ends]
        if torch.is_grad_enabled() and rows.requires_grad:
            # An adapter over the bank trains: only single products have a backward.
            parts = zip(words, pairwise(offsets))
            y = torch.cat([_product(rows[first:end], weight, mine, bias) for mine, (first, end) in parts])
        else:
            y = rk.grouped_masked_linear(rows, weight, words, offsets, bias, invariant=plan.invariant)
        return y.view(*lead, y.shape[-1]).movedim(0, batch_dim)

    def _batch_of(self, x: Tensor, prefix: str) -> int:
        return self._batch_dim if x.dim() > 2 else 0

    def _masked_weight(self, prefix: str) -> Tensor:
        """The weight in its own shape with the off weights 0, for products that are not a linear layer's."""
        weight = self._parameters[prefix + "weight"]
        plan = _plan() or self._own(prefix)
        if plan.kept and prefix in self._dense:
            return self._dense[prefix].view_as(weight)
        words, _ = plan.groups(self.keys[prefix])
        if len(words) > 1:
            raise UserError(f"{self.keys[prefix]} is read as one weight, and cannot serve several tasks in one call")
        return weight if words[0] is None else rk.masked_weight(weight.flatten(1), words[0]).view_as(weight)

    def plain(self, bits: Bits, memo: dict[int, Any]) -> nn.Module:
        """A module of the host's class with the mask merged in, sharing no tensor with this one."""
        host, names = self._host
        plain = turned_into(self, host)
        for name in set(plain.__dict__) - names:
            del plain.__dict__[name]
        for prefix, key in self.keys.items():
            weight, mine = self._parameters[prefix + "weight"], bits.get(key)
            merged = weight.flatten(1).clone() if mine is None else rk.masked_weight(weight.flatten(1), mine)
            plain._parameters[prefix + "weight"] = nn.Parameter(merged.view_as(weight), requires_grad=False)
            del plain._buffers[prefix + "bits"]
        for table in (plain._parameters, plain._buffers, plain._modules):
            for name, value in table.items():
                table[name] = copy.deepcopy(value, memo)
        return plain

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._dense = {prefix: fn(dense) for prefix, dense in self._dense.items()}
        return self


def _product(x: Tensor, weight: Tensor, words: Tensor | None, bias: Tensor | None) -> Tensor:
    return rk.reference.linear(x, weight, bias) if words is None else rk.masked_linear(x, weight, words, bias)


@functools.lru_cache(64)
def all_on(out_features: int, in_features: int, device: torch.device) -> Tensor:
    """The words of a mask with nothing off. Shared: never written."""
    with torch.inference_mode(False):
        ones = torch.full((out_features, -(-in_features // 32)), -1, dtype=torch.int32, device=device)
        if in_features % 32:
            ones[:, -1] = (1 << in_features % 32) - 1
    return ones


class BankLinear(BankModule, nn.Linear):
    """`nn.Linear` under the plan's masks."""

    weight = guarded("")

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x, "", self.bias)


class BankMultiheadAttention(BankModule, PackedAttention):
    """`nn.MultiheadAttention` under the plan's masks; a call that is no plain self-attention runs task by task."""

    mask_prefixes = ("in_proj_",)
    in_proj_weight = guarded("in_proj_")

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, its options by name."""
        plan, dim = _plan(), 0 if self.batch_first else 1
        whole = not (options.get("need_weights", True) or options.get("is_causal"))
        whole = whole and query is key and key is value and self._is_packed(query)
        padding, mask = options.get("key_padding_mask"), options.get("attn_mask")
        if plan is None or len(plan.bits) == 1 or (whole and padding is None):
            return super().forward(query, key, value, **options)
        if mask is not None and mask.dim() == 3:
            raise UserError("attention of several tasks in one call takes one attn_mask for all images")
        parts = []
        for first, count, mine in plan.alone():
            given = options | {"key_padding_mask": None if padding is None else padding.narrow(0, first, count)}
            with running(mine):
                parts.append(super().forward(*(t.narrow(dim, first, count) for t in (query, key, value)), **given))
        outs, weights = zip(*parts)
        return torch.cat(outs, dim), None if weights[0] is None else torch.cat(weights)

    def _linear(self, x: Tensor, prefix: str, bias: Tensor | None) -> Tensor:
        plan = _plan()
        if bias is None or plan is None or not plan.invariant:
            return super()._linear(x, prefix, bias)
        # One image may take the other branch of _self_attention than many: the bias is added after the product in both.
        return super()._linear(x, prefix, None) + bias.to(x.dtype)

    def _batch_of(self, x: Tensor, prefix: str) -> int:
        # PackedAttention hands over (L, B, E), or the rows of (B, L, E).
        return 1 if x.dim() > 2 else 0


class BankConv2d(BankModule, nn.Conv2d):
    """`nn.Conv2d` under the plan's masks. Patches that do not overlap are rows of one grouped product."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            weight = rk.masked_weight(self._weight(""), self._buffers["bits"])
            return self._conv_forward(x, weight.view_as(self.weight), self.bias)
        plan = _plan() or self._own("")
        words, ends = plan.groups(self.keys[""])
        if plan.kept or (len(words) == 1 and not plan.invariant):
            return self._conv_forward(x, self._masked_weight(""), self.bias)
        trains = torch.is_grad_enabled() and x.requires_grad
        if trains or not patches((self.stride, self.padding, self.dilation, self.groups), self.weight):
            if plan.invariant:
                raise UserError(f"{self.keys['']}: invariant answers need a convolution of patches that do not overlap")
            parts = []
            for first, count, mine in plan.alone():
                with running(mine):
                    parts.append(self._conv_forward(x.narrow(0, first, count), self._masked_weight(""), self.bias))
            return torch.cat(parts)
        size = self.weight.shape[2:]
        rows = patch_rows(x, size)
        each = len(rows) // len(x)
        offsets = [end * each for end in ends] if len(words) > 1 else [0, len(rows)]
        y = rk.grouped_masked_linear(rows, self._weight(""), words, offsets, self.bias, invariant=plan.invariant)
        return y.view(len(x), each, -1).transpose(1, 2).unflatten(2, (-1, x.shape[3] // size[1]))


class RowByRow(nn.Parameter):
    """A matrix by which each row is multiplied alone: a product of several rounds by how many they are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ in ("matmul", "__matmul__") and isinstance(args[1], cls) and len(args[0]):
                return torch.cat([func(row, args[1]) for row in args[0].split(1)])
            return func(*args, **(kwargs or {}))


@functools.cache
def by_weight(host: type, prefixes: tuple[str, ...]) -> type:
    """A class for modules whose own forward reads `{prefix}weight`: of several tasks, it runs once for each."""
    body: dict[str, Any] = {"mask_prefixes": prefixes, "forward": split_tasks(host.forward)}
    for prefix in prefixes:
        body[prefix + "weight"] = property(lambda self, prefix=prefix: self._masked_weight(prefix))
    return type(f"Bank{host.__name__}", (BankModule, host), body)


def split_tasks(forward: Any) -> Any:
    """A forward(self, x, ...) that runs once for each task of the plan, on its part of every tensor given by place."""

    @functools.wraps(forward)
    def split(self: nn.Module, *args: Any, **options: Any) -> Any:
        plan, dim = _plan(), getattr(self, "_batch_dim", 0)
        if plan is None or len(plan.bits) == 1:
            return forward(self, *args, **options)
        parts = []
        for first, count, mine in plan.alone():
            # One tensor that is given twice stays one: hosts ask for that.
            own = {id(t): t.narrow(dim, first, count) for t in args if isinstance(t, Tensor)}
            with running(mine):
                parts.append(forward(self, *(own.get(id(t), t) for t in args), **options))
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, dim)
        return tuple(None if values[0] is None else torch.cat(values, dim) for values in zip(*parts))

    return split
