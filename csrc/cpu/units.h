// SPDX-License-Identifier: Apache-2.0
// The CPU functions over a range of units of work, which are what threads share out. They are compiled once
// for each instruction set under a namespace of its own.
#pragma once

#include "../wavelet.h"

namespace wavedp {

// Outputs of this many bytes go past the caches: they would not stay in them until they are read.
constexpr int64_t kStreamedBytes = int64_t(4) << 20;

// One row of the last level, with all that lies under it.
static inline int64_t level_rows(int64_t height, int levels) {
  for (int k = 0; k < levels; ++k) height = band_length(height);
  return height;
}

static inline int64_t unit_count(const Wavedec2& job) {
  return job.images.outer * job.images.inner * level_rows(job.images.height, job.levels);
}
static inline int64_t unit_count(const Waverec2& job) { return job.n * level_rows(job.height, job.levels); }

// One row of the grid, of one image and channel.
static inline int64_t unit_count(const WaveletTokens& job) {
  return job.images.outer * job.images.inner * job.grid_h;
}
static inline int64_t unit_count(const WaveletUntokens& job) { return job.batch * job.channels * job.grid_h; }

static inline int64_t sample_count(const Wavedec2& job) {
  return job.images.outer * job.images.inner * job.images.height * job.images.width;
}
static inline int64_t sample_count(const Waverec2& job) { return job.n * job.height * job.width; }
static inline int64_t sample_count(const WaveletTokens& job) {
  return job.images.outer * job.images.inner * job.images.height * job.images.width;
}
static inline int64_t sample_count(const WaveletUntokens& job) {
  return job.batch * job.channels * job.height * job.width;
}

}  // namespace wavedp

// `partial` is [units, 3 * levels + 1] sums of squares, or null.
#define WAVEDP_DECLARE_UNITS(isa)                                                                 \
  namespace wavedp::isa {                                                                         \
  void wavedec2_units(const Wavedec2& job, int64_t begin, int64_t end);                           \
  void waverec2_units(const Waverec2& job, int64_t begin, int64_t end);                           \
  void wavelet_tokens_units(const WaveletTokens& job, void* partial, int64_t begin, int64_t end); \
  void wavelet_untokens_units(const WaveletUntokens& job, int64_t begin, int64_t end);            \
  }
