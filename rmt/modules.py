"""Masked layers: drop-in subclasses of torch's own, with frozen weights, trainable scores and packed bits.

    y = x @ (weight * (scores > threshold)).T + bias

`scores` is the one trainable parameter of a layer; its gradient is straight-through. `bits` is a buffer that follows
`scores` by itself: every forward compares version counters (no device is waited for) and repacks what has changed, and
under `torch.compile` repacking is part of the graph. The masked weight that dense products read is cached beside it.
State-dict names of weights and biases are those of the original module.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import rmt_kernels

INIT, THRESHOLD = 1e-2, 5e-3


@functools.cache
def _watch_fused_optimizers() -> None:
    """torch's fused optimizers write parameters without counting a version; bits follow versions. Count them."""

    def count(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            if group.get("fused"):
                torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])

    register_optimizer_step_post_hook(count)


class MaskedModule(nn.Module):
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

    def _weight(self, prefix: str) -> Tensor:
        """(N, K) view of the frozen weight; a convolution's K is C * kh * kw."""
        return self._parameters[prefix + "weight"].flatten(1)

    def _versions(self, prefix: str) -> tuple | None:
        """What changes when scores or weight do: version counters, and addresses for what is assigned to `.data`.

        Writing into `.data` in place (`scores.data.mul_(2)`) leaves no trace; `mask.refresh(force=True)` is for that.
        """
        tensors = (self._parameters[prefix + "scores"], self._parameters[prefix + "weight"])
        if any(t.is_inference() for t in tensors):
            return None
        return tuple((t, t._version, t.data_ptr()) for t in tensors)

    def _is_fresh(self, prefix: str) -> bool:
        old, now = self._packed.get(prefix), self._versions(prefix)
        if old is None or now is None or prefix not in self._dense:
            return False
        return all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(old, now))

    def refresh(self, prefix: str = "", force: bool = False) -> None:
        """Repack bits and rewrite the cached masked weight if scores or weight have changed since they were made."""
        if not force and self._is_fresh(prefix):
            return
        # Never as inference tensors: the next training step must be able to save them.
        with torch.inference_mode(False), torch.no_grad():
            bits = rmt_kernels.pack_scores(self._parameters[prefix + "scores"], self.threshold)
            self._buffers[prefix + "bits"].copy_(bits)
            self._dense[prefix] = rmt_kernels.masked_weight(self._weight(prefix), bits)
        self._packed[prefix] = self._versions(prefix)

    def mark_fresh(self, prefix: str = "") -> None:
        """What `rmt.optim.MaskAdam` calls once it has rewritten scores, bits and the masked weight together."""
        self._packed[prefix] = self._versions(prefix)

    def dense(self, prefix: str = "") -> Tensor:
        """(N, K) weight with off elements 0, up to date. Shared, not a copy."""
        self.refresh(prefix)
        return self._dense[prefix]

    def _bits_and_dense(self, prefix: str) -> tuple[Tensor, Tensor | None]:
        if torch.compiler.is_compiling():
            return rmt_kernels.pack_scores(self._parameters[prefix + "scores"].detach(), self.threshold), None
        self.refresh(prefix)
        return self._buffers[prefix + "bits"], self._dense[prefix]

    def _linear(self, x: Tensor, prefix: str, bias: Tensor | None) -> Tensor:
        if not self.masked:
            return rmt_kernels.reference.linear(x, self._weight(prefix), bias)
        bits, dense = self._bits_and_dense(prefix)
        scores = self._parameters[prefix + "scores"]
        graph = torch.is_grad_enabled() and (scores.requires_grad or x.requires_grad)
        if dense is not None and not graph and x.dtype == dense.dtype and not rmt_kernels.backends.forced():
            # What masked_linear would do, without its 7 us of checks: a plain layer's product, checked by torch.
            return rmt_kernels.reference.linear(x, dense, bias)
        return rmt_kernels.masked_linear(x, self._weight(prefix), bits, bias, dense=dense, scores=scores)

    def _masked_weight(self, prefix: str) -> Tensor:
        """The weight as a differentiable function of the scores, in its own shape."""
        weight = self._parameters[prefix + "weight"]
        if not self.masked:
            return weight
        scores = self._parameters[prefix + "scores"]
        if not (torch.is_grad_enabled() and scores.requires_grad) and not torch.compiler.is_compiling():
            return self.dense(prefix).view_as(weight)
        bits, _ = self._bits_and_dense(prefix)
        return rmt_kernels.masked_weight(self._weight(prefix), bits, scores).view_as(weight)

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
        self._dense, self._packed = {}, {}
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


class FusedMaskedLinear(MaskedModule, nn.Linear):
    """`nn.Linear` with a mask. weight (N, K), bias (N,) frozen; scores (N, K) fp32 trainable; bits int32 buffer.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        init: first value of every score; above the threshold, so that a fresh layer equals the dense one.
        threshold: a weight is on where score > threshold.

    Raises: ValueError for an empty layer, or an init or threshold that is not finite.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, init: float = INIT,
        threshold: float = THRESHOLD, device=None, dtype=None,
    ) -> None:  # fmt: skip
        if in_features < 1 or out_features < 1:
            raise ValueError(f"a layer needs features, got in_features={in_features}, out_features={out_features}")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_masks(init, threshold)

    @classmethod
    def from_linear(cls, linear: nn.Linear, init: float = INIT, threshold: float = THRESHOLD) -> "FusedMaskedLinear":
        """A masked layer on `linear`'s own weight and bias tensors (shared, and frozen from now on)."""
        _need_module(linear, nn.Linear)
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, init, threshold, "meta",
            linear.weight.dtype,
        )  # fmt: skip
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._add_masks(init, threshold)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A plain `nn.Linear` with the mask merged in: exact in every dtype, equal outputs bit for bit."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dense().detach().clone(), requires_grad=False)
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return self._linear(x, "", self.bias)


class FusedMaskedConv2d(MaskedModule, nn.Conv2d):
    """`nn.Conv2d` with a mask: patch embeddings and ResNet convolutions. scores (N, K) with K = C / groups * kh * kw.

    The product is cuDNN's or oneDNN's over the masked weight, whose gradient reaches the scores straight through.
    Arguments are those of `nn.Conv2d`, then init and threshold as for `FusedMaskedLinear`.
    """

    def __init__(self, *args, init: float = INIT, threshold: float = THRESHOLD, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._add_masks(init, threshold)

    @classmethod
    def from_module(cls, conv: nn.Conv2d, init: float = INIT, threshold: float = THRESHOLD) -> "FusedMaskedConv2d":
        """A masked layer on `conv`'s own weight and bias tensors."""
        _need_module(conv, nn.Conv2d)
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode, device="meta",
        )  # fmt: skip
        layer.weight, layer.bias = conv.weight, conv.bias
        layer._add_masks(init, threshold)
        return layer.train(conv.training)

    def to_conv(self) -> nn.Conv2d:
        """A plain `nn.Conv2d` with the mask merged in, exact."""
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, self.padding_mode, device="meta",
        )  # fmt: skip
        conv.weight = nn.Parameter(self.dense().detach().view_as(self.weight).clone(), requires_grad=False)
        conv.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return conv.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, H', W')."""
        return self._conv_forward(x, self._masked_weight(""), self.bias)


class FusedMaskedMultiheadAttention(MaskedModule, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with masks on the packed in-projection (3E, E) and on `out_proj` (E, E).

    Self-attention without returned weights runs the masked linears and scaled-dot-product attention; every other call
    (cross-attention, `need_weights`, key padding) runs `F.multi_head_attention_forward` over the masked weights.
    Arguments are those of `nn.MultiheadAttention`, then init and threshold as for `FusedMaskedLinear`.
    """

    mask_prefixes = ("in_proj_",)

    def __init__(self, *args, init: float = INIT, threshold: float = THRESHOLD, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        _mask_packed_attention(self, init, threshold)

    @classmethod
    def from_module(cls, attn: nn.Module, init: float = INIT, threshold: float = THRESHOLD) -> nn.Module:
        """A masked layer on `attn`'s own tensors. Takes `nn.MultiheadAttention`, or a module of the shape of
        open_clip's own `Attention`: a parameter `in_proj_weight`, a Linear `out_proj`, its own forward."""
        if not isinstance(attn, nn.MultiheadAttention):
            return _masked_attention(attn, init, threshold)
        _need_module(attn, nn.MultiheadAttention)
        layer = copy.copy(attn)
        layer.__class__ = cls
        return _mask_packed_attention(layer, init, threshold)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As `nn.MultiheadAttention.forward`. (L, B, E), or (B, L, E) with batch_first, or (L, E) -> same shape."""
        packed = query is key and key is value and query.dim() == 3 and self.bias_k is None and not self.add_zero_attn
        if packed and not need_weights and key_padding_mask is None and not is_causal:
            return self._self_attention(query, attn_mask), None
        if self.batch_first and query.dim() == 3:
            same = query is key, key is value
            query = query.transpose(0, 1)
            key = query if same[0] else key.transpose(0, 1)
            value = key if same[1] else value.transpose(0, 1)
        y, weights = F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, self._masked_weight("in_proj_"), self.in_proj_bias,
            self.bias_k, self.bias_v, self.add_zero_attn, self.dropout, self.out_proj._masked_weight(""),
            self.out_proj.bias, self.training, key_padding_mask, need_weights, attn_mask,
            average_attn_weights=average_attn_weights, is_causal=is_causal,
        )  # fmt: skip
        return (y.transpose(0, 1) if self.batch_first and y.dim() == 3 else y), weights

    def _self_attention(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        # Layouts, and so rounding, are those of F.multi_head_attention_forward: outputs equal its own bit for bit.
        x = x.transpose(0, 1) if self.batch_first else x  # (L, B, E)
        length, batch, width = x.shape
        heads, size = self.num_heads, width // self.num_heads
        packed = self._linear(x, "in_proj_", self.in_proj_bias)  # (L, B, 3E)
        qkv = packed.unflatten(-1, (3, width)).permute(2, 0, 1, 3).contiguous()
        q, k, v = (t.view(length, batch * heads, size).transpose(0, 1).view(batch, heads, length, size) for t in qkv)
        if attn_mask is not None:
            attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", q.dtype, False)
            attn_mask = attn_mask.view(batch, heads, length, length) if attn_mask.dim() == 3 else attn_mask[None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, self.dropout if self.training else 0.0)
        y = self.out_proj(y.permute(2, 0, 1, 3).contiguous().view(batch * length, width))
        y = y.view(length, batch, width)
        return y.transpose(0, 1) if self.batch_first else y


def _mask_packed_attention(layer: FusedMaskedMultiheadAttention, init: float, threshold: float) -> nn.Module:
    if layer.in_proj_weight is None:
        raise ValueError("attention with separate q, k, v weights (kdim or vdim) cannot be masked here")
    # nn.TransformerEncoderLayer's eval fast path reads weights past our forward; it keeps off where this is False.
    layer._qkv_same_embed_dim = False
    return _mask_attention(layer, init, threshold)


def _mask_attention(layer: nn.Module, init: float, threshold: float) -> nn.Module:
    """Gives a shallow copy of an attention module tables of its own, a masked out-projection and masks."""
    for table in ("_parameters", "_buffers", "_modules"):
        layer.__dict__[table] = layer.__dict__[table].copy()
    layer.out_proj = FusedMaskedLinear.from_linear(layer.out_proj, init, threshold)
    scores = layer.out_proj.scores
    layer._add_masks(init, threshold)
    scores.requires_grad_(True)
    return layer


def _masked_attention(attn: nn.Module, init: float, threshold: float) -> nn.Module:
    """open_clip's own `Attention`, of whatever version: its forward runs as it is, and reads the masked weight.

    The in-projection's product is therefore the host's `F.linear` over the masked weight.
    """
    weight, out_proj = getattr(attn, "in_proj_weight", None), getattr(attn, "out_proj", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(out_proj, nn.Linear):
        raise TypeError(
            "from_module takes nn.MultiheadAttention or a module with a parameter in_proj_weight and a Linear "
            f"out_proj, got {type(attn).__name__}"
        )
    layer = copy.copy(attn)
    layer.__class__ = _masked_class(type(attn))
    return _mask_attention(layer, init, threshold)


@functools.cache
def _masked_class(host: type) -> type:
    body = {
        "mask_prefixes": ("in_proj_",),
        "in_proj_weight": property(lambda self: self._masked_weight("in_proj_")),
        "__reduce__": lambda self: (_rebuild, (host, self.__getstate__())),
    }
    return type(f"FusedMasked{host.__name__}", (MaskedModule, host), body)


def _rebuild(host: type, state: dict) -> nn.Module:
    """Unpickles a module of a class that pickle cannot find by name."""
    layer = _masked_class(host).__new__(_masked_class(host))
    layer.__dict__.update(state)
    return layer


def _need_module(module: Any, kind: type) -> None:
    if not isinstance(module, kind) or isinstance(module, MaskedModule):
        raise TypeError(f"expected a plain {kind.__name__}, got {type(module).__name__}")


@dataclass(frozen=True)
class Mask:
    """One masked weight of a model. `key` is the state-dict name of its weight."""

    key: str
    module: MaskedModule
    prefix: str

    @property
    def weight(self) -> Tensor:
        """(N, K), frozen."""
        return self.module._weight(self.prefix).detach()

    @property
    def scores(self) -> nn.Parameter:
        """(N, K) fp32."""
        return self.module._parameters[self.prefix + "scores"]

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

    def set_bits(self, bits: Tensor) -> None:
        """Set scores so that exactly `bits` are on: the layer's init where on, 0 where off. Raises ValueError."""
        want = tuple(self.module._buffers[self.prefix + "bits"].shape)
        if bits.dtype != torch.int32 or tuple(bits.shape) != want:
            raise ValueError(f"bits must be int32 {want}, got {bits.dtype} {tuple(bits.shape)}")
        on = rmt_kernels.reference.unpack_bits(bits.to(self.scores.device), self.scores.shape[1])
        if not 0 <= self.module.threshold < self.module.init:
            raise ValueError(f"need 0 <= threshold < init, got {self.module.threshold} and {self.module.init}")
        with torch.no_grad():
            self.scores.copy_(on * self.module.init)
        self.refresh()


def masks(model: nn.Module) -> list[Mask]:
    """Every masked weight of a model, in module order; the position is its random stream in `rmt.backward`."""
    return [
        Mask(f"{name}.{prefix}weight" if name else f"{prefix}weight", module, prefix)
        for name, module in model.named_modules()
        if isinstance(module, MaskedModule)
        for prefix in module.mask_prefixes
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
