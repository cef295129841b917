"""A swap: the masked weights of all layers of a model rewritten at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, checks, functions


def masked_weights_(
    outs: Sequence[Tensor], weights: Sequence[Tensor], bits: Sequence[Tensor], olds: Sequence[Tensor] | None = None
) -> None:
    """`masked_weight_` of every layer, in place. CUDA's kernel takes up to 48 layers of one dtype in a launch.

    Args:
        outs, weights: (N, K) each, of one dtype a layer; outs contiguous. bits: (N, ceil(K / 32)) int32 each.
        olds: the bits that each of outs was made of before: only what differs is then read and written.

    Raises: ValueError, TypeError on a wrong shape, dtype, device, layout or number of layers.
    """
    olds = [None] * len(outs) if olds is None else olds
    if not len(outs) == len(weights) == len(bits) == len(olds):
        counts = f"{len(outs)} outs, {len(weights)} weights, {len(bits)} bits and {len(olds)} olds"
        raise ValueError(f"every layer needs one of each, got {counts}")
    together: dict[tuple, list[tuple]] = {}
    for layer in zip(outs, weights, bits, olds):
        together.setdefault((layer[0].device, layer[0].dtype), []).append(layer)
    for (device, _), layers in together.items():
        backend = backends.load(backends.choose("masked_weight_", device.type, layers[0]))
        if not hasattr(backend, "masked_weights_"):
            for out, weight, words, old in layers:
                functions.masked_weight_(out, weight, words, old=old)
            continue
        for layer in layers:
            _need_layer(*layer)
        backend.masked_weights_(*map(list, zip(*layers)))
        functions.written(*(layer[0] for layer in layers))


def _need_layer(out: Tensor, weight: Tensor, bits: Tensor, old: Tensor | None) -> None:
    shape, device = weight.shape, weight.device
    # In one look: 25 layers of four tensors, checked property by property, take longer than the launch and the kernel.
    if out.shape == shape and out.dtype == weight.dtype and out.device == device and out.is_contiguous():
        want = (shape[0], checks.words(shape[1]))
        if all(
            b.shape == want and b.dtype == torch.int32 and b.device == device and b.is_contiguous()
            for b in ((bits,) if old is None else (bits, old))
        ):
            return
    checks.need_matrix("weight", weight)
    checks.need_like("out", out, shape, device, (weight.dtype,))
    checks.need_bits(weight, bits)
    if old is not None:
        checks.need_bits(weight, old)
    raise ValueError(f"out must be contiguous, got strides {out.stride()}")
