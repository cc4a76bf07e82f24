// SPDX-License-Identifier: Apache-2.0
// The functions of per_sample.h: divides their units among threads, and adds up what parts of a record gave
// in an order that the number of threads does not change.
#include <atomic>
#include <memory>
#include <numeric>

#include "divide.h"
#include "units_per_sample.h"

WAVEDP_DECLARE_PER_SAMPLE(baseline)
#ifdef WAVEDP_X86
WAVEDP_DECLARE_PER_SAMPLE(avx2)
WAVEDP_DECLARE_PER_SAMPLE(avx512)
#endif
#ifdef WAVEDP_AMX
WAVEDP_DECLARE_LINEAR_NORMS(amx)
WAVEDP_DECLARE_WEIGHT_GRAD(amx)
#endif

namespace wavedp {
namespace {

struct Units {
  decltype(&baseline::linear_norms_units) linear_norms;
  decltype(&baseline::norm_grads_units) norm_grads;
  decltype(&baseline::squared_norms_units) squared_norms;
  decltype(&baseline::weighted_sum_units) weighted_sum;
  decltype(&baseline::scale_records_units) scale_records;
  decltype(&baseline::embedding_norms_units) embedding_norms;
  decltype(&baseline::embedding_weight_grad_units) embedding_weight_grad;
  bool (*weight_grad)(const WeightGrad& job, int64_t begin, int64_t end);
};

#define WAVEDP_UNITS(linear, isa, weight_grad)                   \
  {linear::linear_norms_units,       isa::norm_grads_units,      \
   isa::squared_norms_units,         isa::weighted_sum_units,    \
   isa::scale_records_units,         isa::embedding_norms_units, \
   isa::embedding_weight_grad_units, weight_grad}

const Units kUnits[] = {// as cpu_isa_index counts
#ifdef WAVEDP_AMX
                        WAVEDP_UNITS(amx, avx512, amx::weight_grad_units),
#endif
#ifdef WAVEDP_X86
                        WAVEDP_UNITS(avx512, avx512, nullptr), WAVEDP_UNITS(avx2, avx2, nullptr),
#endif
                        WAVEDP_UNITS(baseline, baseline, nullptr)};

const Units& chosen() { return kUnits[cpu_isa_index()]; }

int64_t size(const Sequences& s) { return s.batch * s.tokens * s.width; }

// Sums of the parts of each record.
void add_up(const std::vector<double>& parts, int64_t records, int64_t each, double* sums) {
  for (int64_t record = 0; record < records; ++record) {
    sums[record] = std::accumulate(parts.begin() + record * each, parts.begin() + (record + 1) * each, 0.0);
  }
}

}  // namespace

void linear_norms_cpu(const LinearNorms& job, int threads) {
  const int64_t each = part_count(job), batch = job.a.batch;
  std::vector<double> parts(batch * each);
  const auto work = [&](int64_t begin, int64_t end) { chosen().linear_norms(job, parts.data(), begin, end); };
  // About as many multiplications are done in the time that a sample is transformed in.
  const double samples =
      static_cast<double>(size(job.a) + size(job.g)) + multiplications(job) / 16 * static_cast<double>(batch);
  divide(batch * slice_count(job), static_cast<int64_t>(std::min(samples, 1e18)), threads, work);
  add_up(parts, batch, each, job.squared);
  for (int64_t record = 0; record < batch; ++record) {
    if (job.squared[record] < 0) job.squared[record] = 0;  // terms cancelled; NaN stays
  }
}

void norm_grads_cpu(const NormGrads& job, int threads) {
  divide(job.x.batch, 2 * size(job.x), threads,
         [&](int64_t begin, int64_t end) { chosen().norm_grads(job, begin, end); });
}

void squared_norms_cpu(const SquaredNorms& job, int threads) {
  const int64_t each = part_count(job);
  std::vector<double> parts(job.x.batch * each);
  divide(job.x.batch * each, size(job.x), threads,
         [&](int64_t begin, int64_t end) { chosen().squared_norms(job, parts.data(), begin, end); });
  add_up(parts, job.x.batch, each, job.squared);
}

void weighted_sum_cpu(const WeightedSum& job, int threads) {
  divide(unit_count(job), std::max<int64_t>(size(job.x), 1), threads,
         [&](int64_t begin, int64_t end) { chosen().weighted_sum(job, begin, end); });
}

bool scale_records_cpu(const ScaledRecords& job, int threads) {
  std::atomic<bool> precise{true};
  divide(job.x.batch, size(job.x), threads, [&](int64_t begin, int64_t end) {
    if (!chosen().scale_records(job, begin, end)) precise.store(false, std::memory_order_relaxed);
  });
  return precise.load();
}

bool weight_grad_cpu(WeightGrad job, int64_t records_in_block, float* grad, int threads) {
  if (!chosen().weight_grad) return false;
  // The sums of a panel stay in the second-level cache; a group has rows for a while. Neither depends on the
  // number of threads, so that it does not show.
  constexpr int64_t kWidestPanel = 512, kUnits = 8, kFewestRows = 512;
  job.panels_down = (job.narrow().width + kWidestPanel - 1) / kWidestPanel;
  job.panels_across = (job.wide().width + kWidestPanel - 1) / kWidestPanel;
  const int64_t panels = job.panels_down * job.panels_across, rows = job.records * job.g.tokens;
  const int64_t most = std::min({kUnits / panels, rows / kFewestRows, job.records});
  job.groups = std::max<int64_t>(most, 1);
  const int64_t needed = (job.records + records_in_block - 1) / records_in_block;
  // A multiple of the groups, but none without a record.
  job.blocks = std::min((needed + job.groups - 1) / job.groups * job.groups, job.records);
  const int64_t size = job.g.width * job.a.width;
  const std::unique_ptr<float[]> groups(job.groups > 1 ? new float[job.groups * size] : nullptr);
  job.sums = groups ? groups.get() : grad;
  std::atomic<bool> ordinary{true};
  const double samples = static_cast<double>(rows) * static_cast<double>(size) / 32;
  divide(panels * job.groups, static_cast<int64_t>(std::min(samples, 1e18)), threads,
         [&](int64_t begin, int64_t end) {
           if (!chosen().weight_grad(job, begin, end)) ordinary.store(false, std::memory_order_relaxed);
         });
  if (!ordinary.load()) return false;
  const std::vector<double> ones(job.groups, 1.0);
  if (groups) {
    weighted_sum_cpu({{groups.get(), DType::kFloat32, job.groups, 1, size, size, size}, ones.data(), grad},
                     threads);
  }
  return true;
}

void embedding_norms_cpu(const EmbeddingNorms& job, int threads) {
  const int64_t tokens = job.g.tokens;
  std::vector<int64_t> order(job.g.batch * tokens);
  divide(job.g.batch, size(job.g) + job.g.batch * tokens * 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t record = begin; record < end; ++record) {
      const auto first = order.begin() + record * tokens, last = first + tokens;
      std::iota(first, last, record * tokens);
      // By id, and tokens of one id in their order.
      std::sort(first, last, [&](int64_t x, int64_t y) {
        return job.ids[x] != job.ids[y] ? job.ids[x] < job.ids[y] : x < y;
      });
    }
    chosen().embedding_norms(job, order.data(), begin, end);
  });
}

bool embedding_weight_grad_cpu(const EmbeddingWeightGrad& job, int threads) {
  const int64_t count = job.g.batch * job.g.tokens, rows = job.num_embeddings;
  const auto counts = [&](int64_t token) {
    return job.factors[token / job.g.tokens] != 0 && job.ids[token] != job.padding_idx;
  };
  // Sorted by counting: starts[v + 1] is first the number of tokens of row v, then where the next of them
  // goes.
  std::vector<int64_t> starts(rows + 2), order(count);
  for (int64_t token = 0; token < count; ++token) {
    if (!counts(token)) continue;
    if (job.ids[token] < 0 || job.ids[token] >= rows) return false;
    ++starts[job.ids[token] + 2];
  }
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  for (int64_t token = 0; token < count; ++token) {
    if (counts(token)) order[starts[job.ids[token] + 1]++] = token;
  }
  divide(rows, size(job.g) + rows * job.g.width / 4 + 1, threads, [&](int64_t begin, int64_t end) {
    chosen().embedding_weight_grad(job, order.data(), starts.data(), begin, end);
  });
  return true;
}

}  // namespace wavedp
