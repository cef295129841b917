// Binds launch.h into the extension module as cuda_<name>, under the parameter names of launch.h. No CUDA call is made
// here: the module loads without a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launch.h"

namespace py = pybind11;
using namespace pybind11::literals;

void bind_cuda(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def("cuda_pack_bits", &rmt::cuda::pack_bits, "mask"_a, "n"_a, "k"_a, "stride"_a, "bits"_a, "cuda_stream"_a, nogil);
  m.def("cuda_pack_scores", &rmt::cuda::pack_scores, "scores"_a, "dtype"_a, "n"_a, "k"_a, "stride"_a, "threshold"_a,
        "bits"_a, "cuda_stream"_a, nogil);
  m.def("cuda_unpack_bits", &rmt::cuda::unpack_bits, "bits"_a, "n"_a, "k"_a, "mask"_a, "cuda_stream"_a, nogil);
  m.def("cuda_masked_weight", &rmt::cuda::masked_weight, "weight"_a, "element_size"_a, "n"_a, "k"_a, "stride"_a,
        "bits"_a, "out"_a, "cuda_stream"_a, nogil);
  m.def("cuda_masked_weights", &rmt::cuda::masked_weights, "outs"_a, "weights"_a, "bits"_a, "olds"_a, "rows"_a,
        "cols"_a, "strides"_a, "element_size"_a, "cuda_stream"_a, nogil);
  m.def("cuda_mask_update_partials", &rmt::cuda::mask_update_partials, "rows"_a, "cols"_a);
  m.def("cuda_mask_update", &rmt::cuda::mask_update, "scores"_a, "bits"_a, "exp_avgs"_a, "exp_avg_sqs"_a, "dense"_a,
        "grads"_a, "weights"_a, "generals"_a, "scales"_a, "rows"_a, "cols"_a, "chained"_a, "streams"_a, "offsets"_a,
        "moments"_a, "weight_dtype"_a, "dense_dtype"_a, "factors"_a, "norms"_a, "counts"_a, "rng"_a, "partials"_a,
        "l2"_a, "strength"_a, "beta1"_a, "beta2"_a, "eps"_a, "threshold"_a, "cuda_stream"_a, nogil);
  m.def("cuda_gradient_dropout", &rmt::cuda::gradient_dropout, "grad_task"_a, "grad_general"_a, "weight"_a,
        "weight_dtype"_a, "scores"_a, "penalty"_a, "rng"_a, "numel"_a, "strength"_a, "stream"_a, "out"_a,
        "cuda_stream"_a, nogil);
  m.def("cuda_masked_linear_small", &rmt::cuda::masked_linear_small, "x"_a, "dtype"_a, "x_stride"_a, "weight"_a,
        "weight_stride"_a, "bits"_a, "starts"_a, "ends"_a, "bias"_a, "n"_a, "k"_a, "y"_a, "cuda_stream"_a, nogil);
  m.def("cuda_fragment_words", &rmt::cuda::fragment_words, "n"_a, "k"_a);
  m.def("cuda_fragment_bits", &rmt::cuda::fragment_bits, "bits"_a, "n"_a, "k"_a, "fragments"_a, "cuda_stream"_a, nogil);
  m.def("cuda_masked_gemm", &rmt::cuda::masked_gemm, "x"_a, "dtype"_a, "x_stride"_a, "weight"_a, "weight_stride"_a,
        "fragments"_a, "bias"_a, "m"_a, "n"_a, "k"_a, "y"_a, "cuda_stream"_a, nogil);
}
