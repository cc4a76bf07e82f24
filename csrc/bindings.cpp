// SPDX-License-Identifier: Apache-2.0
// wavedp._csrc: the CPU functions on addresses. Callers own the memory and keep it alive; the GIL is
// released.
#include <pybind11/pybind11.h>

#include "arguments.h"

namespace py = pybind11;
using namespace py::literals;
using std::uintptr_t;

namespace {

void dwt2(uintptr_t x, uintptr_t bands, int dtype, int64_t n, int64_t height, int64_t width, int64_t stride_n,
          int64_t stride_h, int64_t stride_w, int edge, int threads) {
  wavedp::check_range("threads", threads, 1, INT32_MAX);
  wavedp::wavedp_dwt2_cpu(
      wavedp::dwt2_job(x, bands, dtype, n, height, width, stride_n, stride_h, stride_w, edge), threads);
}

void idwt2(uintptr_t ll, uintptr_t lh, uintptr_t hl, uintptr_t hh, uintptr_t x, int dtype, int64_t n,
           int64_t height, int64_t width, int edge, int threads) {
  wavedp::check_range("threads", threads, 1, INT32_MAX);
  wavedp::wavedp_idwt2_cpu(wavedp::idwt2_job(ll, lh, hl, hh, x, dtype, n, height, width, edge), threads);
}

void set_isa(const std::string& name) {
  if (!wavedp::set_cpu_isa(name.c_str())) {
    throw std::invalid_argument("isa '" + name + "' is not available: expected 'avx512', 'avx2' or " +
                                "'baseline', built in and supported by this CPU");
  }
}

}  // namespace

PYBIND11_MODULE(_csrc, m, py::mod_gil_not_used()) {
  m.doc() = "One level of the 2-D Haar transform on CPU memory; see csrc/wavelet.h.";
  m.def("dwt2", &dwt2, "x_ptr"_a, "bands_ptr"_a, "dtype"_a, "n"_a, "height"_a, "width"_a, "stride_n"_a,
        "stride_h"_a, "stride_w"_a, "edge"_a, "threads"_a, py::call_guard<py::gil_scoped_release>());
  m.def("idwt2", &idwt2, "ll_ptr"_a, "lh_ptr"_a, "hl_ptr"_a, "hh_ptr"_a, "x_ptr"_a, "dtype"_a, "n"_a,
        "height"_a, "width"_a, "edge"_a, "threads"_a, py::call_guard<py::gil_scoped_release>());
  m.def("isa", &wavedp::cpu_isa);
  m.def("set_isa", &set_isa, "name"_a);
}
