// The few operations that compilers do not find by themselves, per instruction set. Included inside a namespace of
// its own per translation unit (RMT_ISA), so that no code of a wider set leaks into a narrower one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(RMT_AVX512) || defined(RMT_AVX2)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace rmt::cpu::RMT_ISA {

inline uint32_t tail_mask(int64_t count) { return count >= 32 ? 0xFFFFFFFFu : (1u << count) - 1; }

// Bits of s[j] > threshold, j < 32. NaN compares false.
inline uint32_t compare32(const float* s, float threshold) {
#if defined(RMT_AVX512)
  const __m512 t = _mm512_set1_ps(threshold);
  const uint32_t lo = _mm512_cmp_ps_mask(_mm512_loadu_ps(s), t, _CMP_GT_OQ);
  const uint32_t hi = _mm512_cmp_ps_mask(_mm512_loadu_ps(s + 16), t, _CMP_GT_OQ);
  return lo | hi << 16;
#elif defined(RMT_AVX2)
  const __m256 t = _mm256_set1_ps(threshold);
  uint32_t word = 0;
  for (int j = 0; j < 4; ++j)
    word |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(s + 8 * j), t, _CMP_GT_OQ))) << 8 * j;
  return word;
#else
  uint32_t word = 0;
  for (int j = 0; j < 32; ++j) word |= static_cast<uint32_t>(s[j] > threshold) << j;
  return word;
#endif
}

// Whether any s[j], j < 32, is NaN.
inline bool any_nan32(const float* s) {
#if defined(RMT_AVX512)
  const __m512 lo = _mm512_loadu_ps(s), hi = _mm512_loadu_ps(s + 16);
  return _mm512_cmp_ps_mask(lo, hi, _CMP_UNORD_Q) != 0;
#else
  bool nan = false;
  for (int j = 0; j < 32; ++j) nan |= s[j] != s[j];
  return nan;
#endif
}

// Bits of bytes[j] != 0, j < 32.
inline uint32_t nonzero32(const uint8_t* bytes) {
#if defined(RMT_AVX512)
  return _mm256_test_epi8_mask(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)), _mm256_set1_epi8(-1));
#elif defined(RMT_AVX2)
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
#else
  uint32_t word = 0;
  for (int j = 0; j < 32; ++j) word |= static_cast<uint32_t>(bytes[j] != 0) << j;
  return word;
#endif
}

// bytes[j] = bit j.
inline void expand32(uint32_t word, uint8_t* bytes) {
#if defined(RMT_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), _mm256_maskz_set1_epi8(word, 1));
#else
  for (int j = 0; j < 32; ++j) bytes[j] = word >> j & 1;
#endif
}

// out[j] = bit j ? in[j] : +0, on bit patterns of 2, 4 or 8 bytes.
template <typename T>
inline void select32(uint32_t word, const T* in, T* out) {
#if defined(RMT_AVX512)
  if constexpr (sizeof(T) == 4) {
    _mm512_storeu_si512(out, _mm512_maskz_loadu_epi32(word & 0xFFFF, in));
    _mm512_storeu_si512(out + 16, _mm512_maskz_loadu_epi32(word >> 16, in + 16));
    return;
  } else if constexpr (sizeof(T) == 2) {
    _mm512_storeu_si512(out, _mm512_maskz_loadu_epi16(word, in));
    return;
  }
#endif
  for (int j = 0; j < 32; ++j) out[j] = in[j] & static_cast<T>(-static_cast<T>(word >> j & 1));
}

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57, kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;

// words[j] = the 32 random bits of flat index draw.offset + 4 * group + j, j < 32: eight Philox-4x32-10 blocks.
inline void philox32(const Draw& draw, uint64_t group, uint32_t* words) {
  group += draw.offset / 4;
  uint32_t k0 = static_cast<uint32_t>(draw.seed), k1 = static_cast<uint32_t>(draw.seed >> 32) + draw.stream;
#if defined(RMT_AVX512)
  // One block per 64-bit lane. Only the low halves count: mul_epu32 ignores the rest, so nothing is ever masked off.
  const __m512i counter = _mm512_add_epi64(_mm512_set1_epi64(group), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  __m512i c0 = counter, c1 = _mm512_srli_epi64(counter, 32);
  __m512i c2 = _mm512_set1_epi64(draw.step), c3 = _mm512_set1_epi64(draw.step >> 32);
  for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96);
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
    c1 = p1;
    c3 = p0;
  }
  const __m512i a = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32));
  const __m512i b = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
  _mm512_storeu_si512(words, _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b));
  _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b));
#else
  // Eight independent blocks side by side: 32 x 32 -> 64 bit products that compilers vectorise.
  uint32_t c[4][8];
  for (int j = 0; j < 8; ++j) {
    c[0][j] = static_cast<uint32_t>(group + j);
    c[1][j] = static_cast<uint32_t>((group + j) >> 32);
    c[2][j] = static_cast<uint32_t>(draw.step);
    c[3][j] = static_cast<uint32_t>(draw.step >> 32);
  }
  for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1)
    for (int j = 0; j < 8; ++j) {
      const uint64_t p0 = static_cast<uint64_t>(c[0][j]) * kPhiloxM0, p1 = static_cast<uint64_t>(c[2][j]) * kPhiloxM1;
      c[0][j] = static_cast<uint32_t>(p1 >> 32) ^ c[1][j] ^ k0;
      c[2][j] = static_cast<uint32_t>(p0 >> 32) ^ c[3][j] ^ k1;
      c[1][j] = static_cast<uint32_t>(p1);
      c[3][j] = static_cast<uint32_t>(p0);
    }
  for (int j = 0; j < 8; ++j)
    for (int w = 0; w < 4; ++w) words[4 * j + w] = c[w][j];
#endif
}

// The upper 24 bits as a uniform in [0, 1): exact, and signed, which is what converts in one instruction.
inline float to_uniform(uint32_t word) { return static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f; }

inline float to_float(float x) { return x; }
inline float to_float(uint16_t bf16) {
  const uint32_t wide = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// Round to nearest even, as torch does; NaN stays NaN.
inline uint16_t to_bf16(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  if ((wide & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
  return static_cast<uint16_t>((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
}

constexpr int64_t kCompared = 16;

// Bits of a[j] != b[j], j < count <= kCompared.
inline uint32_t differ16(const uint32_t* a, const uint32_t* b, int64_t count) {
#if defined(RMT_AVX512)
  const __mmask16 live = static_cast<__mmask16>(tail_mask(count));
  return _mm512_mask_cmpneq_epi32_mask(live, _mm512_maskz_loadu_epi32(live, a), _mm512_maskz_loadu_epi32(live, b));
#else
  uint32_t differ = 0;
  for (int64_t j = 0; j < count; ++j) differ |= static_cast<uint32_t>(a[j] != b[j]) << j;
  return differ;
#endif
}

// out[j] = bit j of word ? in[j] : +0 where bit j of changed, j < count <= 32. Nothing else of in and out is touched.
template <typename T>
inline void change32(uint32_t word, uint32_t changed, const T* in, T* out, int64_t count) {
#if defined(RMT_AVX512)
  if constexpr (sizeof(T) == 4) {
    for (int half = 0; half < 2; ++half, word >>= 16, changed >>= 16, in += 16, out += 16) {
      const __mmask16 some = static_cast<__mmask16>(changed);
      if (some) _mm512_mask_storeu_epi32(out, some, _mm512_maskz_loadu_epi32(static_cast<__mmask16>(word & changed), in));
    }
    return;
  } else if constexpr (sizeof(T) == 2) {
    _mm512_mask_storeu_epi16(out, changed, _mm512_maskz_loadu_epi16(word & changed, in));
    return;
  }
#endif
  for (int64_t j = 0; j < count; ++j)
    if (changed >> j & 1) out[j] = word >> j & 1 ? in[j] : T{0};
}

template <typename T>
inline void select_word(uint32_t word, const void* weight, void* out, int64_t first, int64_t count) {
  const T* in = static_cast<const T*>(weight) + first;
  T* to = static_cast<T*>(out) + first;
  if (count == 32) return select32(word, in, to);
  for (int64_t j = 0; j < count; ++j) to[j] = word >> j & 1 ? in[j] : T{0};
}

// out[first + j] = bit j ? weight[first + j] : +0, j < count <= 32, of 2, 4 or 8 bytes each.
inline void select_any(int itemsize, uint32_t word, const void* weight, void* out, int64_t first, int64_t count) {
  if (itemsize == 4) return select_word<uint32_t>(word, weight, out, first, count);
  if (itemsize == 2) return select_word<uint16_t>(word, weight, out, first, count);
  return select_word<uint64_t>(word, weight, out, first, count);
}

// The same of elements of 2, 4 or 8 bytes, from element `first` on, count <= 32. Bits from `count` on are another row's
// elements, or nobody's: masked stores would write them.
inline void change_any(
    int itemsize, uint32_t word, uint32_t changed, const void* weight, void* out, int64_t first, int64_t count) {
  changed &= tail_mask(count);
  const auto at = [&](auto t) {
    using T = decltype(t);
    change32(word, changed, static_cast<const T*>(weight) + first, static_cast<T*>(out) + first, count);
  };
  itemsize == 4 ? at(uint32_t{}) : itemsize == 2 ? at(uint16_t{}) : at(uint64_t{});
}

}  // namespace rmt::cpu::RMT_ISA
