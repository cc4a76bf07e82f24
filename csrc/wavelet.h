// SPDX-License-Identifier: Apache-2.0
// The batched 2-D Haar transform on raw pointers: what the CPU and the CUDA implementation share. The
// definition is wavedp/reference/wavelet.py. All sizes and strides are in elements, not bytes.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WAVEDP_HOST_DEVICE __host__ __device__
#else
#define WAVEDP_HOST_DEVICE
#endif

namespace wavedp {

// 16-bit types are computed in float32 through all levels and rounded once, to nearest even; float64 stays
// float64. Bytes are images only: a sample is gain * x + bias in float32.
enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16, kUInt8 };

// What stands for the missing sample x[N] after an axis of odd length N:
// 0, x[N-1], x[0], x[N-2], -x[N-1], 2 x[N-1] - x[N-2].
// PyWavelets: zero; constant, symmetric and periodization; periodic; reflect; antisymmetric; smooth and
// antireflect. For N = 1, kReflect and kLinear give x[0].
enum class Edge : int { kZero, kRepeat, kWrap, kReflect, kNegate, kLinear };
constexpr int kEdges = 6;

// The length of a band along an axis of `length` samples: ceil(length / 2).
WAVEDP_HOST_DEVICE static inline int64_t band_length(int64_t length) { return length / 2 + length % 2; }

constexpr int kMaxLevels = 8;  // of one call; callers chain more
constexpr int kMaxBands = 3 * kMaxLevels + 1;

// Bands of L levels are in the order LL_L, LH_L, HL_L, HH_L, LH_(L-1), ..., LH_1, HL_1, HH_1.
// The index of LH of level k; HL and HH follow it.
WAVEDP_HOST_DEVICE static inline int detail_index(int levels, int k) { return 3 * (levels - k) + 1; }

// Images [outer, inner, height, width]: two leading axes with a stride each, so that channels_last needs no
// copy.
struct Images {
  const void* x;
  DType dtype;
  double gain, bias;  // of kUInt8
  int64_t outer, inner, height, width;
  int64_t stride_outer, stride_inner, stride_h, stride_w;
};

// The transform of `levels` levels. Each band is contiguous [outer, inner, h_k, w_k], h_k = ceil(h_(k-1) /
// 2). Without details (all but bands[0] are null) it computes LL alone. `factor` is that of a level: 1/2 is
// orthonormal.
struct Wavedec2 {
  Images images;
  void* bands[kMaxBands];
  DType band_dtype;
  Edge edge;
  int levels;
  double factor;
};

// The transpose of Wavedec2 with the same edge. With kZero it is the inverse, up to the factor: what lies
// past an odd size is dropped.
struct Waverec2 {
  const void* bands[kMaxBands];  // each contiguous [n, h_k, w_k]; null is a band of zeros
  void* x;                       // contiguous [n, height, width]
  DType dtype;
  Edge edge;
  int levels;
  double factor;
  int64_t n, height, width;
};

// The transform of images [B = outer, C = inner, height, width] as tokens: scale 0 is LL, scale s >= 1 the
// details of level L - s + 1 with LH, HL, HH one after the other on the channel axis, C_s = C, 3C, 3C, ...
// Every scale is cut into grid_h x grid_w patches; tokens[s] is contiguous [B, grid_h * grid_w, C_s * p_s *
// q_s] with a token's values in the order (channel, row, column). height and width are multiples of 2^L *
// grid. A token's value is (coefficient - shift) * scale; both are [sum of C_s] by scale and channel, in
// float64 where the arithmetic is, else float32, or both null.
struct WaveletTokens {
  Images images;
  void* tokens[kMaxLevels + 1];
  DType token_dtype;
  int levels;
  double factor;
  int64_t grid_h, grid_w;
  const void *shift, *scale;
  void* energies;  // null, or [B, sum of C_s] of the arithmetic's type: sums of squares of the coefficients
};

// The images [B, C, height, width] whose coefficients are token * scale + shift.
struct WaveletUntokens {
  const void* tokens[kMaxLevels + 1];
  void* x;  // contiguous
  DType dtype;
  int levels;
  double factor;
  int64_t batch, channels, height, width;
  int64_t grid_h, grid_w;
  const void *shift, *scale;
};

void wavedec2_cpu(const Wavedec2& job, int threads);
void waverec2_cpu(const Waverec2& job, int threads);
void wavelet_tokens_cpu(const WaveletTokens& job, int threads);
void wavelet_untokens_cpu(const WaveletUntokens& job, int threads);

// The instruction set that the CPU functions use: "avx512", "avx2" or "baseline".
const char* cpu_isa();
// Chooses one by name; false, and no change, where it was not built or this CPU lacks it.
bool set_cpu_isa(const char* name);

// Launch on a cudaStream_t and return at once with the launch's cudaError_t.
int wavedec2_cuda(const Wavedec2& job, void* stream);
int waverec2_cuda(const Waverec2& job, void* stream);
int wavelet_tokens_cuda(const WaveletTokens& job, void* stream);
int wavelet_untokens_cuda(const WaveletUntokens& job, void* stream);
const char* cuda_error_string(int code);

}  // namespace wavedp
