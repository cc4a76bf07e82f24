// SPDX-License-Identifier: Apache-2.0
// The Haar block, its transpose and the edge rules: the arithmetic of the CPU and the CUDA implementation.
// Sums are taken in one fixed order, rows first, and nothing here is changed by contraction to a fused
// multiply-add, so that every implementation returns the same bits. All of it has internal linkage: an object
// compiled for AVX-512 must not lend its copy to one that runs elsewhere.
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

// LL = k(a+b+c+d), LH = k(a+b-c-d), HL = k(a-b+c-d), HH = k(a-b-c+d) for the factor k.
template <class Value, class Real>
WAVEDP_HOST_DEVICE inline Bands<Value> analyse(const Block<Value>& x, Real factor) {
  const Value low_even = x.a + x.c, low_odd = x.b + x.d, high_even = x.a - x.c, high_odd = x.b - x.d;
  return {factor * (low_even + low_odd), factor * (high_even + high_odd), factor * (low_even - low_odd),
          factor * (high_even - high_odd)};
}

// The matrix is symmetric; with the factor 1/2 it is its own inverse.
template <class Value, class Real>
WAVEDP_HOST_DEVICE inline Block<Value> synthesise(const Bands<Value>& y, Real factor) {
  const Value top = y.ll + y.lh, bottom = y.ll - y.lh, top_step = y.hl + y.hh, bottom_step = y.hl - y.hh;
  return {factor * (top + top_step), factor * (top - top_step), factor * (bottom + bottom_step),
          factor * (bottom - bottom_step)};
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

// The virtual sample from sample(k); no term is added that the rule does not have, as 0 * inf is not 0.
template <class Real, class Sample>
WAVEDP_HOST_DEVICE inline Real virtual_sample(const Taps& taps, Sample sample) {
  if (taps.count == 0) return Real(0);
  const Real first = Real(taps.weight[0]) * sample(taps.index[0]);
  return taps.count == 1 ? first : first + Real(taps.weight[1]) * sample(taps.index[1]);
}

}  // namespace
}  // namespace wavedp
