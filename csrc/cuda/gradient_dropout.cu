// Gradient of the scores from the two weight gradients: chain rule through W, L2 term, gradient dropout.
#include "common.cuh"

namespace rmt::cuda {
namespace {

constexpr int kThreads = 256;

// A thread owns the four flat indices of one Philox call, whatever K is: the tensors are contiguous.
template <typename T>
__global__ void __launch_bounds__(kThreads) gradient_dropout_kernel(
    const float* __restrict__ grad_task,     // (N, K)
    const float* __restrict__ grad_general,  // (N, K) or null
    const T* __restrict__ weight,            // (N, K) or null
    const float* __restrict__ scores,        // (N, K), read with penalty only
    const float* __restrict__ penalty,       // () or null
    const int64_t* __restrict__ rng,         // (2,), read with grad_general only
    int64_t numel, bool vectors, float rest, int64_t stream,
    float* __restrict__ out) {  // (N, K)
  const int64_t group = int64_t{blockIdx.x} * kThreads + threadIdx.x, at = group * 4;
  if (at >= numel) return;
  const int count = static_cast<int>(min(int64_t{4}, numel - at));
  const bool whole = vectors && count == 4;
  float a[4], b[4] = {}, w[4], s[4];  // all loads before the first use
  load4(grad_task, at, count, whole, a);
  if (grad_general != nullptr) load4(grad_general, at, count, whole, b);
  if (weight != nullptr) load4(weight, at, count, whole, w);
  if (penalty != nullptr) load4(scores, at, count, whole, s);
  const float factor = penalty != nullptr ? *penalty : 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (weight != nullptr) {
      a[i] = product(a[i], w[i]);
      b[i] = product(b[i], w[i]);
    }
    if (penalty != nullptr) a[i] += product(factor, s[i]);
  }
  if (grad_general != nullptr) {
    float uniform[4];
    philox_uniform(rng[0], rng[1], stream, static_cast<uint64_t>(group), uniform);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = drop(a[i], b[i], uniform[i], rest);
  }
  if (whole) {
    *reinterpret_cast<float4*>(out + at) = make_float4(a[0], a[1], a[2], a[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) out[at + i] = a[i];
    }
  }
}

}  // namespace

void gradient_dropout(uintptr_t grad_task, uintptr_t grad_general, uintptr_t weight, int weight_dtype,
                      uintptr_t scores, uintptr_t penalty, uintptr_t rng, int64_t numel, double strength,
                      int64_t stream, uintptr_t out, uintptr_t cuda_stream) {
  if (numel == 0) return;
  need(grad_general == 0 || rng != 0, "grad_general needs rng");
  need(penalty == 0 || scores != 0, "penalty needs scores");
  const int64_t blocks = ceil_div(ceil_div(numel, 4), kThreads);
  need(blocks <= 0x7FFFFFFF, "gradient_dropout takes at most 2^41 elements");
  const bool vectors = aligned(grad_task | grad_general | weight | scores | out, 16);
  dispatch(weight_dtype, [&](auto element) {
    gradient_dropout_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, as_stream(cuda_stream)>>>(
        pointer<const float>(grad_task), pointer<const float>(grad_general), pointer<const decltype(element)>(weight),
        pointer<const float>(scores), pointer<const float>(penalty), pointer<const int64_t>(rng), numel, vectors,
        static_cast<float>(1.0 - strength), stream, pointer<float>(out));
  });
  check_launch("gradient_dropout_kernel");
}

}  // namespace rmt::cuda
