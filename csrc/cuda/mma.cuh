// The tensor core instruction of sm_80 that masked_linear_small.cu needs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace rmt::cuda {

// d += A (16 x 16) times B (16 x 8). Lane 4 g + t holds of A the columns 2 t, 2 t + 1 of row g (a0) and g + 8 (a1), and
// the columns 2 t + 8, 2 t + 9 (a2, a3); of B those rows of column g (b0, b1); of d the columns 2 t, 2 t + 1 of row g
// (d[0], d[1]) and g + 8 (d[2], d[3]).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(
    float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

}  // namespace rmt::cuda
