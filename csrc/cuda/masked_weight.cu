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

}  // namespace rmt::cuda
