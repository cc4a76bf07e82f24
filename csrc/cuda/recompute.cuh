// SPDX-License-Identifier: Apache-2.0
// Single values of any level from what is in memory alone: for the few that another thread block holds,
// because an edge rule makes a missing sample of them. Each level has a function of its own, so that the
// stack has a bound.
#pragma once

#include "number.cuh"

namespace wavedp {
namespace {

// Functions that are not inline keep the code small: each level would have a copy of its own.
__device__ __noinline__ Taps taps_of(Edge edge, int64_t length) { return virtual_taps(edge, length); }

// The sample (row, column) of value(row, column) with its missing row and column, columns completed first.
template <class Real, class Value>
__device__ inline Real complete(Edge edge, int64_t height, int64_t width, int64_t row, int64_t column,
                                const Value& value) {
  const auto across = [&](int64_t r) -> Real {
    if (column < width) return value(r, column);
    return virtual_sample<Real>(taps_of(edge, width), [&](int64_t c) { return value(r, c); });
  };
  return row < height ? across(row) : virtual_sample<Real>(taps_of(edge, height), across);
}

template <class In>
struct Plane {
  const Analysis& job;
  const In* x;

  __device__ Plane(const Analysis& job, int64_t n) : job(job) {
    const Images& images = job.images;
    const int64_t outer = quotient(n, images.inner), inner = n - outer * images.inner;
    x = static_cast<const In*>(images.x) + outer * images.stride_outer + inner * images.stride_inner;
  }

  __device__ RealOf<In> sample(int64_t row, int64_t column) const {
    const auto value = widen(x[row * job.images.stride_h + column * job.images.stride_w]);
    if constexpr (sizeof(In) > 1) return value;
    return static_cast<float>(job.images.gain) * value + static_cast<float>(job.images.bias);
  }
};

template <int K, class In>
__device__ __noinline__ RealOf<In> extended(const Plane<In>& plane, int64_t row, int64_t column);

// LL_K
template <int K, class In>
__device__ __noinline__ RealOf<In> approximation(const Plane<In>& plane, int64_t i, int64_t j) {
  if constexpr (K == 0) {
    return plane.sample(i, j);
  } else {
    const Block<RealOf<In>> x{extended<K - 1>(plane, 2 * i, 2 * j), extended<K - 1>(plane, 2 * i, 2 * j + 1),
                              extended<K - 1>(plane, 2 * i + 1, 2 * j),
                              extended<K - 1>(plane, 2 * i + 1, 2 * j + 1)};
    return analyse(x, RealOf<In>(plane.job.factor)).ll;
  }
}

template <int K, class In>
__device__ __noinline__ RealOf<In> extended(const Plane<In>& plane, int64_t row, int64_t column) {
  const Layout& layout = plane.job.layout;
  const auto value = [&](int64_t i, int64_t j) { return approximation<K>(plane, i, j); };
  return complete<RealOf<In>>(plane.job.edge, layout.height[K], layout.width[K], row, column, value);
}

template <class In, int K = 0>
__device__ inline RealOf<In> approximation_at(int k, const Plane<In>& plane, int64_t i, int64_t j) {
  if (k == K) return approximation<K>(plane, i, j);
  if constexpr (K + 1 < kMaxLevels) return approximation_at<In, K + 1>(k, plane, i, j);
  return 0;
}

// token * scale + shift
template <class Real>
__device__ inline Real denormalised(const Layout& layout, const Scale& scale, int band, int64_t channel,
                                    Real x) {
  if (!layout.shift) return x;
  const int64_t index = scale.channel + band * layout.channels + channel;
  return x * static_cast<const Real*>(layout.scale)[index] + static_cast<const Real*>(layout.shift)[index];
}

template <class T>
__device__ inline RealOf<T> coefficient(const Layout& layout, const Scale& scale, int band, const Place& at) {
  if (!scale.band[band]) return RealOf<T>(0);
  const auto x = widen(static_cast<const T*>(scale.band[band])[offset(scale, at)]);
  return denormalised(layout, scale, band, at.channel, x);
}

// The details of level k at (i, j) with `ll`.
template <class T>
__device__ __noinline__ Bands<RealOf<T>> with_details(const Layout& layout, int k, int64_t n, int64_t i,
                                                      int64_t j, RealOf<T> ll) {
  const Scale& scale = layout.details[k - 1];
  const Place at = locate(layout, scale, n, i, j);
  return {ll, coefficient<T>(layout, scale, 0, at), coefficient<T>(layout, scale, 1, at),
          coefficient<T>(layout, scale, 2, at)};
}

template <int K, class T>
__device__ __noinline__ RealOf<T> folded(const Synthesis& job, int64_t n, int64_t row, int64_t column);

// The sample (row, column) at level K of the synthesis, its virtual row and column included.
template <int K, class T>
__device__ __noinline__ RealOf<T> unfolded(const Synthesis& job, int64_t n, int64_t row, int64_t column) {
  const int64_t i = row / 2, j = column / 2;
  const auto y = with_details<T>(job.layout, K + 1, n, i, j, folded<K + 1, T>(job, n, i, j));
  const auto x = synthesise(y, RealOf<T>(job.factor));
  return row % 2 ? (column % 2 ? x.d : x.c) : (column % 2 ? x.b : x.a);
}

// The same of the transpose: with what the edge rule took from this sample for the virtual ones.
template <int K, class T>
__device__ __noinline__ RealOf<T> folded(const Synthesis& job, int64_t n, int64_t row, int64_t column) {
  using Real = RealOf<T>;
  const Layout& layout = job.layout;
  if (K == layout.levels) {
    return coefficient<T>(layout, layout.ll, 0, locate(layout, layout.ll, n, row, column));
  }
  if constexpr (K < kMaxLevels) {
    const int down = fold_weight(job.edge, layout.height[K], row);
    const int right = fold_weight(job.edge, layout.width[K], column);
    const auto across = [&](int64_t r) {
      const Real own = unfolded<K, T>(job, n, r, column);
      return right == 0 ? own : own + Real(right) * unfolded<K, T>(job, n, r, layout.width[K]);
    };
    const Real own = across(row);
    return down == 0 ? own : own + Real(down) * across(layout.height[K]);
  }
  return Real(0);
}

}  // namespace
}  // namespace wavedp
