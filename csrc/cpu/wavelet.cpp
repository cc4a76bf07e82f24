// SPDX-License-Identifier: Apache-2.0
// The Haar transform's loops over rows, written for the compiler to vectorise. Compiled once for each
// instruction set with WAVEDP_ISA as its namespace; nothing else here is visible outside the object.
#include <cstring>
#include <type_traits>

#include "../haar.h"
#include "rows.h"

WAVEDP_DECLARE_ROWS(WAVEDP_ISA)

namespace wavedp::WAVEDP_ISA {
namespace {

constexpr int64_t kTile = 512;  // cells: the buffers of a tile stay in the first-level cache

struct Float32 {
  using Storage = float;
  using Real = float;
  static Real load(Storage x) { return x; }
  static Storage store(Real x) { return x; }
};

struct Float64 {
  using Storage = double;
  using Real = double;
  static Real load(Storage x) { return x; }
  static Storage store(Real x) { return x; }
};

inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct BFloat16 {
  using Storage = uint16_t;
  using Real = float;

  static Real load(Storage x) { return float_of(static_cast<int32_t>(static_cast<uint32_t>(x) << 16)); }

  static Storage store(Real x) {
    const uint32_t bits = static_cast<uint32_t>(bits_of(x));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40u;
    return static_cast<Storage>((bits_of(x) & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
  }
};

// By integer arithmetic, which vectorises on every instruction set and heeds no flush-to-zero mode.
struct Float16 {
  using Storage = uint16_t;
  using Real = float;

  static Real load(Storage x) {
    const int32_t magnitude = (x & 0x7fff) << 13;
    const int32_t smallest_normal = 0x0400 << 13, infinity = 0x7c00 << 13;
    const int32_t rebias = (127 - 15) << 23;
    // A subnormal's bits, read as the mantissa under 2^-14, are 2^-14 too large.
    const float subnormal = float_of(magnitude + rebias + (1 << 23)) - float_of(rebias + (1 << 23));
    const int32_t normal = magnitude + rebias + (magnitude >= infinity ? rebias : 0);
    const int32_t bits = magnitude < smallest_normal ? bits_of(subnormal) : normal;
    return float_of(bits | static_cast<int32_t>(static_cast<uint32_t>(x & 0x8000) << 16));
  }

  static Storage store(Real x) {
    const int32_t bits = bits_of(x);
    const int32_t magnitude = bits & 0x7fffffff;
    const int32_t infinity = 0x7f800000, overflow = (127 + 16) << 23, smallest_normal = (127 - 14) << 23;
    const int32_t rebias = (127 - 15) << 23;
    // Adding 2^-1 rounds a subnormal to units of 2^-24, its last place.
    const int32_t half = (127 - 1) << 23;
    const int32_t subnormal = bits_of(float_of(magnitude) + float_of(half)) - half;
    const int32_t normal = (magnitude - rebias + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const int32_t special = magnitude > infinity ? 0x7e00 : 0x7c00;
    const int32_t finite = magnitude < smallest_normal ? subnormal : normal;
    return static_cast<Storage>((magnitude >= overflow ? special : finite) | ((bits >> 16) & 0x8000));
  }
};

template <class Element>
constexpr bool kNative = std::is_same_v<typename Element::Storage, typename Element::Real>;

// `count` samples as numbers to compute with: in place where they are that already, else in `buffer`.
template <class Element, class Real = typename Element::Real>
const Real* widened(const typename Element::Storage* source, int64_t stride, int64_t count, Real* buffer) {
  if (stride == 1) {
    if constexpr (kNative<Element>) return source;
    for (int64_t k = 0; k < count; ++k) buffer[k] = Element::load(source[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) buffer[k] = Element::load(source[k * stride]);
  }
  return buffer;
}

// Where to compute `count` numbers that belong in `target`, and the step that takes them there.
template <class Element, class Real = typename Element::Real>
Real* staged(typename Element::Storage* target, Real* buffer) {
  if constexpr (kNative<Element>) {
    return target;
  } else {
    return buffer;
  }
}

template <class Element, class Real = typename Element::Real>
void narrow(const Real* __restrict buffer, int64_t count, typename Element::Storage* __restrict target) {
  if constexpr (!kNative<Element>) {
    for (int64_t k = 0; k < count; ++k) target[k] = Element::store(buffer[k]);
  }
}

template <class Real>
void analyse_tile(const Real* __restrict top, const Real* __restrict bottom, int64_t cells,
                  Real* __restrict ll, Real* __restrict lh, Real* __restrict hl, Real* __restrict hh) {
  for (int64_t j = 0; j < cells; ++j) {
    const Bands<Real> y = analyse(Block<Real>{top[2 * j], top[2 * j + 1], bottom[2 * j], bottom[2 * j + 1]});
    ll[j] = y.ll;
    lh[j] = y.lh;
    hl[j] = y.hl;
    hh[j] = y.hh;
  }
}

template <class Real>
void synthesise_tile(const Real* __restrict ll, const Real* __restrict lh, const Real* __restrict hl,
                     const Real* __restrict hh, int64_t cells, Real* __restrict top,
                     Real* __restrict bottom) {
  for (int64_t j = 0; j < cells; ++j) {
    const Block<Real> x = synthesise(Bands<Real>{ll[j], lh[j], hl[j], hh[j]});
    top[2 * j] = x.a;
    top[2 * j + 1] = x.b;
    bottom[2 * j] = x.c;
    bottom[2 * j + 1] = x.d;
  }
}

template <class Element>
void dwt2_loop(const Dwt2& job, int64_t begin, int64_t end) {
  using Storage = typename Element::Storage;
  using Real = typename Element::Real;
  const int64_t rows = band_length(job.height), columns = band_length(job.width);
  const int64_t plane = job.n * rows * columns;
  alignas(64) Real input[2][2 * kTile], output[kBands][kTile];

  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row % rows;
    const Storage* image = static_cast<const Storage*>(job.x) + row / rows * job.stride_n;
    Storage* target = static_cast<Storage*>(job.bands) + row * columns;
    const Storage* top = image + 2 * i * job.stride_h;
    const Storage* bottom = top + job.stride_h;
    const int64_t whole = 2 * i + 1 < job.height ? job.width / 2 : 0;  // cells with four real samples

    for (int64_t j = 0; j < whole; j += kTile) {
      const int64_t cells = whole - j < kTile ? whole - j : kTile;
      const int64_t offset = 2 * j * job.stride_w;
      Real* staging[kBands];
      for (int b = 0; b < kBands; ++b) staging[b] = staged<Element>(target + b * plane + j, output[b]);
      analyse_tile(widened<Element>(top + offset, job.stride_w, 2 * cells, input[0]),
                   widened<Element>(bottom + offset, job.stride_w, 2 * cells, input[1]), cells, staging[kLL],
                   staging[kLH], staging[kHL], staging[kHH]);
      for (int b = 0; b < kBands; ++b) narrow<Element>(output[b], cells, target + b * plane + j);
    }
    const auto sample = [&](int64_t r, int64_t c) {
      return Element::load(image[r * job.stride_h + c * job.stride_w]);
    };
    for (int64_t j = whole; j < columns; ++j) {
      const Bands<Real> y = analyse_extended<Real>(job, i, j, sample);
      target[j] = Element::store(y.ll);
      target[plane + j] = Element::store(y.lh);
      target[2 * plane + j] = Element::store(y.hl);
      target[3 * plane + j] = Element::store(y.hh);
    }
  }
}

template <class Element>
void idwt2_loop(const Idwt2& job, int64_t begin, int64_t end) {
  using Storage = typename Element::Storage;
  using Real = typename Element::Real;
  const int64_t rows = band_length(job.height), columns = band_length(job.width);
  const int64_t pairs = job.width / 2;
  alignas(64) Real input[kBands][kTile], output[2][2 * kTile];
  alignas(64) static const Real zeros[kTile] = {};

  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row % rows;
    const int64_t first_row = row - i;
    Storage* image = static_cast<Storage*>(job.x) + row / rows * job.height * job.width;
    Storage* top = image + 2 * i * job.width;
    Storage* bottom = top + job.width;
    const int64_t real_rows = 2 * i + 1 < job.height ? 2 : 1;

    const auto load = [&](int b, int64_t k) {
      return job.bands[b] ? Element::load(static_cast<const Storage*>(job.bands[b])[k]) : Real(0);
    };
    const auto cell = [&](int64_t r, int64_t j) {
      const int64_t k = (first_row + r) * columns + j;
      return Bands<Real>{load(kLL, k), load(kLH, k), load(kHL, k), load(kHH, k)};
    };
    const auto fold = [&](int64_t r, int64_t c) {
      image[r * job.width + c] = Element::store(folded_pixel<Real>(job, r, c, cell));
    };

    for (int64_t j = 0; real_rows == 2 && j < pairs; j += kTile) {
      const int64_t cells = pairs - j < kTile ? pairs - j : kTile;
      const Real* source[kBands];
      for (int b = 0; b < kBands; ++b) {
        const Storage* band = static_cast<const Storage*>(job.bands[b]);
        source[b] = band ? widened<Element>(band + row * columns + j, 1, cells, input[b]) : zeros;
      }
      synthesise_tile(source[kLL], source[kLH], source[kHL], source[kHH], cells,
                      staged<Element>(top + 2 * j, output[0]), staged<Element>(bottom + 2 * j, output[1]));
      narrow<Element>(output[0], 2 * cells, top + 2 * j);
      narrow<Element>(output[1], 2 * cells, bottom + 2 * j);
    }
    for (int64_t r = 2 * i; r < 2 * i + real_rows; ++r) {
      const bool whole_row = real_rows == 1 || fold_weight(job.edge, job.height, r) != 0;
      if (whole_row) {
        for (int64_t c = 0; c < job.width; ++c) fold(r, c);
      } else if (job.width % 2 == 1) {
        const Taps taps = virtual_taps(job.edge, job.width);
        fold(r, job.width - 1);
        for (int t = 0; t < taps.count; ++t) fold(r, taps.index[t]);
      }
    }
  }
}

}  // namespace

void dwt2_rows(const Dwt2& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case DType::kFloat32:
      return dwt2_loop<Float32>(job, begin, end);
    case DType::kFloat64:
      return dwt2_loop<Float64>(job, begin, end);
    case DType::kBFloat16:
      return dwt2_loop<BFloat16>(job, begin, end);
    case DType::kFloat16:
      return dwt2_loop<Float16>(job, begin, end);
  }
}

void idwt2_rows(const Idwt2& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case DType::kFloat32:
      return idwt2_loop<Float32>(job, begin, end);
    case DType::kFloat64:
      return idwt2_loop<Float64>(job, begin, end);
    case DType::kBFloat16:
      return idwt2_loop<BFloat16>(job, begin, end);
    case DType::kFloat16:
      return idwt2_loop<Float16>(job, begin, end);
  }
}

}  // namespace wavedp::WAVEDP_ISA
