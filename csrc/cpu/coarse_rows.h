// SPDX-License-Identifier: Apache-2.0
// A row of LL_k straight from 2^k rows of an image, in registers: what lies between is never stored. The sums
// are those of haar_rows.h in the same order.
//
// To the hardware's prefetchers so many rows side by side do not look sequential, so all that is read is
// asked for, one row of blocks ahead and again just before. Of the rate of a sum, 205 MB are read at 1.28 for
// LL_3, 0.93 with the near request alone, 1.23 with the far one alone, and 1.06 row by row (Xeon with AMX).
#pragma once

#include "haar_rows.h"

namespace wavedp::WAVEDP_ISA {
namespace {

constexpr int kMaxFusedLow = 3;

// As many cells of LL_k as a vector holds, from the 2^k rows from `x` on. The same of the 2^kAhead rows below
// is asked for.
template <int kLevels, int kAhead, class V, class Real>
inline V low_cells(const Real* x, int64_t stride, Real factor) {
  if constexpr (kLevels == 0) {
    __builtin_prefetch(x + kNearBytes / sizeof(Real), 0, 3);
    __builtin_prefetch(x + (stride << kAhead), 0, 2);
    return load<V>(x);
  } else {
    const int64_t across = static_cast<int64_t>(sizeof(V) / sizeof(Real)) << (kLevels - 1);
    const Real* below = x + (stride << (kLevels - 1));
    const V left = low_cells<kLevels - 1, kAhead, V>(x, stride, factor) +
                   low_cells<kLevels - 1, kAhead, V>(below, stride, factor);
    const V right = low_cells<kLevels - 1, kAhead, V>(x + across, stride, factor) +
                    low_cells<kLevels - 1, kAhead, V>(below + across, stride, factor);
    const auto [even, odd] = parted<V>(left, right);
    return factor * (even + odd);
  }
}

template <int kLevels, class Real>
inline Real low_cell(const Real* x, int64_t stride, Real factor) {
  if constexpr (kLevels == 0) {
    return *x;
  } else {
    const int64_t across = int64_t(1) << (kLevels - 1), down = stride << (kLevels - 1);
    const Block<Real> block{low_cell<kLevels - 1>(x, stride, factor),
                            low_cell<kLevels - 1>(x + across, stride, factor),
                            low_cell<kLevels - 1>(x + down, stride, factor),
                            low_cell<kLevels - 1>(x + down + across, stride, factor)};
    return analyse(block, factor).ll;
  }
}

template <int kLevels, class Real>
void low_row_of(const Real* x, int64_t stride, int64_t cells, Real factor, Real* low) {
  int64_t j = 0;
  in_smaller_vectors<kVectorBytes>([&](auto bytes) {
    using V = Vector<Real, bytes()>;
    constexpr int64_t kLanes = bytes() / sizeof(Real);
    for (; j + kLanes <= cells; j += kLanes) {
      store<V>(low + j, low_cells<kLevels, kLevels, V>(x + (j << kLevels), stride, factor));
    }
  });
  for (; j < cells; ++j) low[j] = low_cell<kLevels>(x + (j << kLevels), stride, factor);
}

// `cells` cells of LL_k, k <= kMaxFusedLow, from the rows from `x` on.
template <class Real>
void low_row(int levels, const Real* x, int64_t stride, int64_t cells, Real factor, Real* low) {
  if (levels == 1) return low_row_of<1>(x, stride, cells, factor, low);
  if (levels == 2) return low_row_of<2>(x, stride, cells, factor, low);
  low_row_of<3>(x, stride, cells, factor, low);
}

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
