// One thread: 28.9 million bits take some 10 ms, less than a second thread would save on a task's many small tensors.
#include "codec.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace rmt::cpu {

namespace {

// Bits 8 byte to 8 byte + 63 of a little-endian stream; 0 beyond its end.
uint64_t load(const uint8_t* data, int64_t byte, int64_t size) {
  uint64_t value = 0;
  std::memcpy(&value, data + byte, std::min<int64_t>(8, size - byte));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  value = __builtin_bswap64(value);
#endif
  return value;
}

uint32_t last_word(int64_t k) { return k % 32 ? (1u << k % 32) - 1 : ~0u; }

}  // namespace

RiceCode rice_encode(const uint32_t* bits, int64_t n, int64_t k, uint8_t* out, int64_t capacity) {
  const int64_t words = (k + 31) / 32;
  RiceCode code = {};
  for (int64_t i = 0; i < n * words; ++i) code.count += __builtin_popcount(bits[i]);
  code.on = 2 * code.count < n * k;
  if (!code.on) code.count = n * k - code.count;

  std::vector<uint32_t> gaps;
  gaps.reserve(code.count);
  int64_t next = 0;
  for (int64_t row = 0; row < n; ++row)
    for (int64_t w = 0; w < words; ++w) {
      uint32_t word = code.on ? bits[row * words + w] : ~bits[row * words + w];
      if (w + 1 == words) word &= last_word(k);
      for (; word; word &= word - 1) {
        const int64_t at = row * k + w * 32 + __builtin_ctz(word);
        gaps.push_back(static_cast<uint32_t>(at - next));
        next = at + 1;
      }
    }

  // The size is convex in the parameter: up while it shrinks.
  int64_t unary = 0;
  for (int parameter = 0;; ++parameter) {
    int64_t bits_of_it = code.count;
    for (uint32_t gap : gaps) bits_of_it += gap >> parameter;
    if (parameter && bits_of_it + code.count >= unary) break;
    unary = bits_of_it;
    code.parameter = parameter;
    if (parameter == 31) break;
  }
  code.unary_bytes = (unary + 7) / 8;
  code.remainder_bytes = (code.count * code.parameter + 7) / 8;
  if (code.unary_bytes + code.remainder_bytes >= capacity) return code;

  std::memset(out, 0, code.unary_bytes);
  uint8_t* to = out + code.unary_bytes;
  uint64_t pending = 0;
  int held = 0;
  int64_t end = -1;
  for (uint32_t gap : gaps) {
    end += (gap >> code.parameter) + 1;
    out[end >> 3] |= 1u << (end & 7);
    pending |= static_cast<uint64_t>(gap & ((1u << code.parameter) - 1)) << held;
    for (held += code.parameter; held >= 8; held -= 8, pending >>= 8) *to++ = static_cast<uint8_t>(pending);
  }
  if (held) *to = static_cast<uint8_t>(pending);
  return code;
}

RiceError rice_decode(
    const uint8_t* unary, const uint8_t* remainders, const RiceCode& code, int64_t n, int64_t k, uint32_t* bits) {
  const int64_t words = (k + 31) / 32, numel = n * k;
  const uint32_t low = (1u << code.parameter) - 1;
  std::memset(bits, code.on ? 0 : 0xff, n * words * sizeof(uint32_t));
  if (!code.on)
    for (int64_t row = 0; row < n; ++row) bits[(row + 1) * words - 1] = last_word(k);

  int64_t seen = 0, end = -1, left = numel, row = 0, column = -1;
  for (int64_t byte = 0; byte < code.unary_bytes; byte += 8)
    for (uint64_t word = load(unary, byte, code.unary_bytes); word; word &= word - 1, ++seen) {
      if (seen == code.count) return kRiceCount;
      const int64_t before = end, first = seen * code.parameter;
      end = byte * 8 + __builtin_ctzll(word);
      int64_t step = end - before - 1;
      if (step > numel >> code.parameter) return kRicePast;
      step <<= code.parameter;
      if (code.parameter) step |= load(remainders, first >> 3, code.remainder_bytes) >> (first & 7) & low;
      if (++step > left) return kRicePast;
      left -= step;
      column += step;
      if (column >= k) row += column / k, column %= k;
      bits[row * words + (column >> 5)] ^= 1u << (column & 31);
    }
  // No byte after the last code's, no bit after the last remainder's.
  if (seen != code.count || (end + 8) / 8 != code.unary_bytes) return kRiceCount;
  const int64_t tail = code.count * code.parameter % 8;
  return tail && remainders[code.remainder_bytes - 1] >> tail ? kRicePad : kRiceGood;
}

}  // namespace rmt::cpu
