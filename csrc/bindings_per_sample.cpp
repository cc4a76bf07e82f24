// SPDX-License-Identifier: Apache-2.0
// The functions of per_sample.h in wavedp._csrc, on addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "arguments.h"
#include "per_sample.h"

namespace py = pybind11;
using namespace py::literals;
using std::uintptr_t;

namespace {

using SequenceAxes = std::array<int64_t, 5>;  // batch, tokens, width, then the strides of the first two

wavedp::Sequences sequences_of(const char* name, uintptr_t x, int dtype, const SequenceAxes& axes) {
  const auto [batch, tokens, width, stride_batch, stride_token] = axes;
  constexpr int64_t max = std::numeric_limits<int64_t>::max() / 64;
  for (const int64_t size : axes) wavedp::check_range("a size or stride", size, 0, max);
  if (batch > 0 && tokens > 0 && width > max / batch / tokens) {
    throw std::invalid_argument(std::string(name) + " has more elements than fit in 64 bits");
  }
  return {wavedp::checked_address(name, x, batch * tokens * width),
          wavedp::checked_dtype("dtype", dtype, wavedp::DType::kFloat16),
          batch,
          tokens,
          width,
          stride_batch,
          stride_token};
}

template <class T>
T* address(const char* name, uintptr_t x, int64_t elements) {
  return static_cast<T*>(wavedp::checked_address(name, x, elements));
}

void check_same(const wavedp::Sequences& x, const wavedp::Sequences& y) {
  if (x.batch != y.batch || x.tokens != y.tokens) {
    throw std::invalid_argument("both must have as many records and tokens");
  }
}

void linear_norms(uintptr_t a, int a_dtype, const SequenceAxes& a_axes, uintptr_t g, int g_dtype,
                  const SequenceAxes& g_axes, uintptr_t squared, uintptr_t bound, uintptr_t bias,
                  int threads) {
  wavedp::check_range("threads", threads, 1, INT32_MAX);
  wavedp::LinearNorms job{sequences_of("a_ptr", a, a_dtype, a_axes),
                          sequences_of("g_ptr", g, g_dtype, g_axes), nullptr, nullptr,
                          reinterpret_cast<void*>(bias)};
  check_same(job.a, job.g);
  job.squared = address<double>("squared_ptr", squared, job.a.batch);
  job.bound = address<double>("bound_ptr", bound, job.a.batch);
  wavedp::linear_norms_cpu(job, threads);
}

void norm_grads(uintptr_t x, int x_dtype, const SequenceAxes& x_axes, uintptr_t g, int g_dtype,
                const SequenceAxes& g_axes, double eps, bool subtract_mean, uintptr_t weight, uintptr_t bias,
                int threads) {
  wavedp::check_range("threads", threads, 1, INT32_MAX);
  wavedp::NormGrads job{sequences_of("x_ptr", x, x_dtype, x_axes),
                        sequences_of("g_ptr", g, g_dtype, g_axes),
                        eps,
                        subtract_mean,
                        nullptr,
                        nullptr};
  check_same(job.x, job.g);
  wavedp::check_range("the width of g", job.g.width, job.x.width, job.x.width);
  job.weight = address<void>("weight_ptr", weight, job.x.batch * job.x.width);
  job.bias = address<void>("bias_ptr", bias, job.x.batch * job.x.width);
  wavedp::norm_grads_cpu(job, threads);
}

void embedding_norms(uintptr_t ids, uintptr_t g, int dtype, const SequenceAxes& axes, int64_t padding_idx,
                     uintptr_t squared, int threads) {
  wavedp::check_range("threads", threads, 1, INT32_MAX);
  const wavedp::Sequences grads = sequences_of("g_ptr", g, dtype, axes);
  wavedp::embedding_norms_cpu({address<const int64_t>("ids_ptr", ids, grads.batch * grads.tokens), grads,
                               padding_idx, address<double>("squared_ptr", squared, grads.batch)},
                              threads);
}

bool embedding_weight_grad(uintptr_t ids, uintptr_t g, int dtype, const SequenceAxes& axes, uintptr_t factors,
                           int64_t num_embeddings, int64_t padding_idx, uintptr_t grad, int threads) {
  wavedp::check_range("threads", threads, 1, INT32_MAX);
  wavedp::check_range("num_embeddings", num_embeddings, 0, std::numeric_limits<int64_t>::max() / 64);
  const wavedp::Sequences grads = sequences_of("g_ptr", g, dtype, axes);
  return wavedp::embedding_weight_grad_cpu(
      {address<const int64_t>("ids_ptr", ids, grads.batch * grads.tokens), grads,
       address<const double>("factors_ptr", factors, grads.batch), num_embeddings, padding_idx,
       address<void>("grad_ptr", grad, num_embeddings * grads.width)},
      threads);
}

void squared_norms(uintptr_t x, int dtype, const SequenceAxes& axes, uintptr_t squared, int threads) {
  wavedp::check_range("threads", threads, 1, INT32_MAX);
  wavedp::check_range("tokens", axes[1], 1, 1);
  const wavedp::Sequences records = sequences_of("x_ptr", x, dtype, axes);
  wavedp::squared_norms_cpu({records, address<double>("squared_ptr", squared, records.batch)}, threads);
}

void weighted_sum(uintptr_t x, int dtype, const SequenceAxes& axes, uintptr_t factors, uintptr_t sum,
                  int threads) {
  wavedp::check_range("threads", threads, 1, INT32_MAX);
  wavedp::check_range("tokens", axes[1], 1, 1);
  const wavedp::Sequences records = sequences_of("x_ptr", x, dtype, axes);
  wavedp::weighted_sum_cpu({records, address<const double>("factors_ptr", factors, records.batch),
                            address<void>("sum_ptr", sum, records.width)},
                           threads);
}

bool scale_records(uintptr_t x, int dtype, const SequenceAxes& axes, uintptr_t factors, double smallest,
                   uintptr_t scaled, int threads) {
  wavedp::check_range("threads", threads, 1, INT32_MAX);
  const wavedp::Sequences records = sequences_of("x_ptr", x, dtype, axes);
  return wavedp::scale_records_cpu(
      {records, address<const double>("factors_ptr", factors, records.batch), smallest,
       address<void>("scaled_ptr", scaled, records.batch * records.tokens * records.width)},
      threads);
}

bool weight_grad(uintptr_t g, const SequenceAxes& g_axes, uintptr_t a, const SequenceAxes& a_axes,
                 uintptr_t factors, int64_t records_in_block, double smallest, uintptr_t grad, int threads) {
  wavedp::check_range("threads", threads, 1, INT32_MAX);
  wavedp::check_range("records_in_block", records_in_block, 1, INT32_MAX);
  const int dtype = static_cast<int>(wavedp::DType::kFloat32);
  wavedp::WeightGrad job{};
  job.g = sequences_of("g_ptr", g, dtype, g_axes);
  job.a = sequences_of("a_ptr", a, dtype, a_axes);
  check_same(job.g, job.a);
  job.factors = address<const double>("factors_ptr", factors, job.g.batch);
  std::vector<int64_t> kept;
  for (int64_t record = 0; record < job.g.batch; ++record) {
    if (job.factors[record] != 0) kept.push_back(record);
  }
  job.kept = kept.data();
  job.records = static_cast<int64_t>(kept.size());
  job.smallest = smallest;
  float* sums = address<float>("grad_ptr", grad, job.g.width * job.a.width);
  return job.records > 0 && wavedp::weight_grad_cpu(job, records_in_block, sums, threads);
}

}  // namespace

void bind_per_sample(py::module_& m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("linear_norms", &linear_norms, "a_ptr"_a, "a_dtype"_a, "a_axes"_a, "g_ptr"_a, "g_dtype"_a, "g_axes"_a,
        "squared_ptr"_a, "bound_ptr"_a, "bias_ptr"_a, "threads"_a, unlocked);
  m.def("norm_grads", &norm_grads, "x_ptr"_a, "x_dtype"_a, "x_axes"_a, "g_ptr"_a, "g_dtype"_a, "g_axes"_a,
        "eps"_a, "subtract_mean"_a, "weight_ptr"_a, "bias_ptr"_a, "threads"_a, unlocked);
  m.def("embedding_norms", &embedding_norms, "ids_ptr"_a, "g_ptr"_a, "dtype"_a, "axes"_a, "padding_idx"_a,
        "squared_ptr"_a, "threads"_a, unlocked);
  m.def("embedding_weight_grad", &embedding_weight_grad, "ids_ptr"_a, "g_ptr"_a, "dtype"_a, "axes"_a,
        "factors_ptr"_a, "num_embeddings"_a, "padding_idx"_a, "grad_ptr"_a, "threads"_a, unlocked);
  m.def("squared_norms", &squared_norms, "x_ptr"_a, "dtype"_a, "axes"_a, "squared_ptr"_a, "threads"_a,
        unlocked);
  m.def("weighted_sum", &weighted_sum, "x_ptr"_a, "dtype"_a, "axes"_a, "factors_ptr"_a, "sum_ptr"_a,
        "threads"_a, unlocked);
  m.def("weight_grad", &weight_grad, "g_ptr"_a, "g_axes"_a, "a_ptr"_a, "a_axes"_a, "factors_ptr"_a,
        "records_in_block"_a, "smallest"_a, "grad_ptr"_a, "threads"_a, unlocked);
  m.def("scale_records", &scale_records, "x_ptr"_a, "dtype"_a, "axes"_a, "factors_ptr"_a, "smallest"_a,
        "scaled_ptr"_a, "threads"_a, unlocked);
}
