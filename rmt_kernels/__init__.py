"""Kernels of regularized mask tuning: masked matmuls on packed bits, mask gradients with gradient dropout, updates."""

from . import reference
from .backends import BackendUnavailable, explain, use_backend
from .codec import decode_bits, encode_bits
from .functions import (
    gradient_dropout,
    grouped_masked_linear,
    mask_grad,
    mask_update_,
    masked_linear,
    masked_linear_dx,
    masked_weight,
    masked_weight_,
    pack_bits,
    pack_scores,
    rng_state,
    unpack_bits,
    weight_grad_,
)
from .low_rank import routed_low_rank
from .ops import weight_gradients_to
from .reference import adam_factors, keep_probability, logit_cotangents, philox_uniform
from .swap import masked_weights_

__all__ = [
    "BackendUnavailable",
    "adam_factors",
    "decode_bits",
    "encode_bits",
    "explain",
    "gradient_dropout",
    "grouped_masked_linear",
    "keep_probability",
    "logit_cotangents",
    "mask_grad",
    "mask_update_",
    "masked_linear",
    "masked_linear_dx",
    "masked_weight",
    "masked_weight_",
    "masked_weights_",
    "pack_bits",
    "pack_scores",
    "philox_uniform",
    "reference",
    "rng_state",
    "routed_low_rank",
    "unpack_bits",
    "use_backend",
    "weight_grad_",
    "weight_gradients_to",
]  # fmt: skip
