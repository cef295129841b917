// The weight-sized work of a training step, every layer in one launch: gradient, Adam, bits, masked weight; and a
// small launch behind it that adds up each layer's norm and counts, where they are wanted.
//
// Bytes a parameter with fp32 moments: both gradients, weight, scores and moments read, scores and moments written,
// 36; with bf16 moments 28, with 8 bits 24. W again, and dense, only where a word has changed.
//
// Layout: a warp takes four words of bits, eight lanes a word, a lane four columns: elements 4 (lane % 8) .. + 3 of
// word lane / 8. Where rows begin on a multiple of four these are the four of one Philox block and one 16-byte vector. A
// matrix without ragged rows is one long row: two warps then hold the 256 elements that share an 8-bit exponent.
#include "mask_update.cuh"

namespace rmt::cuda {
namespace {

struct Partial {  // of a block of threads
  double squares;
  uint32_t flipped, on;
};

template <typename T, typename Combine>
__device__ __forceinline__ T over_warp(T value, Combine combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = combine(value, __shfl_xor_sync(~0u, value, distance));
  return value;
}

__device__ __forceinline__ uint32_t largest_of(const float (&x)[4]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) largest = max(largest, pattern_of(x[i]) & 0x7FFFFFFFu);
  return over_warp(largest, [](uint32_t a, uint32_t b) { return max(a, b); });
}

template <int kMoments, bool kGeneral>
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock) mask_update_kernel(
    const __grid_constant__ Table table, const Step step, Partial* __restrict__ partials) {
  int low = 0, high = table.count;  // the last layer whose first block is not behind this one
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_block[middle] <= blockIdx.x ? low : high) = middle;
  }
  const Layer& layer = table.layers[low];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint64_t word = uint64_t{blockIdx.x - table.first_block[low]} * kWordsPerBlock + warp * kWords + lane / 8;
  const bool live = word < layer.words;
  const uint32_t row = live ? static_cast<uint32_t>(word) / layer.words_per_row : 0u;
  const uint32_t word_of_row = static_cast<uint32_t>(word) - row * layer.words_per_row;
  const int64_t column = live ? int64_t{word_of_row} * 32 + lane % 8 * 4 : 0;
  const int64_t at = row * layer.columns + column;
  const int count = live ? static_cast<int>(max(int64_t{0}, min(int64_t{4}, layer.columns - column))) : 0;
  const bool whole = layer.vectors && count == 4;
  const uint64_t drawn = layer.offset + at;  // added up where it is used, it makes the kernel for 8 bits spill

  float g[4], b[4], w[4], s[4], m[4], v[4];  // all loads before the first use
  load4(layer.grad, at, count, whole, g);
  if constexpr (kGeneral) load4(layer.general, at, count, whole, b);
  if (layer.chained) load_weight(layer.weight, step.weight_dtype, at, count, whole, w);
  load4(layer.scores, at, count, whole, s);
  load_moment<kMoments, true>(layer.exp_avg, layer.exponents[0], at, count, whole, m);
  load_moment<kMoments, false>(layer.exp_avg_sq, layer.exponents[1], at, count, whole, v);
  const uint32_t before = live ? layer.bits[word] : 0u;

  if (layer.chained) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      g[i] = product(g[i], w[i]);
      if constexpr (kGeneral) b[i] = product(b[i], w[i]);
    }
  }
  if (step.l2 != 0.0f) {
    // As the reference has it: torch divides a number by a tensor through the reciprocal.
    const float penalty = product(1.0f / fmaxf(step.norms[layer.index], 0x1p-126f), step.l2);
#pragma unroll
    for (int i = 0; i < 4; ++i) g[i] += product(penalty, s[i]);
  }
  uint32_t random[4] = {};
  if constexpr (kGeneral) {
    philox_words_at(step.rng[0], step.rng[1], layer.stream, drawn, random);
#pragma unroll
    for (int i = 0; i < 4; ++i) g[i] = drop(g[i], b[i], to_uniform(random[i]), step.rest);
  }
  const float factor0 = step.factors[0], factor1 = step.factors[1];
#pragma unroll
  for (int i = 0; i < 4; ++i) adam_step(step.adam, factor0, factor1, g[i], s[i], m[i], v[i]);
  store4(layer.scores, at, count, whole, s);

  uint32_t exponents[2] = {};
  if constexpr (kMoments == kMomentsU8) {
    __shared__ uint32_t largest[2][kWarpsPerBlock];
    const uint32_t mine[2] = {largest_of(m), largest_of(v)};
    if (lane == 0) largest[0][warp] = mine[0], largest[1][warp] = mine[1];
    __syncthreads();
    exponents[0] = block_exponent<true>(max(mine[0], largest[0][warp ^ 1]));
    exponents[1] = block_exponent<false>(max(mine[1], largest[1][warp ^ 1]));
    if (count > 0 && at % kMomentBlock == 0) {
      layer.exponents[0][at / kMomentBlock] = static_cast<uint8_t>(exponents[0]);
      layer.exponents[1][at / kMomentBlock] = static_cast<uint8_t>(exponents[1]);
    }
  }
  if constexpr (kMoments != kMomentsF32) {
    philox_words_at(step.rng[0], step.rng[1], layer.stream + kRoundingStream, drawn, random);
  }
  store_moment<kMoments, true>(layer.exp_avg, at, count, whole, exponents[0], random, m);
  store_moment<kMoments, false>(layer.exp_avg_sq, at, count, whole, exponents[1], random, v);

  uint32_t nibble = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) nibble |= static_cast<uint32_t>(i < count && s[i] > step.threshold) << i;
  uint32_t now = nibble << (lane % 8 * 4);
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) now |= __shfl_xor_sync(~0u, now, distance);
  __syncwarp();  // every lane has read its word before one of them writes it
  if (now != before) {
    if (lane % 8 == 0) layer.bits[word] = now;
    if (layer.dense != nullptr) refresh(layer, step, at, count, nibble);
  }

  if (partials == nullptr) return;
  double squares = 0;  // of fp32 values: each exact
#pragma unroll
  for (int i = 0; i < 4; ++i) squares += i < count ? static_cast<double>(s[i]) * static_cast<double>(s[i]) : 0.0;
  squares = over_warp(squares, [](double x, double y) { return x + y; });
  // Both counts of a block fit in 16 bits: it has 1024 elements. Pad bits that were set have not flipped.
  const uint32_t flipped = (now ^ before) >> (lane % 8 * 4) & ((1u << count) - 1);
  uint32_t both = static_cast<uint32_t>(__popc(flipped)) << 16 | __popc(nibble);
  both = over_warp(both, [](uint32_t x, uint32_t y) { return x + y; });
  __shared__ double warp_squares[kWarpsPerBlock];
  __shared__ uint32_t warp_counts[kWarpsPerBlock];
  if (lane == 0) warp_squares[warp] = squares, warp_counts[warp] = both;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kWarpsPerBlock; ++i) squares += warp_squares[i], both += warp_counts[i];
  partials[blockIdx.x] = {squares, both >> 16, both & 0xFFFFu};
}

// A block for each layer adds its partial sums, always in the same order.
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock) mask_update_sums_kernel(
    const __grid_constant__ Table table, const Partial* __restrict__ partials, float* norms, int64_t* counts) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double squares = 0;
  uint64_t flipped = 0, on = 0;
  for (uint32_t i = table.first_block[blockIdx.x] + threadIdx.x; i < table.first_block[blockIdx.x + 1];
       i += kWarp * kWarpsPerBlock) {
    squares += partials[i].squares;
    flipped += partials[i].flipped;
    on += partials[i].on;
  }
  const auto sum = [](auto x, auto y) { return x + y; };
  squares = over_warp(squares, sum), flipped = over_warp(flipped, sum), on = over_warp(on, sum);
  __shared__ double warp_squares[kWarpsPerBlock];
  __shared__ uint64_t warp_counts[2][kWarpsPerBlock];
  if (lane == 0) warp_squares[warp] = squares, warp_counts[0][warp] = flipped, warp_counts[1][warp] = on;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kWarpsPerBlock; ++i) {
    squares += warp_squares[i], flipped += warp_counts[0][i], on += warp_counts[1][i];
  }
  const int index = table.layers[blockIdx.x].index;
  if (norms != nullptr) norms[index] = static_cast<float>(sqrt(squares));
  if (counts != nullptr) {
    counts[2 * index] = static_cast<int64_t>(flipped);
    counts[2 * index + 1] = static_cast<int64_t>(on);
  }
}

template <int kMoments>
auto kernel_for(bool general) {
  return general ? mask_update_kernel<kMoments, true> : mask_update_kernel<kMoments, false>;
}

// A matrix whose rows are whole words is one long row.
bool flat(int64_t rows, int64_t cols) { return rows == 1 || cols % 32 == 0; }

uint64_t words_of(int64_t rows, int64_t cols) {
  return flat(rows, cols) ? ceil_div(rows * cols, 32) : rows * ceil_div(cols, 32);
}

}  // namespace

int64_t mask_update_partials(const std::vector<int64_t>& rows, const std::vector<int64_t>& cols) {
  int64_t blocks = 0;
  for (size_t i = 0; i < rows.size(); ++i) blocks += ceil_div(words_of(rows[i], cols[i]), kWordsPerBlock);
  return blocks;
}

void mask_update(const std::vector<uintptr_t>& scores, const std::vector<uintptr_t>& bits,
                 const std::vector<uintptr_t>& exp_avgs, const std::vector<uintptr_t>& exp_avg_sqs,
                 const std::vector<uintptr_t>& dense, const std::vector<uintptr_t>& grads,
                 const std::vector<uintptr_t>& weights, const std::vector<uintptr_t>& generals,
                 const std::vector<uintptr_t>& scales, const std::vector<int64_t>& rows,
                 const std::vector<int64_t>& cols, const std::vector<bool>& chained,
                 const std::vector<int64_t>& streams, const std::vector<int64_t>& offsets, int moments,
                 int weight_dtype, int dense_dtype, uintptr_t factors, uintptr_t norms, uintptr_t counts,
                 uintptr_t rng, uintptr_t partials, double l2, double strength, double beta1, double beta2, double eps,
                 double threshold, uintptr_t cuda_stream) {
  const size_t count = scores.size();
  const auto need_length = [&](size_t size) { need(size == count, "mask_update needs lists of one length"); };
  for (size_t size : {bits.size(), exp_avgs.size(), exp_avg_sqs.size(), grads.size(), rows.size(), cols.size(),
                      streams.size(), offsets.size()}) {
    need_length(size);
  }
  for (size_t size : {dense.size(), weights.size(), generals.size(), chained.size(), scales.size() / 2}) {
    if (size != 0) need_length(size);
  }
  need(dense.empty() || !weights.empty(), "dense needs weights");
  need(dense_dtype == weight_dtype || (weight_dtype == kFloat32 && dense_dtype == kBFloat16),
       "dense must have weight's dtype, or bf16 beside fp32");
  need((moments == kMomentsU8) == !scales.empty(), "8-bit moments need scales, and only they do");
  need((generals.empty() && moments == kMomentsF32) || rng != 0, "dropout and rounding need rng");
  need(l2 == 0.0 || norms != 0, "l2 needs norms");
  need((norms == 0 && counts == 0) || partials != 0, "norms and counts need partials");
  const bool general = !generals.empty(), sums = norms != 0 || counts != 0;
  const auto kernel = moments == kMomentsF32    ? kernel_for<kMomentsF32>(general)
                      : moments == kMomentsBF16 ? kernel_for<kMomentsBF16>(general)
                                                : kernel_for<kMomentsU8>(general);
  const Step step{pointer<const float>(factors), pointer<const int64_t>(rng), pointer<const float>(norms),
                  Adam{static_cast<float>(1.0 - beta1), static_cast<float>(beta2), static_cast<float>(1.0 - beta2),
                       static_cast<float>(eps)},
                  static_cast<float>(threshold), static_cast<float>(l2), static_cast<float>(1.0 - strength),
                  weight_dtype, dense_dtype};

  Table table{};
  uint64_t blocks = 0;
  auto* partial = sums ? pointer<Partial>(partials) : nullptr;
  const auto launch = [&] {
    if (blocks == 0) return;
    table.first_block[table.count] = static_cast<uint32_t>(blocks);
    kernel<<<static_cast<unsigned>(blocks), kWarp * kWarpsPerBlock, 0, as_stream(cuda_stream)>>>(table, step, partial);
    check_launch("mask_update_kernel");
    if (sums) {
      mask_update_sums_kernel<<<static_cast<unsigned>(table.count), kWarp * kWarpsPerBlock, 0,
                                as_stream(cuda_stream)>>>(
          table, partial, pointer<float>(norms), pointer<int64_t>(counts));
      check_launch("mask_update_sums_kernel");
      partial += blocks;
    }
    table.count = 0;
    blocks = 0;
  };
  const auto nth = [](const std::vector<uintptr_t>& list, size_t i) { return list.empty() ? 0 : list[i]; };
  for (size_t i = 0; i < count; ++i) {
    const uint64_t words = words_of(rows[i], cols[i]);
    need(words <= 0xFFFFFFFFu, "mask_update takes at most 2^32 - 1 words of bits a layer");
    need(scales.empty() || flat(rows[i], cols[i]), "8-bit moments need K to be a multiple of 32, or one row");
    if (words == 0) continue;
    const uint64_t more = ceil_div(words, kWordsPerBlock);
    if (table.count == kMaxLayers || blocks + more > 0x7FFFFFFF) launch();
    Layer& layer = table.layers[table.count];
    const uint64_t per_row = flat(rows[i], cols[i]) ? words : ceil_div(cols[i], 32);
    layer.columns = flat(rows[i], cols[i]) ? rows[i] * cols[i] : cols[i];
    layer.scores = pointer<float>(scores[i]), layer.bits = pointer<uint32_t>(bits[i]);
    layer.exp_avg = pointer<void>(exp_avgs[i]), layer.exp_avg_sq = pointer<void>(exp_avg_sqs[i]);
    for (int j = 0; j < 2; ++j) layer.exponents[j] = scales.empty() ? nullptr : pointer<uint8_t>(scales[2 * i + j]);
    layer.dense = pointer<void>(nth(dense, i)), layer.weight = pointer<const void>(nth(weights, i));
    layer.grad = pointer<const float>(grads[i]), layer.general = pointer<const float>(nth(generals, i));
    layer.words = static_cast<uint32_t>(words), layer.words_per_row = static_cast<uint32_t>(per_row);
    layer.index = static_cast<int>(i), layer.stream = static_cast<uint32_t>(streams[i]);
    layer.offset = static_cast<uint64_t>(offsets[i]);
    layer.chained = !chained.empty() && chained[i];
    need(!layer.chained || layer.weight != nullptr, "chained needs weights");
    const uintptr_t addresses =
        scores[i] | exp_avgs[i] | exp_avg_sqs[i] | grads[i] | nth(generals, i) | nth(weights, i);
    layer.vectors = (layer.columns % 4 == 0 || flat(rows[i], cols[i])) && aligned(addresses, 16);
    table.first_block[table.count++] = static_cast<uint32_t>(blocks);
    blocks += more;
  }
  launch();
}

}  // namespace rmt::cuda
