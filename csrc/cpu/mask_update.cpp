// The weight-sized work of a training step, one parallel region for all layers: gradient, Adam, bits, masked weight.
// Compiled once per instruction set.
//
// Bytes a parameter with fp32 moments: both gradients, weight, scores and moments read, scores and moments written,
// 36; with bf16 moments 28, with 8 bits 24. The masked weight costs traffic only where a word has changed.
//
// The layers are cut into units of about kUnit elements that begin on a tile, hence on an exponent of 8-bit moments and
// on a block of the random numbers, and on a word. Where rows end within a word (K % 32) a unit is as many rows as that
// takes. A unit's sums are added to its layer's in order, whichever thread they come from.
#include <numeric>
#include <vector>

#include "elementwise.h"
#include "moments.h"
#include "parallel.h"

namespace rmt::cpu::RMT_ISA {

namespace {

constexpr int64_t kUnit = 4096;
constexpr uint32_t kRoundingStream = 1u << 31;  // reference.ROUNDING_STREAM

// How one layer is cut: `rows` rows of `columns`, `step` rows to a unit, or, of one long row, `step` elements.
struct Cut {
  int64_t rows, columns, step, units;
};

Cut cut(int64_t n, int64_t k) {
  if (k % 32 == 0 || n == 1) return {1, n * k, kUnit, (n * k + kUnit - 1) / kUnit};
  const int64_t aligned = kTile / std::gcd<int64_t>(k, kTile);
  const int64_t step = aligned * std::max<int64_t>(1, kUnit / (aligned * k));
  return {n, k, step, (n + step - 1) / step};
}

template <typename M, typename V>
void adam_tile(const MaskUpdate& p, const float* __restrict g, M& first, V& second, float* __restrict s) {
  float* __restrict m = first.values;
  float* __restrict v = second.values;
  // Copies, so that the compiler need not reload them after every store.
  const float rest1 = p.rest1, beta2 = p.beta2, rest2 = p.rest2;
  const float step_size = p.step_size, denom_scale = p.denom_scale, eps = p.eps;
  for (int j = 0; j < kTile; ++j) {
    const float gj = g[j];
    const float mj = m[j] + rest1 * (gj - m[j]);
    const float vj = v[j] * beta2 + rest2 * gj * gj;
    m[j] = mj;
    v[j] = vj;
    s[j] -= mj * step_size / (std::sqrt(vj) * denom_scale + eps);
  }
}

// Squares of fp32 are exact in double: the sum depends on its order alone, which no instruction set changes.
double squares_of(const float* s) {
  double sums[16] = {};
  for (int j = 0; j < kTile; j += 16)
    for (int i = 0; i < 16; ++i) sums[i] += static_cast<double>(s[j + i]) * static_cast<double>(s[j + i]);
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

// Flat elements begin .. end of one layer, up to the scores.
template <Moments kMoments>
void update_elements(const MaskUpdate& p, const UpdateLayer& l, int64_t begin, int64_t end, UpdateSums& sums) {
  alignas(64) float gradient[kTile], copy[kTile];
  alignas(64) uint32_t random[kTile];
  Moment<kMoments, true> first;
  Moment<kMoments, false> second;
  Draw rounding = l.gradient.draw;
  rounding.stream += kRoundingStream;
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = std::min<int64_t>(kTile, end - at);
    gradient_tile(l.gradient, at, count, gradient);
    first.load(l.exp_avg, l.exponents[0], at, count);
    second.load(l.exp_avg_sq, l.exponents[1], at, count);
    float* s = const_cast<float*>(padded<float>(l.scores + at, count, copy));
    adam_tile(p, gradient, first, second, s);
    if (kMoments != Moments::f32) draw_tile(rounding, at, random);
    first.store(random);
    second.store(random);
    if (p.squares) {
      // Without eps the padding has become 0 / 0.
      if (count < kTile) std::memset(s + count, 0, (kTile - count) * sizeof(float));
      sums.squares += squares_of(s);
    }
    if (count < kTile) std::memcpy(l.scores + at, s, count * sizeof(float));
  }
}

void refresh(const UpdateLayer& l, uint32_t word, int64_t first, int64_t count) {
  const DType dtype = l.gradient.weight_dtype;
  if (l.dense_dtype == dtype)
    return select_any(dtype == DType::f32 ? 4 : 2, word, l.weight, l.dense, first, count);
  const float* from = static_cast<const float*>(l.weight) + first;
  uint16_t* to = static_cast<uint16_t*>(l.dense) + first;
  for (int64_t j = 0; j < count; ++j) to[j] = word >> j & 1 ? to_bf16(from[j]) : 0;
}

// Words `word` and on of one row: `count` elements from flat index `first`. Their scores are in the cache.
void update_bits(
    const MaskUpdate& p, const UpdateLayer& l, int64_t word, int64_t first, int64_t count, UpdateSums& sums) {
  for (; count > 0; ++word, first += 32, count -= 32) {
    float tail[32] = {};
    const float* s = l.scores + first;
    if (count < 32) s = static_cast<const float*>(std::memcpy(tail, s, count * sizeof(float)));
    const uint32_t now = compare32(s, p.threshold) & tail_mask(count), before = l.bits[word];
    sums.nans += any_nan32(s);
    sums.on += __builtin_popcount(now);
    if (now == before) continue;
    sums.flipped += __builtin_popcount((now ^ before) & tail_mask(count));
    if (l.dense) refresh(l, now, first, std::min<int64_t>(count, 32));
    l.bits[word] = now;
  }
}

template <Moments kMoments>
void update_unit(const MaskUpdate& p, const UpdateLayer& l, const Cut& c, int64_t unit, UpdateSums& sums) {
  const int64_t begin = unit * c.step, end = std::min(begin + c.step, c.rows == 1 ? c.columns : c.rows);
  if (c.rows == 1) {
    update_elements<kMoments>(p, l, begin, end, sums);
    update_bits(p, l, begin / 32, begin, end - begin, sums);
    return;
  }
  update_elements<kMoments>(p, l, begin * c.columns, end * c.columns, sums);
  const int64_t words = (c.columns + 31) / 32;
  for (int64_t row = begin; row < end; ++row) update_bits(p, l, row * words, row * c.columns, c.columns, sums);
}

}  // namespace

void mask_update(const MaskUpdate& p, int threads) {
  std::vector<Cut> cuts;
  std::vector<int64_t> starts = {0};  // first unit of each layer, and behind the last
  for (int64_t i = 0; i < p.count; ++i) {
    cuts.push_back(cut(p.layers[i].n, p.layers[i].k));
    starts.push_back(starts.back() + cuts.back().units);
  }
  std::vector<UpdateSums> partial(starts.back());
  const auto update = p.moments == Moments::f32    ? update_unit<Moments::f32>
                      : p.moments == Moments::bf16 ? update_unit<Moments::bf16>
                                                   : update_unit<Moments::u8>;
  parallel(starts.back(), 1, threads, [&](int64_t begin, int64_t end) {
    int64_t layer = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (int64_t unit = begin; unit < end; ++unit) {
      if (unit == starts[layer + 1]) ++layer;
      UpdateSums sums = {};  // its own: neighbours in `partial` share a cache line
      update(p, p.layers[layer], cuts[layer], unit - starts[layer], sums);
      partial[unit] = sums;
    }
  });
  for (int64_t i = 0; i < p.count; ++i) {
    UpdateSums& sums = p.sums[i] = {};
    for (int64_t unit = starts[i]; unit < starts[i + 1]; ++unit) {
      sums.squares += partial[unit].squares;
      sums.flipped += partial[unit].flipped;
      sums.on += partial[unit].on;
      sums.nans += partial[unit].nans;
    }
  }
}

}  // namespace rmt::cpu::RMT_ISA
