// SPDX-License-Identifier: Apache-2.0
// The Haar block, its inverse and the edge rules: the arithmetic of the CPU and the CUDA implementation.
// Sums are taken in one fixed order and nothing here is changed by contraction to a fused multiply-add,
// so that every implementation returns the same bits. All of it has internal linkage: an object compiled
// for AVX-512 must not lend its copy to one that runs elsewhere.
#pragma once

#include "wavelet.h"

namespace wavedp {
namespace {

template <class Real>
struct Bands {
  Real ll, lh, hl, hh;
};

// The block [[a, b], [c, d]] of an image.
template <class Real>
struct Block {
  Real a, b, c, d;
};

// LL = (a+b+c+d)/2, LH = (a+b-c-d)/2, HL = (a-b+c-d)/2, HH = (a-b-c+d)/2
template <class Real>
WAVEDP_HOST_DEVICE inline Bands<Real> analyse(const Block<Real>& x) {
  const Real half = Real(0.5);
  const Real top = x.a + x.b, bottom = x.c + x.d, top_step = x.a - x.b, bottom_step = x.c - x.d;
  return {half * (top + bottom), half * (top - bottom), half * (top_step + bottom_step),
          half * (top_step - bottom_step)};
}

// The matrix is symmetric and orthogonal, hence its own inverse.
template <class Real>
WAVEDP_HOST_DEVICE inline Block<Real> synthesise(const Bands<Real>& y) {
  const Real half = Real(0.5);
  const Real top = y.ll + y.lh, bottom = y.ll - y.lh, top_step = y.hl + y.hh, bottom_step = y.hl - y.hh;
  return {half * (top + top_step), half * (top - top_step), half * (bottom + bottom_step),
          half * (bottom - bottom_step)};
}

// x[N] = sum_k weight[k] * x[index[k]], k < count, for an axis of odd length N.
struct Taps {
  int count;
  int64_t index[2];
  int weight[2];
};

WAVEDP_HOST_DEVICE inline Taps virtual_taps(Edge edge, int64_t length) {
  const int64_t last = length - 1;
  const int64_t before = length > 1 ? length - 2 : 0;
  switch (edge) {
    case Edge::kZero:
      return {0, {0, 0}, {0, 0}};
    case Edge::kRepeat:
      return {1, {last, 0}, {1, 0}};
    case Edge::kWrap:
      return {1, {0, 0}, {1, 0}};
    case Edge::kReflect:
      return {1, {before, 0}, {1, 0}};
    case Edge::kNegate:
      return {1, {last, 0}, {-1, 0}};
    case Edge::kLinear:
      break;
  }
  if (length == 1) return {1, {last, 0}, {1, 0}};
  return {2, {last, before}, {2, -1}};
}

// The weight of x[k] in the virtual sample x[length]; 0 for an even length, which has none.
WAVEDP_HOST_DEVICE inline int fold_weight(Edge edge, int64_t length, int64_t k) {
  if (length % 2 == 0) return 0;
  const Taps taps = virtual_taps(edge, length);
  return (taps.count > 0 && taps.index[0] == k ? taps.weight[0] : 0) +
         (taps.count > 1 && taps.index[1] == k ? taps.weight[1] : 0);
}

// sample(0) + ... by the edge rule; no term is added that the rule does not have, as 0 * inf is not 0.
template <class Real, class Sample>
WAVEDP_HOST_DEVICE inline Real extend(Edge edge, int64_t length, int64_t k, Sample sample) {
  if (k < length) return sample(k);
  const Taps taps = virtual_taps(edge, length);
  if (taps.count == 0) return Real(0);
  const Real first = Real(taps.weight[0]) * sample(taps.index[0]);
  return taps.count == 1 ? first : first + Real(taps.weight[1]) * sample(taps.index[1]);
}

// The sample (row, column) of an image with its virtual row and column, either index up to its length.
template <class Real, class Sample>
WAVEDP_HOST_DEVICE inline Real extended_sample(const Dwt2& job, int64_t row, int64_t column, Sample sample) {
  return extend<Real>(job.edge, job.height, row, [&](int64_t r) {
    return extend<Real>(job.edge, job.width, column, [&](int64_t c) { return sample(r, c); });
  });
}

template <class Real, class Sample>
WAVEDP_HOST_DEVICE inline Bands<Real> analyse_extended(const Dwt2& job, int64_t i, int64_t j, Sample sample) {
  return analyse(Block<Real>{extended_sample<Real>(job, 2 * i, 2 * j, sample),
                             extended_sample<Real>(job, 2 * i, 2 * j + 1, sample),
                             extended_sample<Real>(job, 2 * i + 1, 2 * j, sample),
                             extended_sample<Real>(job, 2 * i + 1, 2 * j + 1, sample)});
}

// The pixel (row, column) of the synthesis, virtual row and column included; bands(i, j) loads one cell.
template <class Real, class Cell>
WAVEDP_HOST_DEVICE inline Real pixel(int64_t row, int64_t column, Cell cell) {
  const Block<Real> x = synthesise<Real>(cell(row / 2, column / 2));
  const Real left = row % 2 ? x.c : x.a, right = row % 2 ? x.d : x.b;
  return column % 2 ? right : left;
}

// The pixel (row, column) of the transpose: the synthesis plus what the edge rule took from this pixel.
template <class Real, class Cell>
WAVEDP_HOST_DEVICE inline Real folded_pixel(const Idwt2& job, int64_t row, int64_t column, Cell cell) {
  const int row_weight = fold_weight(job.edge, job.height, row);
  const int column_weight = fold_weight(job.edge, job.width, column);
  const auto across = [&](int64_t r) {
    const Real own = pixel<Real>(r, column, cell);
    return column_weight == 0 ? own : own + Real(column_weight) * pixel<Real>(r, job.width, cell);
  };
  const Real own = across(row);
  return row_weight == 0 ? own : own + Real(row_weight) * across(job.height);
}

}  // namespace
}  // namespace wavedp
