"""Masked layers: drop-in subclasses of torch's own, with frozen weights, trainable scores and packed bits.

    y = x @ (weight * (scores > threshold)).T + bias

`scores` is the one trainable parameter of a layer; its gradient is straight-through. State-dict names of weights and
biases are those of the original module.
"""

from typing import Any

from torch import Tensor, nn

from .masked import INIT, THRESHOLD, MaskedModule


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
        need_plain(linear, nn.Linear)
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
        need_plain(conv, nn.Conv2d)
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


def need_plain(module: Any, kind: type) -> None:
    if not isinstance(module, kind) or isinstance(module, MaskedModule):
        raise TypeError(f"expected a plain {kind.__name__}, got {type(module).__name__}")
