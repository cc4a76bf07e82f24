// SPDX-License-Identifier: Apache-2.0
// Gradients of normalisation layers and embeddings, and sums over gradients that are there: what is bound by
// memory. Sums over tokens and records are float64. Compiled once for each instruction set, see wavelet.cpp.
#include "rows.h"
#include "units_per_sample.h"

WAVEDP_DECLARE_PER_SAMPLE(WAVEDP_ISA)

namespace wavedp::WAVEDP_ISA {
namespace {

// Rows that are summed in the type of the arithmetic.
constexpr int64_t kRowsInReal = 32;

// total += part; part = 0
template <class Real>
void flush(Real* part, int64_t count, double* total) {
  for (int64_t c = 0; c < count; ++c) {
    total[c] += static_cast<double>(part[c]);
    part[c] = 0;
  }
}

template <class Real>
void narrow(const double* total, int64_t count, void* target) {
  for (int64_t c = 0; c < count; ++c) static_cast<Real*>(target)[c] = static_cast<Real>(total[c]);
}

// Asks for what lies after a row, where the rows to come mostly are.
template <class Real>
void ask_after(const Real* row, int64_t width) {
  constexpr int64_t kAhead = 4096;
  const char* at = reinterpret_cast<const char*>(row) + kAhead;
  for (int64_t byte = 0; byte < width * int64_t(sizeof(Real)); byte += kLineBytes) {
    __builtin_prefetch(at + byte, 0, 3);
  }
}

template <class Real>
void norm_grads_of(const NormGrads& job, int64_t begin, int64_t end) {
  const int64_t width = job.x.width;
  Scratch<Real> rows(4 * Scratch<Real>::room(width));
  Scratch<double> totals(2 * Scratch<double>::room(width));
  Real *x_row = rows.take(width), *g_row = rows.take(width);
  Real *weight = rows.take(width), *bias = rows.take(width);
  double *weights = totals.take(width), *biases = totals.take(width);
  for (int64_t c = 0; c < width; ++c) weight[c] = bias[c] = 0;
  for (int64_t record = begin; record < end; ++record) {
    for (int64_t c = 0; c < width; ++c) weights[c] = biases[c] = 0;
    for (int64_t t = 0; t < job.x.tokens; ++t) {
      const Real* x = wide_row(job.x, record, t, 0, width, x_row);
      const Real* g = wide_row(job.g, record, t, 0, width, g_row);
      ask_after(x, width);
      ask_after(g, width);
      const double count = static_cast<double>(width);
      double mean = 0;
      if (job.subtract_mean) {
        mean = sum_in_double(x, x, width, [](const Doubles& a, const Doubles&) { return a; }) / count;
      }
      const double squares = sum_in_double(
          x, x, width, [mean](const Doubles& a, const Doubles&) { return (a - mean) * (a - mean); });
      const Real scale = static_cast<Real>(1 / sqrt(squares / count + job.eps)),
                 centre = static_cast<Real>(mean);
      for (int64_t c = 0; c < width; ++c) {
        weight[c] += g[c] * ((x[c] - centre) * scale);
        bias[c] += g[c];
      }
      if (t % kRowsInReal == kRowsInReal - 1 || t == job.x.tokens - 1) {
        flush(weight, width, weights);
        flush(bias, width, biases);
      }
    }
    narrow<Real>(weights, width, static_cast<Real*>(job.weight) + record * width);
    narrow<Real>(biases, width, static_cast<Real*>(job.bias) + record * width);
  }
}

// total = sum of factor_b g_bt over tokens of `order`; factors may be null.
template <class Real>
void sum_tokens(const Sequences& g, const double* factors, const int64_t* order, int64_t count, Real* row,
                double* total) {
  for (int64_t c = 0; c < g.width; ++c) total[c] = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t record = order[k] / g.tokens, token = order[k] % g.tokens;
    const Real* values = wide_row(g, record, token, 0, g.width, row);
    const double factor = factors ? factors[record] : 1.0;
    for (int64_t c = 0; c < g.width; ++c) total[c] += factor * static_cast<double>(values[c]);
  }
}

template <class Real>
void embedding_norms_of(const EmbeddingNorms& job, const int64_t* order, int64_t begin, int64_t end) {
  const int64_t tokens = job.g.tokens, width = job.g.width;
  Scratch<Real> rows(Scratch<Real>::room(width));
  Scratch<double> totals(Scratch<double>::room(width));
  Real* row = rows.take(width);
  double* total = totals.take(width);
  for (int64_t record = begin; record < end; ++record) {
    const int64_t* sorted = order + record * tokens;
    double squared = 0;
    for (int64_t first = 0, last; first < tokens; first = last) {
      const int64_t id = job.ids[sorted[first]];
      for (last = first + 1; last < tokens && job.ids[sorted[last]] == id;) ++last;
      if (id == job.padding_idx) continue;
      if (last == first + 1) {
        const Real* values = wide_row(job.g, record, sorted[first] - record * tokens, 0, width, row);
        squared += dot_in_double(values, values, width);
      } else {
        sum_tokens(job.g, nullptr, sorted + first, last - first, row, total);
        squared += dot_in_double(total, total, width);
      }
    }
    job.squared[record] = squared;
  }
}

template <class Real>
void embedding_weight_grad_of(const EmbeddingWeightGrad& job, const int64_t* order, const int64_t* starts,
                              int64_t begin, int64_t end) {
  const int64_t width = job.g.width;
  Scratch<Real> rows(Scratch<Real>::room(width));
  Scratch<double> totals(Scratch<double>::room(width));
  Real* row = rows.take(width);
  double* total = totals.take(width);
  for (int64_t v = begin; v < end; ++v) {
    Real* grad = static_cast<Real*>(job.grad) + v * width;
    const int64_t count = starts[v + 1] - starts[v];
    if (count == 0) {
      std::memset(grad, 0, width * sizeof(Real));
    } else {
      sum_tokens(job.g, job.factors, order + starts[v], count, row, total);
      narrow<Real>(total, width, grad);
    }
  }
}

template <class Real>
void squared_norms_of(const SquaredNorms& job, double* parts, int64_t begin, int64_t end) {
  constexpr int64_t kPiece = 4096;
  Scratch<Real> rows(Scratch<Real>::room(kPiece));
  Real* row = rows.take(kPiece);
  const int64_t each = part_count(job), width = job.x.width;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t record = unit / each, first = unit % each * kEntriesPerPart;
    const int64_t last = width - first < kEntriesPerPart ? width : first + kEntriesPerPart;
    double squared = 0;
    for (int64_t c = first; c < last; c += kPiece) {
      const int64_t count = last - c < kPiece ? last - c : kPiece;
      const Real* values = wide_row(job.x, record, 0, c, count, row);
      squared += dot_in_double(values, values, count);
    }
    parts[unit] = squared;
  }
}

// term(kFirst) + ... by halves, whose rounding errors grow with the logarithm of their number.
template <int kFirst, int kCount, class Term>
WAVEDP_INLINED auto sum_by_halves(const Term& term) {
  if constexpr (kCount == 1) {
    return term(kFirst);
  } else {
    constexpr int kHalf = kCount / 2;
    return sum_by_halves<kFirst, kHalf>(term) + sum_by_halves<kFirst + kHalf, kCount - kHalf>(term);
  }
}

// total += sum of factors_k rows_k; meanwhile asks for the memory of as many rows that come next, if any.
template <int kRows, class Real>
void add_rows(const Real* const* rows, const double* factors, const Real* const* next, int64_t count,
              double* total) {
  constexpr int64_t n = kLanes<double>, kStep = kLineBytes / sizeof(Real) / n;
  int64_t c = 0;
  for (; c + kStep * n <= count; c += kStep * n) {
    for (int64_t at = c; at < c + kStep * n; at += n) {
      const auto term = [&](int k) { return factors[k] * load_doubles(rows[k] + at); };
      store(total + at, load<Doubles>(total + at) + sum_by_halves<0, kRows>(term));
    }
    if (next) {
      for (int k = 0; k < kRows; ++k) __builtin_prefetch(next[k] + c, 0, 2);
    }
  }
  for (; c < count; ++c) {
    total[c] += sum_by_halves<0, kRows>([&](int k) { return factors[k] * static_cast<double>(rows[k][c]); });
  }
}

template <class Real>
void weighted_sum_of(const WeightedSum& job, int64_t begin, int64_t end) {
  constexpr int kTogether = 8;
  Scratch<Real> rows(kTogether * Scratch<Real>::room(kColumnsPerUnit));
  Scratch<double> totals(Scratch<double>::room(kColumnsPerUnit));
  Real* buffers[kTogether];
  for (Real*& buffer : buffers) buffer = rows.take(kColumnsPerUnit);
  double* total = totals.take(kColumnsPerUnit);
  const bool native = job.x.dtype == kNative<Real>;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kColumnsPerUnit, left = job.x.width - first;
    const int64_t count = left < kColumnsPerUnit ? left : kColumnsPerUnit;
    for (int64_t c = 0; c < count; ++c) total[c] = 0;
    for (int64_t record = 0; record < job.x.batch;) {
      const Real *values[kTogether], *next[kTogether];
      double factors[kTogether];
      int found = 0;
      for (; record < job.x.batch && found < kTogether; ++record) {
        if (job.factors[record] == 0) continue;  // its entries may be infinite
        values[found] = wide_row(job.x, record, 0, first, count, buffers[found]);
        factors[found++] = job.factors[record];
      }
      if (found < kTogether) {
        for (int k = 0; k < found; ++k) add_rows<1, Real>(values + k, factors + k, nullptr, count, total);
        continue;
      }
      // Records of these columns, or the first ones of the next.
      const bool more = record + kTogether <= job.x.batch;
      const bool ahead = native && (more || unit + 1 < end);
      for (int k = 0; ahead && k < kTogether; ++k) {
        next[k] = static_cast<const Real*>(job.x.x) + (more ? record + k : k) * job.x.stride_batch +
                  (more ? first : first + kColumnsPerUnit);
      }
      add_rows<kTogether, Real>(values, factors, ahead ? next : nullptr, count, total);
    }
    narrow<Real>(total, count, static_cast<Real*>(job.sum) + first);
  }
}

template <class Real>
bool scale_records_of(const ScaledRecords& job, int64_t begin, int64_t end) {
  using V = Lane<Real>;
  constexpr int64_t n = kLanes<Real>;
  const int64_t tokens = job.x.tokens, width = job.x.width;
  Scratch<Real> rows(Scratch<Real>::room(width));
  Real* buffer = rows.take(width);
  bool precise = true;
  for (int64_t record = begin; record < end; ++record) {
    const Real factor = static_cast<Real>(job.factors[record]);
    for (int64_t t = 0; t < tokens; ++t) {
      const Real* row = wide_row(job.x, record, t, 0, width, buffer);
      Real* scaled = static_cast<Real*>(job.scaled) + (record * tokens + t) * width;
      V largest{};
      int64_t c = 0;
      for (; c + n <= width; c += n) {
        const V v = load<V>(row + c) * factor, size = v < 0 ? -v : v;
        store(scaled + c, v);
        largest = size > largest ? size : largest;
      }
      if (c < width) {
        const V v = load_first(row + c, width - c) * factor, size = v < 0 ? -v : v;
        std::memcpy(scaled + c, &v, (width - c) * sizeof(Real));
        largest = size > largest ? size : largest;
      }
      if (lane_max(largest) < static_cast<Real>(job.smallest)) {
        for (c = 0; c < width && precise; ++c) precise = row[c] == 0;
      }
    }
  }
  return precise;
}

}  // namespace

void norm_grads_units(const NormGrads& job, int64_t begin, int64_t end) {
  job.wide() ? norm_grads_of<double>(job, begin, end) : norm_grads_of<float>(job, begin, end);
}

void squared_norms_units(const SquaredNorms& job, double* parts, int64_t begin, int64_t end) {
  job.x.wide() ? squared_norms_of<double>(job, parts, begin, end)
               : squared_norms_of<float>(job, parts, begin, end);
}

void weighted_sum_units(const WeightedSum& job, int64_t begin, int64_t end) {
  job.x.wide() ? weighted_sum_of<double>(job, begin, end) : weighted_sum_of<float>(job, begin, end);
}

void embedding_norms_units(const EmbeddingNorms& job, const int64_t* order, int64_t begin, int64_t end) {
  job.g.wide() ? embedding_norms_of<double>(job, order, begin, end)
               : embedding_norms_of<float>(job, order, begin, end);
}

void embedding_weight_grad_units(const EmbeddingWeightGrad& job, const int64_t* order, const int64_t* starts,
                                 int64_t begin, int64_t end) {
  job.g.wide() ? embedding_weight_grad_of<double>(job, order, starts, begin, end)
               : embedding_weight_grad_of<float>(job, order, starts, begin, end);
}

bool scale_records_units(const ScaledRecords& job, int64_t begin, int64_t end) {
  return job.x.wide() ? scale_records_of<double>(job, begin, end) : scale_records_of<float>(job, begin, end);
}

}  // namespace wavedp::WAVEDP_ISA
