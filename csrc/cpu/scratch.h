// SPDX-License-Identifier: Apache-2.0
// Sizes of the levels, and memory for rows of them.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "../wavelet.h"
#include "vector.h"

namespace wavedp::WAVEDP_ISA {
namespace {

// height[k] and width[k] of LL_k; level 0 is the image.
struct Pyramid {
  int levels;
  int64_t height[kMaxLevels + 1], width[kMaxLevels + 1];

  Pyramid(int count, int64_t image_height, int64_t image_width) : levels(count) {
    height[0] = image_height;
    width[0] = image_width;
    for (int k = 1; k <= levels; ++k) {
      height[k] = band_length(height[k - 1]);
      width[k] = band_length(width[k - 1]);
    }
  }
};

// Rows that start on lines, taken one after the other from one allocation. Where a row is followed by
// another, its length is staggered, so that rows of a power of two do not all fall on the same sets of the
// cache.
template <class Real>
class Scratch {
 public:
  explicit Scratch(int64_t reals) : memory_(allocate(reals)), next_(memory_.get()) {}

  static int64_t room(int64_t count) {
    constexpr int64_t kLine = kLineBytes / sizeof(Real);
    return (count + kLine - 1) / kLine * kLine + kLine;
  }

  Real* take(int64_t count) {
    Real* row = next_;
    next_ += room(count);
    return row;
  }

 private:
  struct Free {
    void operator()(Real* memory) const { std::free(memory); }
  };

  static Real* allocate(int64_t reals) {
    void* memory = std::aligned_alloc(kLineBytes, room(reals) * sizeof(Real));
    if (!memory) throw std::bad_alloc();
    return static_cast<Real*>(memory);
  }

  std::unique_ptr<Real, Free> memory_;
  Real* next_;
};

// Memory of this thread that it keeps for the next time, so that the system does not clear pages of it anew
// at every call. What it held is lost.
inline void* lasting_memory(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    memory.reset(std::aligned_alloc(kLineBytes, (bytes + kLineBytes - 1) / kLineBytes * kLineBytes));
    if (!memory) throw std::bad_alloc();
    size = bytes;
  }
  return memory.get();
}

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
