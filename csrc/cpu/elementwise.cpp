// Bits, masked weight, gradient dropout and the update: everything that reads weight-sized tensors once.
// Compiled once per instruction set.
#include "elementwise.h"

#include <atomic>
#include <cmath>

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

template <typename T>
static void select_word(uint32_t word, const void* weight, void* out, int64_t first, int64_t count) {
  const T* in = static_cast<const T*>(weight) + first;
  T* to = static_cast<T*>(out) + first;
  if (count == 32) return select32(word, in, to);
  for (int64_t j = 0; j < count; ++j) to[j] = word >> j & 1 ? in[j] : T{0};
}

static void select_any(int itemsize, uint32_t word, const void* weight, void* out, int64_t first, int64_t count) {
  if (itemsize == 4) return select_word<uint32_t>(word, weight, out, first, count);
  if (itemsize == 2) return select_word<uint16_t>(word, weight, out, first, count);
  select_word<uint64_t>(word, weight, out, first, count);
}

void masked_weight(
    const void* weight, const uint32_t* bits, int64_t n, int64_t k, int itemsize, void* out, int threads) {
  for_words(n, k, threads, [&](int64_t word, int64_t first, int64_t count) {
    select_any(itemsize, bits[word], weight, out, first, count);
  });
}

// grad[j] for j < count <= 32, whose flat index starts at a multiple of 32.
template <bool kDropout, typename W>
static void dropout_block(
    const GradientDropout& p, const W* weight, const float* u, int64_t first, int64_t count) {
  const float* task = p.grad_task + first;
  const float* general = kDropout ? p.grad_general + first : task;
  const float leak = 1.0f - p.strength;
  float* grad = p.grad + first;
  for (int64_t j = 0; j < count; ++j) {
    const float w = weight ? to_float(weight[first + j]) : 1.0f;
    float a = task[j] * w;
    if (p.scores) a += p.penalty * p.scores[first + j];
    if (kDropout) {
      const float b = general[j] * w;
      // At a = 0 the sign does not matter: both outcomes are 0.
      const float agreement = (a < 0 ? -(a + b) : a + b) / (std::fabs(a) + std::fabs(b) + 1e-8f);
      const float probability = (1.0f + agreement) * 0.5f;
      a = probability > u[j] ? a : leak * a;
    }
    grad[j] = a;
  }
}

template <bool kDropout, typename W>
static void dropout_all(const GradientDropout& p, int threads) {
  const W* weight = static_cast<const W*>(p.weight);
  parallel(p.numel, 1024, threads, [&](int64_t begin, int64_t end) {
    alignas(64) float u[32];
    for (int64_t first = begin; first < end; first += 32) {
      if (kDropout) uniform32(p.draw, static_cast<uint64_t>(first) / 4, u);
      // A constant count lets the compiler unroll the block into whole vectors.
      if (end - first >= 32)
        dropout_block<kDropout>(p, weight, u, first, 32);
      else
        dropout_block<kDropout>(p, weight, u, first, end - first);
    }
  });
}

void gradient_dropout(const GradientDropout& p, int threads) {
  const bool bf16 = p.weight && p.weight_dtype == DType::bf16;
  if (p.grad_general)
    bf16 ? dropout_all<true, uint16_t>(p, threads) : dropout_all<true, float>(p, threads);
  else
    bf16 ? dropout_all<false, uint16_t>(p, threads) : dropout_all<false, float>(p, threads);
}

static inline void adam_block(const MaskUpdate& p, int64_t first, int64_t count) {
  float* __restrict s = p.scores + first;
  float* __restrict m = p.exp_avg + first;
  float* __restrict v = p.exp_avg_sq + first;
  const float* __restrict g = p.grad + first;
  // Copies, so that the compiler need not reload them after every store.
  const float rest1 = p.rest1, beta2 = p.beta2, rest2 = p.rest2;
  const float step_size = p.step_size, denom_scale = p.denom_scale, eps = p.eps;
  for (int64_t j = 0; j < count; ++j) {
    const float gj = g[j];
    const float mj = m[j] + rest1 * (gj - m[j]);
    const float vj = v[j] * beta2 + rest2 * gj * gj;
    m[j] = mj;
    v[j] = vj;
    s[j] -= mj * step_size / (std::sqrt(vj) * denom_scale + eps);
  }
}

int64_t mask_update(const MaskUpdate& p, int threads) {
  std::atomic<int64_t> nans{0};
  for_words(p.n, p.k, threads, [&](int64_t word, int64_t first, int64_t count) {
    uint32_t now;
    bool nan;
    if (count == 32) {
      adam_block(p, first, 32);
      now = compare32(p.scores + first, p.threshold);
      nan = any_nan32(p.scores + first);
    } else {
      adam_block(p, first, count);
      float tail[32] = {};
      std::memcpy(tail, p.scores + first, count * sizeof(float));
      now = compare32(tail, p.threshold) & tail_mask(count);
      nan = any_nan32(tail);
    }
    if (nan) nans.fetch_add(1, std::memory_order_relaxed);
    // Flips are rare: the masked weight costs traffic only where a word has changed.
    if (p.dense && now != p.bits[word]) select_any(p.itemsize, now, p.weight, p.dense, first, count);
    p.bits[word] = now;
  });
  return nans;
}

void uniform(const Draw& draw, float* out, int64_t numel, int threads) {
  parallel(numel, 32, threads, [&](int64_t begin, int64_t end) {
    alignas(64) float u[32];
    for (int64_t first = begin; first < end; first += 32) {
      uniform32(draw, static_cast<uint64_t>(first) / 4, u);
      std::memcpy(out + first, u, std::min<int64_t>(32, end - first) * sizeof(float));
    }
  });
}

}  // namespace rmt::cpu::RMT_ISA
