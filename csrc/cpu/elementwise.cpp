// Bits, masked weight and gradient dropout.
// Compiled once per instruction set.
#include "elementwise.h"

#include <atomic>

#include "gradient.h"
#include "parallel.h"
#include "simd.h"

namespace rmt::cpu::RMT_ISA {

namespace {

int64_t words(int64_t k) { return (k + 31) / 32; }

// Runs body(row, word, column, count) over all words of [n, k], in parallel over rows. A matrix without ragged rows
// is treated as one long row of words, so that few long rows split as well as many short ones.
template <typename Body>
void for_words(int64_t n, int64_t k, int threads, const Body& body) {
  if (k % 32 == 0) {
    parallel(n * (k / 32), 8, threads, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) body(w, w * 32, int64_t{32});
    });
    return;
  }
  parallel(n, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t w = 0; w < words(k); ++w)
        body(row * words(k) + w, row * k + w * 32, std::min<int64_t>(32, k - w * 32));
  });
}

}  // namespace

int64_t pack_scores(const float* scores, int64_t n, int64_t k, float threshold, uint32_t* bits, int threads) {
  std::atomic<int64_t> nans{0};
  for_words(n, k, threads, [&](int64_t word, int64_t first, int64_t count) {
    float tail[32] = {};
    const float* s = scores + first;
    if (count < 32) s = static_cast<const float*>(std::memcpy(tail, s, count * sizeof(float)));
    if (any_nan32(s)) nans.fetch_add(1, std::memory_order_relaxed);
    bits[word] = compare32(s, threshold) & tail_mask(count);
  });
  return nans;
}

void pack_bits(const uint8_t* mask, int64_t n, int64_t k, uint32_t* bits, int threads) {
  for_words(n, k, threads, [&](int64_t word, int64_t first, int64_t count) {
    uint8_t tail[32];
    const uint8_t* m = mask + first;
    if (count < 32) m = static_cast<const uint8_t*>(std::memcpy(tail, m, count));
    bits[word] = nonzero32(m) & tail_mask(count);
  });
}

void unpack_bits(const uint32_t* bits, int64_t n, int64_t k, uint8_t* mask, int threads) {
  for_words(n, k, threads, [&](int64_t word, int64_t first, int64_t count) {
    uint8_t tail[32];
    expand32(bits[word], count < 32 ? tail : mask + first);
    if (count < 32) std::memcpy(mask + first, tail, count);
  });
}

void masked_weight(
    const void* weight, const uint32_t* bits, int64_t n, int64_t k, int itemsize, void* out, int threads) {
  for_words(n, k, threads, [&](int64_t word, int64_t first, int64_t count) {
    select_any(itemsize, bits[word], weight, out, first, count);
  });
}

void swap_mask(
    const void* weight, const uint32_t* bits, const uint32_t* old, int64_t n, int64_t k, int itemsize, void* out,
    int threads) {
  const int64_t line = words(k);
  parallel(n, 1, threads, [&](int64_t begin, int64_t end) {
    // Masks of one kind differ in a word of thirty: they are compared many words at a time, across rows.
    for (int64_t first = begin * line; first < end * line; first += kCompared) {
      uint32_t differ = differ16(bits + first, old + first, std::min(kCompared, end * line - first));
      for (; differ; differ &= differ - 1) {
        const int64_t word = first + __builtin_ctz(differ), row = word / line, column = word % line * 32;
        const int64_t at = row * k + column;
        change_any(itemsize, bits[word], bits[word] ^ old[word], weight, out, at, std::min<int64_t>(32, k - column));
      }
    }
  });
}

void gradient_dropout(const Gradient& p, float* grad, int64_t numel, int threads) {
  parallel(numel, 4 * kTile, threads, [&](int64_t begin, int64_t end) {
    alignas(64) float tile[kTile];
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t count = std::min<int64_t>(kTile, end - first);
      gradient_tile(p, first, count, tile);
      std::memcpy(grad + first, tile, count * sizeof(float));
    }
  });
}

void uniform(const Draw& draw, float* out, int64_t numel, int threads) {
  parallel(numel, 32, threads, [&](int64_t begin, int64_t end) {
    alignas(64) uint32_t words[32];
    for (int64_t first = begin; first < end; first += 32) {
      philox32(draw, static_cast<uint64_t>(first) / 4, words);
      for (int64_t j = 0; j < std::min<int64_t>(32, end - first); ++j) out[first + j] = to_uniform(words[j]);
    }
  });
}

}  // namespace rmt::cpu::RMT_ISA
