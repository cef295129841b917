// mma.cuh and sm90.cuh for the emulator, after the PTX ISA's definitions of fragments, swizzle and mbarrier phases.
// The copy engine delivers at once and wgmma runs as late as its wait allows: the worst order a ring buffer can meet.
// (A registers are taken when wgmma is issued; tests/kernels/sass_lint.py checks those.)
#pragma once

#include <deque>

#include "emulator.h"

namespace rmt::cuda {

template <typename T>
float element(uint32_t pair, int half) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * half));
  if constexpr (std::is_same_v<T, __half>) return __half2float(__half{bits});
  return __bfloat162float(__nv_bfloat16{bits});
}

template <typename T>
void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  for (int i = 0; i < 6; ++i) emulator::offer(i, mine[i]);
  emulator::sync_warp();
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t a = emulator::taken<uint32_t>(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2);
      const uint32_t b = emulator::taken<uint32_t>(column * 4 + k % 8 / 2, 4 + k / 8);
      d[i] += element<T>(a, k % 2) * element<T>(b, k % 2);
    }
  }
  emulator::sync_warp();
}

struct Phases {
  uint32_t count, pending;
  int64_t bytes;
  uint32_t phase;
};
inline std::map<uint32_t, Phases> mbarriers;

inline void settle(Phases& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.count;
  barrier.phase ^= 1;
  emulator::progress = true;
}
inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) { mbarriers[barrier] = {arrivals, arrivals, 0, 0}; }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint32_t barrier) {
  Phases& phases = mbarriers.at(barrier);
  if (phases.pending-- == 0) throw std::runtime_error("more arrivals than the mbarrier expects");
  emulator::progress = true;
  settle(phases);
}
inline void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  mbarriers.at(barrier).bytes += bytes;
  mbarrier_arrive(barrier);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (mbarriers.at(barrier).phase == parity) emulator::yield();
}

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier) {
  if (to % 1024 != 0) throw std::runtime_error("a swizzled box must start on 1024 bytes");
  for (uint32_t r = 0; r < map->box_rows; ++r) {
    for (uint32_t c = 0; c < map->box_columns; ++c) {
      const uint64_t from_row = row + r, from_column = column + c;
      uint16_t value = 0;
      if (from_row < map->rows && from_column < map->columns) {
        std::memcpy(&value, map->base + from_row * map->stride + from_column * 2, 2);
      }
      std::memcpy(emulator::shared_at(swizzled(to + r * 128 + c * 2)), &value, 2);
    }
  }
  mbarriers.at(barrier).bytes -= map->box_rows * map->box_columns * 2;
  settle(mbarriers.at(barrier));
}

inline void load_matrices(uint32_t (&a)[4], uint32_t from) {
  emulator::offer(0, from);
  emulator::sync_warp();
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = emulator::taken<uint32_t>(8 * i + emulator::lane() / 4, 0);
    std::memcpy(&a[i], emulator::shared_at(row) + emulator::lane() % 4 * 4, 4);
  }
  emulator::sync_warp();
}

inline void store_matrices_transposed(uint32_t to, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  const uint32_t registers[4] = {r0, r1, r2, r3};
  emulator::offer(0, to);
  emulator::sync_warp();
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = emulator::taken<uint32_t>(8 * i + emulator::lane() % 4 * 2 + half, 0);
      const uint16_t value = static_cast<uint16_t>(registers[i] >> (16 * half));
      std::memcpy(emulator::shared_at(row) + emulator::lane() / 4 * 2, &value, 2);
    }
  }
  emulator::sync_warp();
}

template <typename T>
uint32_t pack(T low, T high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

inline void named_barrier(int id, int threads) { emulator::arrive_and_wait(id, threads); }
template <int>
void registers_down() {}
template <int>
void registers_up() {}
inline void wgmma_fence() {}

inline uint64_t swizzled_descriptor(uint32_t address) {
  if (address % 1024 != 0) throw std::runtime_error("a swizzled operand must start on 1024 bytes");
  return address >> 4;
}

struct Product {
  uint32_t a[4];
  uint64_t b;
  float* sums;
  int columns;
  bool half, committed;
};
inline std::deque<Product> running[1024];  // of each thread, oldest first

template <typename T, int kSums>
void wgmma(float (&sums)[kSums], const uint32_t (&a)[4], uint64_t b) {
  running[emulator::current].push_back(
      {{a[0], a[1], a[2], a[3]}, b, sums, kSums * 2, std::is_same_v<T, __half>, false});
}
inline void wgmma_commit() { running[emulator::current].back().committed = true; }

template <typename T>
void finish_oldest() {
  const int start = emulator::warp_start(), g = emulator::lane() / 4, t = emulator::lane() % 4;
  const Product& mine = running[emulator::current].front();
  for (int row = g; row < 16; row += 8) {
    float a[16];
    for (int k = 0; k < 16; ++k) {
      a[k] = element<T>(running[start + g * 4 + k % 8 / 2].front().a[row / 8 + k / 8 * 2], k % 2);
    }
    for (int column = 0; column < mine.columns; ++column) {
      if (column % 8 / 2 != t) continue;
      float& sum = mine.sums[column / 8 * 4 + row / 8 * 2 + column % 2];
      for (int k = 0; k < 16; ++k) {
        const uint32_t at = static_cast<uint32_t>(mine.b << 4) + column / 8 * 1024 + column % 8 * 128 + k * 2;
        uint16_t value;
        std::memcpy(&value, emulator::shared_at(swizzled(at)), 2);
        sum += a[k] * element<T>(value, 0);
      }
    }
  }
}

template <int kPending>
void wgmma_wait() {
  std::deque<Product>& queue = running[emulator::current];
  while (queue.size() > kPending) {
    emulator::sync_warp();
    queue.front().half ? finish_oldest<__half>() : finish_oldest<__nv_bfloat16>();
    emulator::sync_warp();
    queue.pop_front();
  }
}

}  // namespace rmt::cuda
