// Declarations of one instruction set's kernels, for its table in masked_linear.cpp.
#pragma once

#include "kernels.h"

namespace rmt::cpu::RMT_ISA {

int64_t pack_scores(const float* scores, int64_t n, int64_t k, float threshold, uint32_t* bits, int threads);
void pack_bits(const uint8_t* mask, int64_t n, int64_t k, uint32_t* bits, int threads);
void unpack_bits(const uint32_t* bits, int64_t n, int64_t k, uint8_t* mask, int threads);
void masked_weight(const void* weight, const uint32_t* bits, int64_t n, int64_t k, int itemsize, void* out, int threads);
void swap_mask(
    const void* weight, const uint32_t* bits, const uint32_t* old, int64_t n, int64_t k, int itemsize, void* out,
    int threads);
void gradient_dropout(const Gradient& p, float* grad, int64_t numel, int threads);
void mask_update(const MaskUpdate& p, int threads);
void uniform(const Draw& draw, float* out, int64_t numel, int threads);
void weight_grad(const WeightGrad& p, int threads);
double weight_grad_rate();

}  // namespace rmt::cpu::RMT_ISA
