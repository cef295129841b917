// The extension module: raw pointers, sizes and stream handles in, results through memory. No torch, so that one build
// serves every version of it. Callers (rmt_kernels/backends) have checked shapes, dtypes and contiguity.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "build_info.h"
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
  m.def("cpu_gradient_dropout",
        [](uintptr_t grad_task, uintptr_t grad_general, uintptr_t weight, int weight_dtype, uintptr_t scores,
           float penalty, float strength, int64_t seed, int64_t step, int64_t stream, uintptr_t grad, int64_t numel,
           int threads) {
          const Draw draw = {static_cast<uint64_t>(seed), static_cast<uint64_t>(step), static_cast<uint32_t>(stream)};
          kernels().gradient_dropout(
              {at<float>(grad_task), at<float>(grad_general), at<void>(weight), static_cast<DType>(weight_dtype),
               at<float>(scores), penalty, strength, draw, at<float>(grad), numel},
              threads);
        }, nogil);
  m.def("cpu_mask_update",
        [](uintptr_t scores, uintptr_t bits, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t dense,
           uintptr_t weight, int itemsize, uintptr_t grad, int64_t n, int64_t k, float step_size, float denom_scale,
           double beta1, double beta2, float eps, float threshold, int threads) {
          return kernels().mask_update(
              {at<float>(scores), at<uint32_t>(bits), at<float>(exp_avg), at<float>(exp_avg_sq), at<void>(dense),
               at<void>(weight), itemsize, at<float>(grad), n, k, step_size, denom_scale,
               static_cast<float>(1 - beta1), static_cast<float>(beta2), static_cast<float>(1 - beta2), eps, threshold},
              threads);
        }, nogil);
  m.def("cpu_masked_linear",
        [](uintptr_t x, uintptr_t weight, uintptr_t bits, uintptr_t bias, uintptr_t offsets, uintptr_t y, int dtype,
           int64_t tasks, int64_t n, int64_t k, int64_t x_stride, int threads) {
          kernels().masked_linear(
              {at<void>(x), at<void>(weight), at<uint32_t>(bits), at<void>(bias), at<int64_t>(offsets), at<void>(y),
               static_cast<DType>(dtype), tasks, n, k, x_stride},
              threads);
        }, nogil);
  // One task: the row range travels by value.
  m.def("cpu_masked_linear_single",
        [](uintptr_t x, uintptr_t weight, uintptr_t bits, uintptr_t bias, int64_t rows, uintptr_t y, int dtype,
           int64_t n, int64_t k, int64_t x_stride, int threads) {
          const int64_t offsets[2] = {0, rows};
          kernels().masked_linear(
              {at<void>(x), at<void>(weight), at<uint32_t>(bits), at<void>(bias), offsets, at<void>(y),
               static_cast<DType>(dtype), 1, n, k, x_stride},
              threads);
        }, nogil);
  m.def("cpu_uniform", [](int64_t seed, int64_t step, int64_t stream, uintptr_t out, int64_t numel, int threads) {
    const Draw draw = {static_cast<uint64_t>(seed), static_cast<uint64_t>(step), static_cast<uint32_t>(stream)};
    kernels().uniform(draw, at<float>(out), numel, threads);
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
