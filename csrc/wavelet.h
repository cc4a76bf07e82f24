// SPDX-License-Identifier: Apache-2.0
// One level of the batched 2-D orthonormal Haar transform on raw pointers: what the CPU and the CUDA
// implementation share. All sizes and strides are in elements, not bytes.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WAVEDP_HOST_DEVICE __host__ __device__
#else
#define WAVEDP_HOST_DEVICE
#endif

namespace wavedp {

// 16-bit types are computed in float32 and rounded once, to nearest even; float64 stays float64.
enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kDTypes = 4;

// What stands for the missing sample x[N] after an axis of odd length N:
// 0, x[N-1], x[0], x[N-2], -x[N-1], 2 x[N-1] - x[N-2].
// PyWavelets: zero; constant, symmetric and periodization; periodic; reflect; antisymmetric; smooth and
// antireflect. For N = 1, kReflect and kLinear give x[0].
enum class Edge : int { kZero, kRepeat, kWrap, kReflect, kNegate, kLinear };
constexpr int kEdges = 6;

// The length of a band along an axis of `length` samples: ceil(length / 2).
WAVEDP_HOST_DEVICE static inline int64_t band_length(int64_t length) { return length / 2 + length % 2; }

enum Band : int { kLL, kLH, kHL, kHH, kBands };

// The forward transform of n images [height, width] into bands [4, n, ceil(height/2), ceil(width/2)].
struct Dwt2 {
  const void* x;
  void* bands;  // contiguous, in the order of Band
  DType dtype;
  Edge edge;
  int64_t n, height, width;
  int64_t stride_n, stride_h, stride_w;
};

// The transpose of Dwt2 with the same edge. With kZero it is the inverse: the orthonormal synthesis with
// the row and column past an odd size dropped.
struct Idwt2 {
  const void* bands[kBands];  // each contiguous [n, ceil(height/2), ceil(width/2)]; null is a band of zeros
  void* x;                    // contiguous [n, height, width]
  DType dtype;
  Edge edge;
  int64_t n, height, width;
};

void wavedp_dwt2_cpu(const Dwt2& job, int threads);
void wavedp_idwt2_cpu(const Idwt2& job, int threads);

// The instruction set that the CPU functions use: "avx512", "avx2" or "baseline".
const char* cpu_isa();
// Chooses one by name; false, and no change, where it was not built or this CPU lacks it.
bool set_cpu_isa(const char* name);

// Launch on a cudaStream_t and return at once with the launch's cudaError_t.
int wavedp_dwt2_cuda(const Dwt2& job, void* stream);
int wavedp_idwt2_cuda(const Idwt2& job, void* stream);
const char* cuda_error_string(int code);

}  // namespace wavedp
