// SPDX-License-Identifier: Apache-2.0
// Bands and tokens as one layout for the kernels: bands are tokens whose grid is 1 x 1, and the three details
// of a level are three channels of a token or three tensors. All offsets are in elements, of 64 bits.
#pragma once

#include "../haar.h"

namespace wavedp {

// The tensors of one scale: LL, or LH, HL and HH of a level. Element (token, channel, row, column) of a band
// is at token * token_size + (channel * rows + row) * columns + column.
struct Scale {
  void* band[3];          // LL alone, or LH, HL, HH; null is not written, and zeros where it is read
  int64_t token_size;     // from one token to the next
  int64_t rows, columns;  // of a patch
  int64_t channel;        // of the first channel of band[0] in shift, scale and energies
};

struct Layout {
  Scale ll;
  Scale details[kMaxLevels];  // of level k at k - 1
  DType dtype;
  int levels;
  int64_t channels;  // images are numbered n = batch * channels + channel
  int64_t grid_h, grid_w;
  int64_t height[kMaxLevels + 1], width[kMaxLevels + 1];  // of LL_k; level 0 is the image
  const void *shift, *scale;
};

struct Analysis {
  Images images;
  Layout layout;
  Edge edge;
  double factor;
  void* energies;
};

struct Synthesis {
  void* x;  // contiguous
  int64_t n;
  Layout layout;
  Edge edge;
  double factor;
};

// By the kernels that take any image; coefficients, and the sums of their squares.
int analyse_general(const Analysis& job, void* stream);
int sum_squares(const Analysis& job, void* stream);

namespace {

// A coefficient's place: which token, and where in the patch of its channel.
struct Place {
  int64_t token, channel, row, column;
};

WAVEDP_HOST_DEVICE inline int64_t offset(const Scale& scale, const Place& at) {
  return at.token * scale.token_size + (at.channel * scale.rows + at.row) * scale.columns + at.column;
}

// Division of 64 bits is a long subroutine on a GPU; most indices fit in 32.
WAVEDP_HOST_DEVICE inline int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

WAVEDP_HOST_DEVICE inline Place locate(const Layout& layout, const Scale& scale, int64_t n, int64_t i,
                                       int64_t j) {
  const int64_t batch = quotient(n, layout.channels), channel = n - batch * layout.channels;
  const int64_t down = layout.grid_h == 1 ? 0 : quotient(i, scale.rows);
  const int64_t across = layout.grid_w == 1 ? 0 : quotient(j, scale.columns);
  return {(batch * layout.grid_h + down) * layout.grid_w + across, channel, i - down * scale.rows,
          j - across * scale.columns};
}

inline Layout empty_layout(DType dtype, int levels, int64_t channels, int64_t height, int64_t width) {
  Layout layout{};
  layout.dtype = dtype;
  layout.levels = levels;
  layout.channels = channels;
  layout.grid_h = layout.grid_w = 1;
  for (int k = 0; k <= levels; ++k) {
    layout.height[k] = height;
    layout.width[k] = width;
    height = band_length(height);
    width = band_length(width);
  }
  return layout;
}

// `bands` in the order of wavelet.h.
template <class Pointer>
Layout layout_of_bands(Pointer* const* bands, DType dtype, int levels, int64_t channels, int64_t height,
                       int64_t width) {
  Layout layout = empty_layout(dtype, levels, channels, height, width);
  const auto scale = [&](int k) {
    const int64_t h = layout.height[k], w = layout.width[k];
    return Scale{{}, channels * h * w, h, w, 0};
  };
  layout.ll = scale(levels);
  layout.ll.band[0] = const_cast<void*>(static_cast<const void*>(bands[0]));
  for (int k = 1; k <= levels; ++k) {
    layout.details[k - 1] = scale(k);
    for (int b = 0; b < 3; ++b) {
      const void* band = bands[detail_index(levels, k) + b];
      layout.details[k - 1].band[b] = const_cast<void*>(band);
    }
  }
  return layout;
}

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kUInt8:
      return 1;
    default:
      return 2;
  }
}

// `tokens` by scale, coarse first.
template <class Pointer>
Layout layout_of_tokens(Pointer* const* tokens, DType dtype, int levels, int64_t channels, int64_t height,
                        int64_t width, int64_t grid_h, int64_t grid_w, const void* shift, const void* scale) {
  Layout layout = empty_layout(dtype, levels, channels, height, width);
  layout.grid_h = grid_h;
  layout.grid_w = grid_w;
  layout.shift = shift;
  layout.scale = scale;
  const auto scale_of = [&](int k, int bands, int64_t channel) {
    const int64_t rows = layout.height[k] / grid_h, columns = layout.width[k] / grid_w;
    return Scale{{}, bands * channels * rows * columns, rows, columns, channel};
  };
  layout.ll = scale_of(levels, 1, 0);
  layout.ll.band[0] = const_cast<void*>(static_cast<const void*>(tokens[0]));
  for (int k = 1; k <= levels; ++k) {
    const int s = levels - k + 1;
    Scale& details = layout.details[k - 1];
    details = scale_of(k, 3, channels + 3 * channels * (s - 1));
    char* first = static_cast<char*>(const_cast<void*>(static_cast<const void*>(tokens[s])));
    for (int b = 0; b < 3; ++b) {
      details.band[b] = first + b * channels * details.rows * details.columns * size_of(dtype);
    }
  }
  return layout;
}

// The kernels for large images: a thread's block is 2^r rows of 8 pixels, r = min(levels, 3).
constexpr int kBlockColumns = 8;
constexpr int kBlockLevels = 3;

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<std::uintptr_t>(bytes) == 0;
}

// Whether whole blocks fill the images, and every piece of a row of a block is one aligned vector in one
// patch.
inline bool blocks_fit(const Layout& layout) {
  if (layout.height[0] % (int64_t(1) << layout.levels) || layout.width[0] % (int64_t(1) << layout.levels) ||
      layout.width[0] % kBlockColumns) {
    return false;
  }
  for (int k = 1; k <= layout.levels && k <= kBlockLevels; ++k) {
    const Scale& details = layout.details[k - 1];
    const int64_t piece = kBlockColumns >> k, bytes = piece * size_of(layout.dtype);
    if (details.columns % piece) return false;
    for (const void* band : details.band) {
      if (!aligned(band, bytes < 16 ? bytes : 16)) return false;
    }
  }
  const int64_t piece = kBlockColumns >> (layout.levels < kBlockLevels ? layout.levels : kBlockLevels);
  return layout.levels >= kBlockLevels ||
         (layout.ll.columns % piece == 0 && aligned(layout.ll.band[0], piece * size_of(layout.dtype)));
}

}  // namespace
}  // namespace wavedp
