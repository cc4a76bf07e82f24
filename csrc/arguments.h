// SPDX-License-Identifier: Apache-2.0
// The jobs of wavelet.h from the numbers that Python passes. std::invalid_argument becomes ValueError.
#pragma once

#include <stdexcept>
#include <string>

#include "wavelet.h"

namespace wavedp {

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", but must lie in [" +
                                std::to_string(low) + ", " + std::to_string(high) + "]");
  }
}

inline void check_sizes(int64_t n, int64_t height, int64_t width) {
  check_range("n", n, 0, INT64_MAX);
  check_range("height", height, 0, INT64_MAX);
  check_range("width", width, 0, INT64_MAX);
  if (n > 0 && height > 0 && width > INT64_MAX / 32 / n / height) {
    throw std::invalid_argument("n * height * width does not fit in 64 bits");
  }
}

inline void check_pointer(const char* name, std::uintptr_t pointer, int64_t n, int64_t height,
                          int64_t width) {
  if (pointer == 0 && n > 0 && height > 0 && width > 0) {
    throw std::invalid_argument(std::string(name) + " is a null pointer, but the image is not empty");
  }
}

inline Dwt2 dwt2_job(std::uintptr_t x, std::uintptr_t bands, int dtype, int64_t n, int64_t height,
                     int64_t width, int64_t stride_n, int64_t stride_h, int64_t stride_w, int edge) {
  check_range("dtype", dtype, 0, kDTypes - 1);
  check_range("edge", edge, 0, kEdges - 1);
  check_sizes(n, height, width);
  check_range("stride_n", stride_n, 0, INT64_MAX);
  check_range("stride_h", stride_h, 0, INT64_MAX);
  check_range("stride_w", stride_w, 0, INT64_MAX);
  check_pointer("x_ptr", x, n, height, width);
  check_pointer("bands_ptr", bands, n, height, width);
  return {reinterpret_cast<const void*>(x),
          reinterpret_cast<void*>(bands),
          static_cast<DType>(dtype),
          static_cast<Edge>(edge),
          n,
          height,
          width,
          stride_n,
          stride_h,
          stride_w};
}

// edge -1 is the inverse, which is the transpose of the zero rule.
inline Idwt2 idwt2_job(std::uintptr_t ll, std::uintptr_t lh, std::uintptr_t hl, std::uintptr_t hh,
                       std::uintptr_t x, int dtype, int64_t n, int64_t height, int64_t width, int edge) {
  check_range("dtype", dtype, 0, kDTypes - 1);
  check_range("edge", edge, -1, kEdges - 1);
  check_sizes(n, height, width);
  check_pointer("x_ptr", x, n, height, width);
  return {{reinterpret_cast<const void*>(ll), reinterpret_cast<const void*>(lh),
           reinterpret_cast<const void*>(hl), reinterpret_cast<const void*>(hh)},
          reinterpret_cast<void*>(x),
          static_cast<DType>(dtype),
          edge < 0 ? Edge::kZero : static_cast<Edge>(edge),
          n,
          height,
          width};
}

}  // namespace wavedp
