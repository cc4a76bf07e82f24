// SPDX-License-Identifier: Apache-2.0
// All levels of the transpose in one pass: a row of LL_k makes two rows of LL_(k-1), and each of them is
// taken up at once, down to the image.
#pragma once

#include "convert.h"
#include "haar_rows.h"
#include "scratch.h"

namespace wavedp::WAVEDP_ISA {
namespace {

// A source says where coefficients come from; what it returns stands until the next call:
//   const Real* low(r)                          row r of LL of the last level
//   DetailRows<const Real> details(k, r)        row r of the details of level k
//   bool takes_pairs()                          whether it makes four rows of an image in place by itself,
//   with void pair(r, low, next_low, image, row_stride, stream)   from rows r and r + 1 of LL of level 1
template <class Real, class Source>
class Synthesis {
 public:
  // `x` is contiguous [n, height, width].
  Synthesis(void* x, DType dtype, int64_t height, int64_t width, int levels, Edge edge, Real factor,
            bool stream_rows, Source& source)
      : x_(x),
        dtype_(dtype),
        size_(levels, height, width),
        edge_(edge),
        factor_(factor),
        stream_(stream_rows && on_lines(x, width * size_of(dtype))),
        in_place_(dtype == kNative<Real> && width % 2 == 0),
        pairs_(in_place_ && source.takes_pairs()),
        scratch_(scratch_size()),
        source_(source) {
    for (int k = 0; k <= levels; ++k) {
      for (Real*& slot : slots_[k]) slot = scratch_.take(2 * band_length(size_.width[k]));
    }
  }

  // The rows of image `n` that lie under row `r` of the last level.
  void run(int64_t n, int64_t r) {
    n_ = n;
    expand(size_.levels, r, source_.low(r));
  }

 private:
  enum Slot { kTop, kBottom, kPulled, kPairTop, kPairBottom, kSlots };

  int64_t scratch_size() const {
    int64_t total = 0;
    for (int k = 0; k <= size_.levels; ++k) {
      total += kSlots * Scratch<Real>::room(2 * band_length(size_.width[k]));
    }
    return total;
  }

  void* image_row(int64_t r) const {
    return address_of(x_, dtype_, (n_ * size_.height[0] + r) * size_.width[0]);
  }

  // Folds the sample past the end of a row of odd width back into the samples it was made of.
  void fold_end(Real* samples, int64_t width) const {
    if (width % 2 == 0) return;
    const Taps taps = virtual_taps(edge_, width);
    for (int t = 0; t < taps.count; ++t) samples[taps.index[t]] += Real(taps.weight[t]) * samples[width];
  }

  // The two rows of LL_(k-1) that row i of LL_k makes, the second of which may lie past the end.
  void expand_pair(int k, int64_t i, const Real* low, Real* top, Real* bottom, bool stream_rows) {
    synthesise_rows(low, source_.details(k, i), size_.width[k], factor_, top, bottom, stream_rows);
    fold_end(top, size_.width[k - 1]);
    fold_end(bottom, size_.width[k - 1]);
  }

  // Adds to row r of LL_k what was taken from it for the row past the end: `last_bottom`, which is made here
  // where the caller does not have it.
  void fold_row(int k, int64_t r, Real* samples, const Real* last_bottom) {
    const int64_t height = size_.height[k];
    const int weight = fold_weight(edge_, height, r);
    if (weight == 0) return;
    if (!last_bottom) {
      const int64_t last = size_.height[k + 1] - 1;
      expand_pair(k + 1, last, pulled(k + 1, last), slots_[k][kPairTop], slots_[k][kPairBottom], false);
      last_bottom = slots_[k][kPairBottom];
    }
    for (int64_t c = 0; c < size_.width[k]; ++c) samples[c] += Real(weight) * last_bottom[c];
  }

  // Row r of LL_k out of turn, which only rows past the end ask for.
  const Real* pulled(int k, int64_t r) {
    if (k == size_.levels) return source_.low(r);
    Real *top = slots_[k][kPairTop], *bottom = slots_[k][kPairBottom], *samples = slots_[k][kPulled];
    expand_pair(k + 1, r / 2, pulled(k + 1, r / 2), top, bottom, false);
    std::memcpy(samples, r % 2 ? bottom : top, size_.width[k] * sizeof(Real));
    fold_row(k, r, samples, nullptr);
    return samples;
  }

  void expand(int k, int64_t i, const Real* low) {
    const bool to_image = k == 1;
    const int64_t first = 2 * i, rows = first + 1 < size_.height[k - 1] ? 2 : 1;
    Real *top = slots_[k - 1][kTop], *bottom = slots_[k - 1][kBottom];
    const bool direct = to_image && in_place_;
    if (direct) {
      top = static_cast<Real*>(image_row(first));
      if (rows == 2) bottom = static_cast<Real*>(image_row(first + 1));
    }
    const bool folds = edge_ != Edge::kZero && size_.height[k - 1] % 2 != 0;
    expand_pair(k, i, low, top, bottom, direct && stream_ && rows == 2 && !folds);
    if (folds) {
      const Real* virtual_row = rows == 1 ? bottom : nullptr;
      fold_row(k - 1, first, top, virtual_row);
      if (rows == 2) fold_row(k - 1, first + 1, bottom, virtual_row);
    }
    if (k == 2 && pairs_) {
      Real* image = static_cast<Real*>(image_row(2 * first));
      source_.pair(first, top, bottom, image, size_.width[0], stream_);
    } else if (!to_image) {
      expand(k - 1, first, top);
      if (rows == 2) expand(k - 1, first + 1, bottom);
    } else if (!direct) {
      narrow_row(dtype_, top, size_.width[0], image_row(first), stream_);
      if (rows == 2) narrow_row(dtype_, bottom, size_.width[0], image_row(first + 1), stream_);
    }
  }

  void* x_;
  const DType dtype_;
  const Pyramid size_;
  const Edge edge_;
  const Real factor_;
  const bool stream_, in_place_, pairs_;
  Scratch<Real> scratch_;
  Real* slots_[kMaxLevels + 1][kSlots];
  int64_t n_ = 0;
  Source& source_;
};

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
