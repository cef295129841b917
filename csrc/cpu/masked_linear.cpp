// y = x @ (weight * bits).T + bias for groups of rows with a mask each, straight from the words: weight is read once for
// all of them and is never rewritten. With AVX-512 a word IS the mask register of a load. Compiled once per instruction
// set. Every element is summed in the order of lanes.h, whatever the groups, their sizes and the threads are.
//
// Loops, from the outside: threads over weight rows; chunks of rows of x that stay in the second cache; kWeightRows
// weight rows; kBlockBytes of their columns, which stay in the first cache while every row of the chunk passes over
// them. Sums wait in memory from one block of columns to the next.
#include <vector>

#include "elementwise.h"
#include "lanes.h"
#include "parallel.h"

namespace rmt::cpu::RMT_ISA {

namespace {

constexpr int64_t kBlockBytes = 3072;
constexpr int64_t kChunkBytes = 1 << 20;
// Rows of a scratch block are a line further apart, so that they do not meet in one set of the cache.
constexpr int64_t kScratchStride = kBlockBytes + 64;

// Brings a block of rows into a cache, a few lines at a time: what is needed next, while something else is computed.
class Ahead {
 public:
  Ahead(const void* from, int64_t rows, int64_t row_bytes, int64_t stride)
      : at_(static_cast<const char*>(from)), rows_(from ? rows : 0), per_row_(row_bytes / 64 + 1), stride_(stride) {}

  template <int kLocality>
  void fetch(int64_t lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      __builtin_prefetch(at_ + 64 * line_, 0, kLocality);
      if (++line_ == per_row_) line_ = 0, --rows_, at_ += stride_;
    }
  }
  int64_t lines() const { return rows_ * per_row_; }

 private:
  const char* at_;
  int64_t rows_, per_row_, stride_, line_ = 0;
};

template <typename P>
class Product {
  using T = typename P::T;
  using V = typename P::V;
  using Acc = typename P::Acc;
  static constexpr int kWeightRows = P::kWeightRows, kRows = P::kRows;
  static constexpr int64_t kBlock = kBlockBytes / sizeof(T), kStride = kScratchStride / sizeof(T);

  // Columns of a few weight rows: where they are, and which of them count.
  struct Block {
    const T* weight;
    int64_t stride;
    const uint32_t* bits;  // null: all columns
    int64_t columns;
  };

 public:
  Product(const MaskedLinear& p, int64_t first, int64_t last) : p_(p), words_((p.k + 31) / 32) {
    const int64_t limit = std::max<int64_t>(4 * kRows, kChunkBytes / (p.k * sizeof(T)) / kRows * kRows);
    const int64_t sums = p.k > kBlock ? limit * kWeightRows : 0;
    plain_ = static_cast<T*>(scratch(2 * kWeightRows * kScratchStride + sums * sizeof(Acc)));
    masked_ = plain_ + kWeightRows * kStride;
    sums_ = reinterpret_cast<Acc*>(masked_ + kWeightRows * kStride);
    std::vector<RowGroup> chunk;
    int64_t rows = 0;
    for (int64_t g = 0; g < p.groups; ++g)
      for (RowGroup left = p.rows[g]; left.first < left.last;) {
        const int64_t end = std::min(left.last, left.first + limit - rows);
        chunk.push_back({left.bits, left.first, end});
        rows += end - left.first;
        left.first = end;
        if (rows == limit) multiply(chunk, first, last), chunk.clear(), rows = 0;
      }
    if (rows) multiply(chunk, first, last);
  }

 private:
  void multiply(const std::vector<RowGroup>& chunk, int64_t first, int64_t last) {
    // Where more than a few tiles read a block it pays to move it together.
    int64_t tiles = 0;
    for (const RowGroup& g : chunk) tiles += (g.last - g.first + kRows - 1) / kRows;
    for (; first + kWeightRows <= last; first += kWeightRows)
      tiles > 2 ? columns<kWeightRows, true>(chunk, first, last) : columns<kWeightRows, false>(chunk, first, last);
    for (; first < last; ++first) columns<1, false>(chunk, first, last);
  }

  template <int R, bool kMoved>
  void columns(const std::vector<RowGroup>& chunk, int64_t row, int64_t last) {
    for (int64_t k = 0; k < p_.k; k += kBlock) {
      const int64_t count = std::min(kBlock, p_.k - k);
      Block whole{static_cast<const T*>(p_.weight) + row * p_.k + k, p_.k, nullptr, count};
      if (kMoved) {
        mask<R>(whole, plain_);
        whole.weight = plain_, whole.stride = kStride;
      }
      // What follows: the next columns, or the first ones of the next weight rows.
      const bool more = k + kBlock < p_.k, done = !more && row + 2 * R > last;
      const int64_t next_row = more ? row : row + R, next_k = more ? k + kBlock : 0;
      const int64_t bytes = std::min(kBlock, p_.k - next_k) * sizeof(T), word = next_row * words_ + next_k / 32;
      const T* const next = done ? nullptr : static_cast<const T*>(p_.weight) + next_row * p_.k + next_k;
      Ahead weight(kMoved ? next : nullptr, R, bytes, p_.k * sizeof(T));
      const int64_t share = weight.lines() / chunk.size() + 1;
      Acc* sums = sums_;
      for (size_t i = 0; i < chunk.size(); ++i) {
        const RowGroup& g = chunk[i];
        weight.template fetch<2>(share);
        const bool same = i + 1 < chunk.size();
        const uint32_t* const masks = same ? chunk[i + 1].bits : done ? nullptr : chunk[0].bits;
        const int64_t width = (same ? count : bytes / sizeof(T)) / 8;
        Ahead bits(masks ? masks + (same ? row * words_ + k / 32 : word) : nullptr, R, width, words_ * 4);
        bits.template fetch<3>(bits.lines());
        Block block = whole;
        if (g.bits) block.bits = g.bits + row * words_ + k / 32;
        if (g.bits && !P::kMasks) {
          mask<R>(block, masked_);
          block = {masked_, kStride, nullptr, count};
        }
        for (int64_t m = g.first; m < g.last; m += kRows) {
          const int64_t rows = std::min<int64_t>(kRows, g.last - m);
          tiles<R, kRows, kMoved>(block, row, m, rows, k, sums);
          sums += R * rows;
        }
      }
    }
  }

  // R weight rows against `rows` <= M rows of x from row m on.
  template <int R, int M, bool kMoved>
  void tiles(const Block& block, int64_t row, int64_t m, int64_t rows, int64_t k, Acc* sums) {
    if constexpr (M > 1)
      if (rows < M) return tiles<R, M - 1, kMoved>(block, row, m, rows, k, sums);
    constexpr int kPart = M > P::kFewRows && R > P::kHalf ? P::kHalf : R;
    for (int part = 0; part < R; part += kPart) {
      const Block some{block.weight + part * block.stride, block.stride,
                       block.bits ? block.bits + part * words_ : nullptr, block.columns};
      if (P::kMasks && some.bits)
        tile<kPart, M, P::kMasks, kMoved>(some, row + part, m, k, sums + part * M);
      else
        tile<kPart, M, false, kMoved>(some, row + part, m, k, sums + part * M);
    }
  }

  // The block's columns with its mask applied, into rows kStride apart.
  template <int R>
  void mask(const Block& block, T* to) const {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    for (int r = 0; r < R; ++r)
      for (int64_t i = 0; i * 32 < block.columns; ++i) {
        const int64_t count = std::min<int64_t>(32, block.columns - i * 32);
        const uint32_t word = block.bits ? block.bits[r * words_ + i] : 0xFFFFFFFFu;
        select_word<Bits>(word, block.weight + r * block.stride + i * 32, to + r * kStride + i * 32, 0, count);
      }
  }

  // Adds the block's columns to the sums of R weight rows and M rows of x, and stores y after the last of them.
  template <int R, int M, bool kMasked, bool kMoved>
  void tile(const Block& block, int64_t row, int64_t m, int64_t k, Acc* sums) {
    const T* const w = block.weight;
    // A constant is part of the address; a variable costs additions at the ports of the multiplication.
    const int64_t stride = kMoved ? kStride : block.stride;
    const uint32_t *const low = block.bits, *const high = low + (R / 2) * words_;
    const T* const x = static_cast<const T*>(p_.x) + m * p_.x_stride + k;
    Acc acc[R][M];
    unroll<R>([&](auto r) { unroll<M>([&](auto i) { acc[r][i] = k ? sums[r * M + i] : P::zero(); }); });
    int64_t at = 0;
    for (; at + 32 <= block.columns; at += 32) {
      unroll<32 / P::kLanes>([&](auto part) {
        constexpr int kFrom = part * P::kLanes;
        V xs[M];
        unroll<M>([&](auto i) { xs[i] = P::load(x + i * p_.x_stride + at + kFrom); });
        unroll<R>([&](auto r) {
          const T* const from = w + r * stride + at + kFrom;
          if constexpr (kMasked) {
            // Straight from memory into a mask register: through a shift it would take two instructions more.
            const uint32_t* const word = (r < R / 2 ? low + r * words_ : high + (r - R / 2) * words_) + at / 32;
            typename P::Mask mask;
            std::memcpy(&mask, reinterpret_cast<const char*>(word) + kFrom / 8, sizeof mask);
            const V ws = P::load_masked(from, mask);
            unroll<M>([&](auto i) { acc[r][i] = P::multiply_add(ws, xs[i], acc[r][i], mask); });
          } else {
            const V ws = P::load(from);
            unroll<M>([&](auto i) { acc[r][i] = P::multiply_add(ws, xs[i], acc[r][i]); });
          }
        });
      });
    }
    for (; at < block.columns; at += P::kLanes) {
      // Past the row's end nothing is read.
      const uint32_t live = tail_mask(block.columns - at);
      V xs[M];
      unroll<M>([&](auto i) { xs[i] = P::load(x + i * p_.x_stride + at, live); });
      unroll<R>([&](auto r) {
        const uint32_t kept = kMasked ? live & block.bits[r * words_ + at / 32] >> at % 32 : live;
        const V ws = P::load(w + r * stride + at, kept);
        unroll<M>([&](auto i) { acc[r][i] = P::multiply_add(ws, xs[i], acc[r][i], kept); });
      });
    }
    if (k + block.columns < p_.k) {
      unroll<R>([&](auto r) { unroll<M>([&](auto i) { sums[r * M + i] = acc[r][i]; }); });
      return;
    }
    unroll<M>([&](auto i) {
      float y[R];
      if constexpr (R % 4 == 0)
        unroll<R / 4>([&](auto q) {
          fold4(acc[4 * q][i], acc[4 * q + 1][i], acc[4 * q + 2][i], acc[4 * q + 3][i], y + 4 * q);
        });
      else
        unroll<R>([&](auto r) { y[r] = fold(acc[r][i]); });
      for (int r = 0; r < R; ++r) {
        const float bias = p_.bias ? to_float(static_cast<const T*>(p_.bias)[row + r]) : 0.0f;
        static_cast<T*>(p_.y)[(m + i) * p_.n + row + r] = P::store(y[r] + bias);
      }
    });
  }

  const MaskedLinear& p_;
  const int64_t words_;
  T *plain_, *masked_;
  Acc* sums_;
};

template <typename P>
void product(const MaskedLinear& p, int threads) {
  parallel(p.n, P::kWeightRows, threads, [&](int64_t first, int64_t last) { Product<P>(p, first, last); });
}

}  // namespace

void masked_linear(const MaskedLinear& p, int threads) {
#if defined(RMT_HAS_BF16)
  if (p.dtype == DType::bf16) return product<BF16>(p, threads);
#endif
  product<F32>(p, threads);
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
    pack_scores, pack_bits, unpack_bits, masked_weight, swap_mask, gradient_dropout, mask_update, masked_linear, uniform,
#if defined(RMT_HAS_BF16)
    weight_grad, weight_grad_rate,
#else
    nullptr, nullptr,
#endif
};

}  // namespace rmt::cpu::RMT_ISA
