// What one instruction set brings to a product of rows: vectors of columns, sums in lanes, and how lanes are added up.
//
// A sum has one order: lane j adds the columns j, j + kLanes, j + 2 kLanes and on, then total() folds halves. It depends
// on nothing else, so any tiling gives the same bits.
#pragma once

#include <utility>

#include "simd.h"

namespace rmt::cpu::RMT_ISA {

// body(0), body(1), .. body(N - 1) with constant indices: arrays of vectors indexed by them stay in registers, which
// gcc does not do for a loop.
template <int N, typename Body, int... I>
inline __attribute__((always_inline)) void unroll(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <int N, typename Body>
inline __attribute__((always_inline)) void unroll(const Body& body) {
  unroll<N>(body, std::make_integer_sequence<int, N>{});
}

#if defined(RMT_AVX512)

// Lane j + lane j + 8, then + 4, + 2, + 1.
inline float fold(__m512 a) {
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}

// to[0 .. 3] = fold(a) .. fold(d), the same additions at a quarter of the instructions.
inline void fold4(__m512 a, __m512 b, __m512 c, __m512 d, float* to) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
  const __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  const __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4E));
  const __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0xB1));
  const __m512i every_fourth = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(every_fourth, one)));
}

struct Lanes {
  using Acc = __m512;
  // Tiles: all weight rows of a block against few rows of x, so that there are sums enough to hide the latency of one;
  // half of them against kRows, 24 sums, where a mask serves six rows.
  static constexpr int kWeightRows = 8, kHalf = 4, kRows = 6, kFewRows = 3;
  static constexpr bool kMasks = true;  // in registers
  static Acc zero() { return _mm512_setzero_ps(); }
};

struct F32 : Lanes {
  using T = float;
  using V = __m512;
  static constexpr int kLanes = 16;
  static V load(const T* from) { return _mm512_loadu_ps(from); }
  static V load(const T* from, uint32_t mask) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from); }
  static Acc multiply_add(V w, V x, Acc acc) { return _mm512_fmadd_ps(w, x, acc); }
  // The multiplication is masked, not the load: that would take an instruction more at its ports. Where a weight is off,
  // x is not looked at, were it NaN.
  using Mask = __mmask16;
  static V load_masked(const T* from, Mask) { return load(from); }
  static Acc multiply_add(V w, V x, Acc acc, Mask mask) { return _mm512_mask3_fmadd_ps(w, x, acc, mask); }
  static T store(float y) { return y; }
};

#if defined(__AVX512BF16__)
#define RMT_HAS_BF16 1
// A lane adds two columns at a time.
struct BF16 : Lanes {
  using T = uint16_t;
  using V = __m512i;
  static constexpr int kLanes = 32;
  static V load(const T* from) { return _mm512_loadu_si512(from); }
  static V load(const T* from, uint32_t mask) { return _mm512_maskz_loadu_epi16(mask, from); }
  static Acc multiply_add(V w, V x, Acc acc) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
  using Mask = __mmask32;
  static V load_masked(const T* from, Mask mask) { return load(from, mask); }
  static Acc multiply_add(V w, V x, Acc acc, Mask) { return multiply_add(w, x, acc); }
  static T store(float y) { return to_bf16(y); }
};
#endif

#else

// Eight lanes that compilers turn into whatever vectors there are.
struct F32 {
  using T = float;
  typedef float V __attribute__((vector_size(32)));
  using Acc = V;
  static constexpr int kLanes = 8, kWeightRows = 4, kHalf = 4, kRows = 2, kFewRows = 2;
  static constexpr bool kMasks = false;
  static Acc zero() { return Acc{}; }
  static V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  static V load(const T* from, uint32_t mask) {
    V v{};
    for (int j = 0; j < kLanes; ++j)
      if (mask >> j & 1) v[j] = from[j];
    return v;
  }
  static Acc multiply_add(V w, V x, Acc acc) { return acc + w * x; }
  using Mask = uint8_t;
  static V load_masked(const T* from, Mask mask) { return load(from, mask); }
  static Acc multiply_add(V w, V x, Acc acc, Mask) { return multiply_add(w, x, acc); }
  static T store(float y) { return y; }
};

inline float fold(F32::Acc a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }

inline void fold4(F32::Acc a, F32::Acc b, F32::Acc c, F32::Acc d, float* to) {
  to[0] = fold(a), to[1] = fold(b), to[2] = fold(c), to[3] = fold(d);
}

#endif

}  // namespace rmt::cpu::RMT_ISA
