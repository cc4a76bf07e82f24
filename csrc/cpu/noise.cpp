// SPDX-License-Identifier: Apache-2.0
// The raw stream and the noisy mean of one tensor.
#include "noise_units.h"
#include "noisy.h"
#include "normals_strict.h"

namespace wavedp::WAVEDP_ISA {
namespace {

// `element` of a tensor on, as float64 or as the type that `out` is narrowed from.
template <class Total, class Rule, class Normal>
void mean_stretch(const NoisyMean& job, const Rule& rule, int64_t element, int64_t count,
                  const Normal* normals) {
  const Total* total = job.total ? static_cast<const Total*>(job.total) + element : nullptr;
  void* out = address_of(job.out, job.out_dtype, element);
  if (job.out_dtype == DType::kFloat64) {
    return mean_of(rule, total, normals, count, static_cast<double*>(out));
  }
  if (job.out_dtype == DType::kFloat32) {
    return mean_of(rule, total, normals, count, static_cast<float*>(out));
  }
  float odd[kChunkGroups * kGroupNormals];
  mean_of<Odd>(rule, total, normals, count, odd);
  narrow_row(job.out_dtype, odd, count, out, false);
}

template <class Source, class Rule>
void mean_units(const NoisyMean& job, int64_t begin, int64_t end) {
  using Normal = typename Source::Real;
  const Rule rule(job.std, job.grid, job.divisor);
  const int64_t starts[2] = {0, job.count};
  over_elements<Source>(
      job.stream, job.std > 0, {starts, 1}, begin, end,
      [&](int64_t, int64_t element, int64_t count) {
        if (job.total)
          prefetch(address_of(job.total, job.total_dtype, element), count * size_of(job.total_dtype));
      },
      [&](int64_t, int64_t element, int64_t count, const Normal* normals) {
        job.total_dtype == DType::kFloat64 ? mean_stretch<double>(job, rule, element, count, normals)
                                           : mean_stretch<float>(job, rule, element, count, normals);
      });
}

}  // namespace

void chacha20_words_units(const ChachaWords& job, int64_t begin, int64_t end) {
  const KeyWords key(job.key);
  Words x[kBlockWords];
  uint32_t lanes[kLanes];
  for (int64_t unit = begin; unit < end; unit += kLanes) {
    Words last[4];
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t counter = job.counter + static_cast<uint64_t>(unit + lane);
      last[0][lane] = static_cast<uint32_t>(counter);
      last[1][lane] = static_cast<uint32_t>(counter >> 32);
    }
    const int rest = 4 - job.nonce_words;
    for (int w = 0; w < job.nonce_words; ++w) last[rest + w] = Words{} + job.nonce[w];
    chacha_blocks(key, last, job.rounds, x);
    const int64_t blocks = end - unit < kLanes ? end - unit : kLanes;
    for (int w = 0; w < kBlockWords; ++w) {
      store(lanes, x[w]);
      for (int64_t lane = 0; lane < blocks; ++lane) {
        const int64_t at = (unit + lane) * kBlockWords + w;
        if (at < job.count) job.words[at] = lanes[lane];
      }
    }
  }
}

void noisy_mean_units(const NoisyMean& job, int64_t begin, int64_t end) {
  switch (job.kind) {
    case NormalKind::kNarrow:
      return mean_units<Normals<float>, MeanRule>(job, begin, end);
    case NormalKind::kWide:
      return mean_units<Normals<double>, MeanRule>(job, begin, end);
    case NormalKind::kStrict:
      return mean_units<StrictNormals, StrictRule>(job, begin, end);
  }
}

}  // namespace wavedp::WAVEDP_ISA
