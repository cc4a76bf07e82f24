// SPDX-License-Identifier: Apache-2.0
// The transform of images to bands or tokens. A thread of analysis_kernel owns 2^r rows of 8 pixels, r =
// min(levels, 3), reads them by 16 bytes, and keeps all levels up to r in registers; LL_3 goes on in shared
// memory. What does not divide into such blocks, or has no aligned rows, goes to analysis_general.cu, and so
// does float64.
#include "number.cuh"

namespace wavedp {
namespace {

template <class Out, class Normalise, int N>
__device__ inline void put_run(const Scale& scale, int band, int64_t offset, const Normalise& normalise,
                               const float (&x)[N]) {
  float y[N];
#pragma unroll
  for (int j = 0; j < N; ++j) y[j] = normalise(x[j]);
  store_run(static_cast<Out*>(scale.band[band]) + offset, y);
}

// Level k of a thread's block: stores the details and returns LL. `at` is the block's place at level r.
template <class Out, bool AFFINE, int K, int R, int ROWS, int COLUMNS>
__device__ inline void analyse_level(const Analysis& job, const Place& at, const float (&x)[ROWS][COLUMNS],
                                     float (&ll)[ROWS / 2][COLUMNS / 2]) {
  const Scale& details = job.layout.details[K - 1];
  const float factor = static_cast<float>(job.factor);
  const bool coarse = details.band[0] == nullptr;
  using Normalise = Normalisation<AFFINE, float>;
  const Normalise of_lh(job.layout, details, 0, at.channel), of_hl(job.layout, details, 1, at.channel),
      of_hh(job.layout, details, 2, at.channel);
  int64_t to = offset(details, {at.token, at.channel, at.row << (R - K), at.column << (R - K)});
#pragma unroll
  for (int i = 0; i < ROWS / 2; ++i, to += details.columns) {
    float lh[COLUMNS / 2], hl[COLUMNS / 2], hh[COLUMNS / 2];
#pragma unroll
    for (int j = 0; j < COLUMNS / 2; ++j) {
      const Block<float> block{x[2 * i][2 * j], x[2 * i][2 * j + 1], x[2 * i + 1][2 * j],
                               x[2 * i + 1][2 * j + 1]};
      const Bands<float> y = analyse(block, factor);
      ll[i][j] = y.ll;
      lh[j] = y.lh;
      hl[j] = y.hl;
      hh[j] = y.hh;
    }
    if (coarse) continue;
    put_run<Out>(details, 0, to, of_lh, lh);
    put_run<Out>(details, 1, to, of_hl, hl);
    put_run<Out>(details, 2, to, of_hh, hh);
  }
}

template <class Out, bool AFFINE, int N>
__device__ inline void put_ll(const Layout& layout, const Place& at, const float (&ll)[N]) {
  const Normalisation<AFFINE, float> normalise(layout, layout.ll, 0, at.channel);
  put_run<Out>(layout.ll, 0, offset(layout.ll, at), normalise, ll);
}

// Levels from 4 up, of the block's strip of LL_3.
template <class Out, bool AFFINE>
__device__ inline void analyse_strip(const Analysis& job, const Strip& strip, float* values) {
  const Layout& layout = job.layout;
  const float factor = static_cast<float>(job.factor);
  for (int k = kBlockLevels + 1; k <= layout.levels; ++k) {
    const int side = layout.levels - k, finer = strip.columns(side + 1);
    float* const next = values + strip.items(side + 1);
    __syncthreads();
    for (int item = threadIdx.x; item < strip.items(side); item += kThreads) {
      const int row = item >> (strip.cell_bits + side), column = item & (strip.columns(side) - 1);
      const Cell cell = strip.cell(column, side);
      if (!cell.exists) continue;
      const float* const top = values + 2 * row * finer + 2 * column;
      const Bands<float> y = analyse(Block<float>{top[0], top[1], top[finer], top[finer + 1]}, factor);
      next[item] = y.ll;
      const Scale& details = layout.details[k - 1];
      const int64_t i = (cell.i << side) + row, j = (cell.j << side) + (column & ((1 << side) - 1));
      const Place at = locate(layout, details, cell.n, i, j);
      if (side == 0) put_ll<Out, AFFINE, 1>(layout, at, {y.ll});
      if (!details.band[0]) continue;
      const float x[3] = {y.lh, y.hl, y.hh};
#pragma unroll
      for (int b = 0; b < 3; ++b) {
        const Normalisation<AFFINE, float> normalise(layout, details, b, at.channel);
        const float one[1] = {x[b]};
        put_run<Out>(details, b, offset(details, at), normalise, one);
      }
    }
    values = next;
  }
}

template <class In>
__device__ inline void load_row(const Analysis& job, const In* from, float (&x)[kBlockColumns]) {
  load_run(from, x);
  if constexpr (sizeof(In) == 1) {
    const float gain = static_cast<float>(job.images.gain), bias = static_cast<float>(job.images.bias);
#pragma unroll
    for (float& sample : x) sample = gain * sample + bias;
  }
}

// The columns that a thread's block of 2^r x 8 pixels has at level r.
template <int R>
constexpr int kColumnBits = kBlockLevels - R;

template <class In, class Out, int R, bool AFFINE>
__global__ void __launch_bounds__(kThreads) analysis_kernel(const __grid_constant__ Analysis job) {
  constexpr int kDeepest = R == kBlockLevels ? kMaxLevels - kBlockLevels : 0;
  __shared__ float values[R == kBlockLevels ? strip_values(1, kDeepest) : 1];
  const Layout& layout = job.layout;
  const Images& images = job.images;
  const int side = layout.levels - R;
  const int bits = cell_bits(side);
  const int64_t down = layout.height[layout.levels], across = layout.width[layout.levels] >> kColumnBits<R>;
  const Strip strip{int64_t(blockIdx.x) << bits, images.outer * images.inner * down * across, down, across,
                    bits};
#pragma unroll 1
  for (int item = threadIdx.x; item < strip.items(side); item += kThreads) {
    const int row = item >> (bits + side), column = item & (strip.columns(side) - 1);
    const Cell cell = strip.cell(column, side);
    if (!cell.exists) continue;
    const int64_t i = (cell.i << side) + row, j = (cell.j << side) + (column & ((1 << side) - 1));
    const int64_t outer = quotient(cell.n, images.inner), inner = cell.n - outer * images.inner;
    const In* from = static_cast<const In*>(images.x) + outer * images.stride_outer +
                     inner * images.stride_inner + (i << R) * images.stride_h + j * kBlockColumns;
    float x[1 << R][kBlockColumns];
#pragma unroll
    for (int r = 0; r < 1 << R; ++r) load_row(job, from + r * images.stride_h, x[r]);
    const Place at = locate(layout, layout.details[R - 1], cell.n, i, j << kColumnBits<R>);
    float ll1[(1 << R) / 2][4];
    analyse_level<Out, AFFINE, 1, R>(job, at, x, ll1);
    if constexpr (R == 1) {
      put_ll<Out, AFFINE>(layout, at, ll1[0]);
    } else {
      float ll2[(1 << R) / 4][2];
      analyse_level<Out, AFFINE, 2, R>(job, at, ll1, ll2);
      if constexpr (R == 2) {
        put_ll<Out, AFFINE>(layout, at, ll2[0]);
      } else {
        float ll3[1][1];
        analyse_level<Out, AFFINE, 3, R>(job, at, ll2, ll3);
        if (side == 0) {
          put_ll<Out, AFFINE>(layout, at, ll3[0]);
        } else {
          values[item] = ll3[0][0];
        }
      }
    }
  }
  if constexpr (R == kBlockLevels) analyse_strip<Out, AFFINE>(job, strip, values);
}

template <class In>
bool rows_are_vectors(const Images& images) {
  constexpr int64_t kElements = kRunAlignment<In, kBlockColumns> / sizeof(In);
  return images.stride_w == 1 && aligned(images.x, kRunAlignment<In, kBlockColumns>) &&
         images.stride_h % kElements == 0 && (images.inner == 1 || images.stride_inner % kElements == 0) &&
         (images.outer == 1 || images.stride_outer % kElements == 0);
}

template <class In, class Out, bool AFFINE>
int launch_blocks(const Analysis& job, void* stream) {
  const int r = job.layout.levels < kBlockLevels ? job.layout.levels : kBlockLevels;
  const int64_t down = job.layout.height[job.layout.levels];
  const int64_t across = job.layout.width[job.layout.levels] >> (kBlockLevels - r);
  const int64_t cells = job.images.outer * job.images.inner * down * across;
  const auto kernel = r == 1   ? analysis_kernel<In, Out, 1, AFFINE>
                      : r == 2 ? analysis_kernel<In, Out, 2, AFFINE>
                               : analysis_kernel<In, Out, 3, AFFINE>;
  return launch(kernel, blocks_of(cells, cell_bits(job.layout.levels - r)), 0, stream, job);
}

template <class In, class Out>
int launch_blocks_of(const Analysis& job, void* stream) {
  return job.layout.shift ? launch_blocks<In, Out, true>(job, stream)
                          : launch_blocks<In, Out, false>(job, stream);
}

template <class In>
int launch_coefficients(const Analysis& job, void* stream) {
  if (rows_are_vectors<In>(job.images) && blocks_fit(job.layout)) {
    constexpr bool kBytes = sizeof(In) == 1;
    switch (job.layout.dtype) {
      case DType::kFloat32:
        if constexpr (kBytes || std::is_same_v<In, float>) return launch_blocks_of<In, float>(job, stream);
        break;
      case DType::kBFloat16:
        if constexpr (kBytes || std::is_same_v<In, __nv_bfloat16>) {
          return launch_blocks_of<In, __nv_bfloat16>(job, stream);
        }
        break;
      case DType::kFloat16:
        if constexpr (kBytes || std::is_same_v<In, __half>) return launch_blocks_of<In, __half>(job, stream);
        break;
      default:
        break;
    }
  }
  return analyse_general(job, stream);
}

int coefficients(const Analysis& job, void* stream) {
  switch (job.images.dtype) {
    case DType::kFloat32:
      return launch_coefficients<float>(job, stream);
    case DType::kBFloat16:
      return launch_coefficients<__nv_bfloat16>(job, stream);
    case DType::kFloat16:
      return launch_coefficients<__half>(job, stream);
    case DType::kUInt8:
      return launch_coefficients<uint8_t>(job, stream);
    default:
      return analyse_general(job, stream);
  }
}

int analyse(const Analysis& job, void* stream) {
  const Images& images = job.images;
  const bool doubles = images.dtype == DType::kFloat64;
  if (doubles != (job.layout.dtype == DType::kFloat64)) return cudaErrorInvalidValue;
  if (images.outer == 0 || images.inner == 0 || images.height == 0 || images.width == 0) return cudaSuccess;
  const int code = coefficients(job, stream);
  return code || !job.energies ? code : sum_squares(job, stream);
}

bool levels_fit(int levels) { return levels >= 1 && levels <= kMaxLevels; }

}  // namespace

int wavedec2_cuda(const Wavedec2& job, void* stream) {
  if (!levels_fit(job.levels)) return cudaErrorInvalidValue;
  const Images& images = job.images;
  const Layout layout = layout_of_bands(job.bands, job.band_dtype, job.levels, images.outer * images.inner,
                                        images.height, images.width);
  return analyse({images, layout, job.edge, job.factor, nullptr}, stream);
}

int wavelet_tokens_cuda(const WaveletTokens& job, void* stream) {
  if (!levels_fit(job.levels)) return cudaErrorInvalidValue;
  const Images& images = job.images;
  const Layout layout = layout_of_tokens(job.tokens, job.token_dtype, job.levels, images.inner, images.height,
                                         images.width, job.grid_h, job.grid_w, job.shift, job.scale);
  return analyse({images, layout, Edge::kZero, job.factor, job.energies}, stream);
}

const char* cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace wavedp
