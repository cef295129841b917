// Runs the .cu files of csrc/cuda on the CPU, one block at a time, one fiber per thread. Stands in for the CUDA headers
// and, with emulated_ptx.h, for mma.cuh and sm90.cuh. What it shows: indices, masks, layouts, barriers and phases are
// right. What it cannot show: memory ordering, alignment faults, speed.
#pragma once

#include <csetjmp>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define CUDART_VERSION 13000
#define __CUDA_ARCH_FEAT_SM90_ALL

using std::max;
using std::min;

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };
inline float __half2float(__half h) {
  _Float16 value;
  std::memcpy(&value, &h, 2);
  return static_cast<float>(value);
}
inline __half __float2half_rn(float f) {
  const _Float16 value = static_cast<_Float16>(f);
  __half h;
  std::memcpy(&h, &value, 2);
  return h;
}
inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t wide = static_cast<uint32_t>(b.bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t wide;
  std::memcpy(&wide, &f, 4);
  return {static_cast<uint16_t>((wide + 0x7FFF + (wide >> 16 & 1)) >> 16)};
}
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }

// --- fibers -------------------------------------------------------------------------------------------------------

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulator {

constexpr size_t kStack = 1 << 17;

struct Barrier {
  int arrived = 0;
  int generation = 0;
};

// A fiber starts through its context and is switched by longjmp, which costs no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  bool started = false, done = false;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline jmp_buf scheduler;
inline int current = 0, threads = 0;
inline bool progress = false;
inline std::function<void()> body;
inline std::vector<uint8_t> dynamic;  // shared memory, with room to place it off a 1024-byte boundary
inline std::map<int, Barrier> barriers;  // by id; warp w's own is -1 - w
inline uint64_t deposits[1024][8];      // what each thread offers to its warp

inline void yield() {
  if (_setjmp(fibers[current]->jump) == 0) _longjmp(scheduler, 1);
}

inline void entry() {
  body();
  fibers[current]->done = true;
  progress = true;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void arrive_and_wait(int id, int count) {
  Barrier& barrier = barriers[id];
  const int generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    progress = true;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline int lane() { return current % 32; }
inline int warp_start() { return current - lane(); }
inline void sync_warp() { arrive_and_wait(-1 - current / 32, 32); }

inline void run_block() {
  for (int i = 0; i < threads; ++i) {
    if (static_cast<int>(fibers.size()) <= i) fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers[i];
    fiber.started = fiber.done = false;
    fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, 0);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
  barriers.clear();
  for (bool alive = true; alive;) {
    alive = progress = false;
    for (int i = 0; i < threads; ++i) {
      if (fibers[i]->done) continue;
      alive = true;
      current = i;
      threadIdx = fibers[i]->index;
      resume(*fibers[i]);
    }
    if (alive && !progress) throw std::runtime_error("emulator: every thread waits");
  }
}

template <typename Kernel>
auto launcher(Kernel kernel, dim3 grid, dim3 block, size_t shared = 0, void* = nullptr) {
  return [=](auto... args) {
    gridDim = grid;
    blockDim = block;
    threads = static_cast<int>(block.x * block.y);
    body = [=] { kernel(args...); };
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        dynamic.assign(shared + 2048, 0xA5);
        blockIdx = dim3(x, y, 0);
        run_block();
      }
    }
  };
}

constexpr uint32_t kSharedBase = 0x430;  // 32-bit address of dynamic shared memory: on 16 bytes, not on 1024
inline uint8_t* dynamic_shared() {
  const uintptr_t start = reinterpret_cast<uintptr_t>(dynamic.data());
  return dynamic.data() + (kSharedBase % 16 - start % 16 + 16) % 16;
}
inline uint8_t* shared_at(uint32_t address) { return dynamic_shared() + (address - kSharedBase); }

template <typename T>
void offer(int slot, T value) {
  std::memcpy(&deposits[current][slot], &value, sizeof(T));
}
template <typename T>
T taken(int lane, int slot) {
  T value;
  std::memcpy(&value, &deposits[warp_start() + lane][slot], sizeof(T));
  return value;
}

}  // namespace emulator

inline uint32_t __cvta_generic_to_shared(const void* pointer) {
  const uint8_t* byte = static_cast<const uint8_t*>(pointer);
  return emulator::kSharedBase + static_cast<uint32_t>(byte - emulator::dynamic_shared());
}
inline void __syncthreads() { emulator::arrive_and_wait(0, emulator::threads); }
inline void __syncwarp() { emulator::sync_warp(); }
inline uint32_t __ballot_sync(uint32_t, bool on) {
  emulator::offer(0, on);
  emulator::sync_warp();
  uint32_t word = 0;
  for (int i = 0; i < 32; ++i) word |= static_cast<uint32_t>(emulator::taken<bool>(i, 0)) << i;
  emulator::sync_warp();
  return word;
}
template <typename T>
T __shfl_sync(uint32_t, T value, int source) {
  emulator::offer(0, value);
  emulator::sync_warp();
  const T got = emulator::taken<T>(source, 0);
  emulator::sync_warp();
  return got;
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int distance) {
  return __shfl_sync(mask, value, emulator::lane() ^ distance);
}

// --- the runtime --------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr int cudaEnableDefault = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const char* multiprocessors = std::getenv("RMT_EMULATED_SMS");
  *value = name == cudaDevAttrComputeCapabilityMajor ? 9 : multiprocessors ? std::atoi(multiprocessors) : 1;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= 232448 ? cudaSuccess : throw std::runtime_error("more shared memory than a block can have");
}

// --- tensor maps --------------------------------------------------------------------------------------------------

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
struct CUtensorMap {
  const uint8_t* base;
  uint64_t columns, rows, stride;  // stride in bytes
  uint32_t box_columns, box_rows;
};
inline CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base, const cuuint64_t* sizes,
    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
    CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool good = rank == 2 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && strides[0] % 16 == 0 && box[0] <= 256 &&
                    box[1] <= 256 && sizes[0] > 0 && sizes[1] > 0 && strides[0] >= sizes[0] * 2 && box[0] * 2 <= 128;
  *map = {static_cast<const uint8_t*>(base), sizes[0], sizes[1], strides[0], box[0], box[1]};
  return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(
    const char*, void** function, unsigned, int, cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
