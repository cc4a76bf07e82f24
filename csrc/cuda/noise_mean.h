// SPDX-License-Identifier: Apache-2.0
// What one thread does of the raw stream, which is a block, and of a noisy mean: see noise_step.h.
#pragma once

#include "noise_rules.h"

namespace wavedp {
namespace {

WAVEDP_DEVICE inline void words_thread(const ChachaWords& job, int64_t thread) {
  const uint64_t counter = job.counter + static_cast<uint64_t>(thread);
  const bool wide = job.nonce_words == 2;
  const uint32_t last[4] = {static_cast<uint32_t>(counter),
                            wide ? static_cast<uint32_t>(counter >> 32) : job.nonce[0],
                            wide ? job.nonce[0] : job.nonce[1], wide ? job.nonce[1] : job.nonce[2]};
  uint32_t x[kBlockWords];
  chacha_block<1>(reinterpret_cast<const uint32_t*>(job.key), last, job.rounds, x);
#pragma unroll
  for (int w = 0; w < kBlockWords; ++w) {
    const int64_t at = thread * kBlockWords + w;
    if (at < job.count) job.words[at] = x[w];
  }
}

struct MeanGrid {
  NoisyMean job;
  MeanRule rule;
  int64_t groups, skipped;  // numbers of the first group before the first element

  explicit MeanGrid(const NoisyMean& mean) : job(mean), rule(mean.std, mean.grid, mean.divisor) {
    const int64_t group = mean.kind == NormalKind::kStrict ? kStrictGroupNormals : kGroupNormals;
    skipped = static_cast<int64_t>(mean.stream.offset % static_cast<uint64_t>(group));
    groups = mean.count / group + (mean.count % group + skipped + group - 1) / group;
  }
};

inline bool is_single(const NoisyMean& job) {
  return job.out_dtype == DType::kFloat32 && (!job.total || job.total_dtype == DType::kFloat32);
}

// kSingle: total, if there is one, and result are of float32.
template <bool kSingle>
WAVEDP_DEVICE inline double read_total(const NoisyMean& job, int64_t i) {
  if (!job.total || i < 0 || i >= job.count) return 0.0;
  if (!kSingle && job.total_dtype == DType::kFloat64)
    return read_once(static_cast<const double*>(job.total) + i);
  return static_cast<double>(read_once(static_cast<const float*>(job.total) + i));
}

template <bool kSingle>
WAVEDP_DEVICE inline void write_mean(const MeanGrid& grid, int64_t i, double sum) {
  const NoisyMean& job = grid.job;
  if (i < 0 || i >= job.count) return;
  if (kSingle || job.out_dtype == DType::kFloat32) {
    float mean;
    divide(grid.rule, sum, mean);
    write_once(static_cast<float*>(job.out) + i, mean);
  } else if (job.out_dtype == DType::kFloat64) {
    double mean;
    divide(grid.rule, sum, mean);
    write_once(static_cast<double*>(job.out) + i, mean);
  } else {
    const float odd = rounded_to_odd(sum * grid.rule.reciprocal);
    write_once(static_cast<uint16_t*>(job.out) + i, narrowed(job.out_dtype, odd));
  }
}

template <NormalKind kKind, bool kSingle>
WAVEDP_DEVICE inline void mean_thread(const MeanGrid& grid, int64_t thread) {
  constexpr int kGroup = kRows<kKind> * kGroupBlocks;
  const NoiseStream& stream = grid.job.stream;
  const int64_t group = thread / kGroupBlocks, column = thread % kGroupBlocks;
  if (group >= grid.groups) return;
  const uint64_t block = (stream.offset / kGroup + static_cast<uint64_t>(group)) * kGroupBlocks + column;
  const int64_t element = group * kGroup - grid.skipped + column;  // of the first row
  uint32_t x[kBlockWords] = {};
  if (grid.rule.std > 0) {
    stream_block<20>(reinterpret_cast<const uint32_t*>(stream.key), block, stream.step, kDomain<kKind>, x);
  }
#pragma unroll
  for (int pair = 0; pair < kRows<kKind> / 2; ++pair) {
    const int64_t i = element + 2 * pair * kGroupBlocks;
    const double even = read_total<kSingle>(grid.job, i),
                 odd = read_total<kSingle>(grid.job, i + kGroupBlocks);
    NormalOf<kKind> normals[2];
    normal_pair<kKind>(x, pair, normals);
    write_mean<kSingle>(grid, i, noisy_sum<kKind>(grid.rule, even, normals[0]));
    write_mean<kSingle>(grid, i + kGroupBlocks, noisy_sum<kKind>(grid.rule, odd, normals[1]));
  }
}

}  // namespace
}  // namespace wavedp
