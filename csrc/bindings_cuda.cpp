// SPDX-License-Identifier: Apache-2.0
// wavedp._csrc_cuda: the CUDA launchers on device addresses and a cudaStream_t, on the current device.
// Each returns a cudaError_t; 0 is success. The GIL is released.
#include <pybind11/pybind11.h>

#include "arguments.h"

namespace py = pybind11;
using namespace py::literals;
using std::uintptr_t;

namespace {

int dwt2(uintptr_t x, uintptr_t bands, int dtype, int64_t n, int64_t height, int64_t width, int64_t stride_n,
         int64_t stride_h, int64_t stride_w, int edge, uintptr_t stream) {
  return wavedp::wavedp_dwt2_cuda(
      wavedp::dwt2_job(x, bands, dtype, n, height, width, stride_n, stride_h, stride_w, edge),
      reinterpret_cast<void*>(stream));
}

int idwt2(uintptr_t ll, uintptr_t lh, uintptr_t hl, uintptr_t hh, uintptr_t x, int dtype, int64_t n,
          int64_t height, int64_t width, int edge, uintptr_t stream) {
  return wavedp::wavedp_idwt2_cuda(wavedp::idwt2_job(ll, lh, hl, hh, x, dtype, n, height, width, edge),
                                   reinterpret_cast<void*>(stream));
}

}  // namespace

PYBIND11_MODULE(_csrc_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "One level of the 2-D Haar transform on CUDA memory; see csrc/wavelet.h.";
  m.def("dwt2", &dwt2, "x_ptr"_a, "bands_ptr"_a, "dtype"_a, "n"_a, "height"_a, "width"_a, "stride_n"_a,
        "stride_h"_a, "stride_w"_a, "edge"_a, "stream"_a, py::call_guard<py::gil_scoped_release>());
  m.def("idwt2", &idwt2, "ll_ptr"_a, "lh_ptr"_a, "hl_ptr"_a, "hh_ptr"_a, "x_ptr"_a, "dtype"_a, "n"_a,
        "height"_a, "width"_a, "edge"_a, "stream"_a, py::call_guard<py::gil_scoped_release>());
  m.def("error_string", &wavedp::cuda_error_string, "code"_a);
}
