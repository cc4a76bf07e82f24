// SPDX-License-Identifier: Apache-2.0
// The way back, from bands or tokens to images. A thread of synthesis_kernel owns 2^r rows of 8 pixels, r =
// min(levels, 3), and writes them by 16 bytes; the levels above 3 are undone in shared memory first.
// Everything else takes synthesis_general_kernel: a thread owns 2 x 2 pixels and walks down to them from LL.
#include "recompute.cuh"

namespace wavedp {
namespace {

template <class T, bool AFFINE, int N>
__device__ inline void get_run(const Layout& layout, const Scale& scale, int band, int64_t channel,
                               int64_t offset, float (&x)[N]) {
  if constexpr (AFFINE) {
    const int64_t index = scale.channel + band * layout.channels + channel;
    const float gain = static_cast<const float*>(layout.scale)[index];
    const float bias = static_cast<const float*>(layout.shift)[index];
    load_run(static_cast<const T*>(scale.band[band]) + offset, x);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = x[j] * gain + bias;
  } else if (scale.band[band]) {
    load_run(static_cast<const T*>(scale.band[band]) + offset, x);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = 0;
  }
}

// The details of level K in a thread's block.
template <int ROWS, int COLUMNS>
struct Details {
  float lh[ROWS][COLUMNS], hl[ROWS][COLUMNS], hh[ROWS][COLUMNS];
};

template <class T, bool AFFINE, int K, int R, int ROWS, int COLUMNS>
__device__ inline void get_details(const Synthesis& job, const Place& at, Details<ROWS, COLUMNS>& y) {
  const Scale& details = job.layout.details[K - 1];
  int64_t from = offset(details, {at.token, at.channel, at.row << (R - K), at.column << (R - K)});
#pragma unroll
  for (int i = 0; i < ROWS; ++i, from += details.columns) {
    get_run<T, AFFINE>(job.layout, details, 0, at.channel, from, y.lh[i]);
    get_run<T, AFFINE>(job.layout, details, 1, at.channel, from, y.hl[i]);
    get_run<T, AFFINE>(job.layout, details, 2, at.channel, from, y.hh[i]);
  }
}

template <int ROWS, int COLUMNS>
__device__ inline void synthesise_level(float factor, const float (&ll)[ROWS][COLUMNS],
                                        const Details<ROWS, COLUMNS>& y, float (&x)[2 * ROWS][2 * COLUMNS]) {
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const Bands<float> bands{ll[i][j], y.lh[i][j], y.hl[i][j], y.hh[i][j]};
      const Block<float> block = synthesise(bands, factor);
      x[2 * i][2 * j] = block.a;
      x[2 * i][2 * j + 1] = block.b;
      x[2 * i + 1][2 * j] = block.c;
      x[2 * i + 1][2 * j + 1] = block.d;
    }
  }
}

// LL_3 of the block's strip into `values` from the levels above 3. The strips lie as in analysis: finest
// first.
template <class T>
__device__ inline void synthesise_strip(const Synthesis& job, const Strip& strip, float* values) {
  const Layout& layout = job.layout;
  const float factor = static_cast<float>(job.factor);
  for (int k = layout.levels; k > kBlockLevels; --k) {
    const int side = layout.levels - k, finer = strip.columns(side + 1);
    float* fine = values;
    for (int s = layout.levels - kBlockLevels; s > side + 1; --s) fine += strip.items(s);
    const float* const coarse = fine + strip.items(side + 1);
    for (int item = threadIdx.x; item < strip.items(side); item += kThreads) {
      const int row = item >> (strip.cell_bits + side), column = item & (strip.columns(side) - 1);
      const Cell cell = strip.cell(column, side);
      if (!cell.exists) continue;
      const int64_t i = (cell.i << side) + row, j = (cell.j << side) + (column & ((1 << side) - 1));
      const float ll = side == 0
                           ? coefficient<T>(layout, layout.ll, 0, locate(layout, layout.ll, cell.n, i, j))
                           : coarse[item];
      const Block<float> x = synthesise(with_details<T>(layout, k, cell.n, i, j, ll), factor);
      float* const top = fine + 2 * row * finer + 2 * column;
      top[0] = x.a;
      top[1] = x.b;
      top[finer] = x.c;
      top[finer + 1] = x.d;
    }
    __syncthreads();
  }
}

template <int R>
constexpr int kColumnBits = kBlockLevels - R;

template <class T, int R, bool AFFINE>
__global__ void __launch_bounds__(kThreads) synthesis_kernel(const __grid_constant__ Synthesis job) {
  constexpr int kDeepest = R == kBlockLevels ? kMaxLevels - kBlockLevels : 0;
  __shared__ float values[R == kBlockLevels ? strip_values(1, kDeepest) : 1];
  const Layout& layout = job.layout;
  const float factor = static_cast<float>(job.factor);
  const int side = layout.levels - R;
  const int bits = cell_bits(side);
  const int64_t down = layout.height[layout.levels], across = layout.width[layout.levels] >> kColumnBits<R>;
  const Strip strip{int64_t(blockIdx.x) << bits, job.n * down * across, down, across, bits};
  if constexpr (R == kBlockLevels) synthesise_strip<T>(job, strip, values);
#pragma unroll 1
  for (int item = threadIdx.x; item < strip.items(side); item += kThreads) {
    const int row = item >> (bits + side), column = item & (strip.columns(side) - 1);
    const Cell cell = strip.cell(column, side);
    if (!cell.exists) continue;
    const int64_t i = (cell.i << side) + row, j = (cell.j << side) + (column & ((1 << side) - 1));
    const Place at = locate(layout, layout.details[R - 1], cell.n, i, j << kColumnBits<R>);
    const int64_t of_ll = offset(layout.ll, at);
    float x[1 << R][kBlockColumns];
    Details<(1 << R) / 2, 4> fine;
    get_details<T, AFFINE, 1, R>(job, at, fine);
    if constexpr (R == 1) {
      float ll1[1][4];
      get_run<T, AFFINE>(layout, layout.ll, 0, at.channel, of_ll, ll1[0]);
      synthesise_level(factor, ll1, fine, x);
    } else {
      float ll1[(1 << R) / 2][4], ll2[(1 << R) / 4][2];
      Details<(1 << R) / 4, 2> middle;
      get_details<T, AFFINE, 2, R>(job, at, middle);
      if constexpr (R == 2) {
        get_run<T, AFFINE>(layout, layout.ll, 0, at.channel, of_ll, ll2[0]);
      } else {
        float ll3[1][1];
        Details<1, 1> third;
        get_details<T, AFFINE, 3, R>(job, at, third);
        if (side == 0) {
          get_run<T, AFFINE>(layout, layout.ll, 0, at.channel, of_ll, ll3[0]);
        } else {
          ll3[0][0] = values[item];
        }
        synthesise_level(factor, ll3, third, ll2);
      }
      synthesise_level(factor, ll2, middle, ll1);
      synthesise_level(factor, ll1, fine, x);
    }
    const int64_t pixel = (cell.n * layout.height[0] + (i << R)) * layout.width[0] + j * kBlockColumns;
    T* const to = static_cast<T*>(job.x) + pixel;
#pragma unroll
    for (int r = 0; r < 1 << R; ++r) store_run(to + r * layout.width[0], x[r]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    synthesis_general_kernel(const __grid_constant__ Synthesis job) {
  const Layout& layout = job.layout;
  const int64_t item = (int64_t(blockIdx.x) << kThreadBits) + threadIdx.x;
  const int64_t row = quotient(item, layout.width[1]), n = quotient(row, layout.height[1]);
  if (n >= job.n) return;
  const int64_t i = row - n * layout.height[1], j = item - row * layout.width[1];
  const RealOf<T> ll = folded<1, T>(job, n, i, j);
  const auto x = synthesise(with_details<T>(layout, 1, n, i, j, ll), RealOf<T>(job.factor));
  const RealOf<T> block[2][2] = {{x.a, x.b}, {x.c, x.d}};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int64_t y = 2 * i + r, z = 2 * j + c;
      if (y >= layout.height[0] || z >= layout.width[0]) continue;
      const bool borrowed =
          fold_weight(job.edge, layout.height[0], y) || fold_weight(job.edge, layout.width[0], z);
      T* const to = static_cast<T*>(job.x) + (n * layout.height[0] + y) * layout.width[0] + z;
      narrow(borrowed ? folded<0, T>(job, n, y, z) : block[r][c], *to);
    }
  }
}

template <class T>
int launch_general(const Synthesis& job, void* stream) {
  const int64_t items = job.n * job.layout.height[1] * job.layout.width[1];
  return launch(synthesis_general_kernel<T>, blocks_of(items, kThreadBits), 0, stream, job);
}

template <class T, bool AFFINE>
int launch_blocks(const Synthesis& job, void* stream) {
  const int r = job.layout.levels < kBlockLevels ? job.layout.levels : kBlockLevels;
  const int64_t down = job.layout.height[job.layout.levels];
  const int64_t across = job.layout.width[job.layout.levels] >> (kBlockLevels - r);
  const auto kernel = r == 1   ? synthesis_kernel<T, 1, AFFINE>
                      : r == 2 ? synthesis_kernel<T, 2, AFFINE>
                               : synthesis_kernel<T, 3, AFFINE>;
  return launch(kernel, blocks_of(job.n * down * across, cell_bits(job.layout.levels - r)), 0, stream, job);
}

template <class T>
int launch_synthesis(const Synthesis& job, void* stream) {
  if (!blocks_fit(job.layout) || !aligned(job.x, kRunAlignment<T, kBlockColumns>)) {
    return launch_general<T>(job, stream);
  }
  return job.layout.shift ? launch_blocks<T, true>(job, stream) : launch_blocks<T, false>(job, stream);
}

int launch_for_dtype(const Synthesis& job, void* stream) {
  if (job.n == 0 || job.layout.height[0] == 0 || job.layout.width[0] == 0) return cudaSuccess;
  switch (job.layout.dtype) {
    case DType::kFloat32:
      return launch_synthesis<float>(job, stream);
    case DType::kFloat64:
      return launch_general<double>(job, stream);
    case DType::kBFloat16:
      return launch_synthesis<__nv_bfloat16>(job, stream);
    case DType::kFloat16:
      return launch_synthesis<__half>(job, stream);
    case DType::kUInt8:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int waverec2_cuda(const Waverec2& job, void* stream) {
  if (job.levels < 1 || job.levels > kMaxLevels) return cudaErrorInvalidValue;
  const Layout layout = layout_of_bands(job.bands, job.dtype, job.levels, job.n, job.height, job.width);
  return launch_for_dtype({job.x, job.n, layout, job.edge, job.factor}, stream);
}

int wavelet_untokens_cuda(const WaveletUntokens& job, void* stream) {
  if (job.levels < 1 || job.levels > kMaxLevels) return cudaErrorInvalidValue;
  const Layout layout = layout_of_tokens(job.tokens, job.dtype, job.levels, job.channels, job.height,
                                         job.width, job.grid_h, job.grid_w, job.shift, job.scale);
  return launch_for_dtype({job.x, job.batch * job.channels, layout, Edge::kZero, job.factor}, stream);
}

}  // namespace wavedp
