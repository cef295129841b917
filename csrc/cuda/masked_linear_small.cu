// Masked linear straight from the bits, for rows grouped by task (one group: a layer's own product of few rows).
//
// Rows of x are cut into tiles of 8 that belong to one group. A block takes 16 rows of W and a few tiles: it reads its
// part of W once, masks it in registers with each tile's own bits, and leaves the other tiles to the blocks beside it,
// which find W in the cache. The tiles, with their groups' addresses, travel by value as a kernel parameter: nothing is
// copied to the device, nothing is read from it to find them, and a captured graph holds them.
//
// A row's sums depend on that row, W and its mask alone: which columns a warp sums, in which order, and the order in
// which warps are added, depend on K only; what else is in the tile, the block, the launch changes nothing.
#include "common.cuh"
#include "mma.cuh"

namespace rmt::cuda {
namespace {

constexpr int kTileRows = 8;
constexpr int kBlockN = 16;         // rows of W a block
constexpr int kTargetBlocks = 512;  // enough to fill any device
constexpr int kFewestTiles = 2;     // of a block: fewer would read W more often than they fill the device better
constexpr int kMaxTiles = 160;      // of a launch: what fits into the 4 KB of parameters that every CUDA takes

struct Tile {
  const uint32_t* bits;  // (N, ceil(K / 32)); null: every bit on
  int64_t x_at;          // where the first row starts in x
  int row, rows;         // 1 to kTileRows of them, from row `row` on
};

template <typename T>
struct Args {
  const T* x;  // (M, K)
  int64_t x_stride;
  const T* weight;  // (N, K)
  int64_t weight_stride;
  const T* bias;  // (N,) or null
  int64_t n, k;
  T* y;  // (M, N)
  int count, per_block;
  Tile tiles[kMaxTiles];
};
static_assert(sizeof(Args<float>) <= 4096, "the parameters of a kernel are few");

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

__device__ __forceinline__ uint4 masked8(uint4 value, uint32_t byte) {
  const uint32_t low = sign_bytes(byte), high = sign_bytes(byte >> 4);
  return make_uint4(value.x & spread_signs(low, 0x9988), value.y & spread_signs(low, 0xBBAA),
                    value.z & spread_signs(high, 0x9988), value.w & spread_signs(high, 0xBBAA));
}

// fp16 and bf16. y^T = (W * M) x^T with W as operand A (16 rows) and a tile of x as B (8 columns). A sum over k may run
// in any order, so lane t of a quad owns columns 8 t .. 8 t + 7 of every 32: one 16-byte load per row feeds two mma of
// 16 columns, and the lane's mask is byte t of the canonical word. The block's warps take the 32-column steps in turn.
constexpr int kMmaWarps = 8;
constexpr int kMmaTiles = 8;
constexpr int kInFlight = 4;  // tiles whose loads are issued together

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kWarp * kMmaWarps, 2) masked_linear_mma_kernel(
    const __grid_constant__ Args<T> args) {
  __shared__ float partial[kMmaWarps][kMmaTiles][4][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int words = static_cast<int>(ceil_div(args.k, 32));
  const int64_t first_n = int64_t{blockIdx.x} * kBlockN;
  // Rows past N repeat the last one: in bounds, and never stored.
  const int64_t low_row = min(first_n + g, args.n - 1), high_row = min(first_n + g + 8, args.n - 1);
  const int first_tile = blockIdx.y * args.per_block, count = min(args.per_block, args.count - first_tile);
  const int64_t low_byte = low_row * words * 4 + t, high_byte = high_row * words * 4 + t, row_of_x = g * args.x_stride;

  float sums[kMmaTiles][4] = {};
  for (int step = warp; step < words; step += kMmaWarps) {
    const int64_t column = int64_t{step} * 32 + 8 * t, left = args.k - column;
    const uint4 low = load8<kVectors>(args.weight + low_row * args.weight_stride + column, left);
    const uint4 high = load8<kVectors>(args.weight + high_row * args.weight_stride + column, left);
    uint4 low_on{}, high_on{};
#pragma unroll
    for (int first = 0; first < kMmaTiles; first += kInFlight) {
      if (first >= count) break;
      uint4 value[kInFlight];
      uint32_t low_bits[kInFlight], high_bits[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {  // past `count` the last tile again: no branch between the loads
        const Tile& tile = args.tiles[first_tile + min(first + i, count - 1)];
        value[i] = load8<kVectors>(args.x + tile.x_at + (g < tile.rows ? row_of_x : 0) + column, left);
        const uint8_t* bits = reinterpret_cast<const uint8_t*>(tile.bits + step);
        low_bits[i] = tile.bits == nullptr ? 0xFFu : bits[low_byte];
        high_bits[i] = tile.bits == nullptr ? 0xFFu : bits[high_byte];
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (first + i >= count) break;
        const Tile& tile = args.tiles[first_tile + first + i];
        if (first + i == 0 || tile.bits != args.tiles[first_tile + first + i - 1].bits) {
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
    if (i >= count) break;
#pragma unroll
    for (int j = 0; j < 4; ++j) partial[warp][i][j][lane] = sums[i][j];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < count * kTileRows * kBlockN; e += kWarp * kMmaWarps) {
    const int i = e / (kTileRows * kBlockN), row = e / kBlockN % kTileRows, column = e % kBlockN;
    const Tile& tile = args.tiles[first_tile + i];
    const int64_t n = first_n + column;
    if (row >= tile.rows || n >= args.n) continue;
    // Where mma left (W row `column`, x row `row`): lane 4 (column % 8) + row / 2, register 2 (column / 8) + row % 2.
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kMmaWarps; ++w) sum += partial[w][i][column / 8 * 2 + row % 2][column % 8 * 4 + row / 2];
    if (args.bias != nullptr) sum += to_float(args.bias[n]);
    args.y[(int64_t{tile.row} + row) * args.n + n] = from_float<T>(sum);
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
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t words = ceil_div(args.k, 32), first_n = int64_t{blockIdx.x} * kBlockN + warp * kFmaRows;
  const int first_tile = blockIdx.y * args.per_block, count = min(args.per_block, args.count - first_tile);

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
      const Tile& tile = args.tiles[first_tile + i];
      float masked[kFmaRows];
#pragma unroll
      for (int j = 0; j < kFmaRows; ++j) {
        const uint32_t word = tile.bits == nullptr ? ~0u : tile.bits[row_n[j] * words + step];
        masked[j] = word >> lane & 1u ? weight[j] : 0.0f;
      }
      const float* x = args.x + tile.x_at + column;
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        if (r == 1 && tile.rows == 1) break;  // one row for each task is what serving is made of
        // Past the tile row 0 again: in bounds, and never stored.
        const float value = inside ? x[(r < tile.rows ? r : 0) * args.x_stride] : 0.0f;
#pragma unroll
        for (int j = 0; j < kFmaRows; ++j) sums[i][r][j] = fmaf(masked[j], value, sums[i][r][j]);
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
    const Tile& tile = args.tiles[first_tile + i];
    const int row = lane / kFmaRows;
    const int64_t n = first_n + lane % kFmaRows;
    if (row < tile.rows && n < args.n) {
      if (args.bias != nullptr) mine += args.bias[n];
      args.y[(int64_t{tile.row} + row) * args.n + n] = mine;
    }
  }
}

template <typename T>
void launch(Args<T>& args, cudaStream_t stream) {
  constexpr int kMost = std::is_same_v<T, float> ? kFmaTiles : kMmaTiles;
  // Few rows of W make few blocks: then a block takes fewer tiles, so that there are more of them.
  const int64_t blocks = ceil_div(args.n, kBlockN), share = std::max<int64_t>(1, kTargetBlocks / blocks);
  args.per_block = static_cast<int>(std::clamp<int64_t>(ceil_div(args.count, share), kFewestTiles, kMost));
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(args.count, args.per_block)));
  if constexpr (std::is_same_v<T, float>) {
    masked_linear_fma_kernel<<<grid, kWarp * kFmaWarps, 0, stream>>>(args);
  } else {
    const bool vectors = aligned(reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.weight), 16) &&
                         args.x_stride % 8 == 0 && args.weight_stride % 8 == 0 && args.k % 8 == 0;
    const auto kernel = vectors ? masked_linear_mma_kernel<T, true> : masked_linear_mma_kernel<T, false>;
    kernel<<<grid, kWarp * kMmaWarps, 0, stream>>>(args);
  }
  check_launch("masked_linear_kernel");
  args.count = 0;
}

}  // namespace

void masked_linear_small(uintptr_t x, int dtype, int64_t x_stride, uintptr_t weight, int64_t weight_stride,
                         const std::vector<uintptr_t>& bits, const std::vector<int64_t>& starts,
                         const std::vector<int64_t>& ends, uintptr_t bias, int64_t n, int64_t k, uintptr_t y,
                         uintptr_t cuda_stream) {
  need(starts.size() == bits.size() && ends.size() == bits.size(), "starts and ends must be one for each of bits");
  need(k <= INT32_MAX, "more columns than 32 bits count");
  if (n == 0) return;
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    Args<T> args{pointer<const T>(x), x_stride, pointer<const T>(weight), weight_stride, pointer<const T>(bias), n, k,
                 pointer<T>(y), 0, 0, {}};
    for (size_t group = 0; group < bits.size(); ++group) {
      need(starts[group] >= 0 && ends[group] <= INT32_MAX, "rows must be counted from 0 on, in 31 bits");
      for (int64_t row = starts[group]; row < ends[group]; row += kTileRows) {
        const int64_t rows = std::min<int64_t>(kTileRows, ends[group] - row);
        args.tiles[args.count++] = {pointer<const uint32_t>(bits[group]), row * x_stride, static_cast<int>(row),
                                    static_cast<int>(rows)};
        if (args.count == kMaxTiles) launch(args, as_stream(cuda_stream));
      }
    }
    if (args.count > 0) launch(args, as_stream(cuda_stream));
  });
}

}  // namespace rmt::cuda
