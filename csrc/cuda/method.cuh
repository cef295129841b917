// The method's arithmetic and the bit layouts, element by element. No CUDA header: a host compiler takes this file too,
// and tests/kernels/test_cuda_compile.py checks every function against rmt_kernels/reference.py on the CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define RMT_HD __host__ __device__ __forceinline__
#else
#define RMT_HD inline
#endif

namespace rmt::cuda {

constexpr float kGdrEps = 1e-8f;  // reference.GDR_EPS

RMT_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A product that is never contracted into an FMA: the reference rounds it, and whether P > U can hang on that.
RMT_HD float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// --- gradient dropout ---------------------------------------------------------------------------------------------

// reference.philox_words of the flat indices 4 * group .. 4 * group + 3.
RMT_HD void philox_words(int64_t seed, int64_t step, int64_t stream, uint64_t group, uint32_t (&words)[4]) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
  uint32_t c2 = static_cast<uint32_t>(step), c3 = static_cast<uint32_t>(static_cast<uint64_t>(step) >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32) + static_cast<uint32_t>(stream);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p2 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p2 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p2);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

RMT_HD float to_uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

// reference.philox_uniform, likewise.
RMT_HD void philox_uniform(int64_t seed, int64_t step, int64_t stream, uint64_t group, float (&uniform)[4]) {
  uint32_t words[4];
  philox_words(seed, step, stream, group, words);
#pragma unroll
  for (int i = 0; i < 4; ++i) uniform[i] = to_uniform(words[i]);
}

// The words of the flat indices at .. at + 3, from two blocks where `at` is not a multiple of 4.
RMT_HD void philox_words_at(int64_t seed, int64_t step, int64_t stream, uint64_t at, uint32_t (&words)[4]) {
  philox_words(seed, step, stream, at / 4, words);
  const int skip = static_cast<int>(at % 4);
  if (skip == 0) return;
  uint32_t next[4];
  philox_words(seed, step, stream, at / 4 + 1, next);
  const uint32_t all[8] = {words[0], words[1], words[2], words[3], next[0], next[1], next[2], next[3]};
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = skip == 1 ? all[i + 1] : skip == 2 ? all[i + 2] : all[i + 3];
}

RMT_HD float keep_probability(float a, float b) {
  const float sign = static_cast<float>((a > 0.0f) - (a < 0.0f));
  return (1.0f + sign * (a + b) / (fabsf(a) + fabsf(b) + kGdrEps)) * 0.5f;
}

// `rest` is 1 - strength, what remains of a dropped element.
RMT_HD float drop(float a, float b, float uniform, float rest) {
  return keep_probability(a, b) > uniform ? a : product(rest, a);
}

// --- Adam ---------------------------------------------------------------------------------------------------------

struct Adam {
  float rest1;  // 1 - beta1
  float beta2;
  float rest2;  // 1 - beta2
  float eps;
};

// One element of reference.mask_update_: lerp as torch.lerp (exact at both ends), then the step.
RMT_HD void adam_step(const Adam& adam, float factor0, float factor1, float g, float& score, float& m, float& v) {
  m = adam.rest1 < 0.5f ? m + adam.rest1 * (g - m) : g - (g - m) * (1.0f - adam.rest1);
  v = product(v, adam.beta2) + product(product(adam.rest2, g), g);
  score -= product(m, factor0) / (product(sqrtf(v), factor1) + adam.eps);
}

// --- stored moments: reference.load_moment, reference.store_moment --------------------------------------------------

constexpr int64_t kRoundingStream = int64_t{1} << 31;  // reference.ROUNDING_STREAM
constexpr int kMomentBlock = 256;                      // reference.MOMENT_BLOCK

RMT_HD uint32_t pattern_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

RMT_HD float of_pattern(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// exp_avg (signed) takes the lower 16 random bits of an element, exp_avg_sq the upper.
template <bool kSigned>
RMT_HD uint32_t rounding_bits(uint32_t word) {
  return kSigned ? word & 0xFFFF : word >> 16;
}

// Upper half of the pattern. Adding to an infinity would make it a NaN.
RMT_HD uint16_t round_bf16(float x, uint32_t random) {
  const uint32_t bits = pattern_of(x);
  return static_cast<uint16_t>((bits + ((bits & 0x7F800000u) == 0x7F800000u ? 0u : random)) >> 16);
}

template <bool kSigned>
RMT_HD float decode8(uint32_t code, uint32_t exponent) {
  const uint32_t c = kSigned ? code & 127u : code;
  uint32_t bits = c != 0 ? ((exponent - (kSigned ? 15 : 31)) << 23) + (c << 20) : 0u;
  if (kSigned) bits |= (code & 128u) << 24;
  return of_pattern(exponent == 255 ? 0x7FC00000u : bits);
}

// E of a block from the largest pattern of its magnitudes: one more where rounding that up would carry.
template <bool kSigned>
RMT_HD uint32_t block_exponent(uint32_t largest) {
  const uint32_t e = (largest + 0xFFFFFu) >> 23, least = kSigned ? 16 : 32;
  return e < least ? least : e > 255 ? 255 : e;
}

template <bool kSigned>
RMT_HD uint32_t encode8(float x, uint32_t exponent, uint32_t random) {
  const uint32_t bits = pattern_of(x), base = (exponent - (kSigned ? 15 : 31)) << 23;
  const int32_t above = static_cast<int32_t>((bits & 0x7FFFFFFFu) - base);
  const float size = of_pattern(bits & 0x7FFFFFFFu), smallest = of_pattern(base + (1u << 20));
  const bool raised = kSigned ? (static_cast<float>(random) + 0.5f) * (smallest * 0x1p-16f) < size : size > 0.0f;
  // 16 bits at the top of the 20 cut off, and half of the last of them: the chance is rounded, not cut.
  const int32_t rounded = (above + static_cast<int32_t>(random << 4) + 8) >> 20, most = kSigned ? 127 : 255;
  const uint32_t c = above < (1 << 20) ? (raised ? 1u : 0u) : static_cast<uint32_t>(rounded < most ? rounded : most);
  return kSigned && x < 0.0f ? c | 128u : c;
}

// --- bits ---------------------------------------------------------------------------------------------------------

// The lowest two bits -> 0xFFFF in each 16-bit half that is on: the AND mask of two packed 16-bit elements.
RMT_HD uint32_t half_masks(uint32_t bits) { return ((bits & 1u) | ((bits & 2u) << 15)) * 0xFFFFu; }

// The lowest bit -> all ones or zero.
RMT_HD uint32_t full_mask(uint32_t bits) { return 0u - (bits & 1u); }

// Fragment-major words, what a lane of a warp that holds 16 rows x 64 columns of W as wgmma (or mma.m16n8k16) operand
// A needs, one word each: word[n / 16][k / 64][lane], lane = 4 * g + t.
//     element (row g + 8 v, column 16 s + 8 h + 2 t + e)  ->  bit 8 (2 v + e) + 7 - (2 s + h)
// so that shifting by 2 s + h brings the four bits of one register pair to the bytes' sign bits.
RMT_HD uint32_t fragment_word(const uint32_t (&rows)[2][2], int t) {  // rows[v][j]: canonical words of row g + 8 v
  uint32_t word = 0;
#pragma unroll
  for (int v = 0; v < 2; ++v) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // i = 2 s + h
      const uint32_t pair = rows[v][i / 4] >> (8 * (i % 4) + 2 * t);
      word |= (pair & 1u) << (16 * v + 7 - i) | (pair >> 1 & 1u) << (16 * v + 15 - i);
    }
  }
  return word;
}

// The lowest four bits -> the sign bits of the four bytes; spread_signs makes masks of them.
RMT_HD uint32_t sign_bytes(uint32_t bits) { return (bits & 0xFu) * 0x10204080u; }

// PTX prmt.b32 with b = 0 and only sign-replicating selectors: nibble 8 + j spreads the sign of byte j over a byte.
RMT_HD uint32_t spread_signs(uint32_t a, uint32_t selector) {
  uint32_t out = 0;
#ifdef __CUDA_ARCH__
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(out) : "r"(a), "r"(selector));
#else
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = a >> (8 * (selector >> (4 * i) & 3u)) & 0xFFu;
    out |= (byte & 0x80u ? 0xFFu : 0u) << (8 * i);
  }
#endif
  return out;
}

// The AND masks of the four registers of operand A for the 16 columns of step s: (v, h) = (0,0), (1,0), (0,1), (1,1).
RMT_HD void fragment_masks(uint32_t word, int s, uint32_t (&mask)[4]) {
  const uint32_t low = word << (2 * s), high = word << (2 * s + 1);
  mask[0] = spread_signs(low, 0x9988);
  mask[1] = spread_signs(low, 0xBBAA);
  mask[2] = spread_signs(high, 0x9988);
  mask[3] = spread_signs(high, 0xBBAA);
}

}  // namespace rmt::cuda
