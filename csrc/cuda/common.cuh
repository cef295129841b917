// What every kernel file shares: error checks, dtype dispatch, and the grid for kernels whose warps walk rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch.h"
#include "method.cuh"

namespace rmt::cuda {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline cudaStream_t as_stream(uintptr_t cuda_stream) { return reinterpret_cast<cudaStream_t>(cuda_stream); }

inline void need(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
  }
}

// Right after a launch: reports a launch that was refused. Faults inside a kernel surface at a later synchronisation.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

inline bool aligned(uintptr_t address, int64_t bytes) { return address % bytes == 0; }

// Blocks of (32, kWarpsPerBlock): x counts strips of a row, one warp each; y and the warps walk the rows in strides.
// No index then needs a 64-bit division.
inline dim3 strip_grid(int64_t rows, int64_t strips) {
  return dim3(static_cast<unsigned>(strips),
              static_cast<unsigned>(std::min<int64_t>(ceil_div(rows, kWarpsPerBlock), 65535)));
}

__device__ __forceinline__ int64_t first_row() { return int64_t{blockIdx.y} * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t row_step() { return int64_t{gridDim.y} * blockDim.y; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Four elements from flat index `at` on, as fp32. `whole`: 16-byte aligned (8 for two-byte types) and in range.
template <typename T>
__device__ __forceinline__ void load4(const T* __restrict__ from, int64_t at, int count, bool whole, float (&to)[4]) {
  if (whole) {
    if constexpr (sizeof(T) == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + at);
      to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else {
      const uint2 four = *reinterpret_cast<const uint2*>(from + at);
      T elements[4];
      memcpy(elements, &four, sizeof(four));
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = to_float(elements[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = i < count ? to_float(from[at + i]) : 0.0f;
  }
}

// Calls `f` with a value of the dtype's C++ type.
template <typename F>
void dispatch(int dtype, F&& f) {
  switch (dtype) {
    case kFloat32: return f(float{});
    case kBFloat16: return f(__nv_bfloat16{});
    case kFloat16: return f(__half{});
    default: throw std::runtime_error("dtype must be 0 (fp32), 1 (bf16) or 2 (fp16), got " + std::to_string(dtype));
  }
}

}  // namespace rmt::cuda
