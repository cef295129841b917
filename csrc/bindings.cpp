// The extension module: raw pointers, sizes and stream handles in, results through memory. No torch, so that one build
// serves every version of it. Callers (rmt_kernels/backends) have checked shapes, dtypes and contiguity.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_info.h"
#include "cpu/codec.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace rmt::cpu;

#ifdef RMT_WITH_CUDA
void bind_cuda(py::module_& m);
#endif

template <typename T>
static T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Pointers = std::vector<uintptr_t>;

static uintptr_t nth(const Pointers& pointers, size_t i) { return i < pointers.size() ? pointers[i] : 0; }

static Draw draw_of(int64_t seed, int64_t step, int64_t stream, int64_t offset) {
  return {static_cast<uint64_t>(seed), static_cast<uint64_t>(step), static_cast<uint32_t>(stream),
          static_cast<uint64_t>(offset)};
}

// Lists are empty or have one entry for each layer, scales two; norms and counts may be null. Returns how many words of
// each layer hold a NaN score.
static std::vector<int64_t> mask_update(
    const Pointers& scores, const Pointers& bits, const Pointers& exp_avgs, const Pointers& exp_avg_sqs,
    const Pointers& dense, const Pointers& grads, const Pointers& weights, const Pointers& generals,
    const Pointers& scales, const std::vector<int64_t>& rows, const std::vector<int64_t>& columns,
    const std::vector<bool>& chained, const std::vector<int64_t>& streams, const std::vector<int64_t>& offsets,
    const std::vector<int>& weight_dtypes, const std::vector<int>& dense_dtypes, int moments,
    std::pair<float, float> factors, uintptr_t norms, uintptr_t counts, int64_t seed, int64_t step, double l2,
    double strength, double beta1, double beta2, float eps, float threshold, int threads) {
  std::vector<UpdateLayer> layers(scores.size());
  std::vector<UpdateSums> sums(scores.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const bool chain = !chained.empty() && chained[i];
    // As the reference has it: torch divides a number by a tensor through the reciprocal.
    const float penalty = l2 ? 1.0f / std::max(at<float>(norms)[i], FLT_MIN) * static_cast<float>(l2) : 0.0f;
    const Draw draw = draw_of(seed, step, streams[i], offsets[i]);
    layers[i] = {
        {at<float>(grads[i]), at<float>(nth(generals, i)), at<void>(chain ? weights[i] : 0),
         static_cast<DType>(weight_dtypes[i]), l2 ? at<float>(scores[i]) : nullptr, penalty,
         static_cast<float>(1 - strength), draw},
        at<float>(scores[i]), at<uint32_t>(bits[i]), at<void>(exp_avgs[i]), at<void>(exp_avg_sqs[i]),
        {at<uint8_t>(nth(scales, 2 * i)), at<uint8_t>(nth(scales, 2 * i + 1))}, at<void>(nth(dense, i)),
        at<void>(nth(weights, i)), static_cast<DType>(dense_dtypes[i]), rows[i], columns[i]};
  }
  kernels().mask_update(
      {layers.data(), static_cast<int64_t>(layers.size()), static_cast<Moments>(moments), factors.first, factors.second,
       static_cast<float>(1 - beta1), static_cast<float>(beta2), static_cast<float>(1 - beta2), eps, threshold,
       norms != 0, sums.data()},
      threads);
  std::vector<int64_t> nans;
  for (size_t i = 0; i < sums.size(); ++i) {
    if (norms) at<float>(norms)[i] = static_cast<float>(std::sqrt(sums[i].squares));
    if (counts) at<int64_t>(counts)[2 * i] = sums[i].flipped, at<int64_t>(counts)[2 * i + 1] = sums[i].on;
    nans.push_back(sums[i].nans);
  }
  return nans;
}

static void bind_cpu(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def("cpu_isa", [] { return std::string(kernels().isa); });
  m.def("cpu_has_bf16", [] { return kernels().has_bf16; });
  m.def("cpu_pack_scores", [](uintptr_t scores, int64_t n, int64_t k, float threshold, uintptr_t bits, int threads) {
    return kernels().pack_scores(at<float>(scores), n, k, threshold, at<uint32_t>(bits), threads);
  }, nogil);
  m.def("cpu_pack_bits", [](uintptr_t mask, int64_t n, int64_t k, uintptr_t bits, int threads) {
    kernels().pack_bits(at<uint8_t>(mask), n, k, at<uint32_t>(bits), threads);
  }, nogil);
  m.def("cpu_unpack_bits", [](uintptr_t bits, int64_t n, int64_t k, uintptr_t mask, int threads) {
    kernels().unpack_bits(at<uint32_t>(bits), n, k, at<uint8_t>(mask), threads);
  }, nogil);
  m.def("cpu_masked_weight",
        [](uintptr_t weight, uintptr_t bits, int64_t n, int64_t k, int itemsize, uintptr_t out, int threads) {
          kernels().masked_weight(at<void>(weight), at<uint32_t>(bits), n, k, itemsize, at<void>(out), threads);
        }, nogil);
  m.def("cpu_swap_mask",
        [](uintptr_t weight, uintptr_t bits, uintptr_t old, int64_t n, int64_t k, int itemsize, uintptr_t out,
           int threads) {
          kernels().swap_mask(at<void>(weight), at<uint32_t>(bits), at<uint32_t>(old), n, k, itemsize, at<void>(out), threads);
        }, nogil);
  m.def("cpu_gradient_dropout",
        [](uintptr_t grad_task, uintptr_t grad_general, uintptr_t weight, int weight_dtype, uintptr_t scores,
           float penalty, float rest, int64_t seed, int64_t step, int64_t stream, uintptr_t grad, int64_t numel,
           int threads) {
          const Draw draw = draw_of(seed, step, stream, 0);
          kernels().gradient_dropout(
              {at<float>(grad_task), at<float>(grad_general), at<void>(weight), static_cast<DType>(weight_dtype),
               at<float>(scores), penalty, rest, draw},
              at<float>(grad), numel, threads);
        }, nogil);
  m.def("cpu_mask_update", &mask_update, nogil);
  m.def("cpu_masked_linear",
        [](uintptr_t x, uintptr_t weight, const Pointers& bits, const std::vector<int64_t>& first,
           const std::vector<int64_t>& last, uintptr_t bias, uintptr_t y, int dtype, int64_t n, int64_t k,
           int64_t x_stride, int threads) {
          std::vector<RowGroup> rows;
          for (size_t g = 0; g < bits.size(); ++g) rows.push_back({at<uint32_t>(bits[g]), first[g], last[g]});
          kernels().masked_linear(
              {at<void>(x), at<void>(weight), at<void>(bias), rows.data(), at<void>(y), static_cast<DType>(dtype),
               static_cast<int64_t>(rows.size()), n, k, x_stride},
              threads);
        }, nogil);
  // One group, without lists.
  m.def("cpu_masked_linear_single",
        [](uintptr_t x, uintptr_t weight, uintptr_t bits, uintptr_t bias, int64_t rows, uintptr_t y, int dtype,
           int64_t n, int64_t k, int64_t x_stride, int threads) {
          const RowGroup group = {at<uint32_t>(bits), 0, rows};
          kernels().masked_linear(
              {at<void>(x), at<void>(weight), at<void>(bias), &group, at<void>(y), static_cast<DType>(dtype), 1, n, k,
               x_stride},
              threads);
        }, nogil);
  m.def("cpu_uniform",
        [](int64_t seed, int64_t step, int64_t stream, int64_t offset, uintptr_t out, int64_t numel, int threads) {
          kernels().uniform(draw_of(seed, step, stream, offset), at<float>(out), numel, threads);
        }, nogil);
  m.def("cpu_weight_grad_rate", [] { return kernels().weight_grad ? kernels().weight_grad_rate() : 0.0; }, nogil);
  m.def("cpu_weight_grad",
        [](uintptr_t g, uintptr_t x, uintptr_t out, int64_t m, int64_t n, int64_t k, int64_t g_stride, int64_t x_stride,
           bool accumulate, int threads) {
          kernels().weight_grad({at<void>(g), at<void>(x), at<float>(out), m, n, k, g_stride, x_stride, accumulate}, threads);
        }, nogil);
  // (parameter, on, count, bytes of unary codes, of remainders); written only where they are less than capacity.
  m.def("cpu_rice_encode", [](uintptr_t bits, int64_t n, int64_t k, uintptr_t out, int64_t capacity) {
    const RiceCode code = rice_encode(at<uint32_t>(bits), n, k, at<uint8_t>(out), capacity);
    return std::make_tuple(code.parameter, code.on, code.count, code.unary_bytes, code.remainder_bytes);
  }, nogil);
  m.def("cpu_rice_decode",
        [](uintptr_t payload, int parameter, bool on, int64_t count, int64_t unary_bytes, int64_t remainder_bytes,
           int64_t n, int64_t k, uintptr_t bits) {
          const RiceCode code = {parameter, on, count, unary_bytes, remainder_bytes};
          const uint8_t* unary = at<uint8_t>(payload);
          return static_cast<int>(rice_decode(unary, unary + unary_bytes, code, n, k, at<uint32_t>(bits)));
        }, nogil);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of rmt_kernels; see rmt_kernels/backends.";
  m.attr("build_info") = RMT_BUILD_INFO;
  bind_cpu(m);
#ifdef RMT_WITH_CUDA
  bind_cuda(m);
#endif
}
