"""What masked layers are made of: scores, bits that follow them, the cached masked weight; and a model's masks.

`bits` is a buffer that follows `scores` by itself: every forward compares version counters (no device is waited for)
and repacks what has changed, and under `torch.compile` repacking is part of the graph. The masked weight that dense
products read is cached beside it. A module of which only some weights are selected stores scores of those alone: see
`rmt.compact`.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import rmt_kernels

from .compact import ScoreStorage, capturing

INIT, THRESHOLD = 1e-2, 5e-3


@functools.cache
def _watch_fused_optimizers() -> None:
    """torch's fused optimizers write parameters without counting a version; bits follow versions. Count them."""

    def count(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            if group.get("fused"):
                torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])

    register_optimizer_step_post_hook(count)


class MaskedModule(ScoreStorage):
    """Scores, bits and the cached masked weight for each `{prefix}weight` of a module."""

    mask_prefixes: tuple[str, ...] = ("",)

    def _add_masks(self, init: float, threshold: float) -> None:
        for name, value in (("init", init), ("threshold", threshold)):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        _watch_fused_optimizers()
        self.requires_grad_(False)
        self.init, self.threshold, self.masked = float(init), float(threshold), True
        self._dense: dict[str, Tensor] = {}
        self._packed: dict[str, tuple] = {}
        for prefix in self.mask_prefixes:
            weight = self._parameters[prefix + "weight"]
            if weight.numel() == 0:
                raise ValueError(f"{prefix}weight must not be empty, got shape {tuple(weight.shape)}")
            shape = (weight.shape[0], weight[0].numel())
            scores = torch.full(shape, self.init, dtype=torch.float32, device=weight.device)
            self.register_parameter(prefix + "scores", nn.Parameter(scores))
            self.register_buffer(prefix + "bits", rmt_kernels.pack_scores(scores, self.threshold))

    def _versions(self, prefix: str) -> tuple | None:
        """What changes when scores or weight do: version counters, and addresses for what is assigned to `.data`.

        Writing into `.data` in place (`scores.data.mul_(2)`) leaves no trace; `mask.refresh(force=True)` is for that.
        """
        tensors = [self._parameters[prefix + "scores"], self._parameters[prefix + "weight"]]
        if self._selected(prefix) is not None:
            tensors.append(self._selected(prefix))
        if any(t.is_inference() for t in tensors):
            return None
        return tuple((t, t._version, rmt_kernels.checks.address(t)) for t in tensors)

    def _is_fresh(self, prefix: str) -> bool:
        if prefix in self._unkept:
            return True  # bits are told
        old, now = self._packed.get(prefix), self._versions(prefix)
        if old is None or now is None or prefix not in self._dense:
            return False
        return all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(old, now))

    def refresh(self, prefix: str = "", force: bool = False) -> None:
        """Repack bits and rewrite the kept masked weight if scores or weight have changed since they were made."""
        if not force and self._is_fresh(prefix):
            return
        # Never as inference tensors: the next training step must be able to save them.
        with torch.inference_mode(False), torch.no_grad():
            bits = self._packed_bits(prefix)
            self._buffers[prefix + "bits"].copy_(bits)
            self._keep(prefix, self._dense[prefix].dtype if prefix in self._dense else None)
        self._packed[prefix] = self._versions(prefix)

    def _keep(self, prefix: str, dtype: torch.dtype | None) -> None:
        """Makes the kept masked weight, in the weight's dtype or another."""
        with torch.inference_mode(False), torch.no_grad():
            dense = rmt_kernels.masked_weight(self._weight(prefix), self._buffers[prefix + "bits"])
            dense, old = dense.to(dtype or dense.dtype).contiguous(), self._dense.get(prefix)
            if old is not None and old.dtype == dense.dtype and capturing(old):
                old.copy_(dense)  # where the forward of the same CUDA graph reads
            else:
                self._dense[prefix] = dense

    def mark_fresh(self, prefix: str = "") -> None:
        """What `rmt.optim.MaskAdam` calls once it has rewritten scores, bits and the masked weight together."""
        self._packed[prefix] = self._versions(prefix)

    def forget_kept(self) -> None:
        """Frees all masked weights that are kept; who asks for one makes it again."""
        self._dense, self._packed = {}, {}

    def dense(self, prefix: str = "", dtype: torch.dtype | None = None) -> Tensor:
        """(N, K) weight with off elements 0, up to date, in the weight's dtype or another. Shared, not a copy."""
        self.refresh(prefix)
        dtype = dtype or self._parameters[prefix + "weight"].dtype
        if self._dense[prefix].dtype != dtype:
            self._keep(prefix, dtype)
        return self._dense[prefix]

    def kept(self, prefix: str = "") -> Tensor:
        """(N, K) masked weight, up to date, in the dtype that products read last: 16 bits under autocast."""
        self.refresh(prefix)
        return self._dense[prefix]

    def _bits(self, prefix: str) -> Tensor:
        if torch.compiler.is_compiling():
            return self._packed_bits(prefix)
        self.refresh(prefix)
        return self._buffers[prefix + "bits"]

    def _product_dense(self, prefix: str) -> Tensor | None:
        """The masked weight in the dtype of a product here; None where bits are all: it is not kept, or traced."""
        if torch.compiler.is_compiling() or prefix in self._unkept:
            return None
        weight = self._parameters[prefix + "weight"]
        low = torch.is_autocast_enabled(weight.device.type) and weight.dtype == torch.float32
        return self.dense(prefix, torch.get_autocast_dtype(weight.device.type) if low else None)

    def _linear(self, x: Tensor, prefix: str, bias: Tensor | None) -> Tensor:
        if not self.masked:
            return rmt_kernels.reference.linear(x, self._weight(prefix), bias)
        bits, dense = self._bits(prefix), self._product_dense(prefix)
        scores = self._parameters[prefix + "scores"]
        weight = self._parameters[prefix + "weight"]
        wanted = scores.requires_grad or x.requires_grad or weight.requires_grad
        graph = torch.is_grad_enabled() and wanted
        if dense is not None and not graph and x.dtype == dense.dtype and not rmt_kernels.backends.forced():
            # What masked_linear would do, without its checks: they count beside one row, and torch has its own.
            return rmt_kernels.reference.linear(x, dense, bias)
        return rmt_kernels.masked_linear(
            x, self._weight(prefix), bits, bias, dense=dense, scores=self._routed_scores(prefix)
        )

    def _masked_weight(self, prefix: str) -> Tensor:
        """The weight as a differentiable function of the scores, in its own shape."""
        weight = self._parameters[prefix + "weight"]
        if not self.masked:
            return weight
        scores = self._parameters[prefix + "scores"]
        graph = torch.is_grad_enabled() and (scores.requires_grad or weight.requires_grad)
        if not graph and not torch.compiler.is_compiling() and prefix not in self._unkept:
            return self.dense(prefix).view_as(weight)
        masked = rmt_kernels.masked_weight(self._weight(prefix), self._bits(prefix), self._routed_scores(prefix))
        return masked.view_as(weight)

    def _apply(self, fn, recurse: bool = True):
        # Scores stay fp32 through .half() and .bfloat16(): Adam steps of 8e-5 on 1e-2 vanish in 16 bits.
        kept = {}
        for prefix in self.mask_prefixes:
            scores = self._parameters[prefix + "scores"]
            kept[prefix] = scores.detach(), scores.grad
            scores.grad = None
        super()._apply(fn, recurse)
        for prefix, (old, grad) in kept.items():
            new = self._parameters[prefix + "scores"]
            if new.dtype != torch.float32 and not old.is_meta:
                new.data = old.to(new.device)
            new.grad = None if grad is None else grad.to(new.device)
        self.forget_kept()
        return self

    def _save_to_state_dict(self, *args) -> None:
        for prefix in self.mask_prefixes:
            self.refresh(prefix)
        super()._save_to_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dense": {}, "_packed": {}}

    def __deepcopy__(self, memo: dict) -> "MaskedModule":
        clone = self.__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return clone


@dataclass(frozen=True)
class Mask:
    """One masked weight of a model. `key` is the state-dict name of its weight."""

    key: str
    module: MaskedModule
    prefix: str
    offset = 0  # flat index of the first score in the whole mask

    @property
    def size(self) -> int:
        """Weights, with a score or without."""
        return self.module._parameters[self.prefix + "weight"].numel()

    @property
    def weight(self) -> Tensor:
        """(N, K), frozen."""
        return self.module._weight(self.prefix).detach()

    @property
    def scores(self) -> nn.Parameter:
        """(N, K) fp32, or (S,) where S weights are selected."""
        return self.module._parameters[self.prefix + "scores"]

    @property
    def shape(self) -> torch.Size:
        """Of the scores."""
        return self.scores.shape

    @property
    def selected(self) -> Tensor | None:
        """(N, ceil(K / 32)) int32 bitmap of the weights that have a score; None: all have."""
        return self.module._selected(self.prefix)

    @property
    def bits(self) -> Tensor:
        """(N, ceil(K / 32)) int32, up to date."""
        self.module.refresh(self.prefix)
        return self.module._buffers[self.prefix + "bits"]

    @property
    def dense(self) -> Tensor:
        """(N, K) masked weight, up to date."""
        return self.module.dense(self.prefix)

    def refresh(self, force: bool = False) -> None:
        """Make bits and masked weight follow the scores now. force: also where nothing seems to have changed."""
        self.module.refresh(self.prefix, force)

    @property
    def kept(self) -> Tensor | None:
        """(N, K) masked weight, up to date, in the dtype that products read last."""
        return self.module.kept(self.prefix)

    def mark_fresh(self) -> None:
        """Scores, bits and the masked weight have been rewritten together."""
        self.module.mark_fresh(self.prefix)

    def set_bits(self, bits: Tensor) -> None:
        """Set scores so that exactly `bits` are on: the layer's init where on, 0 where off.

        Raises: ValueError for bits of another layer, or where a weight that is not selected would be off.
        """
        want = tuple(self.module._buffers[self.prefix + "bits"].shape)
        if bits.dtype != torch.int32 or tuple(bits.shape) != want:
            raise ValueError(f"bits must be int32 {want}, got {bits.dtype} {tuple(bits.shape)}")
        on = rmt_kernels.unpack_bits(bits.to(self.scores.device), self.weight.shape[1])
        if self.selected is not None:
            chosen = rmt_kernels.unpack_bits(self.selected, self.weight.shape[1])
            stuck = int((~on & ~chosen).sum())
            if stuck:
                raise ValueError(f"{self.key}: weights that are not selected must be on, got {stuck} that are off")
            on = on[chosen]
        if not 0 <= self.module.threshold < self.module.init:
            raise ValueError(f"need 0 <= threshold < init, got {self.module.threshold} and {self.module.init}")
        with torch.no_grad():
            self.scores.copy_(on * self.module.init)
        self.refresh()


def masks(model: nn.Module) -> list[Mask]:
    """Every masked weight of a model, in module order; the position is its random stream in `rmt.backward`.

    A weight of which nothing is selected has no scores, and is none of them. A wrapper names its model `mask_root`. An
    adapter of peft's holds what it wraps as `base_layer`; keys are the plain model's all the same.
    """
    return [
        Mask(f"{name.removesuffix('.base_layer')}.{prefix}weight" if name else f"{prefix}weight", module, prefix)
        for name, module in getattr(model, "mask_root", model).named_modules()
        if isinstance(module, MaskedModule)
        for prefix in module.mask_prefixes
        if module._parameters[prefix + "scores"].numel()
    ]


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, every masked module of `model` runs with its plain weight: the frozen zero-shot model."""
    modules = [m for m in model.modules() if isinstance(m, MaskedModule)]
    before = [m.masked for m in modules]
    try:
        for module in modules:
            module.masked = False
        yield
    finally:
        for module, masked in zip(modules, before):
            module.masked = masked
