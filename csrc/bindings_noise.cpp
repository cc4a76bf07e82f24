// SPDX-License-Identifier: Apache-2.0
// The noise functions of wavedp._csrc; see bindings.cpp. Keys are addresses of 32 bytes, never values.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "noise_arguments.h"

namespace py = pybind11;
using namespace py::literals;
using std::uintptr_t;

namespace {

void chacha20_words(uintptr_t key, uint64_t counter, const std::vector<uint32_t>& nonce, int rounds,
                    uintptr_t words, int64_t count, int threads) {
  wavedp::check_range("threads", threads, 1, INT32_MAX);
  wavedp::chacha20_words_cpu(wavedp::chacha20_words_job(key, counter, nonce, rounds, words, count), threads);
}

void noisy_mean(uintptr_t key, uint32_t step, uint64_t offset, uintptr_t total, int total_dtype,
                uintptr_t out, int out_dtype, int kind, double std, double grid, double divisor,
                int64_t count, int threads) {
  wavedp::check_range("threads", threads, 1, INT32_MAX);
  wavedp::noisy_mean_cpu(wavedp::noisy_mean_job(key, step, offset, total, total_dtype, out, out_dtype, kind,
                                                std, grid, divisor, count),
                         threads);
}

void noise_step(uintptr_t key, uint32_t step, uint64_t offset, int rule, bool wide, bool strict, double std,
                double grid, double divisor, const std::vector<wavedp::StepAddresses>& addresses,
                const std::vector<int64_t>& sizes, const std::vector<wavedp::StepKinds>& kinds,
                const std::vector<std::array<double, wavedp::kStepConstants>>& constants, int threads) {
  wavedp::check_range("threads", threads, 1, INT32_MAX);
  const wavedp::StepTensors of(rule, addresses, sizes, kinds, constants);
  wavedp::NoiseStep job =
      wavedp::noise_step_job(key, step, offset, rule, wide, strict, std, grid, divisor, of.starts.back());
  wavedp::set_tensors(job, of);
  wavedp::noise_step_cpu(job, threads);
}

}  // namespace

void bind_noise(py::module_& m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("chacha20_words", &chacha20_words, "key_ptr"_a, "counter"_a, "nonce"_a, "rounds"_a, "words_ptr"_a,
        "count"_a, "threads"_a, unlocked);
  m.def("noisy_mean", &noisy_mean, "key_ptr"_a, "step"_a, "offset"_a, "total_ptr"_a, "total_dtype"_a,
        "out_ptr"_a, "out_dtype"_a, "kind"_a, "std"_a, "grid"_a, "divisor"_a, "count"_a, "threads"_a,
        unlocked);
  m.def("noise_step", &noise_step, "key_ptr"_a, "step"_a, "offset"_a, "rule"_a, "wide"_a, "strict"_a, "std"_a,
        "grid"_a, "divisor"_a, "addresses"_a, "sizes"_a, "kinds"_a, "constants"_a, "threads"_a, unlocked);
}
