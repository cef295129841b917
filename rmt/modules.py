"""Masked layers: drop-in subclasses of torch's own, with frozen weights, trainable scores and packed bits.

    y = x @ (weight * (scores > threshold)).T + bias

`scores` is the one trainable parameter of a layer; its gradient is straight-through. State-dict names of weights and
biases are those of the original module.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rmt_kernels

from .masked import INIT, THRESHOLD, MaskedModule
from .stacking import guarded, refuse_adapters

_TABLES = ("_parameters", "_buffers", "_modules")


class FusedMaskedLinear(MaskedModule, nn.Linear):
    """`nn.Linear` with a mask. weight (N, K), bias (N,) frozen; scores (N, K) fp32 trainable; bits int32 buffer.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        init: first value of every score; above the threshold, so that a fresh layer equals the dense one.
        threshold: a weight is on where score > threshold.

    Raises: ValueError for an empty layer, or an init or threshold that is not finite.
    """

    weight = guarded("")

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, init: float = INIT,
        threshold: float = THRESHOLD, device=None, dtype=None,
    ) -> None:  # fmt: skip
        if in_features < 1 or out_features < 1:
            raise ValueError(f"a layer needs features, got in_features={in_features}, out_features={out_features}")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        add_masks(self, nn.Linear, init, threshold)

    @classmethod
    def from_linear(cls, linear: nn.Linear, init: float = INIT, threshold: float = THRESHOLD) -> nn.Module:
        """A masked layer on `linear`'s own weight and bias tensors (shared, and frozen from now on).

        A subclass with a forward of its own keeps that forward, which then reads the masked weight.
        """
        need_plain(linear, nn.Linear)
        if type(linear).forward is not nn.Linear.forward:
            return mask_by_weight(linear, ("",), init, threshold)
        return add_masks(turned_into(linear, cls), type(linear), init, threshold)

    def to_linear(self) -> nn.Linear:
        """A plain `nn.Linear` with the mask merged in: exact in every dtype, equal outputs bit for bit."""
        return to_plain(self)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return self._linear(x, "", self.bias)


class FusedMaskedConv2d(MaskedModule, nn.Conv2d):
    """`nn.Conv2d` with a mask: patch embeddings and ResNet convolutions. scores (N, K) with K = C / groups * kh * kw.

    The product is cuDNN's or oneDNN's over the masked weight, whose gradient reaches the scores straight through.
    Arguments are those of `nn.Conv2d`, then init and threshold as for `FusedMaskedLinear`.
    """

    weight = guarded("")

    def __init__(self, *args, init: float = INIT, threshold: float = THRESHOLD, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        add_masks(self, nn.Conv2d, init, threshold)

    @classmethod
    def from_module(cls, conv: nn.Conv2d, init: float = INIT, threshold: float = THRESHOLD) -> nn.Module:
        """A masked layer on `conv`'s own weight and bias tensors; a subclass's own forward is kept, as for Linear."""
        need_plain(conv, nn.Conv2d)
        host = type(conv)
        if (host.forward, host._conv_forward) != (nn.Conv2d.forward, nn.Conv2d._conv_forward):
            return mask_by_weight(conv, ("",), init, threshold)
        return add_masks(turned_into(conv, cls), host, init, threshold)

    def to_conv(self) -> nn.Conv2d:
        """A plain `nn.Conv2d` with the mask merged in, exact."""
        return to_plain(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, H', W')."""
        weight = self._masked_weight("")
        simple = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if torch.is_autocast_enabled(x.device.type) and weight.requires_grad and simple:
            options = (self.stride, self.padding, self.dilation, self.groups)
            return AutocastConv.apply(x, weight, self.bias, options, torch.get_autocast_dtype(x.device.type))
        return self._conv_forward(x, weight, self.bias)


class AutocastConv(torch.autograd.Function):
    """What autocast makes of a convolution, but for its weight gradient: that is summed and kept in fp32.

    Autocast alone would hand the test of signs a gradient that has been rounded to 16 bits.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple, dtype: torch.dtype) -> Tensor:
        x, low = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, low)
        ctx.options = options
        return F.conv2d(x, low, None if bias is None else bias.to(dtype), *options)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, low), (need_x, _, need_bias, *_) = ctx.saved_tensors, ctx.needs_input_grad
        with torch.autocast(g.device.type, enabled=False):
            dx = torch.nn.grad.conv2d_input(x.shape, low, g, *ctx.options) if need_x else None
            if patches(ctx.options, low):
                rows = g.flatten(2).transpose(1, 2).flatten(0, 1), patch_rows(x, low.shape[2:])
                dw = torch.empty(low.flatten(1).shape, device=g.device)
                rmt_kernels.weight_grad_(dw, *rows)
                dw = dw.view(low.shape)
            else:
                dw = torch.nn.grad.conv2d_weight(x.float(), low.shape, g.float(), *ctx.options)
        return dx, dw, g.sum((0, 2, 3)) if need_bias else None, None, None


def patches(options: tuple, weight: Tensor) -> bool:
    """Whether a convolution (stride, padding, dilation, groups) cuts an image into patches that do not overlap."""
    stride, padding, dilation, groups = options
    return (tuple(stride), tuple(padding), tuple(dilation), groups) == (tuple(weight.shape[2:]), (0, 0), (1, 1), 1)


def patch_rows(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) images -> rows of C * kh * kw, one a patch in reading order; what fills no patch is left out."""
    (kh, kw), (h, w) = size, (x.shape[2] // size[0], x.shape[3] // size[1])
    x = x[:, :, : h * kh, : w * kw].unflatten(3, (w, kw)).unflatten(2, (h, kh))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)


def need_plain(module: Any, kind: type) -> None:
    if not isinstance(module, kind) or isinstance(module, MaskedModule):
        raise TypeError(f"expected a plain {kind.__name__}, got {type(module).__name__}")


def turned_into(module: nn.Module, kind: type) -> nn.Module:
    """A `kind` with all that `module` has: the same tensors, children and hooks, in tables of its own."""
    layer = kind.__new__(kind)
    layer.__dict__.update(module.__dict__)
    for table in _TABLES:
        layer.__dict__[table] = module.__dict__[table].copy()
    return layer


def add_masks(layer: MaskedModule, host: type, init: float, threshold: float, **changed: Any) -> MaskedModule:
    """Gives `layer`, so far a `host`, its masks and `changed` attributes, and notes how `to_plain` goes back."""
    absent = [p + "weight" for p in layer.mask_prefixes if layer._parameters.get(p + "weight") is None]
    if absent:
        raise TypeError(f"{host.__name__} has no parameter {absent[0]}: is it parametrized, or quantized?")
    # By name, not by value: what a plain module may change later (hooks, training mode) is kept.
    names = frozenset(layer.__dict__) | frozenset(layer._parameters) | frozenset(layer._buffers)
    layer._plain = host, names, {name: layer.__dict__[name] for name in changed}
    layer.__dict__.update(changed)
    layer._add_masks(init, threshold)
    return layer


def to_plain(layer: MaskedModule) -> nn.Module:
    """A module of the class that `layer` was made of, with the masked weights merged in: exact in every dtype."""
    host, names, changed = layer._plain
    plain = turned_into(layer, host)
    for prefix in layer.mask_prefixes:
        name = prefix + "weight"
        merged = layer.dense(prefix).detach().clone().view_as(layer._parameters[name])
        plain._parameters[name] = nn.Parameter(merged, requires_grad=False)
    for table in (plain.__dict__, plain._parameters, plain._buffers):
        for name in set(table) - names:
            del table[name]
    plain.__dict__.update(changed)
    return plain


def mask_by_weight(module: nn.Module, prefixes: tuple[str, ...], init: float, threshold: float) -> nn.Module:
    """Masks a module whose forward, or whose parent, reads `module.{prefix}weight`: it reads the masked weight there.

    All else of the module runs as it is, and so are its products the host's own over the masked weight.
    """
    layer = turned_into(module, _masked_class(type(module), prefixes))
    return add_masks(layer, type(module), init, threshold)


@functools.cache
def _masked_class(host: type, prefixes: tuple[str, ...]) -> type:
    body = {"mask_prefixes": prefixes, "__reduce__": lambda self: (_rebuild, (host, prefixes, self.__getstate__()))}
    for prefix in prefixes:
        body[prefix + "weight"] = _masked_property(prefix)
    return type(f"FusedMasked{host.__name__}", (MaskedModule, host), body)


def _masked_property(prefix: str) -> property:
    def read(self: MaskedModule) -> Tensor:
        refuse_adapters(prefix + "weight")
        return self._masked_weight(prefix)

    return property(read)


def _rebuild(host: type, prefixes: tuple[str, ...], state: dict) -> nn.Module:
    """Unpickles a module of a class that pickle cannot find by name."""
    kind = _masked_class(host, prefixes)
    layer = kind.__new__(kind)
    layer.__dict__.update(state)
    return layer
