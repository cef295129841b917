// weight with the off elements set to +0, by AND on the bit pattern: exact for every dtype, inf and NaN included.
#include "common.cuh"

namespace rmt::cuda {
namespace {

// The AND mask of 32-bit register r of a group of elements whose first is on bit 0 of `bits`.
template <int kBytes>
__device__ __forceinline__ uint32_t register_mask(uint32_t bits, int r) {
  if constexpr (kBytes == 2) return half_masks(bits >> (2 * r));
  return full_mask(bits >> (kBytes == 4 ? r : r / 2));
}

// 16 bytes a lane: a group of 16 / kBytes columns, which never straddles a word.
template <int kBytes>
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock) masked_weight_vector_kernel(
    const uint4* __restrict__ weight,  // (N, K)
    int64_t n, int64_t groups,         // groups a row
    int64_t stride,                    // of the rows of weight, in groups
    int64_t words,
    const uint32_t* __restrict__ bits,  // (N, words)
    uint4* __restrict__ out) {          // (N, K)
  constexpr int kColumns = 16 / kBytes;
  const int64_t group = int64_t{blockIdx.x} * kWarp + threadIdx.x, column = group * kColumns;
  if (group >= groups) return;
#pragma unroll 2
  for (int64_t row = first_row(); row < n; row += row_step()) {
    const uint32_t on = bits[row * words + column / 32] >> (column % 32);
    uint4 value = weight[row * stride + group];
    value.x &= register_mask<kBytes>(on, 0);
    value.y &= register_mask<kBytes>(on, 1);
    value.z &= register_mask<kBytes>(on, 2);
    value.w &= register_mask<kBytes>(on, 3);
    out[row * groups + group] = value;
  }
}

// Any K and alignment: one element a lane.
template <typename T>
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock) masked_weight_kernel(
    const T* __restrict__ weight,  // (N, K), elements as unsigned integers
    int64_t n, int64_t k, int64_t stride,
    const uint32_t* __restrict__ bits,  // (N, ceil(K / 32))
    T* __restrict__ out) {              // (N, K)
  const int64_t words = ceil_div(k, 32), column = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  if (column >= k) return;
#pragma unroll 2
  for (int64_t row = first_row(); row < n; row += row_step()) {
    const bool on = bits[row * words + column / 32] >> (column % 32) & 1u;
    out[row * k + column] = on ? weight[row * stride + column] : T{0};
  }
}

// In place, for every layer of a model in one launch: a swap of its task.
struct Rewritten {
  const void* weight;    // (N, K)
  const uint32_t* bits;  // (N, words)
  const uint32_t* old;   // of what `out` holds now; null: anything
  void* out;             // (N, K), contiguous
  int64_t stride;        // of the rows of weight
  int64_t columns;       // K; N * K for a matrix that is one long row of whole words
  uint32_t words;        // a row
  uint32_t groups;       // of 16 bytes or fewer, a row
  uint32_t first_block;
  bool vectors;
};

constexpr int kMaxRewritten = 48;  // the parameters of a kernel are 4 KB where CUDA is older than 12.1
constexpr int kGroups = 4;         // of a thread
constexpr int kGroupsPerBlock = kGroups * kWarp * kWarpsPerBlock;

struct Rewrite {
  Rewritten layers[kMaxRewritten];
  uint64_t groups[kMaxRewritten];  // of a layer
  int count;
};
static_assert(sizeof(Rewrite) <= 4096, "the parameters of a kernel are few");

// A thread takes the groups of 16 / sizeof(T) columns that lie a block apart: neighbours in a warp, and none straddles
// a word. Where the words are equal nothing more is read, and nothing written.
template <typename T>
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock) masked_weights_kernel(
    const __grid_constant__ Rewrite table) {
  constexpr int kBytes = sizeof(T), kColumns = 16 / kBytes;
  int low = 0, high = table.count;  // the last layer whose first block is not behind this one
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.layers[middle].first_block <= blockIdx.x ? low : high) = middle;
  }
  const Rewritten& layer = table.layers[low];
  const uint64_t first = uint64_t{blockIdx.x - layer.first_block} * kGroupsPerBlock + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const uint64_t group = first + i * kWarp * kWarpsPerBlock;
    if (group >= table.groups[low]) return;
    // 32 bits as long as they do: a 64-bit division costs more than the rest.
    const uint64_t row = group >> 32 ? group / layer.groups : static_cast<uint32_t>(group) / layer.groups;
    const int64_t column = static_cast<int64_t>(group - row * layer.groups) * kColumns;
    const int64_t word = row * layer.words + column / 32;
    const uint32_t bits = layer.bits[word];
    if (layer.old != nullptr && layer.old[word] == bits) continue;
    const T* from = static_cast<const T*>(layer.weight) + row * layer.stride + column;
    T* to = static_cast<T*>(layer.out) + row * layer.columns + column;
    const uint32_t on = bits >> (column % 32);
    if (layer.vectors) {
      uint4 value = *reinterpret_cast<const uint4*>(from);
      value.x &= register_mask<kBytes>(on, 0);
      value.y &= register_mask<kBytes>(on, 1);
      value.z &= register_mask<kBytes>(on, 2);
      value.w &= register_mask<kBytes>(on, 3);
      *reinterpret_cast<uint4*>(to) = value;
    } else {
      for (int j = 0; j < kColumns && column + j < layer.columns; ++j) to[j] = on >> j & 1u ? from[j] : T{0};
    }
  }
}

template <typename T>
void launch_masked_weight(uintptr_t weight, int64_t n, int64_t k, int64_t stride, uintptr_t bits, uintptr_t out,
                          uintptr_t cuda_stream) {
  constexpr int64_t kColumns = 16 / sizeof(T);
  const dim3 block(kWarp, kWarpsPerBlock);
  if (k % kColumns == 0 && stride % kColumns == 0 && aligned(weight, 16) && aligned(out, 16)) {
    masked_weight_vector_kernel<sizeof(T)>
        <<<strip_grid(n, ceil_div(k / kColumns, kWarp)), block, 0, as_stream(cuda_stream)>>>(
            pointer<const uint4>(weight), n, k / kColumns, stride / kColumns, ceil_div(k, 32),
            pointer<const uint32_t>(bits), pointer<uint4>(out));
  } else {
    masked_weight_kernel<<<strip_grid(n, ceil_div(k, kWarp)), block, 0, as_stream(cuda_stream)>>>(
        pointer<const T>(weight), n, k, stride, pointer<const uint32_t>(bits), pointer<T>(out));
  }
  check_launch("masked_weight_kernel");
}

}  // namespace

void masked_weight(uintptr_t weight, int element_size, int64_t n, int64_t k, int64_t stride, uintptr_t bits,
                   uintptr_t out, uintptr_t cuda_stream) {
  if (n == 0 || k == 0) return;
  switch (element_size) {
    case 2: return launch_masked_weight<uint16_t>(weight, n, k, stride, bits, out, cuda_stream);
    case 4: return launch_masked_weight<uint32_t>(weight, n, k, stride, bits, out, cuda_stream);
    case 8: return launch_masked_weight<uint64_t>(weight, n, k, stride, bits, out, cuda_stream);
    default: need(false, "element_size must be 2, 4 or 8");
  }
}

void masked_weights(const std::vector<uintptr_t>& outs, const std::vector<uintptr_t>& weights,
                    const std::vector<uintptr_t>& bits, const std::vector<uintptr_t>& olds,
                    const std::vector<int64_t>& rows, const std::vector<int64_t>& cols,
                    const std::vector<int64_t>& strides, int element_size, uintptr_t cuda_stream) {
  need(element_size == 2 || element_size == 4 || element_size == 8, "element_size must be 2, 4 or 8");
  const int64_t per_group = 16 / element_size;
  Rewrite table{};
  uint64_t blocks = 0;
  const auto launch = [&] {
    if (table.count == 0) return;
    const auto kernel = element_size == 2   ? masked_weights_kernel<uint16_t>
                        : element_size == 4 ? masked_weights_kernel<uint32_t>
                                            : masked_weights_kernel<uint64_t>;
    kernel<<<dim3(static_cast<unsigned>(blocks)), kWarp * kWarpsPerBlock, 0, as_stream(cuda_stream)>>>(table);
    check_launch("masked_weights_kernel");
    table.count = 0, blocks = 0;
  };
  for (size_t i = 0; i < outs.size(); ++i) {
    const int64_t n = rows[i], k = cols[i];
    if (n == 0 || k == 0) continue;
    const bool one_row = k % 32 == 0 && strides[i] == k;
    const int64_t columns = one_row ? n * k : k, groups = ceil_div(columns, per_group);
    need(groups <= UINT32_MAX, "a row of more than 2^32 groups of 16 bytes");
    const bool vectors = k % per_group == 0 && strides[i] % per_group == 0 && aligned(weights[i] | outs[i], 16);
    const uint64_t all = static_cast<uint64_t>(one_row ? 1 : n) * groups, more = ceil_div(all, kGroupsPerBlock);
    if (table.count == kMaxRewritten || blocks + more > INT32_MAX) launch();
    table.groups[table.count] = all;
    table.layers[table.count++] = {pointer<const void>(weights[i]), pointer<const uint32_t>(bits[i]),
                                   pointer<const uint32_t>(olds[i]), pointer<void>(outs[i]),
                                   one_row ? columns : strides[i], columns,
                                   static_cast<uint32_t>(ceil_div(columns, 32)), static_cast<uint32_t>(groups),
                                   static_cast<uint32_t>(blocks), vectors};
    blocks += more;
  }
  launch();
}

}  // namespace rmt::cuda
