// The method's arithmetic and the bit layouts, element by element. No CUDA header: a host compiler takes this file too,
// and tests/kernels/test_cuda_compile.py checks every function against rmt_kernels/reference.py on the CPU.
#pragma once

#include <cmath>
#include <cstdint>

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

// reference.philox_uniform of the flat indices 4 * group .. 4 * group + 3.
RMT_HD void philox_uniform(int64_t seed, int64_t step, int64_t stream, uint64_t group, float (&uniform)[4]) {
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
  const uint32_t words[4] = {c0, c1, c2, c3};
#pragma unroll
  for (int i = 0; i < 4; ++i) uniform[i] = static_cast<float>(words[i] >> 8) * 0x1p-24f;
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
