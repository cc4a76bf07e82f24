// SPDX-License-Identifier: Apache-2.0
// The noise functions of wavedp._csrc_cuda; see bindings_cuda.cpp. Keys are addresses of 32 bytes of device
// memory, never values, which would stay in the launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "noise_arguments.h"

namespace py = pybind11;
using namespace py::literals;
using std::uintptr_t;

namespace {

int chacha20_words(uintptr_t key, uint64_t counter, const std::vector<uint32_t>& nonce, int rounds,
                   uintptr_t words, int64_t count, uintptr_t stream) {
  return wavedp::chacha20_words_cuda(wavedp::chacha20_words_job(key, counter, nonce, rounds, words, count),
                                     reinterpret_cast<void*>(stream));
}

int noisy_mean(uintptr_t key, uint32_t step, uint64_t offset, uintptr_t total, int total_dtype, uintptr_t out,
               int out_dtype, int kind, double std, double grid, double divisor, int64_t count,
               uintptr_t stream) {
  return wavedp::noisy_mean_cuda(wavedp::noisy_mean_job(key, step, offset, total, total_dtype, out, out_dtype,
                                                        kind, std, grid, divisor, count),
                                 reinterpret_cast<void*>(stream));
}

int64_t noise_step_table_bytes(bool wide, int64_t tensors) {
  wavedp::check_range("tensors", tensors, 0, wavedp::kMostElements / 1024);
  return wavedp::noise_step_table_bytes(wide, tensors);
}

int noise_step_table(int rule, bool wide, const std::vector<wavedp::StepAddresses>& addresses,
                     const std::vector<int64_t>& sizes, const std::vector<wavedp::StepKinds>& kinds,
                     const std::vector<std::array<double, wavedp::kStepConstants>>& constants,
                     uintptr_t table) {
  const wavedp::StepTensors of(rule, addresses, sizes, kinds, constants);
  wavedp::NoiseStep job{};
  job.wide = wide;
  wavedp::set_tensors(job, of);
  return wavedp::noise_step_table(job, wavedp::checked_address("table_ptr", table, 1));
}

int noise_step(uintptr_t key, uint32_t step, uint64_t offset, int rule, bool wide, bool strict, double std,
               double grid, double divisor, uintptr_t table, int64_t tensors, int64_t elements, int form,
               uintptr_t stream) {
  wavedp::check_range("tensors", tensors, 1, wavedp::kMostElements / 1024);
  wavedp::NoiseStep job =
      wavedp::noise_step_job(key, step, offset, rule, wide, strict, std, grid, divisor, elements);
  job.count = tensors;
  return wavedp::noise_step_cuda(job, wavedp::checked_address("table_ptr", table, 1), elements, form,
                                 reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_noise(py::module_& m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("chacha20_words", &chacha20_words, "key_ptr"_a, "counter"_a, "nonce"_a, "rounds"_a, "words_ptr"_a,
        "count"_a, "stream"_a, unlocked);
  m.def("noisy_mean", &noisy_mean, "key_ptr"_a, "step"_a, "offset"_a, "total_ptr"_a, "total_dtype"_a,
        "out_ptr"_a, "out_dtype"_a, "kind"_a, "std"_a, "grid"_a, "divisor"_a, "count"_a, "stream"_a,
        unlocked);
  m.def("noise_step_table_bytes", &noise_step_table_bytes, "wide"_a, "tensors"_a);
  m.def("noise_step_table", &noise_step_table, "rule"_a, "wide"_a, "addresses"_a, "sizes"_a, "kinds"_a,
        "constants"_a, "table_ptr"_a, unlocked);
  m.def("noise_step", &noise_step, "key_ptr"_a, "step"_a, "offset"_a, "rule"_a, "wide"_a, "strict"_a, "std"_a,
        "grid"_a, "divisor"_a, "table_ptr"_a, "tensors"_a, "elements"_a, "form"_a, "stream"_a, unlocked);
}
