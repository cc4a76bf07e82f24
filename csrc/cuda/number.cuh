// SPDX-License-Identifier: Apache-2.0
// Element types on the device: their arithmetic type, conversions, and runs of them that move as vectors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "strip.h"

namespace wavedp {
namespace {

template <class Storage>
struct Arithmetic {
  using Real = float;
};
template <>
struct Arithmetic<double> {
  using Real = double;
};
template <class Storage>
using RealOf = typename Arithmetic<Storage>::Real;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(uint8_t x) { return x; }

__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(double x, double& y) { y = x; }
__device__ inline void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& y) { y = __float2half_rn(x); }

// The word that N values move as: all of them, or 16 bytes.
template <int BYTES>
struct WordOf {
  using Type = uint4;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<4> {
  using Type = unsigned;
};
template <>
struct WordOf<2> {
  using Type = unsigned short;
};

template <class Storage, int N>
union Run {
  using Word = typename WordOf<N * sizeof(Storage)>::Type;
  static constexpr int kWords = N * sizeof(Storage) / sizeof(Word);
  Storage value[N];
  Word word[kWords];
  __device__ Run() {}
};
template <class Storage, int N>
constexpr int64_t kRunAlignment = sizeof(typename Run<Storage, N>::Word);

// nvcc 13 splits an assignment of a vector that was put together from registers into its elements.
__device__ inline void store_word(uint4* to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w));
}
__device__ inline void store_word(uint2* to, uint2 x) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y));
}
__device__ inline void store_word(unsigned* to, unsigned x) { *to = x; }
__device__ inline void store_word(unsigned short* to, unsigned short x) { *to = x; }

template <int N, class Real, class Storage>
__device__ inline void load_run(const Storage* from, Real (&x)[N]) {
  Run<Storage, N> run;
#pragma unroll
  for (int w = 0; w < run.kWords; ++w) {
    run.word[w] = reinterpret_cast<const typename Run<Storage, N>::Word*>(from)[w];
  }
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = widen(run.value[j]);
}

// bfloat16 has an instruction that rounds two.
template <int N, class Storage>
__device__ inline void store_run(Storage* to, const float (&x)[N]) {
  Run<Storage, N> run;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if constexpr (std::is_same_v<Storage, __nv_bfloat16> && N > 1) {
      if (j % 2) continue;
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[j], x[j + 1]);
      run.value[j] = pair.x;
      run.value[j + 1] = pair.y;
    } else {
      narrow(x[j], run.value[j]);
    }
  }
#pragma unroll
  for (int w = 0; w < run.kWords; ++w) {
    store_word(reinterpret_cast<typename Run<Storage, N>::Word*>(to) + w, run.word[w]);
  }
}

template <class Real>
__device__ inline void store_any(void* to, DType dtype, int64_t offset, Real x) {
  if constexpr (sizeof(Real) == sizeof(double)) {
    static_cast<double*>(to)[offset] = x;
  } else if (dtype == DType::kFloat32) {
    static_cast<float*>(to)[offset] = x;
  } else if (dtype == DType::kBFloat16) {
    narrow(x, static_cast<__nv_bfloat16*>(to)[offset]);
  } else {
    narrow(x, static_cast<__half*>(to)[offset]);
  }
}

// (coefficient - shift) * scale, or the coefficient.
template <bool AFFINE, class Real>
struct Normalisation {
  Real shift = 0, scale = 1;

  __device__ Normalisation(const Layout& layout, const Scale& of, int band, int64_t channel) {
    if constexpr (AFFINE) {
      const int64_t index = of.channel + band * layout.channels + channel;
      shift = static_cast<const Real*>(layout.shift)[index];
      scale = static_cast<const Real*>(layout.scale)[index];
    }
  }
  __device__ Real operator()(Real x) const { return AFFINE ? (x - shift) * scale : x; }
};

// `blocks` of kThreads threads of a kernel whose one parameter is `job`.
template <class Job>
int launch(void (*kernel)(Job), int64_t blocks, size_t shared, void* stream, const Job& job) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  void* arguments[] = {const_cast<Job*>(&job)};
  const auto* entry = reinterpret_cast<const void*>(kernel);
  const cudaError_t error = cudaLaunchKernel(entry, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                                             arguments, shared, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess)
    cudaGetLastError();  // returned here, it must not stay for the next caller to find
  return error;
}

}  // namespace
}  // namespace wavedp
