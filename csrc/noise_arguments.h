// SPDX-License-Identifier: Apache-2.0
// The jobs of noise.h from the numbers that Python passes. std::invalid_argument becomes ValueError.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "noise.h"

namespace wavedp {

constexpr int64_t kMostElements = int64_t(1) << 58;

inline const unsigned char* checked_key(uintptr_t key) {
  return static_cast<const unsigned char*>(checked_address("key_ptr", key, 32));
}

inline void check_positive(const char* name, double value) {
  if (!(value > 0) || !std::isfinite(value)) {
    throw std::invalid_argument(std::string(name) + " must be positive and finite");
  }
}

inline void check_grid(double grid, double std, bool strict) {
  if (grid != 0 || (strict && std != 0)) check_positive("grid", grid);
}

// The last block's number must fit in 64 bits.
inline NoiseStream checked_stream(uintptr_t key, uint32_t step, uint64_t offset, int64_t elements) {
  if (offset > UINT64_MAX - static_cast<uint64_t>(elements)) {
    throw std::invalid_argument("offset and the number of elements do not fit in 64 bits together");
  }
  return {checked_key(key), step, offset};
}

inline ChachaWords chacha20_words_job(std::uintptr_t key, uint64_t counter,
                                      const std::vector<uint32_t>& nonce, int rounds, std::uintptr_t words,
                                      int64_t count) {
  check_range("count", count, 0, kMostElements);
  check_range("the number of words of the nonce", static_cast<int64_t>(nonce.size()), 2, 3);
  if (rounds != 8 && rounds != 12 && rounds != 20) throw std::invalid_argument("rounds must be 8, 12 or 20");
  ChachaWords job{};
  job.key = checked_key(key);
  job.counter = counter;
  job.nonce_words = static_cast<int>(nonce.size());
  std::copy(nonce.begin(), nonce.end(), job.nonce);
  job.rounds = rounds;
  job.words = static_cast<uint32_t*>(checked_address("words_ptr", words, count));
  job.count = count;
  return job;
}

inline NoisyMean noisy_mean_job(std::uintptr_t key, uint32_t step, uint64_t offset, std::uintptr_t total,
                                int total_dtype, std::uintptr_t out, int out_dtype, int kind, double std,
                                double grid, double divisor, int64_t count) {
  check_range("count", count, 0, kMostElements);
  check_positive("divisor", divisor);
  if (std != 0) check_positive("std", std);
  check_range("kind", kind, 0, 2);
  check_grid(grid, std, kind == static_cast<int>(NormalKind::kStrict));
  NoisyMean job{};
  job.stream = checked_stream(key, step, offset, count);
  job.total = reinterpret_cast<const void*>(total);
  job.total_dtype = checked_dtype("total_dtype", total_dtype, DType::kFloat64);
  job.out = checked_address("out_ptr", out, count);
  job.out_dtype = checked_dtype("out_dtype", out_dtype, DType::kFloat16);
  job.kind = static_cast<NormalKind>(kind);
  job.std = std;
  job.grid = grid;
  job.divisor = divisor;
  job.count = count;
  return job;
}

// Of every parameter: addresses of parameter, sum, the three moments, average and master.
using StepAddresses = std::array<std::uintptr_t, 7>;
// Of every parameter: dtype, its sum's dtype, and whether it is rounded at random.
using StepKinds = std::tuple<int, int, bool>;

// The tensors of a step, and where each starts.
struct StepTensors {
  std::vector<StepTensor> tensors;
  std::vector<int64_t> starts;

  StepTensors(int rule, const std::vector<StepAddresses>& addresses, const std::vector<int64_t>& sizes,
              const std::vector<StepKinds>& kinds,
              const std::vector<std::array<double, kStepConstants>>& constants)
      : tensors(addresses.size()), starts(addresses.size() + 1, 0) {
    check_range("rule", rule, 0, 1);
    const std::size_t count = addresses.size();
    if (sizes.size() != count || kinds.size() != count || constants.size() != count) {
      throw std::invalid_argument("addresses, sizes, kinds and constants must be equally many");
    }
    for (std::size_t t = 0; t < count; ++t) {
      check_range("a size", sizes[t], 0, kMostElements);
      starts[t + 1] = starts[t] + sizes[t];
      check_range("the number of elements", starts[t + 1], 0, kMostElements);
      StepTensor& tensor = tensors[t];
      const bool adam = rule == static_cast<int>(StepRule::kAdam);
      tensor.param = checked_address("a parameter", addresses[t][0], sizes[t]);
      tensor.dtype = checked_dtype("a parameter's dtype", std::get<0>(kinds[t]), DType::kFloat16);
      tensor.total = reinterpret_cast<const void*>(addresses[t][1]);
      tensor.total_dtype = checked_dtype("a sum's dtype", std::get<1>(kinds[t]), DType::kFloat64);
      tensor.first = checked_address("a first moment", addresses[t][2], adam ? sizes[t] : 0);
      tensor.second = checked_address("a second moment", addresses[t][3], adam ? sizes[t] : 0);
      tensor.largest = reinterpret_cast<void*>(addresses[t][4]);
      tensor.average = reinterpret_cast<void*>(addresses[t][5]);
      tensor.master = reinterpret_cast<float*>(addresses[t][6]);
      tensor.stochastic = std::get<2>(kinds[t]);
      const bool half = tensor.dtype == DType::kBFloat16 || tensor.dtype == DType::kFloat16;
      if (tensor.master && !half) throw std::invalid_argument("a master is that of a parameter of 16 bits");
      if (tensor.stochastic && (tensor.dtype != DType::kBFloat16 || tensor.master)) {
        throw std::invalid_argument("a parameter that is rounded at random is of bfloat16, without a master");
      }
      static_assert(sizeof tensor.constants == sizeof constants[t]);
      std::memcpy(&tensor.constants, constants[t].data(), sizeof tensor.constants);
    }
  }
};

// Without its tensors.
inline NoiseStep noise_step_job(std::uintptr_t key, uint32_t step, uint64_t offset, int rule, bool wide,
                                bool strict, double std, double grid, double divisor, int64_t elements) {
  check_range("rule", rule, 0, 1);
  check_range("the number of elements", elements, 0, kMostElements);
  check_positive("divisor", divisor);
  if (std != 0) check_positive("std", std);
  check_grid(grid, std, strict);
  NoiseStep job{};
  job.stream = checked_stream(key, step, offset, elements);
  job.rule = static_cast<StepRule>(rule);
  job.wide = wide;
  job.strict = strict;
  job.std = std;
  job.grid = grid;
  job.divisor = divisor;
  return job;
}

inline void set_tensors(NoiseStep& job, const StepTensors& of) {
  job.tensors = of.tensors.data();
  job.starts = of.starts.data();
  job.count = static_cast<int64_t>(of.tensors.size());
}

}  // namespace wavedp
