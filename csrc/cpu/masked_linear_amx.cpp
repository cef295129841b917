// masked_linear in bf16 by AMX tiles: y^T = (weight * bits) x^T.
//
// Sixteen rows of weight, 32 columns each, are a tile's first factor as they lie in memory; a word of bits is the mask
// register under which one row of it is copied, while the tile unit multiplies the columns before. Rows of x are packed
// once, 16 rows x 32 columns to a block: dwords [pair of columns][row], the second factor. Rows of x that do not exist are
// zeros, and so are rows and columns of weight.
//
// Loops, from the outside: chunks of x that stay in the second cache; threads over weight rows; 32 of these; kSteps steps
// of their columns, which stay in the first cache, as does their masked copy, while every group passes over them. Sums
// wait in memory from one block of columns to the next.
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
constexpr int64_t kSteps = 8;               // steps of columns in a block
constexpr int64_t kAhead = 2;               // steps that the masking is before the product
constexpr int64_t kChunkBytes = 1 << 20;    // of packed x
constexpr int64_t kSums = kRows * kRows;    // floats

// Up to 32 rows of x that share a mask.
struct Pair {
  const uint32_t* bits;
  int64_t first, rows;
  bool masks;  // the first of its group
};

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

// Copies 32 rows of weight under their mask, a step of 32 columns at a time, into blocks [step][32 rows].
class Masking {
 public:
  // next: the mask of the group after this one, brought into the cache on the way, or null.
  Masking(const MaskedLinear& p, const uint32_t* bits, const uint32_t* next, int64_t row, int64_t step, char* to)
      : weight_(static_cast<const uint16_t*>(p.weight) + row * p.k + step * kDepth), k_(p.k), words_((p.k + kDepth - 1) / kDepth),
        left_(p.k - step * kDepth), rows_(std::min(kRows, p.n - row)), to_(to) {
    const int64_t at = row * words_ + step;
    bits_ = bits ? bits + at : nullptr;
    next_ = next ? next + at : nullptr;
  }

  void step(int64_t s) {
    // Vectors that are stored may alias anything: what the loops need is in registers before them.
    char* const to = to_ + s * 2 * kBlock;
    const uint16_t* const from = weight_ + s * kDepth;
    const int64_t words = words_, k = k_;
    if (next_)
      for (int64_t r = s * 4; r < std::min(rows_, s * 4 + 4); ++r) __builtin_prefetch(next_ + r * words);
    if (rows_ == kRows && left_ >= (s + 1) * kDepth) {
      const uint16_t* line = from;
      if (const uint32_t* word = bits_ ? bits_ + s : nullptr)
        for (int64_t r = 0; r < kRows; ++r, word += words, line += k)
          _mm512_store_si512(to + 64 * r, _mm512_maskz_loadu_epi16(*word, line));
      else
        for (int64_t r = 0; r < kRows; ++r, line += k) _mm512_store_si512(to + 64 * r, _mm512_loadu_si512(line));
      return;
    }
    const uint32_t live = tail_mask(left_ - s * kDepth);
    for (int64_t r = 0; r < kRows; ++r) {
      const uint32_t word = r >= rows_ ? 0 : bits_ ? bits_[r * words_ + s] & live : live;
      _mm512_store_si512(to + 64 * r, _mm512_maskz_loadu_epi16(word, from + (r < rows_ ? r : 0) * k_));
    }
  }

 private:
  const uint16_t* weight_;
  const uint32_t *bits_, *next_;
  int64_t k_, words_, left_, rows_;
  char* to_;
};

// Adds `steps` steps to sums [32 rows of weight][32 of x], or begins them; with one panel [..][16 of x]. masking: makes
// `w` on the way, or null.
template <bool kTwo>
void product(const char* w, const char* x, int64_t panel, int64_t steps, bool begins, float* sum, Masking* masking) {
  if (masking)
    for (int64_t s = 0; s < std::min(kAhead, steps); ++s) masking->step(s);
  // The compiler does not know that tile loads read memory: what is stored stays before them.
  asm volatile("" : : : "memory");
  if (begins) {
    _tile_zero(0);
    _tile_zero(2);
    _tile_zero(1);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sum, 4 * kRows);
    _tile_loadd(2, sum + kPanel * kRows, 4 * kRows);
    if constexpr (kTwo) {
      _tile_loadd(1, sum + kPanel, 4 * kRows);
      _tile_loadd(3, sum + kPanel * kRows + kPanel, 4 * kRows);
    }
  }
  for (int64_t s = 0; s < steps; ++s, w += 2 * kBlock, x += kBlock) {
    if (masking && s + kAhead < steps) masking->step(s + kAhead);
    asm volatile("" : : : "memory");
    _tile_loadd(6, x, 64);
    _tile_loadd(4, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + kBlock, 64);
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

// Rows first .. last of weight against a chunk of pairs, whose panels lie one after the other at x.
void multiply(const MaskedLinear& p, const Pair* pairs, int64_t count, const char* x, int64_t first, int64_t last, char* own) {
  const Tiles configured;
  const int64_t steps = (p.k + kDepth - 1) / kDepth, panel = steps * kBlock;
  char* const masked = own;
  float* const sums = reinterpret_cast<float*>(own + kSteps * 2 * kBlock);
  for (int64_t row = first; row < last; row += kRows)
    for (int64_t step = 0; step < steps; step += kSteps) {
      const int64_t here = std::min(kSteps, steps - step);
      const char* at = x + step * kBlock;
      for (int64_t i = 0; i < count; ++i) {
        const Pair& pair = pairs[i];
        int64_t after = i + 1;
        while (after < count && !pairs[after].masks) ++after;
        Masking masking(p, pair.bits, after < count ? pairs[after].bits : nullptr, row, step, masked);
        Masking* const make = pair.masks || i == 0 ? &masking : nullptr;
        float* const sum = sums + i * kSums;
        const bool two = pair.rows > kPanel;
        if (two)
          product<true>(masked, at, panel, here, step == 0, sum, make);
        else
          product<false>(masked, at, panel, here, step == 0, sum, make);
        at += (two ? 2 : 1) * panel;
        if (step + here == steps) deliver(p, sum, row, pair.first, pair.rows);
      }
    }
}

}  // namespace

void masked_linear(const MaskedLinear& p, int threads) {
  if (p.dtype != DType::bf16) return avx512::table.masked_linear(p, threads);
  const int64_t steps = (p.k + kDepth - 1) / kDepth, panel = steps * kBlock;
  std::vector<Pair> pairs;
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t m = p.rows[g].first; m < p.rows[g].last; m += kRows)
      pairs.push_back({p.rows[g].bits, m, std::min(kRows, p.rows[g].last - m), m == p.rows[g].first});
  const int64_t total = static_cast<int64_t>(pairs.size());
  const int64_t most = std::min(total, std::max<int64_t>(4, kChunkBytes / (2 * panel)));
  const int64_t own = kSteps * 2 * kBlock + most * kSums * static_cast<int64_t>(sizeof(float));
  char* const packed = static_cast<char*>(scratch(most * 2 * panel + threads * own));

  for (int64_t begin = 0; begin < total; begin += most) {
    const int64_t count = std::min(most, total - begin);
    std::vector<Pair> panels;  // of up to 16 rows
    for (int64_t i = begin; i < begin + count; ++i)
      for (int64_t m = 0; m < pairs[i].rows; m += kPanel)
        panels.push_back({nullptr, pairs[i].first + m, std::min(kPanel, pairs[i].rows - m), false});
    parallel(panels.size(), 1, threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        pack(static_cast<const uint16_t*>(p.x) + panels[i].first * p.x_stride, p.x_stride, panels[i].rows, p.k, packed + i * panel);
    });
    const int64_t blocks = (p.n + kRows - 1) / kRows, shares = std::min<int64_t>(threads, blocks);
    parallel(p.n, kRows, threads, [&](int64_t first, int64_t last) {
      // Which of parallel()'s shares this is: its own place in the scratch memory.
      const int64_t share = (first / kRows * shares + blocks - 1) / blocks;
      multiply(p, &pairs[begin], count, packed, first, last, packed + most * 2 * panel + share * own);
    });
  }
}

}  // namespace rmt::cpu::RMT_ISA
