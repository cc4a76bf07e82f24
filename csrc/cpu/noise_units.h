// SPDX-License-Identifier: Apache-2.0
// The CPU functions of noise over a range of units of work; see units.h. A unit of numbers is a group of
// them, one of the raw stream a block.
#pragma once

#include "../noise.h"

namespace wavedp {

static inline int64_t group_count(const NoiseStream& stream, bool strict, int64_t elements) {
  if (elements == 0) return 0;
  const int64_t group = strict ? kStrictGroupNormals : kGroupNormals;
  const int64_t skipped = static_cast<int64_t>(stream.offset % group);
  return (skipped + elements + group - 1) / group;
}

static inline int64_t unit_count(const ChachaWords& job) {
  return (job.count + kBlockWords - 1) / kBlockWords;
}
static inline int64_t unit_count(const NoisyMean& job) {
  return group_count(job.stream, job.kind == NormalKind::kStrict, job.count);
}
static inline int64_t unit_count(const NoiseStep& job) {
  return group_count(job.stream, job.strict, job.starts[job.count]);
}

}  // namespace wavedp

#define WAVEDP_DECLARE_NOISE_UNITS(isa)                                          \
  namespace wavedp::isa {                                                        \
  void chacha20_words_units(const ChachaWords& job, int64_t begin, int64_t end); \
  void noisy_mean_units(const NoisyMean& job, int64_t begin, int64_t end);       \
  void noise_step_units(const NoiseStep& job, int64_t begin, int64_t end);       \
  }

#ifdef WAVEDP_ISA
WAVEDP_DECLARE_NOISE_UNITS(WAVEDP_ISA)
#endif
