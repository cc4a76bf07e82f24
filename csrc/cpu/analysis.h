// SPDX-License-Identifier: Apache-2.0
// All levels of the transform in one pass over an image: a row of LL_k is made from two rows of LL_(k-1),
// each made just before, down to the image. What lies between the levels never leaves the first-level cache.
#pragma once

#include "coarse_rows.h"
#include "convert.h"
#include "haar_rows.h"
#include "scratch.h"

namespace wavedp::WAVEDP_ISA {
namespace {

// A row of LL_k, and for an odd width the sample past its end.
template <class Real>
struct Row {
  const Real* samples;
  Real beyond;
};

// A sink says where rows go:
//   static constexpr bool kDetails        whether there are details at all
//   LevelRows<Real> rows(k, r)            row r of the details of level k, and of LL of the last level
//   void done(k, r)                       after they were written
//   bool takes_pairs()                    whether it makes two rows of level 1 at a time by itself, with
//   void pair(image, row_stride, r, low, next_low)   from four rows of an image in place
template <class Real>
struct LevelRows {
  Real* low;  // of the last level only
  DetailRows<Real> details;
  bool stream;
};

template <class Real, class Sink>
class Analysis {
 public:
  Analysis(const Images& images, int levels, Edge edge, Real factor, Sink& sink)
      : images_(images),
        size_(levels, images.height, images.width),
        edge_(edge),
        factor_(factor),
        gain_(static_cast<Real>(images.gain)),
        bias_(static_cast<Real>(images.bias)),
        in_place_(images.dtype == kNative<Real> && images.stride_w == 1),
        pairs_(in_place_ && sink.takes_pairs()),
        scratch_(scratch_size()),
        sink_(sink) {
    for (int k = 0; k < levels; ++k) {
      for (Real*& slot : slots_[k]) slot = scratch_.take(size_.width[k]);
    }
  }

  // Row `r` of the last level, and the rows of details under it, of the image (outer, inner).
  void run(int64_t outer, int64_t inner, int64_t r) {
    origin_ = outer * images_.stride_outer + inner * images_.stride_inner;
    row<true>(size_.levels, r, nullptr);
  }

 private:
  enum Slot { kTop, kBottom, kVirtual, kSlots };

  int64_t scratch_size() const {
    int64_t total = 0;
    for (int k = 0; k < size_.levels; ++k) total += kSlots * Scratch<Real>::room(size_.width[k]);
    return total;
  }

  Row<Real> completed(const Real* samples, int k) const {
    const int64_t width = size_.width[k];
    if (width % 2 == 0) return {samples, Real(0)};
    return {samples, virtual_sample<Real>(virtual_taps(edge_, width), [&](int64_t c) { return samples[c]; })};
  }

  // The upper row of a pair is copied even where it could be read in place: read side by side, two rows do
  // not look sequential to the hardware's prefetchers, and a pass that only reads took twice as long (Zen 4).
  Row<Real> image_row(int64_t r, Real* slot) const {
    const void* source = address_of(images_.x, images_.dtype, origin_ + r * images_.stride_h);
    if (in_place_ && slot != slots_[0][kTop]) return completed(static_cast<const Real*>(source), 0);
    if (in_place_) {
      copy_row<!Sink::kDetails>(static_cast<const Real*>(source), size_.width[0], slot, false);
    } else {
      widen_row(images_.dtype, source, images_.stride_w, size_.width[0], gain_, bias_, slot);
    }
    return completed(slot, 0);
  }

  // Row r of LL_k. `kEmit` writes the details under it and, of the last level, the row itself to the sink.
  template <bool kEmit>
  Row<Real> row(int k, int64_t r, Real* slot) {
    if (k == 0) return image_row(r, slot);
    if constexpr (!Sink::kDetails) {
      if (is_whole(k, r)) return whole_row<kEmit>(k, r, slot);
    }
    Row<Real> top, bottom;
    if (kEmit && k == 2 && pairs_) {
      Real *low = slots_[1][kTop], *next_low = slots_[1][kBottom];
      const void* source = address_of(images_.x, images_.dtype, origin_ + 4 * r * images_.stride_h);
      sink_.pair(static_cast<const Real*>(source), images_.stride_h, 2 * r, low, next_low);
      top = {low, Real(0)};
      bottom = {next_low, Real(0)};
    } else {
      top = row<kEmit>(k - 1, 2 * r, slots_[k - 1][kTop]);
      bottom = 2 * r + 1 < size_.height[k - 1] ? row<kEmit>(k - 1, 2 * r + 1, slots_[k - 1][kBottom])
                                               : virtual_row(k - 1, top);
    }
    const int64_t cells = size_.width[k - 1] / 2;
    const bool last = k == size_.levels;
    LevelRows<Real> out{};
    if (kEmit && (last || Sink::kDetails)) out = sink_.rows(k, r);
    Real* low = kEmit && last ? out.low : slot;
    Bands<Real> beyond{};
    const bool odd = size_.width[k - 1] % 2 != 0;
    if (odd) {
      beyond = analyse(
          Block<Real>{top.samples[2 * cells], top.beyond, bottom.samples[2 * cells], bottom.beyond}, factor_);
    }
    if (kEmit && Sink::kDetails) {
      analyse_rows(top.samples, bottom.samples, cells, factor_, low, last && out.stream, out.details,
                   out.stream);
      if (odd) {
        out.details.lh[cells] = beyond.lh;
        out.details.hl[cells] = beyond.hl;
        out.details.hh[cells] = beyond.hh;
      }
    } else {
      if (!Sink::kDetails && k == 1 && in_place_) {
        analyse_low_rows<true>(top.samples, bottom.samples, cells, factor_, low);
      } else {
        analyse_low_rows<false>(top.samples, bottom.samples, cells, factor_, low);
      }
    }
    if (odd) low[cells] = beyond.ll;
    if (kEmit && (last || Sink::kDetails)) sink_.done(k, r);
    return kEmit && last ? Row<Real>{low, Real(0)} : completed(low, k);
  }

  // Whether row r of LL_k is made of blocks that the image has, where it can be read in place.
  bool is_whole(int k, int64_t r) const {
    return in_place_ && k <= kMaxFusedLow && (r + 1) << k <= size_.height[0] &&
           size_.width[k] << k == size_.width[0];
  }

  template <bool kEmit>
  Row<Real> whole_row(int k, int64_t r, Real* slot) {
    const bool last = kEmit && k == size_.levels;
    Real* low = last ? sink_.rows(k, r).low : slot;
    const void* source = address_of(images_.x, images_.dtype, origin_ + (r << k) * images_.stride_h);
    low_row(k, static_cast<const Real*>(source), images_.stride_h, size_.width[k], factor_, low);
    if (last) sink_.done(k, r);
    return last ? Row<Real>{low, Real(0)} : completed(low, k);
  }

  // The row past the last, `top`, of LL_k, whose height is odd. Rows that it needs and that are gone are made
  // again, which only the last row of an image asks for.
  Row<Real> virtual_row(int k, const Row<Real>& top) {
    const int64_t width = size_.width[k];
    const Taps taps = virtual_taps(edge_, size_.height[k]);
    Real* samples = slots_[k][kVirtual];
    if (taps.count == 0) {
      for (int64_t c = 0; c < width; ++c) samples[c] = Real(0);
      return {samples, Real(0)};
    }
    const int64_t last = size_.height[k] - 1;
    const int64_t other = taps.index[taps.count - 1];
    const Row<Real> source = other == last ? top : row<false>(k, other, samples);
    if (taps.count == 1) {
      const Real weight = Real(taps.weight[0]);
      for (int64_t c = 0; c < width; ++c) samples[c] = weight * source.samples[c];
      return {samples, weight * source.beyond};
    }
    const Real first = Real(taps.weight[0]), second = Real(taps.weight[1]);
    for (int64_t c = 0; c < width; ++c) samples[c] = first * top.samples[c] + second * source.samples[c];
    return {samples, first * top.beyond + second * source.beyond};
  }

  const Images& images_;
  const Pyramid size_;
  const Edge edge_;
  const Real factor_, gain_, bias_;
  const bool in_place_, pairs_;
  Scratch<Real> scratch_;
  Real* slots_[kMaxLevels][kSlots];
  int64_t origin_ = 0;
  Sink& sink_;
};

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
