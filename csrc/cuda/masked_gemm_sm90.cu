// Masked GEMM for Hopper: y^T = (W * M) x^T, W masked in registers on its way into wgmma.
//
// A block makes 128 columns of y (rows of W) by kBlockM rows. One thread of the first warpgroup feeds a ring of kStages
// stages with 64 columns of W and of x; two consumer warpgroups take 64 rows of W each: ldmatrix, AND with one
// fragment-major word per lane and 64 columns (method.cuh), wgmma with operand A in registers and x as B in shared
// memory. The masks of the next 16 columns are made while wgmma works on the current ones.
//
// Hazard: wgmma reads its A registers while later instructions already run. a[s] is rewritten only after the group that
// read it four steps before has finished: with a step loaded ahead, at most kPending = 2 groups may stay unfinished.
#include "common.cuh"
#include "sm90.cuh"

namespace rmt::cuda {
namespace {

constexpr int kBlockN = 128;
constexpr int kBlockK = 64;
constexpr int kSteps = kBlockK / 16;  // wgmma steps, and sets of A registers
[[maybe_unused]] constexpr int kPending = kSteps - 2;  // unused where the body is not compiled
constexpr int kStages = 4;
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kConsumers = 2;
constexpr int kThreads = kGroup * (1 + kConsumers);
[[maybe_unused]] constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 128 * 40 + 256 * 232 <= 64 K

constexpr int kRowBytes = kBlockK * 2;             // of a stage: one 128-byte swizzle row
constexpr int kWeightBytes = kBlockN * kRowBytes;  // of W in a stage
[[maybe_unused]] constexpr int kOutPitch = 64 * 2 + 16;  // bytes a row of a consumer's y tile: no bank conflicts

template <int kBlockM>
constexpr int kStageBytes = kWeightBytes + kBlockM * kRowBytes;
template <int kBlockM>  // 1024 to align the stages, which the swizzle needs
constexpr int kSharedBytes = 1024 + kStages * kStageBytes<kBlockM> + 2 * kStages * 8;

// Canonical bits -> fragment-major words: a warp writes the words of 16 rows by 64 columns. Rows past N are off.
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock) fragment_bits_kernel(
    const uint32_t* __restrict__ bits,  // (N, ceil(K / 32))
    int64_t n, int64_t words, int64_t row_blocks,
    uint32_t* __restrict__ fragments) {  // (row_blocks, ceil(K / 64), 32)
  const int lane = threadIdx.x;
  for (int64_t block = first_row(); block < row_blocks; block += row_step()) {
    uint32_t rows[2][2];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int64_t row = block * 16 + lane / 4 + 8 * v;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t word = int64_t{blockIdx.x} * 2 + j;
        rows[v][j] = row < n && word < words ? bits[row * words + word] : 0u;
      }
    }
    fragments[(block * gridDim.x + blockIdx.x) * kWarp + lane] = fragment_word(rows, lane % 4);
  }
}

// kMasked false runs the same instructions without the AND: the bitwise gate on a weight that is masked already.
template <typename T, int kBlockM, bool kMasked>
__global__ void __launch_bounds__(kThreads, 1) masked_gemm_kernel(
    const __grid_constant__ CUtensorMap weight_map,  // (N, K)
    const __grid_constant__ CUtensorMap x_map,       // (M, K)
    const uint32_t* __restrict__ fragments,          // (N up to 128 / 16, k_blocks, 32)
    const T* __restrict__ bias,                      // (N,) or null
    int64_t m, int64_t n, int k_blocks, bool vectors,
    T* __restrict__ y) {  // (M, N); `vectors`: its rows start on 16 bytes
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t shared[];
  const uint32_t stages = (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + 1023) & ~1023u;
  const uint32_t full = stages + kStages * kStageBytes<kBlockM>, empty = full + kStages * 8;
  const int group = threadIdx.x / kGroup, lane = threadIdx.x % kWarp, warp = threadIdx.x % kGroup / kWarp;
  const int first_m = blockIdx.x * kBlockM, first_n = blockIdx.y * kBlockN;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + 8 * i, 1);
      mbarrier_init(empty + 8 * i, kConsumers * kGroup / kWarp);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (group == 0) {
    registers_down<kProducerRegisters>();
    if (threadIdx.x == 0) {
      for (int block = 0; block < k_blocks; ++block) {
        const int stage = block % kStages;
        const uint32_t to = stages + stage * kStageBytes<kBlockM>;
        mbarrier_wait(empty + 8 * stage, (block / kStages & 1) ^ 1);  // the first round passes at once
        mbarrier_expect(full + 8 * stage, kStageBytes<kBlockM>);
        copy_box(to, &weight_map, block * kBlockK, first_n, full + 8 * stage);
        copy_box(to + kWeightBytes, &x_map, block * kBlockK, first_m, full + 8 * stage);
      }
    }
  } else {
    registers_up<kConsumerRegisters>();
    const int consumer = group - 1, slice = consumer * 4 + warp;  // a warp's 16 rows of W within the block
    const uint32_t* words = fragments + (int64_t{blockIdx.y} * (kBlockN / 16) + slice) * k_blocks * kWarp + lane;
    // ldmatrix: lanes 0..15 name the rows of columns 0..7, lanes 16..31 those of columns 8..15.
    const uint32_t from_row = (slice * 16 + lane % 16) * kRowBytes, from_column = lane / 16 * 16;
    float sums[kBlockM / 2] = {};
    uint32_t a[kSteps][4];
    const auto load = [&](int stage, int step, uint32_t word) {
      const uint32_t offset = from_row + step * 32 + from_column;
      load_matrices(a[step], stages + stage * kStageBytes<kBlockM> + (offset ^ (offset >> 7 & 7) << 4));
      if constexpr (kMasked) {
        uint32_t mask[4];
        fragment_masks(word, step, mask);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[step][i] &= mask[i];
      }
    };
    uint32_t word = kMasked ? words[0] : 0u;
    mbarrier_wait(full, 0);
    load(0, 0, word);
    for (int block = 0; block < k_blocks; ++block) {
      const int stage = block % kStages, next = (block + 1) % kStages;
      const bool more = block + 1 < k_blocks;
      const uint32_t next_word = kMasked && more ? words[(block + 1) * kWarp] : 0u;
      const uint64_t b = swizzled_descriptor(stages + stage * kStageBytes<kBlockM> + kWeightBytes);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step + 1 < kSteps) {
          load(stage, step + 1, word);
        } else if (more) {
          mbarrier_wait(full + 8 * next, (block + 1) / kStages & 1);
          load(next, 0, next_word);
        }
        wgmma_fence();
        wgmma<T>(sums, a[step], b + 2 * step);
        wgmma_commit();
        wgmma_wait<kPending>();
        // Steps 0 and 1 alone are pending: every step of the previous block is done with its stage.
        if (step == kPending - 1 && block > 0 && lane == 0) mbarrier_arrive(empty + 8 * ((block - 1) % kStages));
      }
      word = next_word;
    }
    wgmma_wait<0>();

    // y tile: through shared memory, transposed, so that rows of y leave in 128-byte pieces. Every box has arrived and
    // every wgmma is done once both consumers are here: the stages are free.
    named_barrier(1, kConsumers * kGroup);
    const int64_t row_n = first_n + slice * 16 + lane / 4;
    const float low_bias = bias != nullptr && row_n < n ? to_float(bias[row_n]) : 0.0f;
    const float high_bias = bias != nullptr && row_n + 8 < n ? to_float(bias[row_n + 8]) : 0.0f;
    const uint32_t out = stages + consumer * kBlockM * kOutPitch;
    const uint32_t to = out + (lane / 16 * 8 + lane % 8) * kOutPitch + (warp * 16 + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int j = 0; j < kBlockM / 16; ++j) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // 8 x 8 matrices: W rows 0..7 and 8..15 of x rows 0..7, then of 8..15
        const float add = i % 2 == 0 ? low_bias : high_bias;
        pairs[i] = pack(from_float<T>(sums[8 * j + 2 * i] + add), from_float<T>(sums[8 * j + 2 * i + 1] + add));
      }
      store_matrices_transposed(to + j * 16 * kOutPitch, pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    named_barrier(2 + consumer, kGroup);
    const int thread = threadIdx.x % kGroup;
    const int64_t column = first_n + consumer * 64 + thread % 8 * 8;
    const uint8_t* tile = shared + (out - static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
    for (int row = thread / 8; row < kBlockM && first_m + row < m; row += kGroup / 8) {
      const uint4 eight = *reinterpret_cast<const uint4*>(tile + row * kOutPitch + thread % 8 * 16);
      T* y_row = y + (first_m + row) * n;
      if (vectors && column < n) {
        *reinterpret_cast<uint4*>(y_row + column) = eight;
      } else {
        T elements[8];
        memcpy(elements, &eight, sizeof(eight));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (column + i < n) y_row[column + i] = elements[i];
        }
      }
    }
  }
#else
  __trap();  // masked_gemm refuses to launch it on anything but compute capability 9.0
#endif
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Through the runtime, so that the module loads where there is no driver.
EncodeTiled encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
        "cudaGetDriverEntryPointByVersion");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
        "cudaGetDriverEntryPoint");
#endif
  need(found == cudaDriverEntryPointSuccess && function != nullptr, "the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<EncodeTiled>(function);
}

CUtensorMap matrix_map(uintptr_t matrix, int dtype, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  static const EncodeTiled encode = encode_tiled();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kBlockK, static_cast<cuuint32_t>(box_rows)}, ones[2] = {1, 1};
  const CUresult result = encode(
      &map, dtype == kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      pointer<void>(matrix), sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  need(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled refused the matrix");
  return map;
}

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

template <typename T, int kBlockM, bool kMasked>
void launch_gemm(int dtype, uintptr_t x, int64_t x_stride, uintptr_t weight, int64_t weight_stride, uintptr_t fragments,
                 uintptr_t bias, int64_t m, int64_t n, int64_t k, uintptr_t y, uintptr_t cuda_stream) {
  const auto kernel = masked_gemm_kernel<T, kBlockM, kMasked>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<kBlockM>),
        "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(ceil_div(m, kBlockM)), static_cast<unsigned>(ceil_div(n, kBlockN)));
  kernel<<<grid, kThreads, kSharedBytes<kBlockM>, as_stream(cuda_stream)>>>(
      matrix_map(weight, dtype, n, k, weight_stride, kBlockN), matrix_map(x, dtype, m, k, x_stride, kBlockM),
      pointer<const uint32_t>(fragments), pointer<const T>(bias), m, n, static_cast<int>(ceil_div(k, kBlockK)),
      n % 8 == 0 && aligned(y, 16), pointer<T>(y));
  check_launch("masked_gemm_kernel");
}

}  // namespace

int64_t fragment_words(int64_t n, int64_t k) {
  return ceil_div(n, kBlockN) * (kBlockN / 16) * ceil_div(k, kBlockK) * kWarp;
}

void fragment_bits(uintptr_t bits, int64_t n, int64_t k, uintptr_t fragments, uintptr_t cuda_stream) {
  if (n == 0 || k == 0) return;
  const int64_t row_blocks = ceil_div(n, kBlockN) * (kBlockN / 16);
  fragment_bits_kernel<<<strip_grid(row_blocks, ceil_div(k, kBlockK)), dim3(kWarp, kWarpsPerBlock), 0,
                         as_stream(cuda_stream)>>>(pointer<const uint32_t>(bits), n, ceil_div(k, 32), row_blocks,
                                                   pointer<uint32_t>(fragments));
  check_launch("fragment_bits_kernel");
}

void masked_gemm(uintptr_t x, int dtype, int64_t x_stride, uintptr_t weight, int64_t weight_stride,
                 uintptr_t fragments, uintptr_t bias, int64_t m, int64_t n, int64_t k, uintptr_t y,
                 uintptr_t cuda_stream) {
  if (m == 0 || n == 0) return;
  need(dtype == kFloat16 || dtype == kBFloat16, "masked_gemm takes fp16 and bf16");
  need(aligned(x | weight, 16) && x_stride % 8 == 0 && weight_stride % 8 == 0,
       "masked_gemm needs x and weight on 16 bytes, with row strides of a multiple of 8 elements");
  need(k > 0 && std::max({m, n, k}) < int64_t{1} << 30 && ceil_div(n, kBlockN) <= 65535,
       "masked_gemm takes 1 <= K < 2^30, M < 2^30 and N < 2^23");
  need(attribute(cudaDevAttrComputeCapabilityMajor) == 9, "masked_gemm needs a GPU of compute capability 9.0");
  // The wide tile reuses W more, the narrow one spreads a small product over the device. Both sum in one order.
  const int64_t wide = ceil_div(m, 256) * ceil_div(n, kBlockN);
  const bool narrow = wide < attribute(cudaDevAttrMultiProcessorCount);
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, float>) {
      const auto launch = narrow ? (fragments != 0 ? launch_gemm<T, 128, true> : launch_gemm<T, 128, false>)
                                 : (fragments != 0 ? launch_gemm<T, 256, true> : launch_gemm<T, 256, false>);
      launch(dtype, x, x_stride, weight, weight_stride, fragments, bias, m, n, k, y, cuda_stream);
    }
  });
}

}  // namespace rmt::cuda
