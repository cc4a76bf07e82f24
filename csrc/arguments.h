// SPDX-License-Identifier: Apache-2.0
// The jobs of wavelet.h from the numbers that Python passes. std::invalid_argument becomes ValueError.
#pragma once

#include <array>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "wavelet.h"

namespace wavedp {

using Addresses = std::vector<std::uintptr_t>;
using ImageAxes = std::array<int64_t, 8>;  // outer, inner, height, width, then their strides

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", but must lie in [" +
                                std::to_string(low) + ", " + std::to_string(high) + "]");
  }
}

// The number of elements, which must leave room for bytes and virtual samples in 64 bits.
inline int64_t checked_elements(int64_t n, int64_t height, int64_t width) {
  constexpr int64_t max = std::numeric_limits<int64_t>::max();
  check_range("height", height, 1, max / 32);
  check_range("width", width, 1, max / 32);
  check_range("the number of images", n, 0, max / 32);
  if (n > 0 && width > max / 32 / n / height) {
    throw std::invalid_argument("the number of pixels does not fit in 64 bits");
  }
  return n * height * width;
}

// The number of images of two axes.
inline int64_t checked_images(const char* outer_name, int64_t outer, const char* inner_name, int64_t inner) {
  constexpr int64_t max = std::numeric_limits<int64_t>::max();
  check_range(outer_name, outer, 0, max);
  check_range(inner_name, inner, 0, max);
  if (outer > 0 && inner > max / outer)
    throw std::invalid_argument("the number of images does not fit in 64 bits");
  return outer * inner;
}

inline DType checked_dtype(const char* name, int dtype, DType last) {
  check_range(name, dtype, 0, static_cast<int>(last));
  return static_cast<DType>(dtype);
}

inline void* checked_address(const char* name, std::uintptr_t address, int64_t elements) {
  if (address == 0 && elements > 0) throw std::invalid_argument(std::string(name) + " is a null pointer");
  return reinterpret_cast<void*>(address);
}

// The precision of float64 is kept, and nothing else is widened to it.
inline void check_precision(DType image, DType result) {
  if ((image == DType::kFloat64) != (result == DType::kFloat64)) {
    throw std::invalid_argument("float64 goes with float64 alone");
  }
}

inline Images images_of(std::uintptr_t x, int dtype, double gain, double bias, const ImageAxes& axes) {
  const auto [outer, inner, height, width, stride_outer, stride_inner, stride_h, stride_w] = axes;
  constexpr int64_t max = std::numeric_limits<int64_t>::max();
  const int64_t elements = checked_elements(checked_images("outer", outer, "inner", inner), height, width);
  for (const int64_t stride : {stride_outer, stride_inner, stride_h, stride_w}) {
    check_range("a stride", stride, 0, max);
  }
  return {checked_address("x_ptr", x, elements),
          checked_dtype("dtype", dtype, DType::kUInt8),
          gain,
          bias,
          outer,
          inner,
          height,
          width,
          stride_outer,
          stride_inner,
          stride_h,
          stride_w};
}

inline void check_levels(int levels, std::size_t bands) {
  check_range("levels", levels, 1, kMaxLevels);
  check_range("the number of bands", static_cast<int64_t>(bands), 3 * levels + 1, 3 * levels + 1);
}

inline Wavedec2 wavedec2_job(std::uintptr_t x, int dtype, double gain, double bias, const ImageAxes& axes,
                             const Addresses& bands, int band_dtype, int edge, int levels, double factor) {
  check_levels(levels, bands.size());
  check_range("edge", edge, 0, kEdges - 1);
  Wavedec2 job{};
  job.images = images_of(x, dtype, gain, bias, axes);
  job.band_dtype = checked_dtype("band_dtype", band_dtype, DType::kFloat16);
  check_precision(job.images.dtype, job.band_dtype);
  job.edge = static_cast<Edge>(edge);
  job.levels = levels;
  job.factor = factor;
  const bool coarse = bands.size() > 1 && bands[1] == 0;
  for (std::size_t b = 0; b < bands.size(); ++b) {
    const bool wanted = b == 0 || !coarse;
    job.bands[b] = checked_address("a band", bands[b], wanted ? job.images.outer * job.images.inner : 0);
    if (!wanted && bands[b]) throw std::invalid_argument("either all details are given or none");
  }
  return job;
}

inline Waverec2 waverec2_job(const Addresses& bands, std::uintptr_t x, int dtype, int64_t n, int64_t height,
                             int64_t width, int edge, int levels, double factor) {
  check_levels(levels, bands.size());
  check_range("edge", edge, 0, kEdges - 1);
  Waverec2 job{};
  for (std::size_t b = 0; b < bands.size(); ++b) job.bands[b] = reinterpret_cast<const void*>(bands[b]);
  job.x = checked_address("x_ptr", x, checked_elements(n, height, width));
  job.dtype = checked_dtype("dtype", dtype, DType::kFloat16);
  job.edge = static_cast<Edge>(edge);
  job.levels = levels;
  job.factor = factor;
  job.n = n;
  job.height = height;
  job.width = width;
  return job;
}

inline void check_grid(int64_t height, int64_t width, int levels, int64_t grid_h, int64_t grid_w) {
  check_range("grid_h", grid_h, 1, height >> levels);
  check_range("grid_w", grid_w, 1, width >> levels);
  if (height % (grid_h << levels) || width % (grid_w << levels)) {
    throw std::invalid_argument("height and width must be multiples of 2^levels times the grid");
  }
}

inline WaveletTokens wavelet_tokens_job(std::uintptr_t x, int dtype, double gain, double bias,
                                        const ImageAxes& axes, const Addresses& tokens, int token_dtype,
                                        int levels, double factor, int64_t grid_h, int64_t grid_w,
                                        std::uintptr_t shift, std::uintptr_t scale, std::uintptr_t energies) {
  check_range("levels", levels, 1, kMaxLevels);
  check_range("the number of scales", static_cast<int64_t>(tokens.size()), levels + 1, levels + 1);
  WaveletTokens job{};
  job.images = images_of(x, dtype, gain, bias, axes);
  check_grid(job.images.height, job.images.width, levels, grid_h, grid_w);
  for (std::size_t s = 0; s < tokens.size(); ++s) {
    job.tokens[s] = checked_address("a scale", tokens[s], job.images.outer * job.images.inner);
  }
  job.token_dtype = checked_dtype("token_dtype", token_dtype, DType::kFloat16);
  check_precision(job.images.dtype, job.token_dtype);
  job.levels = levels;
  job.factor = factor;
  job.grid_h = grid_h;
  job.grid_w = grid_w;
  if ((shift == 0) != (scale == 0)) throw std::invalid_argument("shift and scale go together");
  job.shift = reinterpret_cast<const void*>(shift);
  job.scale = reinterpret_cast<const void*>(scale);
  job.energies = reinterpret_cast<void*>(energies);
  return job;
}

inline WaveletUntokens wavelet_untokens_job(const Addresses& tokens, std::uintptr_t x, int dtype,
                                            int64_t batch, int64_t channels, int64_t height, int64_t width,
                                            int levels, double factor, int64_t grid_h, int64_t grid_w,
                                            std::uintptr_t shift, std::uintptr_t scale) {
  check_range("levels", levels, 1, kMaxLevels);
  check_range("the number of scales", static_cast<int64_t>(tokens.size()), levels + 1, levels + 1);
  WaveletUntokens job{};
  const int64_t elements =
      checked_elements(checked_images("batch", batch, "channels", channels), height, width);
  check_grid(height, width, levels, grid_h, grid_w);
  for (std::size_t s = 0; s < tokens.size(); ++s) {
    job.tokens[s] = checked_address("a scale", tokens[s], elements);
  }
  job.x = checked_address("x_ptr", x, elements);
  job.dtype = checked_dtype("dtype", dtype, DType::kFloat16);
  job.levels = levels;
  job.factor = factor;
  job.batch = batch;
  job.channels = channels;
  job.height = height;
  job.width = width;
  job.grid_h = grid_h;
  job.grid_w = grid_w;
  if ((shift == 0) != (scale == 0)) throw std::invalid_argument("shift and scale go together");
  job.shift = reinterpret_cast<const void*>(shift);
  job.scale = reinterpret_cast<const void*>(scale);
  return job;
}

}  // namespace wavedp
