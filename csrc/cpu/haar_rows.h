// SPDX-License-Identifier: Apache-2.0
// One level of the transform on a pair of rows, in vectors.
#pragma once

#include "../haar.h"
#include "vector.h"

namespace wavedp::WAVEDP_ISA {
namespace {

template <class Real>
struct DetailRows {
  Real *lh, *hl, *hh;
};

// A span takes as many whole steps of `kVectors` vectors of `kBytes` as there are from cell `j` on, and
// returns the first cell that it left. Each band's vectors of a step are stored one right after the other: a
// line.

template <int kBytes, int kVectors, bool kStreamLow, bool kStreamDetails, class Real>
inline int64_t analyse_span(const Real* top, const Real* bottom, int64_t j, int64_t cells, Real factor,
                            Real* low, const DetailRows<Real> details) {
  using V = Vector<Real, kBytes>;
  constexpr int64_t kLanes = kBytes / sizeof(Real), kStep = kLanes * kVectors;
  for (; j + kStep <= cells; j += kStep) {
    Bands<V> y[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const Real *t = top + 2 * (j + v * kLanes), *b = bottom + 2 * (j + v * kLanes);
      const V t0 = load<V>(t), t1 = load<V>(t + kLanes), b0 = load<V>(b), b1 = load<V>(b + kLanes);
      const auto [low_even, low_odd] = parted<V>(t0 + b0, t1 + b1);
      const auto [high_even, high_odd] = parted<V>(t0 - b0, t1 - b1);
      y[v] = {factor * (low_even + low_odd), factor * (high_even + high_odd), factor * (low_even - low_odd),
              factor * (high_even - high_odd)};
    }
    for (int v = 0; v < kVectors; ++v) put<kStreamLow>(low + j + v * kLanes, y[v].ll);
    for (int v = 0; v < kVectors; ++v) put<kStreamDetails>(details.lh + j + v * kLanes, y[v].lh);
    for (int v = 0; v < kVectors; ++v) put<kStreamDetails>(details.hl + j + v * kLanes, y[v].hl);
    for (int v = 0; v < kVectors; ++v) put<kStreamDetails>(details.hh + j + v * kLanes, y[v].hh);
  }
  return j;
}

template <int kBytes, bool kAhead, class Real>
inline int64_t analyse_low_span(const Real* top, const Real* bottom, int64_t j, int64_t cells, Real factor,
                                Real* low) {
  using V = Vector<Real, kBytes>;
  constexpr int64_t kLanes = kBytes / sizeof(Real);
  for (; j + kLanes <= cells; j += kLanes) {
    const Real *t = top + 2 * j, *b = bottom + 2 * j;
    const V b0 = load_ahead<kAhead, V>(b), b1 = load_ahead<kAhead, V>(b + kLanes);
    const auto [even, odd] = parted<V>(load<V>(t) + b0, load<V>(t + kLanes) + b1);
    store<V>(low + j, factor * (even + odd));
  }
  return j;
}

template <int kBytes, int kVectors, bool kStream, class Real>
inline int64_t synthesise_span(const Real* low, const DetailRows<const Real> details, int64_t j,
                               int64_t cells, Real factor, Real* top, Real* bottom) {
  using V = Vector<Real, kBytes>;
  constexpr int64_t kLanes = kBytes / sizeof(Real), kStep = kLanes * kVectors;
  for (; j + kStep <= cells; j += kStep) {
    Block<V> x[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = j + v * kLanes;
      x[v] = synthesise(Bands<V>{load<V>(low + at), load<V>(details.lh + at), load<V>(details.hl + at),
                                 load<V>(details.hh + at)},
                        factor);
    }
    for (int v = 0; v < kVectors; ++v) {
      const auto [first, second] = joined<V>(x[v].a, x[v].b);
      put<kStream>(top + 2 * (j + v * kLanes), first);
      put<kStream>(top + 2 * (j + v * kLanes) + kLanes, second);
    }
    for (int v = 0; v < kVectors; ++v) {
      const auto [first, second] = joined<V>(x[v].c, x[v].d);
      put<kStream>(bottom + 2 * (j + v * kLanes), first);
      put<kStream>(bottom + 2 * (j + v * kLanes) + kLanes, second);
    }
  }
  return j;
}

// Calls `span(bytes)` for vectors of this size down to the smallest, each as far as it goes.
template <int kBytes, class Span>
inline void in_smaller_vectors(const Span& span) {
  span(std::integral_constant<int, kBytes>());
  if constexpr (kBytes > 16) in_smaller_vectors<kBytes / 2>(span);
}

// The block of cell j of two rows.
template <class Real>
inline Block<Real> block_at(const Real* top, const Real* bottom, int64_t j) {
  return {top[2 * j], top[2 * j + 1], bottom[2 * j], bottom[2 * j + 1]};
}

// Cells [0, cells) of two rows. Streaming wants rows of whole lines.
template <class Real>
void analyse_rows(const Real* top, const Real* bottom, int64_t cells, Real factor, Real* low, bool stream_low,
                  const DetailRows<Real>& details, bool stream_details) {
  constexpr int kVectors = kLineBytes / kVectorBytes;
  int64_t j = 0;
  if (stream_low) {
    j = analyse_span<kVectorBytes, kVectors, true, true>(top, bottom, j, cells, factor, low, details);
  } else if (stream_details) {
    j = analyse_span<kVectorBytes, kVectors, false, true>(top, bottom, j, cells, factor, low, details);
  }
  in_smaller_vectors<kVectorBytes>([&](auto bytes) {
    j = analyse_span<bytes(), 1, false, false>(top, bottom, j, cells, factor, low, details);
  });
  for (; j < cells; ++j) {
    const Bands<Real> y = analyse(block_at(top, bottom, j), factor);
    low[j] = y.ll;
    details.lh[j] = y.lh;
    details.hl[j] = y.hl;
    details.hh[j] = y.hh;
  }
}

// `kAhead` where the lower row is one of an image.
template <bool kAhead, class Real>
void analyse_low_rows(const Real* top, const Real* bottom, int64_t cells, Real factor, Real* low) {
  int64_t j = 0;
  in_smaller_vectors<kVectorBytes>(
      [&](auto bytes) { j = analyse_low_span<bytes(), kAhead>(top, bottom, j, cells, factor, low); });
  for (; j < cells; ++j) low[j] = analyse(block_at(top, bottom, j), factor).ll;
}

// 2 * cells samples of each of two rows.
template <class Real>
void synthesise_rows(const Real* low, const DetailRows<const Real>& details, int64_t cells, Real factor,
                     Real* top, Real* bottom, bool stream_rows) {
  constexpr int kVectors = kVectorBytes < 32 ? 2 : 1;
  int64_t j = 0;
  if (stream_rows) {
    j = synthesise_span<kVectorBytes, kVectors, true>(low, details, j, cells, factor, top, bottom);
  }
  in_smaller_vectors<kVectorBytes>([&](auto bytes) {
    j = synthesise_span<bytes(), 1, false>(low, details, j, cells, factor, top, bottom);
  });
  for (; j < cells; ++j) {
    const Block<Real> x =
        synthesise(Bands<Real>{low[j], details.lh[j], details.hl[j], details.hh[j]}, factor);
    top[2 * j] = x.a;
    top[2 * j + 1] = x.b;
    bottom[2 * j] = x.c;
    bottom[2 * j + 1] = x.d;
  }
}

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
