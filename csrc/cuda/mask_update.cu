// Adam, threshold, repacking and the refreshed masked weight of every layer, in one launch.
//
// Bytes a parameter: scores, m, v read and written, gradient read = 28; W and dense only where a word changed.
#include "common.cuh"

namespace rmt::cuda {
namespace {

// A warp takes kWords words of bits, a lane one element of each: all loads are issued before the first use, which hides
// the latency of device memory.
constexpr int kWords = 4;
constexpr int kWordsPerBlock = kWords * kWarpsPerBlock;

struct Layer {
  float* scores;
  uint32_t* bits;
  float* exp_avg;
  float* exp_avg_sq;
  void* dense;         // or null
  const float* grad;
  const void* weight;  // or null
  uint32_t words;      // N * ceil(K / 32): below 2^32 for anything that fits in a device's memory
  uint32_t words_per_row;
  int64_t k;
};

// The layers travel as a kernel parameter, so that a captured graph holds them. CUDA 12.1 raised the limit on
// parameters from 4 KB to 32 KB. A call with more layers than fit takes several launches.
#if CUDART_VERSION >= 12010
constexpr int kMaxLayers = 256;
#else
constexpr int kMaxLayers = 44;
#endif

struct Table {
  Layer layers[kMaxLayers];
  uint32_t first_block[kMaxLayers];  // ascending
  int count;
};

static_assert(sizeof(Table) < (kMaxLayers > 44 ? 32000 : 4000), "the table must fit in the kernel's parameters");

template <typename T>  // unsigned integer of the size of weight's elements
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock) mask_update_kernel(
    const __grid_constant__ Table table,
    const float* __restrict__ factors,  // (2,)
    Adam adam, float threshold) {
  int low = 0, high = table.count;  // the last layer whose first block is not behind this one
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_block[middle] <= blockIdx.x ? low : high) = middle;
  }
  const Layer& layer = table.layers[low];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint64_t first = uint64_t{blockIdx.x - table.first_block[low]} * kWordsPerBlock + warp * kWords;
  if (first >= layer.words) return;
  const float factor0 = factors[0], factor1 = factors[1];

  int64_t at[kWords];
  bool inside[kWords];
  float s[kWords], m[kWords], v[kWords], g[kWords];
  uint32_t before[kWords];
  uint32_t row = static_cast<uint32_t>(first) / layer.words_per_row;
  uint32_t column = static_cast<uint32_t>(first) % layer.words_per_row;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int64_t k = int64_t{column} * 32 + lane;
    inside[i] = first + i < layer.words && k < layer.k;
    at[i] = row * layer.k + k;
    s[i] = inside[i] ? layer.scores[at[i]] : 0.0f;
    m[i] = inside[i] ? layer.exp_avg[at[i]] : 0.0f;
    v[i] = inside[i] ? layer.exp_avg_sq[at[i]] : 0.0f;
    g[i] = inside[i] ? layer.grad[at[i]] : 0.0f;
    before[i] = first + i < layer.words ? layer.bits[first + i] : 0u;
    if (++column == layer.words_per_row) column = 0, ++row;
  }
  __syncwarp();  // every lane has read its words before lane 0 writes one
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (first + i >= layer.words) return;
    adam_step(adam, factor0, factor1, g[i], s[i], m[i], v[i]);
    if (inside[i]) {
      layer.scores[at[i]] = s[i];
      layer.exp_avg[at[i]] = m[i];
      layer.exp_avg_sq[at[i]] = v[i];
    }
    const bool on = inside[i] && s[i] > threshold;
    const uint32_t word = __ballot_sync(~0u, on);
    if (word == before[i]) continue;
    if (lane == 0) layer.bits[first + i] = word;
    if (layer.dense != nullptr && inside[i]) {
      static_cast<T*>(layer.dense)[at[i]] = on ? static_cast<const T*>(layer.weight)[at[i]] : T{0};
    }
  }
}

}  // namespace

void mask_update(const std::vector<uintptr_t>& scores, const std::vector<uintptr_t>& bits,
                 const std::vector<uintptr_t>& exp_avgs, const std::vector<uintptr_t>& exp_avg_sqs,
                 const std::vector<uintptr_t>& dense, const std::vector<uintptr_t>& grads,
                 const std::vector<uintptr_t>& weights, const std::vector<int64_t>& rows,
                 const std::vector<int64_t>& cols, int element_size, uintptr_t factors, double beta1, double beta2,
                 double eps, double threshold, uintptr_t cuda_stream) {
  const size_t count = scores.size();
  for (size_t size : {bits.size(), exp_avgs.size(), exp_avg_sqs.size(), grads.size(), rows.size(), cols.size()}) {
    need(size == count, "mask_update needs lists of one length");
  }
  need(dense.size() == weights.size() && (dense.empty() || dense.size() == count),
       "dense and weights must both be empty or have one tensor for each of scores");
  need(element_size == 2 || element_size == 4, "element_size must be 2 or 4");
  const auto kernel = element_size == 2 ? mask_update_kernel<uint16_t> : mask_update_kernel<uint32_t>;
  const Adam adam{static_cast<float>(1.0 - beta1), static_cast<float>(beta2), static_cast<float>(1.0 - beta2),
                  static_cast<float>(eps)};

  Table table{};
  uint64_t blocks = 0;
  const auto launch = [&] {
    if (blocks == 0) return;
    kernel<<<static_cast<unsigned>(blocks), kWarp * kWarpsPerBlock, 0, as_stream(cuda_stream)>>>(
        table, pointer<const float>(factors), adam, static_cast<float>(threshold));
    check_launch("mask_update_kernel");
    table.count = 0;
    blocks = 0;
  };
  for (size_t i = 0; i < count; ++i) {
    const uint64_t words_per_row = ceil_div(cols[i], 32), words = rows[i] * words_per_row;
    need(words <= 0xFFFFFFFFu, "mask_update takes at most 2^32 - 1 words of bits a layer");
    if (words == 0) continue;
    const uint64_t more = ceil_div(words, kWordsPerBlock);
    if (table.count == kMaxLayers || blocks + more > 0x7FFFFFFF) launch();
    table.first_block[table.count] = static_cast<uint32_t>(blocks);
    table.layers[table.count++] = Layer{
        pointer<float>(scores[i]), pointer<uint32_t>(bits[i]), pointer<float>(exp_avgs[i]),
        pointer<float>(exp_avg_sqs[i]), dense.empty() ? nullptr : pointer<void>(dense[i]),
        pointer<const float>(grads[i]), dense.empty() ? nullptr : pointer<const void>(weights[i]),
        static_cast<uint32_t>(words), static_cast<uint32_t>(words_per_row), cols[i]};
    blocks += more;
  }
  launch();
}

}  // namespace rmt::cuda
