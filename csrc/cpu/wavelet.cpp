// SPDX-License-Identifier: Apache-2.0
// The transform to bands and back. Compiled once for each instruction set with WAVEDP_ISA as its namespace.
#include "analysis.h"
#include "synthesis.h"
#include "units.h"

WAVEDP_DECLARE_UNITS(WAVEDP_ISA)

namespace wavedp::WAVEDP_ISA {
namespace {

// Rows of bands in memory, or rows of scratch that are rounded into it.
template <class Real, bool kWithDetails>
class BandsSink {
 public:
  static constexpr bool kDetails = kWithDetails;

  explicit BandsSink(const Wavedec2& job)
      : job_(job),
        size_(job.levels, job.images.height, job.images.width),
        in_place_(job.band_dtype == kNative<Real>),
        scratch_(4 * Scratch<Real>::room(size_.width[1])) {
    for (Real*& row : rows_) row = scratch_.take(size_.width[1]);
    const bool large = sample_count(job) * size_of(job.band_dtype) >= kStreamedBytes;
    for (int k = 1; k <= job.levels; ++k) {
      stream_[k] = large && kDetails;
      const int first = k == job.levels ? 0 : detail_index(job.levels, k);
      for (int b = first; b < detail_index(job.levels, k) + 3; ++b) {
        stream_[k] = stream_[k] && on_lines(job.bands[b], size_.width[k] * size_of(job.band_dtype));
      }
    }
  }

  void select(int64_t n) { n_ = n; }

  LevelRows<Real> rows(int k, int64_t r) {
    LevelRows<Real> to{rows_[0], {rows_[1], rows_[2], rows_[3]}, false};
    if (!in_place_) return to;
    if (k == job_.levels) to.low = static_cast<Real*>(row(0, k, r));
    if constexpr (kDetails) {
      const int b = detail_index(job_.levels, k);
      to.details = {static_cast<Real*>(row(b, k, r)), static_cast<Real*>(row(b + 1, k, r)),
                    static_cast<Real*>(row(b + 2, k, r))};
    }
    to.stream = stream_[k];
    return to;
  }

  static constexpr bool takes_pairs() { return false; }
  void pair(const Real*, int64_t, int64_t, Real*, Real*) {}

  void done(int k, int64_t r) {
    if (in_place_) return;
    if (k == job_.levels) narrow_row(job_.band_dtype, rows_[0], size_.width[k], row(0, k, r), stream_[k]);
    for (int b = 0; kDetails && b < 3; ++b) {
      void* target = row(detail_index(job_.levels, k) + b, k, r);
      narrow_row(job_.band_dtype, rows_[b + 1], size_.width[k], target, stream_[k]);
    }
  }

 private:
  void* row(int b, int k, int64_t r) const {
    return address_of(job_.bands[b], job_.band_dtype, (n_ * size_.height[k] + r) * size_.width[k]);
  }

  const Wavedec2& job_;
  const Pyramid size_;
  const bool in_place_;
  Scratch<Real> scratch_;
  Real* rows_[4];
  bool stream_[kMaxLevels + 1];
  int64_t n_ = 0;
};

template <class Real, bool kDetails>
void analyse_units(const Wavedec2& job, int64_t begin, int64_t end) {
  const Images& images = job.images;
  BandsSink<Real, kDetails> sink(job);
  Analysis<Real, BandsSink<Real, kDetails>> analysis(images, job.levels, job.edge,
                                                     static_cast<Real>(job.factor), sink);
  const int64_t rows = level_rows(images.height, job.levels);
  // Channels that lie side by side are read one right after the other, while their lines are in the cache.
  const bool interleaved = images.stride_inner < images.stride_w;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t outer = unit / (rows * images.inner), rest = unit % (rows * images.inner);
    const int64_t inner = interleaved ? rest % images.inner : rest / rows;
    sink.select(outer * images.inner + inner);
    analysis.run(outer, inner, interleaved ? rest / images.inner : rest % rows);
  }
  fence();
}

template <class Real>
void analyse_units(const Wavedec2& job, int64_t begin, int64_t end) {
  if (job.bands[1]) {
    analyse_units<Real, true>(job, begin, end);
  } else {
    analyse_units<Real, false>(job, begin, end);
  }
}

template <class Real>
class BandsSource {
 public:
  explicit BandsSource(const Waverec2& job)
      : job_(job),
        size_(job.levels, job.height, job.width),
        in_place_(job.dtype == kNative<Real>),
        scratch_(5 * Scratch<Real>::room(size_.width[1])) {
    for (Real*& row : rows_) row = scratch_.take(size_.width[1]);
    zeros_ = scratch_.take(size_.width[1]);
    std::memset(zeros_, 0, size_.width[1] * sizeof(Real));
  }

  void select(int64_t n) { n_ = n; }
  static constexpr bool takes_pairs() { return false; }
  void pair(int64_t, const Real*, const Real*, Real*, int64_t, bool) {}
  const Real* low(int64_t r) { return row(0, job_.levels, r, rows_[0]); }
  DetailRows<const Real> details(int k, int64_t r) {
    const int b = detail_index(job_.levels, k);
    return {row(b, k, r, rows_[1]), row(b + 1, k, r, rows_[2]), row(b + 2, k, r, rows_[3])};
  }

 private:
  const Real* row(int b, int k, int64_t r, Real* scratch) const {
    if (!job_.bands[b]) return zeros_;
    const void* source = address_of(job_.bands[b], job_.dtype, (n_ * size_.height[k] + r) * size_.width[k]);
    if (in_place_) return static_cast<const Real*>(source);
    widen_row(job_.dtype, source, 1, size_.width[k], Real(1), Real(0), scratch);
    return scratch;
  }

  const Waverec2& job_;
  const Pyramid size_;
  const bool in_place_;
  Scratch<Real> scratch_;
  Real *rows_[4], *zeros_;
  int64_t n_ = 0;
};

template <class Real>
void synthesise_units(const Waverec2& job, int64_t begin, int64_t end) {
  BandsSource<Real> source(job);
  const bool large = sample_count(job) * size_of(job.dtype) >= kStreamedBytes;
  Synthesis<Real, BandsSource<Real>> synthesis(job.x, job.dtype, job.height, job.width, job.levels, job.edge,
                                               static_cast<Real>(job.factor), large, source);
  const int64_t rows = level_rows(job.height, job.levels);
  for (int64_t unit = begin; unit < end; ++unit) {
    source.select(unit / rows);
    synthesis.run(unit / rows, unit % rows);
  }
  fence();
}

}  // namespace

void wavedec2_units(const Wavedec2& job, int64_t begin, int64_t end) {
  job.band_dtype == DType::kFloat64 ? analyse_units<double>(job, begin, end)
                                    : analyse_units<float>(job, begin, end);
}

void waverec2_units(const Waverec2& job, int64_t begin, int64_t end) {
  job.dtype == DType::kFloat64 ? synthesise_units<double>(job, begin, end)
                               : synthesise_units<float>(job, begin, end);
}

}  // namespace wavedp::WAVEDP_ISA
