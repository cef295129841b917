// y = x @ (weight * bits).T + bias for few rows, straight from the words: weight is read once, for all tasks, and is
// never rewritten. With AVX-512 a word IS the mask register of a load. Compiled once per instruction set.
#include "elementwise.h"
#include "parallel.h"
#include "simd.h"

namespace rmt::cpu::RMT_ISA {

namespace {

#if defined(RMT_AVX512)

struct F32 {
  using T = float;
  using Acc = __m512;
  static Acc zero() { return _mm512_setzero_ps(); }
  static float total(Acc a) { return _mm512_reduce_add_ps(a); }
  static T store(float y) { return y; }

  // acc[r][m] += weight[r, 32 columns] * x[m, 32 columns]. Columns past `live` are read as 0 and not touched.
  template <int R, int M>
  static void step(Acc (&acc)[R][M], const T* const (&w)[R], const T* const (&x)[M], int64_t k, const uint32_t (&word)[R],
                   uint32_t live) {
    for (int half = 0; half < 2; ++half, k += 16) {
      const __mmask16 columns = static_cast<__mmask16>(live >> 16 * half);
      __m512 wr[R];
      for (int r = 0; r < R; ++r) wr[r] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(word[r] >> 16 * half), w[r] + k);
      for (int m = 0; m < M; ++m) {
        const __m512 xm = live == 0xFFFFFFFFu ? _mm512_loadu_ps(x[m] + k) : _mm512_maskz_loadu_ps(columns, x[m] + k);
        for (int r = 0; r < R; ++r) acc[r][m] = _mm512_fmadd_ps(wr[r], xm, acc[r][m]);
      }
    }
  }
};

#if defined(__AVX512BF16__)
struct BF16 {
  using T = uint16_t;
  using Acc = __m512;
  static Acc zero() { return _mm512_setzero_ps(); }
  static float total(Acc a) { return _mm512_reduce_add_ps(a); }
  static T store(float y) { return to_bf16(y); }

  template <int R, int M>
  static void step(Acc (&acc)[R][M], const T* const (&w)[R], const T* const (&x)[M], int64_t k, const uint32_t (&word)[R],
                   uint32_t live) {
    __m512bh wr[R];
    for (int r = 0; r < R; ++r) wr[r] = (__m512bh)_mm512_maskz_loadu_epi16(word[r], w[r] + k);
    for (int m = 0; m < M; ++m) {
      const __m512bh xm = (__m512bh)(live == 0xFFFFFFFFu ? _mm512_loadu_si512(x[m] + k) : _mm512_maskz_loadu_epi16(live, x[m] + k));
      for (int r = 0; r < R; ++r) acc[r][m] = _mm512_dpbf16_ps(acc[r][m], wr[r], xm);
    }
  }
};
#define RMT_HAS_BF16 1
#endif

#else

// Eight or so lanes that compilers turn into vectors; weights are masked on their bit patterns into a small buffer.
struct F32 {
  using T = float;
  struct Acc {
    float lane[8];
  };
  static Acc zero() { return Acc{}; }
  static float total(const Acc& a) {
    float sum = 0;
    for (float lane : a.lane) sum += lane;
    return sum;
  }
  static T store(float y) { return y; }

  template <int R, int M>
  static void step(Acc (&acc)[R][M], const T* const (&w)[R], const T* const (&x)[M], int64_t k, const uint32_t (&word)[R],
                   uint32_t live) {
    alignas(32) float wr[R][32], xm[M][32];
    for (int r = 0; r < R; ++r) load(word[r], live, w[r] + k, wr[r]);
    for (int m = 0; m < M; ++m) load(live, live, x[m] + k, xm[m]);
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m)
        for (int j = 0; j < 32; ++j) acc[r][m].lane[j % 8] += wr[r][j] * xm[m][j];
  }

  static void load(uint32_t word, uint32_t live, const float* from, float* to) {
    if (live == 0xFFFFFFFFu) {
      for (int j = 0; j < 32; ++j) to[j] = word >> j & 1 ? from[j] : 0.0f;
      return;
    }
    // Columns past the row's end are not read.
    for (int j = 0; j < 32; ++j) to[j] = word >> j & 1 ? from[j] : 0.0f;
  }
};

#endif

template <typename P>
struct Tile {
  using T = typename P::T;

  template <int R, int M>
  static void run(const MaskedLinear& p, const uint32_t* bits, int64_t row, int64_t m0) {
    const int64_t words = (p.k + 31) / 32;
    const T* w[R];
    const T* x[M];
    typename P::Acc acc[R][M];
    for (int r = 0; r < R; ++r) w[r] = static_cast<const T*>(p.weight) + (row + r) * p.k;
    for (int m = 0; m < M; ++m) x[m] = static_cast<const T*>(p.x) + (m0 + m) * p.x_stride;
    for (auto& line : acc)
      for (auto& a : line) a = P::zero();
    uint32_t word[R];
    const int64_t whole = p.k / 32;
    for (int64_t i = 0; i < whole; ++i) {
      for (int r = 0; r < R; ++r) word[r] = bits[(row + r) * words + i];
      P::template step<R, M>(acc, w, x, i * 32, word, 0xFFFFFFFFu);
    }
    if (whole < words) {
      for (int r = 0; r < R; ++r) word[r] = bits[(row + r) * words + whole];
      P::template step<R, M>(acc, w, x, whole * 32, word, tail_mask(p.k - whole * 32));
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) {
        const float bias = p.bias ? to_float(static_cast<const T*>(p.bias)[row + r]) : 0.0f;
        static_cast<T*>(p.y)[(m0 + m) * p.n + row + r] = P::store(P::total(acc[r][m]) + bias);
      }
  }

  // R weight rows against rows m0 .. m1 of x, in the largest tiles that fit.
  template <int R>
  static void rows(const MaskedLinear& p, const uint32_t* bits, int64_t row, int64_t m0, int64_t m1) {
    for (; m1 - m0 >= 4; m0 += 4) run<R, 4>(p, bits, row, m0);
    if (m1 - m0 == 3) run<R, 3>(p, bits, row, m0);
    if (m1 - m0 == 2) run<R, 2>(p, bits, row, m0);
    if (m1 - m0 == 1) run<R, 1>(p, bits, row, m0);
  }

  static void all(const MaskedLinear& p, int threads) {
    constexpr int kRows = 4;
    const int64_t words = (p.k + 31) / 32;
    parallel(p.n, kRows, threads, [&](int64_t begin, int64_t end) {
      // A block of weight rows stays in the first cache while every task's rows pass over it.
      for (int64_t row = begin; row < end; row += kRows)
        for (int64_t t = 0; t < p.tasks; ++t) {
          const uint32_t* bits = p.bits + t * p.n * words;
          if (end - row >= kRows)
            rows<kRows>(p, bits, row, p.offsets[t], p.offsets[t + 1]);
          else
            for (int64_t r = row; r < end; ++r) rows<1>(p, bits, r, p.offsets[t], p.offsets[t + 1]);
        }
    });
  }
};

}  // namespace

void masked_linear(const MaskedLinear& p, int threads) {
#if defined(RMT_HAS_BF16)
  if (p.dtype == DType::bf16) return Tile<BF16>::all(p, threads);
#endif
  Tile<F32>::all(p, threads);
}

#define RMT_TEXT_(x) #x
#define RMT_TEXT(x) RMT_TEXT_(x)
const Kernels table = {
    RMT_TEXT(RMT_ISA),
#if defined(RMT_HAS_BF16)
    true,
#else
    false,
#endif
    pack_scores, pack_bits, unpack_bits, masked_weight, gradient_dropout, mask_update, masked_linear, uniform,
#if defined(RMT_HAS_BF16)
    weight_grad, weight_grad_rate,
#else
    nullptr, nullptr,
#endif
};

}  // namespace rmt::cpu::RMT_ISA
