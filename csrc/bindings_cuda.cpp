// SPDX-License-Identifier: Apache-2.0
// wavedp._csrc_cuda: the CUDA launchers on device addresses and a cudaStream_t, on the current device.
// Each returns a cudaError_t; 0 is success. The GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"

namespace py = pybind11;
using namespace py::literals;
using std::uintptr_t;
using wavedp::Addresses;
using wavedp::ImageAxes;

namespace {

int wavedec2(uintptr_t x, int dtype, double gain, double bias, const ImageAxes& axes, const Addresses& bands,
             int band_dtype, int edge, int levels, double factor, uintptr_t stream) {
  return wavedp::wavedec2_cuda(
      wavedp::wavedec2_job(x, dtype, gain, bias, axes, bands, band_dtype, edge, levels, factor),
      reinterpret_cast<void*>(stream));
}

int waverec2(const Addresses& bands, uintptr_t x, int dtype, int64_t n, int64_t height, int64_t width,
             int edge, int levels, double factor, uintptr_t stream) {
  return wavedp::waverec2_cuda(wavedp::waverec2_job(bands, x, dtype, n, height, width, edge, levels, factor),
                               reinterpret_cast<void*>(stream));
}

int wavelet_tokens(uintptr_t x, int dtype, double gain, double bias, const ImageAxes& axes,
                   const Addresses& tokens, int token_dtype, int levels, double factor, int64_t grid_h,
                   int64_t grid_w, uintptr_t shift, uintptr_t scale, uintptr_t energies, uintptr_t stream) {
  return wavedp::wavelet_tokens_cuda(
      wavedp::wavelet_tokens_job(x, dtype, gain, bias, axes, tokens, token_dtype, levels, factor, grid_h,
                                 grid_w, shift, scale, energies),
      reinterpret_cast<void*>(stream));
}

int wavelet_untokens(const Addresses& tokens, uintptr_t x, int dtype, int64_t batch, int64_t channels,
                     int64_t height, int64_t width, int levels, double factor, int64_t grid_h, int64_t grid_w,
                     uintptr_t shift, uintptr_t scale, uintptr_t stream) {
  return wavedp::wavelet_untokens_cuda(
      wavedp::wavelet_untokens_job(tokens, x, dtype, batch, channels, height, width, levels, factor, grid_h,
                                   grid_w, shift, scale),
      reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_noise(py::module_& m);  // bindings_cuda_noise.cpp

PYBIND11_MODULE(_csrc_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "The 2-D Haar transform and ChaCha20 noise on CUDA memory; see csrc/wavelet.h and csrc/noise.h.";
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("wavedec2", &wavedec2, "x_ptr"_a, "dtype"_a, "gain"_a, "bias"_a, "planes"_a, "bands"_a,
        "band_dtype"_a, "edge"_a, "levels"_a, "factor"_a, "stream"_a, unlocked);
  m.def("waverec2", &waverec2, "bands"_a, "x_ptr"_a, "dtype"_a, "n"_a, "height"_a, "width"_a, "edge"_a,
        "levels"_a, "factor"_a, "stream"_a, unlocked);
  m.def("wavelet_tokens", &wavelet_tokens, "x_ptr"_a, "dtype"_a, "gain"_a, "bias"_a, "planes"_a, "tokens"_a,
        "token_dtype"_a, "levels"_a, "factor"_a, "grid_h"_a, "grid_w"_a, "shift_ptr"_a, "scale_ptr"_a,
        "energies_ptr"_a, "stream"_a, unlocked);
  m.def("wavelet_untokens", &wavelet_untokens, "tokens"_a, "x_ptr"_a, "dtype"_a, "batch"_a, "channels"_a,
        "height"_a, "width"_a, "levels"_a, "factor"_a, "grid_h"_a, "grid_w"_a, "shift_ptr"_a, "scale_ptr"_a,
        "stream"_a, unlocked);
  bind_noise(m);
  m.def("error_string", &wavedp::cuda_error_string, "code"_a);
}
