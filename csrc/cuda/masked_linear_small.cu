// Masked linear for few rows, straight from the bits, for one task or for rows grouped by task.
//
// Rows of x are cut into tiles of 8 that belong to one task. A pass reads W once and serves up to kTiles tiles, masking
// W in registers with each tile's own bits; further passes find W in the cache. Every output element sums its K slices
// in one fixed order, whatever the grid: runs repeat bit for bit.
#include "common.cuh"
#include "mma.cuh"

namespace rmt::cuda {
namespace {

constexpr int kTileRows = 8;
constexpr int kBlockN = 16;         // rows of W a block
constexpr int kTargetBlocks = 512;  // enough to fill any device

template <typename T>
struct Args {
  const T* x;  // (M, K)
  int64_t x_stride;
  const T* weight;  // (N, K)
  int64_t weight_stride;
  const uint32_t* bits;    // (T, N, ceil(K / 32))
  const T* bias;           // (N,) or null
  const int64_t* offsets;  // (T + 1,) or null: one task
  int64_t tasks, m, n, k;
  T* y;  // (M, N)
};

struct Tile {
  int64_t task, row;
  int rows;
};

// Walks the tiles of all tasks. Offsets are clamped to [0, M]: bad ones give wrong rows, never a wild address.
template <typename T>
struct Cursor {
  int64_t task, row;

  __device__ explicit Cursor(const Args<T>& args) : task(0), row(start(args, 0)) {}

  static __device__ int64_t start(const Args<T>& args, int64_t task) {
    if (args.offsets == nullptr) return task == 0 ? 0 : args.m;
    return max(int64_t{0}, min(args.offsets[task], args.m));
  }

  __device__ int next(const Args<T>& args, Tile* tiles, int limit) {
    int count = 0;
    while (count < limit && task < args.tasks) {
      const int64_t end = start(args, task + 1);
      if (row < end) {
        tiles[count++] = Tile{task, row, static_cast<int>(min(int64_t{kTileRows}, end - row))};
        row += kTileRows;
      } else {
        row = start(args, ++task);
      }
    }
    return count;
  }
};

// 8 two-byte elements; zeros from `left` on. kVectors: rows start on 16 bytes and K % 8 = 0, so all 8 are in or out.
template <bool kVectors, typename T>
__device__ __forceinline__ uint4 load8(const T* from, int64_t left) {
  if constexpr (kVectors) return left > 0 ? *reinterpret_cast<const uint4*>(from) : uint4{};
  const uint16_t* elements = reinterpret_cast<const uint16_t*>(from);
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < left ? elements[2 * i] : 0u, high = 2 * i + 1 < left ? elements[2 * i + 1] : 0u;
    pairs[i] = low | high << 16;
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

__device__ __forceinline__ uint4 masked8(uint4 value, uint32_t bits) {
  return make_uint4(value.x & half_masks(bits), value.y & half_masks(bits >> 2), value.z & half_masks(bits >> 4),
                    value.w & half_masks(bits >> 6));
}

// fp16 and bf16. y^T = (W * M) x^T with W as operand A (16 rows) and a tile of x as B (8 columns). A sum over k may run
// in any order, so lane t of a quad owns columns 8 t .. 8 t + 7 of every 32: one 16-byte load per row feeds two mma of
// 16 columns, and the lane's mask is byte t of the canonical word. The block's warps take the 32-column steps in turn.
constexpr int kMmaWarps = 8;
constexpr int kMmaTiles = 8;
constexpr int kInFlight = 4;  // tiles whose loads are issued together

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kWarp * kMmaWarps, kVectors ? 2 : 1) masked_linear_mma_kernel(
    const __grid_constant__ Args<T> args) {
  __shared__ Tile tiles[kMmaTiles];
  __shared__ int tile_count;
  __shared__ float partial[kMmaWarps][kMmaTiles][4][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int64_t words = ceil_div(args.k, 32), first_n = int64_t{blockIdx.x} * kBlockN;
  // Rows past N repeat the last one: in bounds, and never stored.
  const int64_t low_row = min(first_n + g, args.n - 1), high_row = min(first_n + g + 8, args.n - 1);
  Cursor<T> cursor(args);

  for (unsigned pass = 0;; pass = pass + 1 == gridDim.y ? 0 : pass + 1) {
    __syncthreads();  // the last pass has been stored
    if (threadIdx.x == 0) tile_count = cursor.next(args, tiles, kMmaTiles);
    __syncthreads();
    const int count = tile_count;
    if (count == 0) return;
    if (pass != blockIdx.y) continue;

    float sums[kMmaTiles][4] = {};
    for (int64_t step = warp; step < words; step += kMmaWarps) {
      const int64_t column = step * 32 + 8 * t, left = args.k - column;
      const uint4 low = load8<kVectors>(args.weight + low_row * args.weight_stride + column, left);
      const uint4 high = load8<kVectors>(args.weight + high_row * args.weight_stride + column, left);
      int64_t task = -1;
      uint4 low_on{}, high_on{};
#pragma unroll
      for (int first = 0; first < kMmaTiles; first += kInFlight) {
        if (first >= count) break;
        uint4 value[kInFlight];
        uint32_t low_bits[kInFlight], high_bits[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {  // past `count` the last tile again: no branch between the loads
          const Tile tile = tiles[min(first + i, count - 1)];
          const int64_t row = tile.row + min(g, tile.rows - 1);
          value[i] = load8<kVectors>(args.x + row * args.x_stride + column, left);
          const uint32_t* bits = args.bits + tile.task * args.n * words + step;
          low_bits[i] = bits[low_row * words] >> (8 * t);
          high_bits[i] = bits[high_row * words] >> (8 * t);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (first + i >= count) break;
          if (tiles[first + i].task != task) {
            task = tiles[first + i].task;
            low_on = masked8(low, low_bits[i]);
            high_on = masked8(high, high_bits[i]);
          }
          float(&sum)[4] = sums[first + i];
          mma_m16n8k16<T>(sum, low_on.x, high_on.x, low_on.y, high_on.y, value[i].x, value[i].y);
          mma_m16n8k16<T>(sum, low_on.z, high_on.z, low_on.w, high_on.w, value[i].z, value[i].w);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kMmaTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) partial[warp][i][j][lane] = sums[i][j];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < count * kTileRows * kBlockN; e += kWarp * kMmaWarps) {
      const int i = e / (kTileRows * kBlockN), row = e / kBlockN % kTileRows, column = e % kBlockN;
      // Where mma left (W row `column`, x row `row`): lane 4 (column % 8) + row / 2, register 2 (column / 8) + row % 2.
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kMmaWarps; ++w) sum += partial[w][i][column / 8 * 2 + row % 2][column % 8 * 4 + row / 2];
      const int64_t n = first_n + column;
      if (row < tiles[i].rows && n < args.n) {
        if (args.bias != nullptr) sum += to_float(args.bias[n]);
        args.y[(tiles[i].row + row) * args.n + n] = from_float<T>(sum);
      }
    }
  }
}

// fp32. A warp owns kFmaRows rows of W; its lanes take the columns in turn, so that lane i's mask is bit i of the word,
// and add up at the end.
constexpr int kFmaWarps = 4;
constexpr int kFmaRows = kBlockN / kFmaWarps;
constexpr int kFmaTiles = 2;

__global__ void __launch_bounds__(kWarp * kFmaWarps) masked_linear_fma_kernel(
    const __grid_constant__ Args<float> args) {
  static_assert(kTileRows * kFmaRows == kWarp, "a lane stores one element of a tile");
  __shared__ Tile tiles[kFmaTiles];
  __shared__ int tile_count;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t words = ceil_div(args.k, 32), first_n = int64_t{blockIdx.x} * kBlockN + warp * kFmaRows;
  Cursor<float> cursor(args);

  for (unsigned pass = 0;; pass = pass + 1 == gridDim.y ? 0 : pass + 1) {
    __syncthreads();  // the last pass has been stored
    if (threadIdx.x == 0) tile_count = cursor.next(args, tiles, kFmaTiles);
    __syncthreads();
    const int count = tile_count;
    if (count == 0) return;
    if (pass != blockIdx.y) continue;

    float sums[kFmaTiles][kTileRows][kFmaRows] = {};
    for (int64_t step = 0; step < words; ++step) {
      const int64_t column = step * 32 + lane;
      const bool inside = column < args.k;
      int64_t row_n[kFmaRows];
      float weight[kFmaRows];
#pragma unroll
      for (int j = 0; j < kFmaRows; ++j) {
        row_n[j] = min(first_n + j, args.n - 1);
        weight[j] = inside ? args.weight[row_n[j] * args.weight_stride + column] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kFmaTiles; ++i) {
        if (i >= count) break;
        const Tile tile = tiles[i];
        float masked[kFmaRows];
#pragma unroll
        for (int j = 0; j < kFmaRows; ++j) {
          const uint32_t word = args.bits[(tile.task * args.n + row_n[j]) * words + step];
          masked[j] = word >> lane & 1u ? weight[j] : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < kTileRows; ++r) {
          const float x = inside ? args.x[(tile.row + min(r, tile.rows - 1)) * args.x_stride + column] : 0.0f;
#pragma unroll
          for (int j = 0; j < kFmaRows; ++j) sums[i][r][j] = fmaf(masked[j], x, sums[i][r][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kFmaTiles; ++i) {
      if (i >= count) break;
      float mine = 0.0f;  // element (row lane / kFmaRows, W row lane % kFmaRows)
#pragma unroll
      for (int e = 0; e < kWarp; ++e) {
        float sum = sums[i][e / kFmaRows][e % kFmaRows];
#pragma unroll
        for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        mine = lane == e ? sum : mine;
      }
      const int row = lane / kFmaRows;
      const int64_t n = first_n + lane % kFmaRows;
      if (row < tiles[i].rows && n < args.n) {
        if (args.bias != nullptr) mine += args.bias[n];
        args.y[(tiles[i].row + row) * args.n + n] = mine;
      }
    }
  }
}

}  // namespace

void masked_linear_small(uintptr_t x, int dtype, int64_t x_stride, uintptr_t weight, int64_t weight_stride,
                         uintptr_t bits, uintptr_t bias, uintptr_t offsets, int64_t tasks, int64_t m, int64_t n,
                         int64_t k, uintptr_t y, uintptr_t cuda_stream) {
  if (m == 0 || n == 0) return;
  need(offsets != 0 || tasks == 1, "without offsets there is one task");
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kTiles = std::is_same_v<T, float> ? kFmaTiles : kMmaTiles;
    const Args<T> args{pointer<const T>(x), x_stride, pointer<const T>(weight), weight_stride,
                       pointer<const uint32_t>(bits), pointer<const T>(bias), pointer<const int64_t>(offsets), tasks,
                       m, n, k, pointer<T>(y)};
    const int64_t blocks = ceil_div(n, kBlockN);
    const int64_t most_passes = ceil_div(ceil_div(m, kTileRows) + tasks - 1, kTiles);
    const int64_t share = std::max<int64_t>(1, kTargetBlocks / blocks);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min(most_passes, share)));
    if constexpr (std::is_same_v<T, float>) {
      masked_linear_fma_kernel<<<grid, kWarp * kFmaWarps, 0, as_stream(cuda_stream)>>>(args);
    } else {
      const bool vectors = aligned(x | weight, 16) && x_stride % 8 == 0 && weight_stride % 8 == 0 && k % 8 == 0;
      const auto kernel = vectors ? masked_linear_mma_kernel<T, true> : masked_linear_mma_kernel<T, false>;
      kernel<<<grid, kWarp * kMmaWarps, 0, as_stream(cuda_stream)>>>(args);
    }
  });
  check_launch("masked_linear_kernel");
}

}  // namespace rmt::cuda
