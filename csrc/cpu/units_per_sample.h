// SPDX-License-Identifier: Apache-2.0
// The functions of per_sample.h over a range of units of work; see units.h.
#pragma once

#include "../per_sample.h"

namespace wavedp {

// <a a^T, g g^T> takes T^2 (d + p) / 2 multiplications, g^T a takes T d p.
static inline bool costs_less_as_gram(const LinearNorms& job) {
  const double tokens = static_cast<double>(job.a.tokens), d = static_cast<double>(job.a.width),
               p = static_cast<double>(job.g.width);
  return tokens * (d + p) <= 2 * d * p;
}

// A record's sum of squares is that of its parts: rows of tiles, whichever unit computes them.
constexpr int64_t kRowsPerPart = 4;
static inline int64_t part_count(const LinearNorms& job) {
  const int64_t narrow = job.a.width < job.g.width ? job.a.width : job.g.width;
  return ((costs_less_as_gram(job) ? job.a.tokens : narrow) + kRowsPerPart - 1) / kRowsPerPart;
}

static inline double multiplications(const LinearNorms& job) {
  const double tokens = static_cast<double>(job.a.tokens), d = static_cast<double>(job.a.width),
               p = static_cast<double>(job.g.width);
  return costs_less_as_gram(job) ? tokens * tokens * (d + p) / 2 : tokens * d * p;
}

// Units of one record: a few where it is much work, so that a small batch keeps many threads busy. Every unit
// reads the whole record.
static inline int64_t slice_count(const LinearNorms& job) {
  const double share = multiplications(job) / (1 << 24);
  const int64_t most = part_count(job) / 8;
  const int64_t slices = share < 8 ? static_cast<int64_t>(share) : 8;
  const int64_t needed = (32 + job.a.batch - 1) / (job.a.batch > 0 ? job.a.batch : 1);
  const int64_t fewest = slices < needed ? slices : needed;
  return fewest < 1 || most < 1 ? 1 : fewest < most ? fewest : most;
}

// Entries of a record whose squares are added up by one unit, and columns of WeightedSum.
constexpr int64_t kEntriesPerPart = 1 << 16;
constexpr int64_t kColumnsPerUnit = 2048;
static inline int64_t part_count(const SquaredNorms& job) {
  return (job.x.width + kEntriesPerPart - 1) / kEntriesPerPart;
}
static inline int64_t unit_count(const WeightedSum& job) {
  return (job.x.width + kColumnsPerUnit - 1) / kColumnsPerUnit;
}

}  // namespace wavedp

// `parts` is [batch, part_count] of float64. `order` has tokens as record * tokens + token: those of each
// record sorted by their ids, or all of them, those of row v of the embedding from starts[v] on.
#define WAVEDP_DECLARE_LINEAR_NORMS(isa)                                                      \
  namespace wavedp::isa {                                                                     \
  void linear_norms_units(const LinearNorms& job, double* parts, int64_t begin, int64_t end); \
  }
#define WAVEDP_DECLARE_WEIGHT_GRAD(isa)                                      \
  namespace wavedp::isa {                                                    \
  bool weight_grad_units(const WeightGrad& job, int64_t begin, int64_t end); \
  }
#define WAVEDP_DECLARE_PER_SAMPLE(isa)                                                                     \
  WAVEDP_DECLARE_LINEAR_NORMS(isa)                                                                         \
  namespace wavedp::isa {                                                                                  \
  void norm_grads_units(const NormGrads& job, int64_t begin, int64_t end);                                 \
  void squared_norms_units(const SquaredNorms& job, double* parts, int64_t begin, int64_t end);            \
  void weighted_sum_units(const WeightedSum& job, int64_t begin, int64_t end);                             \
  bool scale_records_units(const ScaledRecords& job, int64_t begin, int64_t end);                          \
  void embedding_norms_units(const EmbeddingNorms& job, const int64_t* order, int64_t begin, int64_t end); \
  void embedding_weight_grad_units(const EmbeddingWeightGrad& job, const int64_t* order,                   \
                                   const int64_t* starts, int64_t begin, int64_t end);                     \
  }
