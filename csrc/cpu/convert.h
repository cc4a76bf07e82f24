// SPDX-License-Identifier: Apache-2.0
// Rows of stored numbers to rows of the numbers that are computed with, and back.
#pragma once

#include "../wavelet.h"
#include "vector.h"

namespace wavedp::WAVEDP_ISA {
namespace {

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The 16-bit types, one number at a time (Float = float, Bits = uint32_t) or in vectors of these. A loaded
// number's bits come in the low half of Bits, and the stored one's bits are returned there.
struct BFloat16 {
  template <class Float, class Bits>
  static Float load(const Bits& x) {
    return bits_as<Float>(x << 16);
  }

  template <class Bits, class Float>
  static Bits store(const Float& x) {
    const Bits bits = bits_as<Bits>(x), high = bits >> 16;
    const Bits rounded = (bits + 0x7fffu + (high & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? high | 0x40u : rounded;
  }
};

// By integer arithmetic, which every instruction set has and which heeds no flush-to-zero mode.
struct Float16 {
  static constexpr uint32_t kRebias = (127 - 15) << 23;

  template <class Float, class Bits>
  static Float load(const Bits& x) {
    const Bits magnitude = (x & 0x7fffu) << 13, sign = (x & 0x8000u) << 16;
    const uint32_t smallest_normal = 0x0400 << 13, infinity = 0x7c00 << 13;
    // A subnormal's bits, read as the mantissa under 2^-14, are 2^-14 too large.
    const Float subnormal =
        bits_as<Float>(magnitude + (kRebias + (1u << 23))) - bits_as<float>(kRebias + (1u << 23));
    const Bits finite = magnitude + kRebias;
    const Bits normal = magnitude >= infinity ? finite + kRebias : finite;
    return bits_as<Float>((magnitude < smallest_normal ? bits_as<Bits>(subnormal) : normal) | sign);
  }

  template <class Bits, class Float>
  static Bits store(const Float& x) {
    const uint32_t infinity = 0x7f800000, overflow = (127 + 16) << 23, smallest_normal = (127 - 14) << 23;
    const uint32_t half = (127 - 1) << 23;
    const Bits bits = bits_as<Bits>(x), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    // Adding 2^-1 rounds a subnormal to units of 2^-24, its last place.
    const Bits subnormal = bits_as<Bits>(bits_as<Float>(magnitude) + bits_as<float>(half)) - half;
    const Bits normal = (magnitude - kRebias + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Bits none = bits & 0u;
    const Bits special = magnitude > infinity ? none + 0x7e00u : none + 0x7c00u;
    const Bits finite = magnitude < smallest_normal ? subnormal : normal;
    return (magnitude >= overflow ? special : finite) | sign;
  }
};

template <class Element>
struct OneByOne {
  float operator()(uint16_t x) const { return Element::template load<float, uint32_t>(x); }
  uint16_t operator()(float x) const { return static_cast<uint16_t>(Element::template store<uint32_t>(x)); }
};

template <class Real>
constexpr DType kNative = sizeof(Real) == 8 ? DType::kFloat64 : DType::kFloat32;

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

inline const void* address_of(const void* base, DType dtype, int64_t element) {
  return static_cast<const char*>(base) + element * size_of(dtype);
}

inline void* address_of(void* base, DType dtype, int64_t element) {
  return static_cast<char*>(base) + element * size_of(dtype);
}

// The strides that images have (3 and 4 are those of channels_last) are constants of loops of their own.
template <class Stored, class Real, class Convert>
inline void widen_strided(const void* source, int64_t stride, int64_t count, Real* __restrict target,
                          const Convert& convert) {
  const Stored* s = static_cast<const Stored*>(source);
  if (stride == 1) {
    for (int64_t k = 0; k < count; ++k) target[k] = convert(s[k]);
  } else if (stride == 3) {
    for (int64_t k = 0; k < count; ++k) target[k] = convert(s[3 * k]);
  } else if (stride == 4) {
    for (int64_t k = 0; k < count; ++k) target[k] = convert(s[4 * k]);
  } else {
    for (int64_t k = 0; k < count; ++k) target[k] = convert(s[k * stride]);
  }
}

// In vectors from front to back: the compiler would call memcpy, which reads the end first.
template <bool kAhead = false, class Real>
inline void copy_row(const Real* source, int64_t count, Real* target, bool stream_row) {
  using V = Vector<Real, kVectorBytes>;
  constexpr int64_t kLanes = kVectorBytes / sizeof(Real);
  int64_t k = 0;
  if (stream_row) {
    for (; k + kLanes <= count; k += kLanes) stream(target + k, load<V>(source + k));
  }
  for (; k + kLanes <= count; k += kLanes) store(target + k, load_ahead<kAhead, V>(source + k));
  for (; k < count; ++k) target[k] = source[k];
}

// `count` samples, `stride` apart, as numbers to compute with.
template <class Real>
void widen_row(DType dtype, const void* source, int64_t stride, int64_t count, Real gain, Real bias,
               Real* target) {
  if (dtype == kNative<Real> && stride == 1) {
    return copy_row(static_cast<const Real*>(source), count, target, false);
  }
  switch (dtype) {
    case DType::kFloat32:
      return widen_strided<float>(source, stride, count, target, [](float x) { return Real(x); });
    case DType::kFloat64:
      return widen_strided<double>(source, stride, count, target, [](double x) { return Real(x); });
    case DType::kBFloat16:
      return widen_strided<uint16_t>(source, stride, count, target, OneByOne<BFloat16>());
    case DType::kFloat16:
      return widen_strided<uint16_t>(source, stride, count, target, OneByOne<Float16>());
    case DType::kUInt8:
      return widen_strided<uint8_t>(source, stride, count, target,
                                    [=](uint8_t x) { return gain * Real(x) + bias; });
  }
}

template <class Element, bool kStream>
inline int64_t narrow_lines(const float* source, int64_t count, uint16_t* target) {
  constexpr int64_t kLanes = kVectorBytes / sizeof(float), kStep = kLineBytes / sizeof(uint16_t);
  using Bits = Vector<uint32_t, kVectorBytes>;
  using Half = Vector<uint16_t, kVectorBytes / 2>;
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep) {
    for (int64_t v = 0; v < kStep; v += kLanes) {
      const Bits bits = Element::template store<Bits>(load<Vector<float, kVectorBytes>>(source + k + v));
      if constexpr (sizeof(Half) >= 16) {
        put<kStream>(target + k + v, __builtin_convertvector(bits, Half));
      } else {
        store(target + k + v, __builtin_convertvector(bits, Half));
      }
    }
  }
  return k;
}

template <class Element>
inline void narrow_to_16_bits(const float* source, int64_t count, uint16_t* target, bool stream_row) {
  int64_t k = stream_row ? narrow_lines<Element, true>(source, count, target)
                         : narrow_lines<Element, false>(source, count, target);
  for (; k < count; ++k) target[k] = OneByOne<Element>()(source[k]);
}

// The reverse, rounded to nearest even. Streaming wants a row of whole lines.
inline void narrow_row(DType dtype, const float* source, int64_t count, void* target, bool stream_row) {
  if (dtype == DType::kBFloat16) {
    narrow_to_16_bits<BFloat16>(source, count, static_cast<uint16_t*>(target), stream_row);
  } else if (dtype == DType::kFloat16) {
    narrow_to_16_bits<Float16>(source, count, static_cast<uint16_t*>(target), stream_row);
  } else {
    copy_row(source, count, static_cast<float*>(target), stream_row);
  }
}

inline void narrow_row(DType, const double* source, int64_t count, void* target, bool stream_row) {
  copy_row(source, count, static_cast<double*>(target), stream_row);
}

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
