// What the products over AMX tiles share: their configuration, and 16 x 16 dwords turned over. For AVX-512 and AMX only.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace rmt::cpu::RMT_ISA {

namespace {

// Rows become columns.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 i + c] holds, in its quarter q, rows 4 i .. 4 i + 3 of column 4 q + c.
  for (int c = 0; c < 4; ++c) {
    const __m512i even01 = _mm512_shuffle_i32x4(r[c], r[c + 4], 0x88), odd01 = _mm512_shuffle_i32x4(r[c], r[c + 4], 0xDD);
    const __m512i even23 = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0xDD);
    t[c] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    t[c + 4] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    t[c + 8] = _mm512_shuffle_i32x4(even01, even23, 0xDD);
    t[c + 12] = _mm512_shuffle_i32x4(odd01, odd23, 0xDD);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

#if defined(RMT_AMX)

// Tiles 0 to 3: sums. 4, 5: the first factor. 6, 7: the second. All whole, 16 rows of 64 bytes.
alignas(64) const uint8_t kTiles[64] = {1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 64, 0, 64, 0,
                                        64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                        0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0};

// The thread is torch's: what it had configured is put back.
class Tiles {
 public:
  Tiles() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" : : "m"(kTiles));
  }
  ~Tiles() {
    if (before_[0])
      asm volatile("ldtilecfg %0" : : "m"(before_));
    else
      _tile_release();
  }
  Tiles(const Tiles&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

#endif

}  // namespace

}  // namespace rmt::cpu::RMT_ISA
