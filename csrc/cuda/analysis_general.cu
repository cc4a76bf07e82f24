// SPDX-License-Identifier: Apache-2.0
// The transform of any images: all sizes, strides, edge rules and pairs of types, by a tile of 4 x 4 pixels
// per thread with single loads and stores. Levels above 2 go on in shared memory. Also the sums of the
// coefficients' squares.
#include "recompute.cuh"

namespace wavedp {
namespace {

template <class Real>
__device__ inline void put_any(const Layout& layout, const Scale& scale, int band, const Place& at, Real x) {
  if (layout.shift) x = Normalisation<true, Real>(layout, scale, band, at.channel)(x);
  store_any(scale.band[band], layout.dtype, offset(scale, at), x);
}

// Where coefficients go: to the bands or tokens, ...
template <class Real>
struct Coefficients {
  __device__ __noinline__ void put(const Layout& layout, int k, int64_t n, int64_t i, int64_t j,
                                   const Bands<Real> y) {
    const Scale& scale = layout.details[k - 1];
    if (scale.band[0]) {
      const Place at = locate(layout, scale, n, i, j);
      put_any(layout, scale, 0, at, y.lh);
      put_any(layout, scale, 1, at, y.hl);
      put_any(layout, scale, 2, at, y.hh);
    }
    if (k == layout.levels) put_any(layout, layout.ll, 0, locate(layout, layout.ll, n, i, j), y.ll);
  }
};

// ... or only into the sums of their squares.
template <class Real>
struct Energies {
  Real ll, lh[kMaxLevels], hl[kMaxLevels], hh[kMaxLevels];

  __device__ void put(const Layout& layout, int k, int64_t, int64_t, int64_t, const Bands<Real>& y) {
    lh[k - 1] += y.lh * y.lh;
    hl[k - 1] += y.hl * y.hl;
    hh[k - 1] += y.hh * y.hh;
    if (k == layout.levels) ll += y.ll * y.ll;
  }
};

constexpr int kTileLevels = 2;

// Level K <= kTileLevels of a thread's tile: LL_K at (i, j) and after it from LL_(K - 1) at (2 i, 2 j) and
// after it.
template <int K, bool EDGES, int ROWS, class In, class Sink, class Real>
__device__ inline void analyse_tile(const Analysis& job, const Plane<In>& plane, int64_t n, int64_t i,
                                    int64_t j, Real (&x)[ROWS][ROWS], Real (&ll)[ROWS / 2][ROWS / 2],
                                    Sink& sink) {
  const Layout& layout = job.layout;
  [[maybe_unused]] const int64_t height = layout.height[K - 1], width = layout.width[K - 1];
#pragma unroll
  for (int r = 0; EDGES && r < ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < ROWS; ++c) {
      const int64_t row = 2 * i + r, column = 2 * j + c;
      const bool given = row < height && column < width;
      const bool read = row < 2 * layout.height[K] && column < 2 * layout.width[K];
      if constexpr (EDGES) {
        if (read && !given) x[r][c] = extended<K - 1>(plane, row, column);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS / 2; ++r) {
#pragma unroll
    for (int c = 0; c < ROWS / 2; ++c) {
      if (i + r >= layout.height[K] || j + c >= layout.width[K]) continue;
      const Block<Real> block{x[2 * r][2 * c], x[2 * r][2 * c + 1], x[2 * r + 1][2 * c],
                              x[2 * r + 1][2 * c + 1]};
      const Bands<Real> y = analyse(block, Real(job.factor));
      ll[r][c] = y.ll;
      sink.put(layout, K, n, i + r, j + c, y);
    }
  }
}

// LL_k of the cells in a strip, by row and column in the image; what lies beside the cell is computed anew.
template <class In>
struct StripValues {
  const Plane<In>& plane;
  const Cell& cell;
  const RealOf<In>* values;  // the first of the cell
  int k, side, stride;

  __device__ __noinline__ RealOf<In> completed(int64_t row, int64_t column) const {
    const Layout& layout = plane.job.layout;
    return complete<RealOf<In>>(plane.job.edge, layout.height[k], layout.width[k], row, column,
                                [&](int64_t i, int64_t j) { return (*this)(i, j); });
  }

  __device__ RealOf<In> operator()(int64_t row, int64_t column) const {
    if (row >> side != cell.i || column >> side != cell.j) return approximation_at(k, plane, row, column);
    return values[(row & ((1 << side) - 1)) * stride + (column & ((1 << side) - 1))];
  }
};

// The levels above kTileLevels, of the block's strip of LL_kTileLevels.
template <class In, bool EDGES, class Sink>
__device__ inline void analyse_strip_general(const Analysis& job, const Strip& strip, RealOf<In>* values,
                                             Sink& sink) {
  using Real = RealOf<In>;
  const Layout& layout = job.layout;
#pragma unroll 1
  for (int k = kTileLevels + 1; k <= layout.levels; ++k) {
    const int side = layout.levels - k, finer = strip.columns(side + 1);
    Real* const next = values + strip.items(side + 1);
    __syncthreads();
#pragma unroll 1
    for (int item = threadIdx.x; item < strip.items(side); item += kThreads) {
      const int row = item >> (strip.cell_bits + side), column = item & (strip.columns(side) - 1);
      const Cell cell = strip.cell(column, side);
      const int64_t i = (cell.i << side) + row, j = (cell.j << side) + (column & ((1 << side) - 1));
      if (!cell.exists || i >= layout.height[k] || j >= layout.width[k]) continue;
      const Real* const top = values + 2 * row * finer + 2 * column;
      Block<Real> x{top[0], top[1], top[finer], top[finer + 1]};
      if constexpr (EDGES) {
        const bool right = 2 * j + 1 >= layout.width[k - 1], below = 2 * i + 1 >= layout.height[k - 1];
        if (right || below) {
          const Plane<In> plane(job, cell.n);
          const Real* const first = values + (column >> side << (side + 1));
          const StripValues<In> value{plane, cell, first, k - 1, side + 1, finer};
          if (right) x.b = value.completed(2 * i, 2 * j + 1);
          if (below) x.c = value.completed(2 * i + 1, 2 * j);
          x.d = value.completed(2 * i + 1, 2 * j + 1);
        }
      }
      const Bands<Real> y = analyse(x, Real(job.factor));
      next[item] = y.ll;
      sink.put(layout, k, cell.n, i, j, y);
    }
    values = next;
  }
}

// All levels of the cells of one strip. Without EDGES no size is odd on the way.
template <class In, bool EDGES, class Sink>
__device__ inline void analyse_cells(const Analysis& job, const Strip& strip, int side, RealOf<In>* values,
                                     Sink& sink) {
  using Real = RealOf<In>;
  const Layout& layout = job.layout;
#pragma unroll 1
  for (int item = threadIdx.x; item < strip.items(side); item += kThreads) {
    const int row = item >> (strip.cell_bits + side), column = item & (strip.columns(side) - 1);
    const Cell cell = strip.cell(column, side);
    if (!cell.exists) continue;
    const int64_t i = (cell.i << side) + row, j = (cell.j << side) + (column & ((1 << side) - 1));
    const Plane<In> plane(job, cell.n);
    Real x[4][4] = {}, ll1[2][2] = {}, ll2[1][1] = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (4 * i + r < layout.height[0] && 4 * j + c < layout.width[0]) {
          x[r][c] = plane.sample(4 * i + r, 4 * j + c);
        }
      }
    }
    analyse_tile<1, EDGES>(job, plane, cell.n, 2 * i, 2 * j, x, ll1, sink);
    if (layout.levels == 1) continue;
    analyse_tile<2, EDGES>(job, plane, cell.n, i, j, ll1, ll2, sink);
    if (side > 0) values[item] = ll2[0][0];
  }
  analyse_strip_general<In, EDGES>(job, strip, values, sink);
}

struct Tiles {
  int side, cell_bits;
  int64_t down, across;

  WAVEDP_HOST_DEVICE explicit Tiles(const Layout& layout)
      : side(layout.levels > kTileLevels ? layout.levels - kTileLevels : 0),
        cell_bits(wavedp::cell_bits(side)),
        down(((layout.height[0] - 1) >> (side + kTileLevels)) + 1),
        across(((layout.width[0] - 1) >> (side + kTileLevels)) + 1) {}
};

extern __shared__ double shared_values[];

template <class In>
__global__ void __launch_bounds__(kThreads, 4) analysis_general_kernel(const __grid_constant__ Analysis job) {
  const Tiles tiles(job.layout);
  const int64_t cells = job.images.outer * job.images.inner * tiles.down * tiles.across;
  const Strip strip{int64_t(blockIdx.x) << tiles.cell_bits, cells, tiles.down, tiles.across, tiles.cell_bits};
  Coefficients<RealOf<In>> sink;
  analyse_cells<In, true>(job, strip, tiles.side, reinterpret_cast<RealOf<In>*>(shared_values), sink);
}

// The sum of the threads' `x`, in an order that does not depend on timing.
template <class Real>
__device__ inline void sum_over_block(Real x, Real* scratch, Real* to) {
  __syncthreads();
  scratch[threadIdx.x] = x;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *to = scratch[0];
}

// One block per image and channel reads it a second time and writes nothing but sums, without atomics or a
// second pass over partial sums. Few images leave most of a GPU idle.
template <class In>
__global__ void __launch_bounds__(kThreads, 4) energies_kernel(const __grid_constant__ Analysis job) {
  using Real = RealOf<In>;
  const Layout& layout = job.layout;
  const Tiles tiles(layout);
  Real* const values = reinterpret_cast<Real*>(shared_values);
  const int64_t n = blockIdx.x, of_image = tiles.down * tiles.across;
  Energies<Real> sums{};
  for (int64_t first = n * of_image; first < (n + 1) * of_image; first += int64_t(1) << tiles.cell_bits) {
    const Strip strip{first, (n + 1) * of_image, tiles.down, tiles.across, tiles.cell_bits};
    analyse_cells<In, false>(job, strip, tiles.side, values, sums);
    __syncthreads();
  }
  const int64_t batch = quotient(n, layout.channels), channel = n - batch * layout.channels;
  Real* const to =
      static_cast<Real*>(job.energies) + batch * layout.channels * (3 * layout.levels + 1) + channel;
  sum_over_block(sums.ll, values, to);
  for (int k = 1; k <= layout.levels; ++k) {
    Real* const first = to + layout.details[k - 1].channel;
    sum_over_block(sums.lh[k - 1], values, first);
    sum_over_block(sums.hl[k - 1], values, first + layout.channels);
    sum_over_block(sums.hh[k - 1], values, first + 2 * layout.channels);
  }
}

template <class In>
int launch_general(const Analysis& job, void* stream) {
  const Tiles tiles(job.layout);
  const int64_t cells = job.images.outer * job.images.inner * tiles.down * tiles.across;
  const size_t values = tiles.side == 0 ? 0 : strip_values(1 << tiles.cell_bits, tiles.side);
  return launch(analysis_general_kernel<In>, blocks_of(cells, tiles.cell_bits), values * sizeof(RealOf<In>),
                stream, job);
}

template <class In>
int launch_energies(const Analysis& job, void* stream) {
  const Tiles tiles(job.layout);
  const size_t values = strip_values(1 << tiles.cell_bits, tiles.side);
  return launch(energies_kernel<In>, job.images.outer * job.images.inner, values * sizeof(RealOf<In>), stream,
                job);
}

// call(In()) for the type of the images.
template <class Call>
int for_dtype(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat32:
      return call(float());
    case DType::kFloat64:
      return call(double());
    case DType::kBFloat16:
      return call(__nv_bfloat16());
    case DType::kFloat16:
      return call(__half());
    case DType::kUInt8:
      return call(uint8_t());
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int analyse_general(const Analysis& job, void* stream) {
  return for_dtype(job.images.dtype, [&](auto in) { return launch_general<decltype(in)>(job, stream); });
}

int sum_squares(const Analysis& job, void* stream) {
  return for_dtype(job.images.dtype, [&](auto in) { return launch_energies<decltype(in)>(job, stream); });
}

}  // namespace wavedp
