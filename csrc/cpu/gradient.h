// The gradient of the scores, a tile at a time: chain rule, L2 term, gradient dropout (reference.gradient_dropout). The
// op of that name and the update share it, so that their numbers are the same.
//
// A tile is kTile flat elements that stay in the first-level cache between the passes over them. Every pass runs over
// all kTile of them: a constant count is what lets the compiler vectorise without a remainder, so a shorter tile is
// padded with zeros.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace rmt::cpu::RMT_ISA {

constexpr int kTile = 256;

// from[0 .. kTile), or a copy of its first `count` elements with zeros behind.
template <typename T>
inline const T* padded(const T* from, int64_t count, T* copy) {
  if (count == kTile) return from;
  std::memset(copy, 0, kTile * sizeof(T));
  return static_cast<const T*>(std::memcpy(copy, from, count * sizeof(T)));
}

// fp16 to fp32 by its pattern: the factor 2^112 sets the exponent right, of denormals too.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFF) << 13;
  float x;
  std::memcpy(&x, &magnitude, 4);
  x *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits |= (half & 0x7FFF) >= 0x7C00 ? 0x7F800000u : 0u;
  bits |= static_cast<uint32_t>(half & 0x8000) << 16;
  std::memcpy(&x, &bits, 4);
  return x;
}

// kTile weights in fp32, in place where they are.
inline const float* wide(const void* weight, DType dtype, int64_t first, int64_t count, float* to) {
  if (dtype == DType::f32) return padded(static_cast<const float*>(weight) + first, count, to);
  alignas(64) uint16_t copy[kTile];
  const uint16_t* from = padded(static_cast<const uint16_t*>(weight) + first, count, copy);
  if (dtype == DType::bf16)
    for (int j = 0; j < kTile; ++j) to[j] = to_float(from[j]);
  else
    for (int j = 0; j < kTile; ++j) to[j] = half_to_float(from[j]);
  return to;
}

inline void multiply(const float* x, const float* y, float* __restrict to) {
  for (int j = 0; j < kTile; ++j) to[j] = x[j] * y[j];
}

// a[j] becomes the gradient where it is kept, rest * a[j] where it is dropped.
inline void drop_tile(const float* __restrict b, const uint32_t* __restrict words, float rest, float* __restrict a) {
  for (int j = 0; j < kTile; ++j) {
    const float aj = a[j], sum = aj + b[j];
    // At a = 0 the sign does not matter: both outcomes are 0.
    const float agreement = (aj < 0 ? -sum : sum) / (std::fabs(aj) + std::fabs(b[j]) + 1e-8f);
    const float probability = (1.0f + agreement) * 0.5f;
    a[j] = probability > to_uniform(words[j]) ? aj : rest * aj;
  }
}

inline void draw_tile(const Draw& draw, int64_t first, uint32_t* words) {
  for (int j = 0; j < kTile; j += 32) philox32(draw, static_cast<uint64_t>(first + j) / 4, words + j);
}

// a[j] = gradient of flat element first + j, j < count; `first` is a multiple of 4.
inline void gradient_tile(const Gradient& p, int64_t first, int64_t count, float* __restrict a) {
  alignas(64) float copy[kTile], weights[kTile], other[kTile];
  const float* w = p.weight ? wide(p.weight, p.weight_dtype, first, count, weights) : nullptr;
  const float* task = padded(p.task + first, count, copy);
  if (w)
    multiply(task, w, a);
  else
    std::memcpy(a, task, kTile * sizeof(float));
  if (p.scores) {
    const float* s = padded(p.scores + first, count, copy);
    const float penalty = p.penalty;
    for (int j = 0; j < kTile; ++j) a[j] += penalty * s[j];
  }
  if (!p.general) return;
  const float* b = padded(p.general + first, count, copy);
  if (w) {
    multiply(b, w, other);
    b = other;
  }
  alignas(64) uint32_t words[kTile];
  draw_tile(p.draw, first, words);
  drop_tile(b, words, p.rest, a);
}

}  // namespace rmt::cpu::RMT_ISA
