// What the kernels of mask_update.cu are given, and how a thread reads and writes its four elements: `count` of them
// from flat index `at` on, as one vector where `whole`. Layouts of stored moments: reference.load_moment.
#pragma once

#include "common.cuh"

namespace rmt::cuda {

constexpr int kWords = 4;  // of a warp
constexpr int kWordsPerBlock = kWords * kWarpsPerBlock;

struct Layer {
  float* scores;
  uint32_t* bits;
  void* exp_avg;
  void* exp_avg_sq;
  uint8_t* exponents[2];  // of exp_avg and exp_avg_sq, or null
  void* dense;            // or null
  const float* grad;
  const float* general;  // or null
  const void* weight;    // or null
  int64_t columns;       // of a row; N * K for one long row
  uint64_t offset;       // flat index of the first element within the whole layer, a multiple of 4
  uint32_t words;        // of bits, below 2^32 for anything that fits in a device's memory
  uint32_t words_per_row;
  int index;  // place in norms and counts
  uint32_t stream;
  bool chained;
  bool vectors;  // every group of four columns is aligned
};

// The layers travel as a kernel parameter, so that a captured graph holds them. CUDA 12.1 raised the limit on
// parameters from 4 KB to 32 KB. A call with more layers than fit takes several launches.
#if CUDART_VERSION >= 12010
constexpr int kMaxLayers = 256;
#else
constexpr int kMaxLayers = 31;
#endif

struct Table {
  Layer layers[kMaxLayers];
  uint32_t first_block[kMaxLayers + 1];  // ascending; behind the last layer, the number of blocks
  int count;
};

// What all layers share. On the device, so that a captured graph reads them anew: factors, rng, norms.
struct Step {
  const float* factors;  // (2,)
  const int64_t* rng;    // (2,), or null
  const float* norms;    // (L,) of the scores before, or null
  Adam adam;
  float threshold, l2, rest;  // rest: 1 - strength
  int weight_dtype, dense_dtype;
};

static_assert(sizeof(Table) + sizeof(Step) < (kMaxLayers > 32 ? 32000 : 4000), "the parameters of a kernel are few");

__device__ __forceinline__ void load_weight(const void* weight, int dtype, int64_t at, int count, bool whole,
                                            float (&to)[4]) {
  if (dtype == kFloat32) {
    load4(static_cast<const float*>(weight), at, count, whole, to);
  } else if (dtype == kBFloat16) {
    load4(static_cast<const __nv_bfloat16*>(weight), at, count, whole, to);
  } else {
    load4(static_cast<const __half*>(weight), at, count, whole, to);
  }
}

__device__ __forceinline__ void store4(float* to, int64_t at, int count, bool whole, const float (&from)[4]) {
  if (whole) {
    *reinterpret_cast<float4*>(to + at) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[at + i] = from[i];
    }
  }
}

template <int kMoments, bool kSigned>
__device__ __forceinline__ void load_moment(const void* stored, const uint8_t* exponents, int64_t at, int count,
                                            bool whole, float (&to)[4]) {
  if constexpr (kMoments == kMomentsF32) {
    load4(static_cast<const float*>(stored), at, count, whole, to);
  } else if constexpr (kMoments == kMomentsBF16) {
    load4(static_cast<const __nv_bfloat16*>(stored), at, count, whole, to);
  } else {
    const uint8_t* codes = static_cast<const uint8_t*>(stored) + at;
    uint32_t four = 0;
    if (whole) {
      four = *reinterpret_cast<const uint32_t*>(codes);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) four |= i < count ? uint32_t{codes[i]} << (8 * i) : 0u;
    }
    const uint32_t exponent = count > 0 ? exponents[at / kMomentBlock] : 0u;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = decode8<kSigned>(four >> (8 * i) & 255u, exponent);
  }
}

// `exponent` is the block's own, for 8 bits.
template <int kMoments, bool kSigned>
__device__ __forceinline__ void store_moment(void* stored, int64_t at, int count, bool whole, uint32_t exponent,
                                             const uint32_t (&random)[4], const float (&from)[4]) {
  if constexpr (kMoments == kMomentsF32) {
    store4(static_cast<float*>(stored), at, count, whole, from);
  } else if constexpr (kMoments == kMomentsBF16) {
    uint16_t* to = static_cast<uint16_t*>(stored) + at;
    uint32_t halves[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) halves[i] = round_bf16(from[i], rounding_bits<kSigned>(random[i]));
    if (whole) {
      *reinterpret_cast<uint2*>(to) = make_uint2(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < count) to[i] = static_cast<uint16_t>(halves[i]);
      }
    }
  } else {
    uint8_t* to = static_cast<uint8_t*>(stored) + at;
    uint32_t four = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) four |= encode8<kSigned>(from[i], exponent, rounding_bits<kSigned>(random[i])) << 8 * i;
    if (whole) {
      *reinterpret_cast<uint32_t*>(to) = four;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < count) to[i] = static_cast<uint8_t>(four >> (8 * i));
      }
    }
  }
}

__device__ __forceinline__ void refresh(const Layer& layer, const Step& step, int64_t at, int count, uint32_t bits) {
  for (int i = 0; i < count; ++i) {
    const bool on = bits >> i & 1u;
    if (step.weight_dtype != step.dense_dtype) {
      const float w = static_cast<const float*>(layer.weight)[at + i];
      static_cast<__nv_bfloat16*>(layer.dense)[at + i] = from_float<__nv_bfloat16>(on ? w : 0.0f);
    } else if (step.weight_dtype == kFloat32) {
      static_cast<uint32_t*>(layer.dense)[at + i] = on ? static_cast<const uint32_t*>(layer.weight)[at + i] : 0u;
    } else {
      static_cast<uint16_t*>(layer.dense)[at + i] =
          on ? static_cast<const uint16_t*>(layer.weight)[at + i] : uint16_t{0};
    }
  }
}

}  // namespace rmt::cuda
