// CPU kernels of regularized mask tuning. Formulas and shapes: rmt_kernels/reference.py.
//
// Every kernel is compiled once per instruction set (a namespace each, picked at run time by `kernels()`), takes raw
// pointers to contiguous rows unless a stride is given, and splits its work by rows or by elements. What is summed over
// a layer is summed over fixed blocks, and these in order: results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace rmt::cpu {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// State of the draws: see philox_uniform in reference.py.
struct Draw {
  uint64_t seed;
  uint64_t step;
  uint32_t stream;
  uint64_t offset;  // flat index of the first element within the whole layer, a multiple of 4
};

// What gradient_dropout makes of two gradients, flat: reference.gradient_dropout.
struct Gradient {
  const float* task;     // [numel]
  const float* general;  // [numel] or null: no dropout
  const void* weight;    // [numel] of weight_dtype, or null: the gradients are the scores' own
  DType weight_dtype;
  const float* scores;  // [numel], or null: no L2 term
  float penalty;        // factor of the L2 term
  float rest;           // 1 - lambda, what remains of a dropped element
  Draw draw;
};

// How Adam's moments are stored: reference.load_moment.
enum class Moments : int { f32 = 0, bf16 = 1, u8 = 2 };

struct UpdateLayer {
  Gradient gradient;    // its task, general and weight are [N, K]
  float* scores;        // [N, K]
  uint32_t* bits;       // [N, ceil(K / 32)]
  void* exp_avg;        // [N, K] of MaskUpdate::moments, as exp_avg_sq
  void* exp_avg_sq;
  uint8_t* exponents[2];  // [ceil(N K / 256)] each, of exp_avg and exp_avg_sq, or null
  void* dense;            // [N, K], or null; rewritten only where a word changes
  const void* weight;     // [N, K] of gradient.weight_dtype, read with dense
  DType dense_dtype;      // weight's, or bf16 beside f32
  int64_t n, k;
};

// What comes of a layer's scores.
struct UpdateSums {
  double squares;             // of the new scores
  int64_t flipped, on, nans;  // bits that changed, bits that are on, words that hold a NaN score
};

struct MaskUpdate {
  const UpdateLayer* layers;  // [count]
  int64_t count;
  Moments moments;
  float step_size, denom_scale;     // reference.adam_factors
  float rest1, beta2, rest2;  // 1 - beta1, beta2, 1 - beta2: subtracted in double, 1 - 0.999f is off by 5e-5
  float eps, threshold;
  bool squares;      // whether the sums of squares are wanted
  UpdateSums* sums;  // [count], out
};

// Rows of x that share a mask.
struct RowGroup {
  const uint32_t* bits;  // [N, ceil(K / 32)], or null: all of weight
  int64_t first, last;   // rows first .. last - 1
};

struct MaskedLinear {
  const void* x;         // [M, K], row stride x_stride
  const void* weight;    // [N, K]
  const void* bias;      // [N] or null
  const RowGroup* rows;  // [groups], disjoint
  void* y;               // [M, N], out; rows of no group are left alone
  DType dtype;           // of x, weight, bias and y
  int64_t groups, n, k, x_stride;
};

struct WeightGrad {
  const void* g;  // [M, N] bf16, row stride g_stride
  const void* x;  // [M, K] bf16, row stride x_stride
  float* out;     // [N, K], = g.T @ x, or += where accumulate
  int64_t m, n, k, g_stride, x_stride;
  bool accumulate;
};

// pack_scores returns how many words held a NaN score.
struct Kernels {
  const char* isa;
  bool has_bf16;  // masked_linear in bf16
  int64_t (*pack_scores)(const float* scores, int64_t n, int64_t k, float threshold, uint32_t* bits, int threads);
  void (*pack_bits)(const uint8_t* mask, int64_t n, int64_t k, uint32_t* bits, int threads);
  void (*unpack_bits)(const uint32_t* bits, int64_t n, int64_t k, uint8_t* mask, int threads);
  void (*masked_weight)(const void* weight, const uint32_t* bits, int64_t n, int64_t k, int itemsize, void* out, int threads);
  // out = masked_weight(weight, bits) in place of masked_weight(weight, old). Words that are equal are not touched.
  void (*swap_mask)(const void* weight, const uint32_t* bits, const uint32_t* old, int64_t n, int64_t k, int itemsize, void* out, int threads);
  void (*gradient_dropout)(const Gradient& p, float* grad, int64_t numel, int threads);
  void (*mask_update)(const MaskUpdate& p, int threads);
  void (*masked_linear)(const MaskedLinear& p, int threads);
  void (*uniform)(const Draw& draw, float* out, int64_t numel, int threads);
  void (*weight_grad)(const WeightGrad& p, int threads);  // M > 0; null where no instruction multiplies bf16
  double (*weight_grad_rate)();  // bf16 multiply-adds of weight_grad's instruction in the time of one in fp32
};

// What setup.py could build is in RMT_WITH_*, for dispatch.cpp.
namespace baseline { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
// The rest is avx512's.
namespace amx {
void masked_linear(const MaskedLinear& p, int threads);  // bf16 by tiles
void weight_grad(const WeightGrad& p, int threads);
double weight_grad_rate();
}  // namespace amx

// The widest set this processor has; RMT_CPU_ISA=baseline|avx2|avx512|amx asks for no wider one.
const Kernels& kernels();

// Memory of the calling thread, aligned to 64 bytes, kept for its next call. Contents are whatever was there.
void* scratch(int64_t bytes);

}  // namespace rmt::cpu
