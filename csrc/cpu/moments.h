// How Adam's moments are stored in 16 and 8 bits, a tile at a time: reference.load_moment, reference.store_moment.
//
// bf16: the upper half of the fp32 pattern, 16 random bits added to the lower half before it is cut off.
// uint8, one exponent E (a biased fp32 exponent) for each tile, which is why a tile has 256 elements:
//     exp_avg     s eeee mmm   c = low 7 bits, fp32 pattern (E - 15 << 23) + (c << 20), sign s
//     exp_avg_sq  eeeee mmm    c = all 8 bits, fp32 pattern (E - 31 << 23) + (c << 20)
//     c = 0 is 0; E = 255 is NaN, all of the tile.
#pragma once

#include <type_traits>

#include "gradient.h"

namespace rmt::cpu::RMT_ISA {

inline uint32_t pattern_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float of_pattern(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <bool kSigned>
constexpr int kSpan = kSigned ? 15 : 31;  // exponents below E that a code can have

template <bool kSigned>
inline void decode_tile(const uint8_t* __restrict codes, uint8_t exponent, float* __restrict x) {
  const uint32_t base = static_cast<uint32_t>(exponent - kSpan<kSigned>) << 23;
  const uint32_t poison = exponent == 255 ? 0x7FC00000u : 0u;
  for (int j = 0; j < kTile; ++j) {
    const uint32_t code = codes[j], c = kSigned ? code & 127 : code;
    uint32_t bits = c ? base + (c << 20) : 0u;
    if (kSigned) bits |= (code & 128) << 24;
    x[j] = of_pattern(bits | poison);
  }
}

// random: 32 bits an element, of which exp_avg takes the lower 16, exp_avg_sq the upper. Returns E.
template <bool kSigned>
inline uint8_t encode_tile(const float* __restrict x, const uint32_t* __restrict random, uint8_t* __restrict codes) {
  uint32_t largest = 0;
  for (int j = 0; j < kTile; ++j) largest = std::max(largest, pattern_of(x[j]) & 0x7FFFFFFF);
  // One more where rounding the largest up would carry into the exponent.
  const int exponent = std::min<int>(std::max<int>((largest + 0xFFFFF) >> 23, kSpan<kSigned> + 1), 255);
  const int32_t base = (exponent - kSpan<kSigned>) << 23;
  const float smallest = of_pattern(static_cast<uint32_t>(base + (1 << 20)));
  const float per_chance = smallest * 0x1p-16f;
  for (int j = 0; j < kTile; ++j) {
    const int32_t r = static_cast<int32_t>(kSigned ? random[j] & 0xFFFF : random[j] >> 16);
    const uint32_t bits = pattern_of(x[j]);
    const int32_t above = static_cast<int32_t>(bits & 0x7FFFFFFF) - base;
    const float size = of_pattern(bits & 0x7FFFFFFF);
    const int32_t small = kSigned ? (static_cast<float>(r) + 0.5f) * per_chance < size : size > 0.0f;
    // 16 bits at the top of the 20 cut off, and half of the last of them: the chance is rounded, not cut.
    const int32_t large = std::min((above + (r << 4) + 8) >> 20, kSigned ? 127 : 255);
    const int32_t c = above < (1 << 20) ? small : large;
    codes[j] = static_cast<uint8_t>(kSigned ? c | static_cast<int32_t>(bits >> 24 & (x[j] < 0 ? 128 : 0)) : c);
  }
  return static_cast<uint8_t>(exponent);
}

template <bool kSigned>
inline void round_tile(const float* __restrict x, const uint32_t* __restrict random, uint16_t* __restrict to) {
  for (int j = 0; j < kTile; ++j) {
    const uint32_t bits = pattern_of(x[j]), r = kSigned ? random[j] & 0xFFFF : random[j] >> 16;
    // Adding to an infinity would make it a NaN.
    to[j] = static_cast<uint16_t>((bits + ((bits & 0x7F800000) == 0x7F800000 ? 0 : r)) >> 16);
  }
}

// One moment of one tile: `values` is where it is read and written in fp32, in place where that is how it is stored.
template <Moments kMoments, bool kSigned>
struct Moment {
  using Stored = std::conditional_t<
      kMoments == Moments::f32, float, std::conditional_t<kMoments == Moments::bf16, uint16_t, uint8_t>>;
  alignas(64) float buffer[kTile];
  alignas(64) Stored copy[kTile];
  Stored* stored;
  uint8_t* exponent;
  int64_t count;
  float* values;

  void load(void* all, uint8_t* exponents, int64_t first, int64_t elements) {
    stored = static_cast<Stored*>(all) + first;
    exponent = kMoments == Moments::u8 ? exponents + first / kTile : nullptr;
    count = elements;
    const Stored* from = padded<Stored>(stored, count, copy);
    values = buffer;
    if constexpr (kMoments == Moments::f32)
      values = count == kTile ? stored : copy;
    else if constexpr (kMoments == Moments::bf16)
      for (int j = 0; j < kTile; ++j) buffer[j] = to_float(from[j]);
    else
      decode_tile<kSigned>(from, *exponent, buffer);
  }

  void store(const uint32_t* random) {
    Stored* to = count == kTile ? stored : copy;
    if constexpr (kMoments == Moments::bf16) round_tile<kSigned>(buffer, random, to);
    if constexpr (kMoments == Moments::u8) *exponent = encode_tile<kSigned>(buffer, random, to);
    if (count < kTile) std::memcpy(stored, copy, count * sizeof(Stored));
  }
};

}  // namespace rmt::cpu::RMT_ISA
