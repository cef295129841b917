// Bits from masks and scores, and back. Memory-bound: a value is read once, a word written once.
#include "common.cuh"

namespace rmt::cuda {
namespace {

struct Above {
  float threshold;
  template <typename T>
  __device__ bool operator()(T score) const {
    return to_float(score) > threshold;
  }
};

struct On {
  __device__ bool operator()(uint8_t mask) const { return mask != 0; }
};

constexpr int kInFlight = 8;  // words whose loads are issued together; divides kWarp

// A warp packs up to 32 words of a row, one ballot each; lane i keeps word i: they leave in one coalesced store.
template <typename T, typename IsOn>
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock) pack_kernel(
    const T* __restrict__ values,  // (N, K)
    int64_t n, int64_t k, int64_t stride, IsOn is_on,
    uint32_t* __restrict__ bits) {  // (N, ceil(K / 32))
  const int lane = threadIdx.x;
  const int64_t words = ceil_div(k, 32), first = int64_t{blockIdx.x} * kWarp;
  const int count = static_cast<int>(min(int64_t{kWarp}, words - first));
  for (int64_t row = first_row(); row < n; row += row_step()) {
    const T* from = values + row * stride + first * 32 + lane;
    uint32_t mine = 0;
    for (int batch = 0; batch < count; batch += kInFlight) {
      bool on[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const bool inside = (first + batch + i) * 32 + lane < k;
        on[i] = inside && is_on(from[(batch + i) * 32]);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const uint32_t word = __ballot_sync(~0u, on[i]);
        mine = lane == batch + i ? word : mine;
      }
    }
    if (lane < count) bits[row * words + first + lane] = mine;
  }
}

// A lane unpacks 4 columns, a warp 128; `whole` says that groups of 4 are aligned and never cross a row's end.
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock) unpack_kernel(
    const uint32_t* __restrict__ bits,  // (N, ceil(K / 32))
    int64_t n, int64_t k, bool whole,
    uint8_t* __restrict__ mask) {  // (N, K)
  const int64_t words = ceil_div(k, 32), column = (int64_t{blockIdx.x} * kWarp + threadIdx.x) * 4;
  if (column >= k) return;
  for (int64_t row = first_row(); row < n; row += row_step()) {
    const uint32_t four = bits[row * words + column / 32] >> (column % 32) & 15u;
    const uint32_t bytes = four * 0x00204081u & 0x01010101u;  // bit i to byte i
    uint8_t* to = mask + row * k + column;
    if (whole) {
      *reinterpret_cast<uint32_t*>(to) = bytes;
    } else {
      for (int i = 0; i < 4 && column + i < k; ++i) to[i] = bytes >> (8 * i) & 1u;
    }
  }
}

template <typename T, typename IsOn>
void launch_pack(uintptr_t values, int64_t n, int64_t k, int64_t stride, IsOn is_on, uintptr_t bits, uintptr_t stream) {
  if (n == 0 || k == 0) return;
  pack_kernel<<<strip_grid(n, ceil_div(k, 32 * kWarp)), dim3(kWarp, kWarpsPerBlock), 0, as_stream(stream)>>>(
      pointer<const T>(values), n, k, stride, is_on, pointer<uint32_t>(bits));
  check_launch("pack_kernel");
}

}  // namespace

void pack_bits(uintptr_t mask, int64_t n, int64_t k, int64_t stride, uintptr_t bits, uintptr_t cuda_stream) {
  launch_pack<uint8_t>(mask, n, k, stride, On{}, bits, cuda_stream);
}

void pack_scores(uintptr_t scores, int dtype, int64_t n, int64_t k, int64_t stride, double threshold, uintptr_t bits,
                 uintptr_t cuda_stream) {
  dispatch(dtype, [&](auto element) {
    launch_pack<decltype(element)>(scores, n, k, stride, Above{static_cast<float>(threshold)}, bits, cuda_stream);
  });
}

void unpack_bits(uintptr_t bits, int64_t n, int64_t k, uintptr_t mask, uintptr_t cuda_stream) {
  if (n == 0 || k == 0) return;
  const bool whole = k % 4 == 0 && aligned(mask, 4);
  unpack_kernel<<<strip_grid(n, ceil_div(k, 4 * kWarp)), dim3(kWarp, kWarpsPerBlock), 0, as_stream(cuda_stream)>>>(
      pointer<const uint32_t>(bits), n, k, whole, pointer<uint8_t>(mask));
  check_launch("unpack_kernel");
}

}  // namespace rmt::cuda
