// SPDX-License-Identifier: Apache-2.0
// wavedp._csrc: the CPU functions on addresses. Callers own the memory and keep it alive; the GIL is
// released while they run.
#include <pybind11/pybind11.h>

#include <type_traits>

#include "arguments.h"
#include "cpu/team.h"

// Lists and tuples of integers, in half the time of pybind11/stl.h: a call for a small image shows it.
namespace pybind11::detail {

template <class Numbers>
struct numbers_caster {
  PYBIND11_TYPE_CASTER(Numbers, const_name("Sequence[int]"));

  bool load(handle source, bool) {
    if (!PyList_Check(source.ptr()) && !PyTuple_Check(source.ptr())) return false;
    PyObject* const* items = PySequence_Fast_ITEMS(source.ptr());
    const std::size_t count = PySequence_Fast_GET_SIZE(source.ptr());
    if constexpr (std::is_same_v<Numbers, wavedp::Addresses>) value.resize(count);
    if (value.size() != count) return false;
    for (std::size_t k = 0; k < count; ++k) {
      if (!PyLong_Check(items[k])) return false;
      if constexpr (std::is_same_v<Numbers, wavedp::Addresses>) {
        value[k] = PyLong_AsSize_t(items[k]);
      } else {
        value[k] = PyLong_AsLongLong(items[k]);
      }
      if (value[k] + 1 == 0 && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
      }
    }
    return true;
  }
};

template <>
struct type_caster<wavedp::Addresses> : numbers_caster<wavedp::Addresses> {};
template <>
struct type_caster<wavedp::ImageAxes> : numbers_caster<wavedp::ImageAxes> {};

}  // namespace pybind11::detail

namespace py = pybind11;

void bind_noise(py::module_& m);
void bind_per_sample(py::module_& m);

using namespace py::literals;
using std::uintptr_t;
using wavedp::Addresses;
using wavedp::ImageAxes;

namespace {

void checked_threads(int threads) { wavedp::check_range("threads", threads, 1, INT32_MAX); }

void wavedec2(uintptr_t x, int dtype, double gain, double bias, const ImageAxes& axes, const Addresses& bands,
              int band_dtype, int edge, int levels, double factor, int threads) {
  checked_threads(threads);
  wavedp::wavedec2_cpu(
      wavedp::wavedec2_job(x, dtype, gain, bias, axes, bands, band_dtype, edge, levels, factor), threads);
}

void waverec2(const Addresses& bands, uintptr_t x, int dtype, int64_t n, int64_t height, int64_t width,
              int edge, int levels, double factor, int threads) {
  checked_threads(threads);
  wavedp::waverec2_cpu(wavedp::waverec2_job(bands, x, dtype, n, height, width, edge, levels, factor),
                       threads);
}

void wavelet_tokens(uintptr_t x, int dtype, double gain, double bias, const ImageAxes& axes,
                    const Addresses& tokens, int token_dtype, int levels, double factor, int64_t grid_h,
                    int64_t grid_w, uintptr_t shift, uintptr_t scale, uintptr_t energies, int threads) {
  checked_threads(threads);
  wavedp::wavelet_tokens_cpu(
      wavedp::wavelet_tokens_job(x, dtype, gain, bias, axes, tokens, token_dtype, levels, factor, grid_h,
                                 grid_w, shift, scale, energies),
      threads);
}

void wavelet_untokens(const Addresses& tokens, uintptr_t x, int dtype, int64_t batch, int64_t channels,
                      int64_t height, int64_t width, int levels, double factor, int64_t grid_h,
                      int64_t grid_w, uintptr_t shift, uintptr_t scale, int threads) {
  checked_threads(threads);
  wavedp::wavelet_untokens_cpu(wavedp::wavelet_untokens_job(tokens, x, dtype, batch, channels, height, width,
                                                            levels, factor, grid_h, grid_w, shift, scale),
                               threads);
}

void set_isa(const std::string& name) {
  if (!wavedp::set_cpu_isa(name.c_str())) {
    throw std::invalid_argument("isa '" + name + "' is not available: expected 'amx', 'avx512', 'avx2' " +
                                "or 'baseline', built in and supported by this CPU");
  }
}

}  // namespace

PYBIND11_MODULE(_csrc, m, py::mod_gil_not_used()) {
  m.doc() = "The Haar transform, norms of gradients and noise on CPU memory; see csrc/*.h.";
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("wavedec2", &wavedec2, "x_ptr"_a, "dtype"_a, "gain"_a, "bias"_a, "planes"_a, "bands"_a,
        "band_dtype"_a, "edge"_a, "levels"_a, "factor"_a, "threads"_a, unlocked);
  m.def("waverec2", &waverec2, "bands"_a, "x_ptr"_a, "dtype"_a, "n"_a, "height"_a, "width"_a, "edge"_a,
        "levels"_a, "factor"_a, "threads"_a, unlocked);
  m.def("wavelet_tokens", &wavelet_tokens, "x_ptr"_a, "dtype"_a, "gain"_a, "bias"_a, "planes"_a, "tokens"_a,
        "token_dtype"_a, "levels"_a, "factor"_a, "grid_h"_a, "grid_w"_a, "shift_ptr"_a, "scale_ptr"_a,
        "energies_ptr"_a, "threads"_a, unlocked);
  m.def("wavelet_untokens", &wavelet_untokens, "tokens"_a, "x_ptr"_a, "dtype"_a, "batch"_a, "channels"_a,
        "height"_a, "width"_a, "levels"_a, "factor"_a, "grid_h"_a, "grid_w"_a, "shift_ptr"_a, "scale_ptr"_a,
        "threads"_a, unlocked);
  bind_noise(m);
  bind_per_sample(m);
  m.def("leave_pool", &wavedp::leave_pool);
  m.def("isa", &wavedp::cpu_isa);
  m.def("set_isa", &set_isa, "name"_a);
}
