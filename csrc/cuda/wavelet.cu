// SPDX-License-Identifier: Apache-2.0
// One thread owns one 2x2 block and neighbouring threads own neighbouring blocks, so that a warp reads two
// runs of 64 samples and writes four of 32, or the reverse.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "../haar.h"

namespace wavedp {
namespace {

constexpr int64_t kThreads = 256;

template <class Storage>
struct Arithmetic {
  using Real = float;
};
template <>
struct Arithmetic<double> {
  using Real = double;
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void put(float* target, float x) { *target = x; }
__device__ inline void put(double* target, double x) { *target = x; }
__device__ inline void put(__nv_bfloat16* target, float x) { *target = __float2bfloat16_rn(x); }
__device__ inline void put(__half* target, float x) { *target = __float2half_rn(x); }

template <class Storage>
struct alignas(2 * sizeof(Storage)) Pair {
  Storage first, second;
};

// The thread's first row among the n * rows of a band, and its first column; the grid strides from there.
__device__ inline int64_t first_row() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ inline int64_t row_step() { return int64_t(gridDim.x) * blockDim.y; }
__device__ inline int64_t first_column() { return int64_t(blockIdx.y) * blockDim.x + threadIdx.x; }
__device__ inline int64_t column_step() { return int64_t(gridDim.y) * blockDim.x; }

__device__ inline int64_t quotient(int64_t a, int64_t b) {
  // Division of 64 bits is a long subroutine; most indices fit in 32.
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

template <class Storage>
__device__ inline void put_bands(const Dwt2& job, int64_t cell,
                                 const Bands<typename Arithmetic<Storage>::Real>& y) {
  const int64_t plane = job.n * band_length(job.height) * band_length(job.width);
  Storage* target = static_cast<Storage*>(job.bands) + cell;
  put(target, y.ll);
  put(target + plane, y.lh);
  put(target + 2 * plane, y.hl);
  put(target + 3 * plane, y.hh);
}

template <class Storage>
__device__ inline typename Arithmetic<Storage>::Real get(const void* band, int64_t cell) {
  return band ? widen(static_cast<const Storage*>(band)[cell]) : typename Arithmetic<Storage>::Real(0);
}

template <class Storage>
__device__ inline Bands<typename Arithmetic<Storage>::Real> get_bands(const Idwt2& job, int64_t cell) {
  return {get<Storage>(job.bands[kLL], cell), get<Storage>(job.bands[kLH], cell),
          get<Storage>(job.bands[kHL], cell), get<Storage>(job.bands[kHH], cell)};
}

// Even sizes, and rows whose samples lie in aligned pairs: one load for two samples.
template <class Storage>
__global__ void __launch_bounds__(kThreads) dwt2_even_kernel(Dwt2 job) {
  using Real = typename Arithmetic<Storage>::Real;
  const int64_t rows = job.height / 2, columns = job.width / 2;
  for (int64_t row = first_row(); row < job.n * rows; row += row_step()) {
    const int64_t n = quotient(row, rows);
    const Storage* image = static_cast<const Storage*>(job.x) + n * job.stride_n;
    const Storage* top = image + 2 * (row - n * rows) * job.stride_h;
#pragma unroll 1
    for (int64_t j = first_column(); j < columns; j += column_step()) {
      const Pair<Storage> ab = reinterpret_cast<const Pair<Storage>*>(top)[j];
      const Pair<Storage> cd = reinterpret_cast<const Pair<Storage>*>(top + job.stride_h)[j];
      const Block<Real> x{widen(ab.first), widen(ab.second), widen(cd.first), widen(cd.second)};
      put_bands<Storage>(job, row * columns + j, analyse(x));
    }
  }
}

// Any sizes and strides.
template <class Storage>
__global__ void __launch_bounds__(kThreads) dwt2_kernel(Dwt2 job) {
  using Real = typename Arithmetic<Storage>::Real;
  const int64_t rows = band_length(job.height), columns = band_length(job.width);
  for (int64_t row = first_row(); row < job.n * rows; row += row_step()) {
    const int64_t n = quotient(row, rows);
    const Storage* image = static_cast<const Storage*>(job.x) + n * job.stride_n;
    const auto sample = [&](int64_t r, int64_t c) {
      return widen(image[r * job.stride_h + c * job.stride_w]);
    };
#pragma unroll 1
    for (int64_t j = first_column(); j < columns; j += column_step()) {
      put_bands<Storage>(job, row * columns + j, analyse_extended<Real>(job, row - n * rows, j, sample));
    }
  }
}

// Even sizes, and an image whose pixels can be stored in aligned pairs.
template <class Storage>
__global__ void __launch_bounds__(kThreads) idwt2_even_kernel(Idwt2 job) {
  using Real = typename Arithmetic<Storage>::Real;
  const int64_t columns = job.width / 2;
  for (int64_t row = first_row(); row < job.n * (job.height / 2); row += row_step()) {
    Storage* top = static_cast<Storage*>(job.x) + 2 * row * job.width;
#pragma unroll 1
    for (int64_t j = first_column(); j < columns; j += column_step()) {
      const Block<Real> x = synthesise(get_bands<Storage>(job, row * columns + j));
      Pair<Storage> ab, cd;
      put(&ab.first, x.a);
      put(&ab.second, x.b);
      put(&cd.first, x.c);
      put(&cd.second, x.d);
      reinterpret_cast<Pair<Storage>*>(top)[j] = ab;
      reinterpret_cast<Pair<Storage>*>(top + job.width)[j] = cd;
    }
  }
}

// Any sizes. One thread owns one pixel here, as border pixels gather from up to four blocks.
template <class Storage>
__global__ void __launch_bounds__(kThreads) idwt2_kernel(Idwt2 job) {
  using Real = typename Arithmetic<Storage>::Real;
  const int64_t rows = band_length(job.height), columns = band_length(job.width);
  for (int64_t row = first_row(); row < job.n * job.height; row += row_step()) {
    const int64_t n = quotient(row, job.height);
    const auto cell = [&](int64_t i, int64_t j) {
      return get_bands<Storage>(job, (n * rows + i) * columns + j);
    };
#pragma unroll 1
    for (int64_t c = first_column(); c < job.width; c += column_step()) {
      put(static_cast<Storage*>(job.x) + row * job.width + c,
          folded_pixel<Real>(job, row - n * job.height, c, cell));
    }
  }
}

struct Launch {
  dim3 grid, block;
};

// Blocks are as wide as a row, up to kThreads, and as high as fills them. What the grid cannot hold is
// covered by striding.
Launch launch_over(int64_t rows, int64_t columns) {
  int64_t across = 1;
  while (across < kThreads && across < columns) across *= 2;
  const int64_t down = kThreads / across;
  const auto blocks = [](int64_t items, int64_t per_block, int64_t limit) {
    return static_cast<unsigned>(std::min((items - 1) / per_block + 1, limit));
  };
  return {dim3(blocks(rows, down, INT32_MAX), blocks(columns, across, 65535)),
          dim3(static_cast<unsigned>(across), static_cast<unsigned>(down))};
}

template <class Storage>
bool pairs_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Pair<Storage>) == 0;
}

template <class Storage>
int launch(const Dwt2& job, cudaStream_t stream) {
  const auto [grid, block] = launch_over(job.n * band_length(job.height), band_length(job.width));
  const bool even = job.height % 2 == 0 && job.width % 2 == 0;
  if (even && job.stride_w == 1 && job.stride_h % 2 == 0 && job.stride_n % 2 == 0 &&
      pairs_aligned<Storage>(job.x)) {
    dwt2_even_kernel<Storage><<<grid, block, 0, stream>>>(job);
  } else {
    dwt2_kernel<Storage><<<grid, block, 0, stream>>>(job);
  }
  return cudaGetLastError();
}

template <class Storage>
int launch(const Idwt2& job, cudaStream_t stream) {
  const bool even = job.height % 2 == 0 && job.width % 2 == 0;
  if (even && pairs_aligned<Storage>(job.x)) {
    const auto [grid, block] = launch_over(job.n * (job.height / 2), job.width / 2);
    idwt2_even_kernel<Storage><<<grid, block, 0, stream>>>(job);
  } else {
    const auto [grid, block] = launch_over(job.n * job.height, job.width);
    idwt2_kernel<Storage><<<grid, block, 0, stream>>>(job);
  }
  return cudaGetLastError();
}

template <class Job>
int launch_for_dtype(const Job& job, void* stream_handle) {
  if (job.n == 0 || job.height == 0 || job.width == 0) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  switch (job.dtype) {
    case DType::kFloat32:
      return launch<float>(job, stream);
    case DType::kFloat64:
      return launch<double>(job, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(job, stream);
    case DType::kFloat16:
      return launch<__half>(job, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int wavedp_dwt2_cuda(const Dwt2& job, void* stream) { return launch_for_dtype(job, stream); }

int wavedp_idwt2_cuda(const Idwt2& job, void* stream) { return launch_for_dtype(job, stream); }

const char* cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace wavedp
