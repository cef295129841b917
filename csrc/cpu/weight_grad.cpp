// out (+)= g.T @ x in fp32 from bf16 rows: by AMX tiles with RMT_AMX, by vdpbf16ps without.
//
// Both factors are packed first, into blocks of 16 columns x 32 rows (1 KB) that lie one after the other down a panel of
// 16 columns, so that every read of the product is a whole, aligned line. A block holds dwords [pair of rows][column],
// which is what vdpbf16ps and the second factor of an AMX product take; its first factor is the same, transposed. Rows
// and columns that do not exist are packed as zeros.
//
// Each element of out adds up its rows in an order that depends on M alone: threads and cache blocks divide out only.
#include <immintrin.h>

#include <chrono>

#include "elementwise.h"
#include "simd.h"
#include "tiles.h"

namespace rmt::cpu::RMT_ISA {

namespace {

constexpr int64_t kRows = 32, kColumns = 16, kBlock = 1024;  // of a packed block; its bytes
constexpr int64_t kTile = 32;       // a product step makes kTile x kTile of out, from two panels of each factor
constexpr int64_t kL1 = 16;         // blocks of a panel per pass over out: two panels of x, 32 KB, stay in the first cache
constexpr int64_t kL2 = 384;        // out is worked off in squares of at most this: with their panels they fit 2 MB
constexpr int64_t kStretch = 2048;  // rows packed at once: bounds the scratch memory at 4 KB a column
constexpr int64_t kGroup = 8;       // panels that are packed in one go

int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Packs up to 32 rows of 16 columns; `live` has a bit for every column that exists.
template <bool kTransposed>
void pack_block(const uint16_t* from, int64_t stride, int64_t rows, __mmask16 live, char* to) {
  __m512i pairs[16];
  for (int p = 0; p < 16; ++p) {
    const __mmask16 first = 2 * p < rows ? live : 0, second = 2 * p + 1 < rows ? live : 0;
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, from + 2 * p * stride));
    const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, from + (2 * p + 1) * stride));
    pairs[p] = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
  }
  if constexpr (kTransposed) transpose(pairs);
  for (int p = 0; p < 16; ++p) _mm512_store_si512(to + 64 * p, pairs[p]);
}

struct Factor {
  const uint16_t* rows;
  int64_t stride, columns, panels;
  char* packed;
};

// Panels first .. first + kGroup, block `step`, of the stretch of `rows` rows from row `top` on.
template <bool kTransposed>
void pack_group(const Factor& f, int64_t top, int64_t rows, int64_t step, int64_t steps, int64_t first) {
  const int64_t row = top + step * kRows, here = least(kRows, rows - step * kRows);
  for (int64_t panel = first; panel < least(first + kGroup, f.panels); ++panel) {
    const int64_t column = panel * kColumns, left = f.columns - column;
    const uint32_t live = left >= kColumns ? 0xFFFF : left > 0 ? (1u << left) - 1 : 0;
    // A panel that only pads has no address of its own.
    const uint16_t* from = f.rows + row * f.stride + (left > 0 ? column : 0);
    pack_block<kTransposed>(from, f.stride, here, static_cast<__mmask16>(live), f.packed + (panel * steps + step) * kBlock);
  }
}

// A finished tile on its way to out, = or +=, row by row.
struct Delivery {
  const float* sum;
  float* out;
  int64_t stride, rows;
  __mmask16 left, right;
  bool add;

  void row() {
    __m512 a = _mm512_load_ps(sum), b = _mm512_load_ps(sum + 16);
    if (add) {
      a = _mm512_add_ps(a, _mm512_maskz_loadu_ps(left, out));
      b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(right, out + 16));
    }
    _mm512_mask_storeu_ps(out, left, a);
    _mm512_mask_storeu_ps(out + 16, right, b);
    sum += kTile, out += stride, --rows;
  }

  void rest() {
    while (rows > 0) row();
  }
};

#if defined(RMT_AMX)

// sum (kTile x kTile) = the product of `steps` blocks of two panels each. Meanwhile the tile before is delivered: on its
// own that would take half as long as the product, whose tile instructions leave the other units idle.
void product(const char* g, const char* x, int64_t panel, int64_t steps, float* sum, Delivery before) {
  // The compiler does not know that tile loads read memory: nothing may be stored late.
  asm volatile("" : : : "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, g += kBlock, x += kBlock) {
    _tile_loadd(6, x, 64);
    _tile_loadd(4, g, 64);
    _tile_loadd(7, x + panel, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, g + panel, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (before.rows > 0) before.row();
    _tile_dpbf16ps(2, 5, 6);
    if (before.rows > 0) before.row();
    _tile_dpbf16ps(3, 5, 7);
  }
  before.rest();
  _tile_stored(0, sum, 4 * kTile);
  _tile_stored(1, sum + 16, 4 * kTile);
  _tile_stored(2, sum + 16 * kTile, 4 * kTile);
  _tile_stored(3, sum + 16 * kTile + 16, 4 * kTile);
  asm volatile("" : : : "memory");
}

#else

struct Tiles {
  Tiles() {}
};

// vdpbf16ps rounds twice for every pair of rows: sums start anew after so many blocks.
constexpr int64_t kFresh = 2;

void product(const char* g, const char* x, int64_t panel, int64_t steps, float* sum, Delivery before) {
  before.rest();
  constexpr int kR = 8;  // rows at once: two sums each, and the two vectors of x that all of them meet
  for (int top = 0; top < kTile; top += kR) {
    const char* const a = g + top / kColumns * panel + 4 * (top % kColumns);
    float* const to = sum + top * kTile;
    for (int64_t s = 0; s < steps; s += kFresh) {
      __m512 part[kR][2];
      for (auto& row : part) row[0] = row[1] = _mm512_setzero_ps();
      for (int64_t at = s * kBlock; at < least(s + kFresh, steps) * kBlock; at += 64) {
        const __m512bh left = (__m512bh)_mm512_load_si512(x + at), right = (__m512bh)_mm512_load_si512(x + panel + at);
        for (int r = 0; r < kR; ++r) {
          int32_t pair;
          __builtin_memcpy(&pair, a + at + 4 * r, 4);
          const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
          part[r][0] = _mm512_dpbf16_ps(part[r][0], both, left);
          part[r][1] = _mm512_dpbf16_ps(part[r][1], both, right);
        }
      }
      for (int r = 0; r < kR; ++r)
        for (int h = 0; h < 2; ++h) {
          float* const place = to + r * kTile + 16 * h;
          _mm512_store_ps(place, s ? _mm512_add_ps(_mm512_load_ps(place), part[r][h]) : part[r][h]);
        }
    }
  }
}

#endif

struct Square {
  int64_t n0, n1, k0, k1;
};

// Every pass over the rows is summed by itself and then added, as BLAS do: a single running sum over thousands of rows
// is several times as far off.
void square(const WeightGrad& p, const Factor& g, const Factor& x, int64_t steps, const Square& s, bool add) {
  const int64_t passes = divide_up(steps, kL1), panel = steps * kBlock;
  alignas(64) float sums[2][kTile * kTile];
  Delivery before = {};
  int turn = 0;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = steps * pass / passes, count = steps * (pass + 1) / passes - first;
    for (int64_t k = s.k0; k < s.k1; k += kTile) {
      const uint32_t live = tail_mask(p.k - k);
      for (int64_t n = s.n0; n < s.n1; n += kTile, turn ^= 1) {
        const char* const a = g.packed + n / kColumns * panel + first * kBlock;
        const char* const b = x.packed + k / kColumns * panel + first * kBlock;
        product(a, b, panel, count, sums[turn], before);
        before = {sums[turn], p.out + n * p.k + k, p.k, least(kTile, p.n - n), static_cast<__mmask16>(live),
                  static_cast<__mmask16>(live >> 16), add || pass};
      }
    }
  }
  before.rest();
}

}  // namespace

void weight_grad(const WeightGrad& p, int threads) {
  const int64_t stretches = divide_up(p.m, kStretch);
  const int64_t most = least(divide_up(divide_up(p.m, stretches), kRows), kStretch / kRows);  // blocks of a stretch
  Factor g = {static_cast<const uint16_t*>(p.g), p.g_stride, p.n, divide_up(p.n, kTile) * 2, nullptr};
  Factor x = {static_cast<const uint16_t*>(p.x), p.x_stride, p.k, divide_up(p.k, kTile) * 2, nullptr};
  g.packed = static_cast<char*>(scratch((g.panels + x.panels) * most * kBlock));
  x.packed = g.packed + g.panels * most * kBlock;

  // Small matrices get smaller squares, so that every thread has some.
  int64_t tall = divide_up(p.n, kL2), wide = divide_up(p.k, kL2);
  while (tall * wide < 2 * threads && (tall < g.panels / 2 || wide < x.panels / 2))
    ++(g.panels * wide >= x.panels * tall && tall < g.panels / 2 ? tall : wide);
  const auto edge = [](int64_t i, int64_t parts, int64_t panels) { return panels / 2 * i / parts * kTile; };

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Tiles tiles;
    for (int64_t top = 0; top < p.m; top += most * kRows) {
      const int64_t rows = least(most * kRows, p.m - top), steps = divide_up(rows, kRows);
      const int64_t g_groups = divide_up(g.panels, kGroup), groups = g_groups + divide_up(x.panels, kGroup);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < steps * groups; ++i) {
        const int64_t step = i / groups, group = i % groups;
#if defined(RMT_AMX)
        constexpr bool kTransposed = true;
#else
        constexpr bool kTransposed = false;
#endif
        if (group < g_groups)
          pack_group<kTransposed>(g, top, rows, step, steps, group * kGroup);
        else
          pack_group<false>(x, top, rows, step, steps, (group - g_groups) * kGroup);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < tall * wide; ++i) {
        const int64_t r = i / wide, c = i % wide;
        const Square s = {edge(r, tall, g.panels), edge(r + 1, tall, g.panels), edge(c, wide, x.panels),
                          edge(c + 1, wide, x.panels)};
        square(p, g, x, steps, s, p.accumulate || top);
      }
    }
  }
}

#if defined(RMT_AMX)

// 512 multiply-adds a cycle and core, against 32 of two fp32 units.
double weight_grad_rate() { return 16; }

#else

namespace {

// Nanoseconds of a multiply-add instruction in a stream of independent ones.
template <bool kBf16>
double nanoseconds() {
  constexpr int kStreams = 12, kRounds = 300;
  __m512 sums[kStreams], factor = _mm512_set1_ps(1e-3f);
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kRounds; ++i) {
    for (auto& sum : sums)
      sum = kBf16 ? _mm512_dpbf16_ps(sum, (__m512bh)factor, (__m512bh)factor) : _mm512_fmadd_ps(factor, factor, sum);
    asm volatile("" : "+v"(factor));
  }
  const std::chrono::duration<double, std::nano> passed = std::chrono::steady_clock::now() - start;
  for (auto& sum : sums) asm volatile("" : : "v"(sum));
  return passed.count() / (kStreams * kRounds);
}

}  // namespace

// Measured, since no flag says whether vdpbf16ps runs at fp32's rate or, as on Sapphire Rapids, at a quarter of it. The
// fastest of many: some 0.1 ms.
double weight_grad_rate() {
  double bf16 = nanoseconds<true>(), fp32 = nanoseconds<false>();
  for (int i = 0; i < 30; ++i) {
    const double again[2] = {nanoseconds<true>(), nanoseconds<false>()};
    bf16 = again[0] < bf16 ? again[0] : bf16;
    fp32 = again[1] < fp32 ? again[1] : fp32;
  }
  return 2 * fp32 / bf16;
}

#endif

}  // namespace rmt::cpu::RMT_ISA
