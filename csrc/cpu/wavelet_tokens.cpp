// SPDX-License-Identifier: Apache-2.0
// The transform to tokens and back, one row of the grid of one channel at a time. Between the two steps lie a
// few rows of each band, which stay in the first-level cache. Compiled once for each instruction set, see
// wavelet.cpp.
#include "analysis.h"
#include "patches.h"
#include "synthesis.h"
#include "units.h"

WAVEDP_DECLARE_UNITS(WAVEDP_ISA)

namespace wavedp::WAVEDP_ISA {
namespace {

// One band on its way between the transform and the tokens.
template <class Real>
struct BandRows {
  int level, scale;
  Patches patches;
  int64_t batch;  // rows that are moved at a time, a power of two
  Real* rows;     // so many, `stride` apart
  int64_t stride;
  int64_t channel;  // of the first channel's coefficients among all channels of all scales
  int64_t place;    // and among those of the scale
  // Of the channel and the row of the grid that it is turned to:
  int64_t first;   // row of the band
  int64_t origin;  // the element of the scale's tokens at which the first patch starts
  Real shift, scaling;

  Real* row(int64_t r) const { return rows + (r & (batch - 1)) * stride; }
  bool starts(int64_t r) const { return (r & (batch - 1)) == 0; }
  bool ends(int64_t r) const { return ((r + 1) & (batch - 1)) == 0; }
};

template <class Real>
class Strip {
 public:
  Strip(int levels, int64_t channels, int64_t height, int64_t width, int64_t grid_h, int64_t grid_w,
        DType dtype, const void* shift, const void* scale)
      : grid_h_(grid_h),
        shift_(static_cast<const Real*>(shift)),
        scale_(static_cast<const Real*>(scale)),
        bands_(3 * levels + 1),
        scratch_(scratch_size(levels, width)) {
    for (int b = 0; b < bands_; ++b) {
      BandRows<Real>& band = band_[b];
      band.scale = (b + 2) / 3;
      band.level = b == 0 ? levels : levels - band.scale + 1;
      const int64_t p = (height >> band.level) / grid_h, q = (width >> band.level) / grid_w;
      band.patches = {grid_w, p, q, (b == 0 ? 1 : 3) * channels * p * q};
      band.batch = band.patches.batch(size_of(dtype));
      band.stride = Scratch<Real>::room(width >> band.level);
      band.rows = scratch_.take(kMaxBatch * band.stride);
      band.channel = b * channels;
      band.place = b == 0 ? 0 : (b - 1) % 3 * channels;
    }
  }

  // Turns to the row `i` of the grid, of this image and channel.
  void select(int64_t image, int64_t channel, int64_t i) {
    for (int b = 0; b < bands_; ++b) {
      BandRows<Real>& band = band_[b];
      const Patches& p = band.patches;
      band.first = i * p.height;
      band.origin =
          (image * grid_h_ + i) * p.count * p.token_stride + (band.place + channel) * p.height * p.width;
      band.shift = shift_ ? shift_[band.channel + channel] : Real(0);
      band.scaling = scale_ ? scale_[band.channel + channel] : Real(1);
    }
  }

  // Whether two rows of the finest patches make a line.
  bool has_pairs() const {
    const BandRows<Real>& finest = band_[bands_ - 1];
    const Patches& p = finest.patches;
    return kPairs && bands_ > 4 && finest.batch == 2 && p.width * sizeof(Real) == kLineBytes / 2 &&
           p.count * p.width * sizeof(Real) % kVectorBytes == 0;
  }

  // Where rows r and r + 1 of the finest details lie in the tokens of their scale.
  template <class T>
  DetailPatches<T> pair_at(int64_t r,
                           std::conditional_t<std::is_const_v<T>, const void, void>* tokens) const {
    DetailPatches<T> at;
    for (int d = 0; d < 3; ++d) {
      const BandRows<Real>& band = band_[bands_ - 3 + d];
      at.tokens[d] = static_cast<T*>(tokens) + band.origin + (r - band.first) * band.patches.width;
      at.shift[d] = band.shift;
      at.scaling[d] = band.scaling;
      at.token_stride = band.patches.token_stride;
    }
    return at;
  }

  int bands() const { return bands_; }
  const BandRows<Real>& band(int b) const { return band_[b]; }

 private:
  static int64_t scratch_size(int levels, int64_t width) {
    int64_t total = 0;
    for (int k = 1; k <= levels; ++k)
      total += 4 * Scratch<Real>::room(kMaxBatch * Scratch<Real>::room(width >> k));
    return total;
  }

  const int64_t grid_h_;
  const Real *shift_, *scale_;
  const int bands_;
  Scratch<Real> scratch_;
  BandRows<Real> band_[kMaxBands];
};

template <class Real>
Real sum_of_squares(const Real* row, int64_t count) {
  using V = Vector<Real, kVectorBytes>;
  constexpr int64_t kLanes = kVectorBytes / sizeof(Real);
  V sums{};
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    const V v = load<V>(row + c);
    sums += v * v;
  }
  Real total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
  for (; c < count; ++c) total += row[c] * row[c];
  return total;
}

template <class Real>
class TokensSink {
 public:
  static constexpr bool kDetails = true;

  TokensSink(const WaveletTokens& job, Strip<Real>& strip)
      : job_(job),
        strip_(strip),
        in_place_(job.token_dtype == kNative<Real>),
        narrow_memory_(in_place_ ? 0 : Scratch<Real>::room(kMaxBatch * strip.band(strip.bands() - 1).stride)),
        narrow_(reinterpret_cast<uint16_t*>(narrow_memory_.take(0))) {
    const bool large = sample_count(job) * size_of(job.token_dtype) >= kStreamedBytes;
    for (int b = 0; b < strip.bands(); ++b) {
      const Patches& p = strip.band(b).patches;
      const int64_t element = size_of(job.token_dtype), batch_bytes = strip.band(b).batch * p.width * element;
      stream_[b] = large && batch_bytes % kLineBytes == 0 &&
                   on_lines(job.tokens[strip.band(b).scale], p.height * p.width * element);
    }
  }

  // Where the sums of squares of this unit go, or null.
  void select(Real* energies) { energies_ = energies; }

  bool takes_pairs() const { return in_place_ && !job_.energies && strip_.has_pairs(); }

  void pair(const Real* image, int64_t row_stride, int64_t r, Real* low, Real* next_low) {
    const int first = detail_index(job_.levels, 1);
    const DetailPatches<Real> to = strip_.template pair_at<Real>(r, job_.tokens[job_.levels]);
    const Patches& p = strip_.band(first).patches;
    const Real factor = static_cast<Real>(job_.factor);
    if constexpr (kPairs) {
      if (stream_[first]) {
        analyse_to_tokens<true>(image, row_stride, p.count * p.width, factor, low, next_low, to);
      } else {
        analyse_to_tokens<false>(image, row_stride, p.count * p.width, factor, low, next_low, to);
      }
    }
  }

  LevelRows<Real> rows(int k, int64_t r) {
    const int b = detail_index(job_.levels, k);
    return {k == job_.levels ? strip_.band(0).row(r) : nullptr,
            {strip_.band(b).row(r), strip_.band(b + 1).row(r), strip_.band(b + 2).row(r)},
            false};
  }

  void done(int k, int64_t r) {
    const int first = k == job_.levels ? 0 : detail_index(job_.levels, k);
    if (!strip_.band(first).ends(r)) return;
    for (int b = first; b < detail_index(job_.levels, k) + 3; ++b) move(b, r - strip_.band(b).first);
  }

 private:
  // The batch of rows that ends with row `last` of the patches.
  void move(int b, int64_t last) {
    const BandRows<Real>& band = strip_.band(b);
    const Patches& p = band.patches;
    const int64_t width = p.count * p.width;
    if (energies_) {
      for (int64_t r = 0; r < band.batch; ++r) energies_[b] += sum_of_squares(band.row(r), width);
    }
    const int64_t origin = band.origin + (last + 1 - band.batch) * p.width;
    const Real shift = band.shift, scaling = band.scaling;
    if (in_place_) {
      Real* tokens = static_cast<Real*>(job_.tokens[band.scale]) + origin;
      write(static_cast<const Real*>(band.rows), band, tokens, stream_[b],
            [=](auto v) { return (v - shift) * scaling; });
      return;
    }
    for (int64_t r = 0; r < band.batch; ++r) {
      Real* row = band.row(r);
      for (int64_t c = 0; c < width; ++c) row[c] = (row[c] - shift) * scaling;
      narrow_row(job_.token_dtype, row, width, narrow_ + r * band.stride, false);
    }
    uint16_t* tokens = static_cast<uint16_t*>(job_.tokens[band.scale]) + origin;
    write(static_cast<const uint16_t*>(narrow_), band, tokens, stream_[b], [](auto v) { return v; });
  }

  template <class T, class Change>
  static void write(const T* rows, const BandRows<Real>& band, T* tokens, bool stream_lines,
                    const Change& change) {
    const Patches& p = band.patches;
    const int64_t stride = band.stride;
    by_shape<T>(p.width, band.batch, [&](auto bytes, auto batch) {
      if constexpr (bytes() >= 16) {
        if (stream_lines) return write_rows<bytes(), batch(), true>(rows, stride, p, tokens, change);
      }
      write_rows<bytes(), batch(), false>(rows, stride, p, tokens, change);
    });
  }

  const WaveletTokens& job_;
  Strip<Real>& strip_;
  const bool in_place_;
  Scratch<Real> narrow_memory_;
  uint16_t* narrow_;
  bool stream_[kMaxBands];
  Real* energies_ = nullptr;
};

template <class Real>
class TokensSource {
 public:
  TokensSource(const WaveletUntokens& job, Strip<Real>& strip)
      : job_(job),
        strip_(strip),
        in_place_(job.dtype == kNative<Real>),
        narrow_memory_(in_place_ ? 0 : Scratch<Real>::room(kMaxBatch * strip.band(strip.bands() - 1).stride)),
        narrow_(reinterpret_cast<uint16_t*>(narrow_memory_.take(0))) {}

  bool takes_pairs() const { return in_place_ && strip_.has_pairs(); }

  void pair(int64_t r, const Real* low, const Real* next_low, Real* image, int64_t row_stride,
            bool stream_rows) {
    const DetailPatches<const Real> from = strip_.template pair_at<const Real>(r, job_.tokens[job_.levels]);
    const Patches& p = strip_.band(strip_.bands() - 1).patches;
    const int64_t cells = p.count * p.width, ahead = p.count * p.token_stride;
    const Real factor = static_cast<Real>(job_.factor);
    if constexpr (kPairs) {
      if (stream_rows) {
        synthesise_from_tokens<true>(low, next_low, from, ahead, cells, factor, image, row_stride);
      } else {
        synthesise_from_tokens<false>(low, next_low, from, ahead, cells, factor, image, row_stride);
      }
    }
  }

  const Real* low(int64_t r) { return row(0, r); }
  DetailRows<const Real> details(int k, int64_t r) {
    const int b = detail_index(job_.levels, k);
    return {row(b, r), row(b + 1, r), row(b + 2, r)};
  }

 private:
  const Real* row(int b, int64_t r) {
    const BandRows<Real>& band = strip_.band(b);
    if (band.starts(r)) move(b, r - band.first);
    return band.row(r);
  }

  // The batch of rows that begins with row `first` of the patches.
  void move(int b, int64_t first) {
    const BandRows<Real>& band = strip_.band(b);
    const Patches& p = band.patches;
    const int64_t origin = band.origin + first * p.width, next_row = p.count * p.token_stride;
    const Real shift = band.shift, scaling = band.scaling;
    if (in_place_) {
      const Real* tokens = static_cast<const Real*>(job_.tokens[band.scale]) + origin;
      by_shape<Real>(p.width, band.batch, [&](auto bytes, auto batch) {
        read_rows<bytes(), batch()>(tokens, p, band.rows, band.stride, next_row,
                                    [=](auto v) { return v * scaling + shift; });
      });
      return;
    }
    const uint16_t* tokens = static_cast<const uint16_t*>(job_.tokens[band.scale]) + origin;
    by_shape<uint16_t>(p.width, band.batch, [&](auto bytes, auto batch) {
      read_rows<bytes(), batch()>(tokens, p, narrow_, band.stride, next_row, [](auto v) { return v; });
    });
    for (int64_t r = 0; r < band.batch; ++r) {
      const int64_t width = p.count * p.width;
      Real* row = band.row(r);
      widen_row(job_.dtype, narrow_ + r * band.stride, 1, width, Real(1), Real(0), row);
      for (int64_t c = 0; c < width; ++c) row[c] = row[c] * scaling + shift;
    }
  }

  const WaveletUntokens& job_;
  Strip<Real>& strip_;
  const bool in_place_;
  Scratch<Real> narrow_memory_;
  uint16_t* narrow_;
};

template <class Real>
void tokens_units(const WaveletTokens& job, Real* partial, int64_t begin, int64_t end) {
  const Images& images = job.images;
  Strip<Real> strip(job.levels, images.inner, images.height, images.width, job.grid_h, job.grid_w,
                    job.token_dtype, job.shift, job.scale);
  TokensSink<Real> sink(job, strip);
  Analysis<Real, TokensSink<Real>> analysis(images, job.levels, Edge::kZero, static_cast<Real>(job.factor),
                                            sink);
  const int64_t rows = strip.band(0).patches.height;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t channel = unit % images.inner, i = unit / images.inner % job.grid_h;
    const int64_t image = unit / images.inner / job.grid_h;
    strip.select(image, channel, i);
    sink.select(partial ? partial + unit * strip.bands() : nullptr);
    for (int64_t r = 0; r < rows; ++r) analysis.run(image, channel, i * rows + r);
  }
  fence();
}

template <class Real>
void untokens_units(const WaveletUntokens& job, int64_t begin, int64_t end) {
  Strip<Real> strip(job.levels, job.channels, job.height, job.width, job.grid_h, job.grid_w, job.dtype,
                    job.shift, job.scale);
  TokensSource<Real> source(job, strip);
  const bool large = sample_count(job) * size_of(job.dtype) >= kStreamedBytes;
  Synthesis<Real, TokensSource<Real>> synthesis(job.x, job.dtype, job.height, job.width, job.levels,
                                                Edge::kZero, static_cast<Real>(job.factor), large, source);
  const int64_t rows = strip.band(0).patches.height;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t channel = unit % job.channels, i = unit / job.channels % job.grid_h;
    const int64_t image = unit / job.channels / job.grid_h;
    strip.select(image, channel, i);
    for (int64_t r = 0; r < rows; ++r) synthesis.run(image * job.channels + channel, i * rows + r);
  }
  fence();
}

}  // namespace

void wavelet_tokens_units(const WaveletTokens& job, void* partial, int64_t begin, int64_t end) {
  job.token_dtype == DType::kFloat64 ? tokens_units(job, static_cast<double*>(partial), begin, end)
                                     : tokens_units(job, static_cast<float*>(partial), begin, end);
}

void wavelet_untokens_units(const WaveletUntokens& job, int64_t begin, int64_t end) {
  job.dtype == DType::kFloat64 ? untokens_units<double>(job, begin, end)
                               : untokens_units<float>(job, begin, end);
}

}  // namespace wavedp::WAVEDP_ISA
