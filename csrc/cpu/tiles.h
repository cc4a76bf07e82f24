// SPDX-License-Identifier: Apache-2.0
// The two products of which norms are made, one tile of the result in registers at a time.
#pragma once

#include "rows.h"

namespace wavedp::WAVEDP_ISA {
namespace {

// Tile of x y^T for rows x and y: every entry is a dot product, summed in the lanes of one register. Loads of
// rows are used kDotCols and kDotRows times.
constexpr int kDotRows = 4, kDotCols = kVectorBytes == 64 ? 4 : 2;
constexpr int kDotTile = kDotRows * kDotCols;

// Tile of x^T y: entries of a row of y are the lanes, those of a row of x are spread over all lanes.
constexpr int kOuterRows = kVectorBytes == 64 ? 8 : 4, kOuterVectors = 2;

// v[0] becomes the vector of the sums of the lanes of v[0], v[1], ...: as many as there are lanes.
template <int kCount, class V>
inline void sum_lanes(V* v) {
  if constexpr (kCount > 1) {
    constexpr int kHalf = kCount / 2;
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      v[i] = merged<kHalf, false>(v[i], v[i + kHalf], Lanes<V>()) +
             merged<kHalf, true>(v[i], v[i + kHalf], Lanes<V>());
    }
    sum_lanes<kHalf>(v);
  }
}

// tile[i * kDotCols + j] (+)= x[i] . y[j] over `count` entries, whole vectors of them.
template <bool kAdd, class Real>
inline void dot_tile(const Real* const* x, const Real* const* y, int64_t count, Real* tile) {
  using V = Lane<Real>;
  constexpr int n = static_cast<int>(kLanes<Real>);
  V sums[kDotTile] = {};
  for (int64_t k = 0; k < count; k += n) {
    V row[kDotRows];
#pragma GCC unroll 4
    for (int i = 0; i < kDotRows; ++i) row[i] = load<V>(x[i] + k);
#pragma GCC unroll 4
    for (int j = 0; j < kDotCols; ++j) {
      const V column = load<V>(y[j] + k);
#pragma GCC unroll 4
      for (int i = 0; i < kDotRows; ++i) sums[i * kDotCols + j] += row[i] * column;
    }
  }
#pragma GCC unroll 8
  for (int part = 0; part < kDotTile; part += n) {
    sum_lanes<n>(sums + part);
    store(tile + part, kAdd ? load<V>(tile + part) + sums[part] : sums[part]);
  }
}

// The same of rows that are `stride` apart.
template <bool kAdd, class Real>
inline void dot_tile(const Real* x, const Real* y, int64_t stride, int64_t count, Real* tile) {
  const Real *rows[kDotRows], *columns[kDotCols];
  for (int i = 0; i < kDotRows; ++i) rows[i] = x + i * stride;
  for (int j = 0; j < kDotCols; ++j) columns[j] = y + j * stride;
  dot_tile<kAdd>(rows, columns, count, tile);
}

// tile[i][.] = sum_t x[t * width + i] * y[t * width + .] for kOuterRows entries of x and kOuterVectors
// vectors of y, both in panels of this width.
template <class Real>
inline void outer_tile(const Real* x, const Real* y, int64_t tokens, Real* tile) {
  using V = Lane<Real>;
  constexpr int64_t n = kLanes<Real>, width = kOuterVectors * n;
  V sums[kOuterRows][kOuterVectors] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    V row[kOuterVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kOuterVectors; ++v) row[v] = load<V>(y + t * width + v * n);
#pragma GCC unroll 8
    for (int i = 0; i < kOuterRows; ++i) {
      const V entry = V{} + x[t * width + i];
#pragma GCC unroll 2
      for (int v = 0; v < kOuterVectors; ++v) sums[i][v] += entry * row[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kOuterRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kOuterVectors; ++v) store(tile + i * width + v * n, sums[i][v]);
  }
}

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
