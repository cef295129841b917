// masked_linear in bf16 by AMX tiles: y^T = (weight * bits) x^T.
//
// Sixteen rows of weight, 32 columns each, are a tile's first factor as they lie in memory; a word of bits is the mask
// register under which one row of it is copied into the second cache, while the tile unit multiplies the columns before.
// Rows of x are packed once a call, 16 rows x 32 columns to a block: dwords [pair of columns][row], the second factor.
// Rows of x that do not exist are zeros, and so are rows and columns of weight.
//
// An element's sum runs over the columns in steps of 32, whatever the groups, their sizes and the threads are.
#include <vector>

#include "elementwise.h"
#include "parallel.h"
#include "simd.h"
#include "tiles.h"

namespace rmt::cpu::RMT_ISA {

namespace {

constexpr int64_t kDepth = 32, kPanel = 16, kBlock = 1024;  // columns and rows of a packed block; its bytes
constexpr int64_t kRows = 2 * kPanel;                       // rows of weight, and of x, that a product takes
constexpr int64_t kMaskedBytes = 512 << 10;  // of masked weight that stay in the second cache while a group passes
constexpr int64_t kAhead = 2;                // steps that the masking is before the product

// Up to 16 rows of x, all columns, into `steps` blocks.
void pack(const uint16_t* x, int64_t stride, int64_t rows, int64_t k, char* to) {
  for (int64_t at = 0; at < k; at += kDepth, to += kBlock) {
    const uint32_t live = tail_mask(k - at);
    __m512i lines[kPanel];
    for (int64_t r = 0; r < kPanel; ++r) lines[r] = _mm512_maskz_loadu_epi16(r < rows ? live : 0, x + (r < rows ? r : 0) * stride + at);
    transpose(lines);
    for (int64_t r = 0; r < kPanel; ++r) _mm512_store_si512(to + 64 * r, lines[r]);
  }
}

// Copies 32 rows of weight under their mask, a step of 32 columns at a time, into two panels of blocks.
class Masking {
 public:
  Masking(const MaskedLinear& p, const uint32_t* bits, int64_t row, int64_t steps, char* to)
      : weight_(static_cast<const uint16_t*>(p.weight) + row * p.k), bits_(bits ? bits + row * steps : nullptr), k_(p.k),
        steps_(steps), rows_(std::min(kRows, p.n - row)), to_(to) {}

  void step(int64_t s) {
    const uint32_t live = tail_mask(k_ - s * kDepth);
    for (int64_t r = 0; r < kRows; ++r) {
      const bool real = r < rows_;
      const uint32_t word = !real ? 0 : bits_ ? bits_[r * steps_ + s] & live : live;
      const __m512i line = _mm512_maskz_loadu_epi16(word, weight_ + (real ? r : 0) * k_ + s * kDepth);
      _mm512_store_si512(to_ + (r / kPanel * steps_ + s) * kBlock + r % kPanel * 64, line);
    }
  }

 private:
  const uint16_t* weight_;
  const uint32_t* bits_;
  int64_t k_, steps_, rows_;
  char* to_;
};

// sum (32 rows of weight x 32 of x; with one panel 16 of x) over all steps. masking: makes `w` on the way, or null.
template <bool kTwo>
void product(const char* w, const char* x, int64_t steps, float* sum, Masking* masking) {
  const int64_t panel = steps * kBlock;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (masking)
    for (int64_t s = 0; s < std::min(kAhead, steps); ++s) masking->step(s);
  for (int64_t s = 0; s < steps; ++s, w += kBlock, x += kBlock) {
    if (masking && s + kAhead < steps) masking->step(s + kAhead);
    // The compiler does not know that tile loads read memory: what is stored stays before them.
    asm volatile("" : : : "memory");
    _tile_loadd(6, x, 64);
    _tile_loadd(4, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + panel, 64);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTwo) {
      _tile_loadd(7, x + panel, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sum, 4 * kRows);
  _tile_stored(2, sum + kPanel * kRows, 4 * kRows);
  if constexpr (kTwo) {
    _tile_stored(1, sum + kPanel, 4 * kRows);
    _tile_stored(3, sum + kPanel * kRows + kPanel, 4 * kRows);
  }
  asm volatile("" : : : "memory");
}

// The sums of `rows` rows of x from row m on, with the bias, into columns `first` .. first + 31 of y.
void deliver(const MaskedLinear& p, const float* sum, int64_t first, int64_t m, int64_t rows) {
  for (int64_t i = 0; i < kRows && first + i < p.n; i += kPanel) {
    const __mmask16 live = static_cast<__mmask16>(tail_mask(std::min(kPanel, p.n - first - i)));
    const uint16_t* const bias = static_cast<const uint16_t*>(p.bias) + first + i;
    const __m512i wide = p.bias ? _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, bias)), 16)
                                : _mm512_setzero_si512();
    for (int64_t j = 0; j < rows; j += kPanel) {
      __m512i lines[kPanel];
      for (int64_t r = 0; r < kPanel; ++r) lines[r] = _mm512_load_si512(sum + (i + r) * kRows + j);
      transpose(lines);
      uint16_t* const y = static_cast<uint16_t*>(p.y) + (m + j) * p.n + first + i;
      for (int64_t r = 0; r < std::min(kPanel, rows - j); ++r) {
        const __m512 total = _mm512_add_ps(_mm512_castsi512_ps(lines[r]), _mm512_castsi512_ps(wide));
        _mm256_mask_storeu_epi16(y + r * p.n, live, (__m256i)_mm512_cvtneps_pbh(total));
      }
    }
  }
}

}  // namespace

void masked_linear(const MaskedLinear& p, int threads) {
  if (p.dtype != DType::bf16) return avx512::table.masked_linear(p, threads);
  const int64_t steps = (p.k + kDepth - 1) / kDepth, panel = steps * kBlock;
  int64_t panels = 0;
  for (int64_t g = 0; g < p.groups; ++g) panels += (p.rows[g].last - p.rows[g].first + kPanel - 1) / kPanel;
  // Rows of weight that are masked at once, by each thread for itself.
  const int64_t wide = std::max<int64_t>(1, kMaskedBytes / (2 * panel)) * kRows;
  const int64_t own = wide / kPanel * panel + 4 * kRows * kRows;
  char* const packed = static_cast<char*>(scratch(panels * panel + threads * own));
  std::vector<RowGroup> tiles;
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t m = p.rows[g].first; m < p.rows[g].last; m += kPanel)
      tiles.push_back({p.rows[g].bits, m, std::min(m + kPanel, p.rows[g].last)});

  parallel(panels, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      pack(static_cast<const uint16_t*>(p.x) + tiles[i].first * p.x_stride, p.x_stride, tiles[i].last - tiles[i].first, p.k,
           packed + i * panel);
  });
  parallel(p.n, kRows, threads, [&](int64_t first, int64_t last) {
    const Tiles configured;
    // Which share of parallel()'s this is: its own place in the scratch memory.
    const int64_t blocks = (p.n + kRows - 1) / kRows, shares = std::min<int64_t>(threads, blocks);
    char* const masked = packed + panels * panel + (first / kRows * shares + blocks - 1) / blocks * own;
    float* const sum = reinterpret_cast<float*>(masked + wide / kPanel * panel);
    for (; first < last; first += wide) {
      const int64_t end = std::min(last, first + wide);
      const char* x = packed;
      for (int64_t g = 0; g < p.groups; ++g)
        for (int64_t m = p.rows[g].first; m < p.rows[g].last; m += kRows) {
          const int64_t rows = std::min(kRows, p.rows[g].last - m);
          char* w = masked;
          for (int64_t row = first; row < end; row += kRows, w += 2 * panel) {
            Masking masking(p, p.rows[g].bits, row, steps, w);
            Masking* const make = m == p.rows[g].first ? &masking : nullptr;
            rows > kPanel ? product<true>(w, x, steps, sum, make) : product<false>(w, x, steps, sum, make);
            deliver(p, sum, row, m, rows);
          }
          x += (rows > kPanel ? 2 : 1) * panel;
        }
    }
  });
}

}  // namespace rmt::cpu::RMT_ISA
