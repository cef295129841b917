// The functions that bindings.cpp binds as cuda_<name>. Plain C++: no CUDA header, no torch.
//
// Pointers are device addresses (0: absent), sizes count elements, strides are those of the rows (inner stride 1), and
// cuda_stream is a cudaStream_t. Everything is asynchronous; std::runtime_error says what could not be launched.
// Names and shapes: rmt_kernels/reference.py. M rows, N out_features, K in_features; bits (N, ceil(K / 32)).
#pragma once

#include <cstdint>
#include <vector>

namespace rmt::cuda {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };  // as rmt_kernels.backends.native.DTYPES

void pack_bits(
    uintptr_t mask,  // (N, K) bool
    int64_t n, int64_t k, int64_t stride,
    uintptr_t bits, uintptr_t cuda_stream);

void pack_scores(
    uintptr_t scores, int dtype,  // (N, K)
    int64_t n, int64_t k, int64_t stride,
    double threshold, uintptr_t bits, uintptr_t cuda_stream);

void unpack_bits(
    uintptr_t bits, int64_t n, int64_t k,
    uintptr_t mask,  // (N, K) bool, contiguous, written
    uintptr_t cuda_stream);

void masked_weight(
    uintptr_t weight, int element_size,  // (N, K) of 2, 4 or 8 bytes
    int64_t n, int64_t k, int64_t stride,
    uintptr_t bits,
    uintptr_t out,  // (N, K), contiguous, written
    uintptr_t cuda_stream);

void masked_weights(
    const std::vector<uintptr_t>& outs,     // one (N, K) each, contiguous, rewritten
    const std::vector<uintptr_t>& weights,  // one (N, K) of element_size bytes each
    const std::vector<uintptr_t>& bits,
    const std::vector<uintptr_t>& olds,     // the bits that each of outs was made of, or 0: not known
    const std::vector<int64_t>& rows,       // N of each
    const std::vector<int64_t>& cols,       // K of each
    const std::vector<int64_t>& strides,    // of the rows of weights
    int element_size, uintptr_t cuda_stream);

enum Moments : int { kMomentsF32 = 0, kMomentsBF16 = 1, kMomentsU8 = 2 };  // as rmt_kernels.backends.native.MOMENTS

// How many partial sums of 16 bytes mask_update writes for such layers.
int64_t mask_update_partials(const std::vector<int64_t>& rows, const std::vector<int64_t>& cols);

void mask_update(
    const std::vector<uintptr_t>& scores,       // one (N, K) fp32 each, contiguous, as all tensors here
    const std::vector<uintptr_t>& bits,
    const std::vector<uintptr_t>& exp_avgs,     // (N, K) of `moments`
    const std::vector<uintptr_t>& exp_avg_sqs,
    const std::vector<uintptr_t>& dense,        // empty, or one (N, K) of dense_dtype each
    const std::vector<uintptr_t>& grads,
    const std::vector<uintptr_t>& weights,      // empty, or one (N, K) of weight_dtype each
    const std::vector<uintptr_t>& generals,     // empty (no dropout), or as `grads`
    const std::vector<uintptr_t>& scales,       // empty, or for 8-bit moments two (ceil(N K / 256),) uint8 each
    const std::vector<int64_t>& rows,           // N of each
    const std::vector<int64_t>& cols,           // K of each
    const std::vector<bool>& chained,           // empty, or whether weights multiply the gradients
    const std::vector<int64_t>& streams,
    const std::vector<int64_t>& offsets,        // of each first element within the whole layer, multiples of 4
    int moments, int weight_dtype, int dense_dtype,  // dense's is weight's, or bf16 beside fp32
    uintptr_t factors,                          // (2,) fp32 from adam_factors
    uintptr_t norms,                            // (L,) fp32, or 0
    uintptr_t counts,                           // (L, 2) int64, or 0
    uintptr_t rng,                              // (2,) int64, or 0
    uintptr_t partials,                         // mask_update_partials x 16 bytes, or 0 without norms and counts
    double l2, double strength, double beta1, double beta2, double eps, double threshold, uintptr_t cuda_stream);

void gradient_dropout(
    uintptr_t grad_task,     // (N, K) fp32, contiguous, as all matrices here
    uintptr_t grad_general,  // or 0: no dropout
    uintptr_t weight, int weight_dtype,  // or 0: the gradients are those of the scores already
    uintptr_t scores, uintptr_t penalty,  // (N, K) and () fp32, or 0: no L2 term
    uintptr_t rng,           // (2,) int64
    int64_t numel, double strength, int64_t stream,
    uintptr_t out,           // (N, K) fp32, written
    uintptr_t cuda_stream);

void masked_linear_small(
    uintptr_t x, int dtype, int64_t x_stride,  // (M, K); dtype is weight's, bias's and y's too
    uintptr_t weight, int64_t weight_stride,   // (N, K)
    const std::vector<uintptr_t>& bits,        // one (N, ceil(K / 32)) for each group of rows, 0: every bit on
    const std::vector<int64_t>& starts,        // the groups' first rows in x and y
    const std::vector<int64_t>& ends,          // the rows behind their last ones
    uintptr_t bias,                            // (N,) or 0
    int64_t n, int64_t k,
    uintptr_t y,                               // (M, N), contiguous; rows of no group are left alone
    uintptr_t cuda_stream);

// How many words fragment_bits writes: 32 for every 16 x 64 elements, N rounded up to 128 and K to 64.
int64_t fragment_words(int64_t n, int64_t k);

void fragment_bits(
    uintptr_t bits, int64_t n, int64_t k,
    uintptr_t fragments,  // (fragment_words(n, k),) int32, written
    uintptr_t cuda_stream);

void masked_gemm(
    uintptr_t x, int dtype, int64_t x_stride,  // (M, K) fp16 or bf16; 16-byte aligned, stride a multiple of 8
    uintptr_t weight, int64_t weight_stride,   // (N, K), likewise
    uintptr_t fragments,                       // from fragment_bits; 0: weight is masked already
    uintptr_t bias,                            // (N,) or 0
    int64_t m, int64_t n, int64_t k,
    uintptr_t y,                               // (M, N), contiguous, written
    uintptr_t cuda_stream);

}  // namespace rmt::cuda
