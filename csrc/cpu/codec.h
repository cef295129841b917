// Gaps of a mask as Golomb-Rice codes: rmt_kernels/codec.py, which has the stream around them and the plain version.
#pragma once

#include <cstdint>

namespace rmt::cpu {

struct RiceCode {
  int parameter;   // bits of a remainder
  bool on;         // whether the bits that are on are coded, or those that are off: the rarer
  int64_t count;   // how many those are
  int64_t unary_bytes, remainder_bytes;
};

enum RiceError : int { kRiceGood = 0, kRiceCount = 1, kRicePast = 2, kRicePad = 3 };

// bits: [n, ceil(k / 32)], n k < 2^32. Writes unary and remainder bytes to `out` where both are less than `capacity`.
RiceCode rice_encode(const uint32_t* bits, int64_t n, int64_t k, uint8_t* out, int64_t capacity);

// Any bytes may come; the sizes are true and parameter < 32. Writes [n, ceil(k / 32)] words, whatever it returns.
RiceError rice_decode(
    const uint8_t* unary, const uint8_t* remainders, const RiceCode& code, int64_t n, int64_t k, uint32_t* bits);

}  // namespace rmt::cpu
