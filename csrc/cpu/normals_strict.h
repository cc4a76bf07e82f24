// SPDX-License-Identifier: Apache-2.0
// The float64 normals of strict noise, by the operations of wavedp/reference/normals_strict.py in their
// order: the same bits on every instruction set.
#pragma once

#include "normals.h"

namespace wavedp::WAVEDP_ISA {
namespace {

using Doubles = Vector<double, kVectorBytes>;
using Longs = Vector<int64_t, kVectorBytes>;
using Quads = Vector<uint64_t, kVectorBytes>;  // 32 bits each, as far as they come from words
constexpr int kDoubles = kVectorBytes / 8;

inline Doubles square_root(const Doubles& x) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif defined(__AVX2__)
  return (Doubles)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
  return (Doubles)_mm_sqrt_pd((__m128d)x);
#else
  Doubles root;
  for (int lane = 0; lane < kDoubles; ++lane) root[lane] = std::sqrt(x[lane]);
  return root;
#endif
}

// x * 2^kPower for x below 2^52, exactly: x is put below the leading bit of 2^(52 + kPower).
template <int kPower>
inline Doubles scaled(const Quads& x) {
  constexpr uint64_t kBits = uint64_t(1023 + 52 + kPower) << 52;
  return bits_as<Doubles>(x | kBits) - bits_as<double>(kBits);
}

// From the highest coefficient, which comes first here, to the lowest.
inline Doubles horner(const Doubles&, const Doubles& value) { return value; }
template <class... Rest>
inline Doubles horner(const Doubles& z, const Doubles& value, double coefficient, Rest... rest) {
  return horner(z, value * z + coefficient, rest...);
}

inline Doubles strict_radius(const Quads& high, const Quads& low, const Quads& lowest) {
  constexpr double kSqrtHalf = 0x1.6a09e667f3bcdp-1;
  constexpr uint64_t kBias = (uint64_t(1024) << 52) - 0x3fe6a09e667f3bcd;  // less the bits of kSqrtHalf
  const Quads upper = Quads{} - (high >> 31);                              // all ones, or none
  const Doubles w =
      scaled<-32>(high ^ (upper & 0xffffffffu)) +
      (scaled<-64>(low ^ (upper & 0xffffffffu)) + (scaled<-76>(lowest ^ (upper & 0xfffu)) + 0x1p-77));
  const Quads bits = bits_as<Quads>(w), exponent = (bits + kBias) >> 52;  // above by 1024
  const Longs near_one = w < 1.0 - kSqrtHalf;
  const Doubles below = bits_as<Doubles>(bits - (exponent << 52) + (uint64_t(1024) << 52)) - 1.0;
  const Doubles above = near_one ? -w : 1.0 - (w + w);
  const Doubles zero{}, above_e = near_one ? zero : zero - 1.0;
  const Doubles f = (Longs)upper ? above : below;
  const Doubles e = (Longs)upper ? above_e : scaled<0>(exponent) - 1024.0;
  const Doubles s = f / (f + 2.0), z = s * s;
  const Doubles top = z * 0x1.2f0634596ccf8p-3 + 0x1.39a1a70c4652ap-3;
  const Doubles log = horner(z, top, 0x1.74663fa07a01fp-3, 0x1.c71c520615de0p-3, 0x1.24924941f4e05p-2,
                             0x1.999999997fd7ap-2, 0x1.5555555555592p-1);
  const Doubles rest = e * 0x1.ef35793c76730p-45 - s * (f - z * log);
  return square_root((e * 0x1.62e42fefa3800p-1 + (f + rest)) * -2.0);
}

inline void strict_turn(const Doubles& radius, const Quads& high, const Quads& low, Doubles& first,
                        Doubles& second) {
  const Quads quarter = ((high + 0x20000000u) >> 30) & 3u;
  // The rest and half a turn, so that it is not below 0.
  const Quads rest = (high - (quarter << 30) + 0x80000000u) & 0xffffffffu;
  const Doubles x = (scaled<-30>(rest) - 2.0) + (scaled<-50>(low >> 12) + 0x1p-51), z = x * x;
  const Doubles sine_top = z * 0x1.e403d056e4915p-25 - 0x1.e300a6598bfb7p-19;
  const Doubles s = horner(z, sine_top, 0x1.5078301b61792p-13, -0x1.32d2cce3332ccp-8, 0x1.466bc67758d85p-4,
                           -0x1.4abbce625be47p-1, 0x1.921fb54442d18p+0) *
                    x;
  const Doubles cosine_top = z * -0x1.b26fe86abf9f6p-28 + 0x1.f9cc6acff3cc6p-22;
  const Doubles c = horner(z, cosine_top, -0x1.a6d1ecb740509p-16, 0x1.e1f50683b42d0p-11,
                           -0x1.55d3c7e3c95bcp-6, 0x1.03c1f081b5ab0p-2, -0x1.3bd3cc9be45dep+0, 1.0);
  const Longs odd = (Longs)(quarter & 1u) != 0;
  const Quads cosine = bits_as<Quads>(odd ? s : c) ^ ((quarter + 1u) & 2u) << 62;
  const Quads sine = bits_as<Quads>(odd ? c : s) ^ (quarter & 2u) << 62;
  first = radius * bits_as<Doubles>(cosine);
  second = radius * bits_as<Doubles>(sine);
}

// The numbers of a strict stream by groups of sixteen blocks.
class StrictNormals {
 public:
  using Real = double;
  static constexpr int64_t kGroup = kStrictGroupNormals;

  explicit StrictNormals(const NoiseStream& stream) : blocks_(stream.key, stream.step, kStrictDomain) {}

  // The 128 numbers of a group.
  void group(uint64_t number, bool, double* target) {
    Words x[kBlockWords];
    for (int lane = 0; lane < kGroupBlocks; lane += kLanes) {
      blocks_.make(number * kGroupBlocks + lane, x);
      for (int pair = 0; pair < kStrictBlockNormals / 2; ++pair) {
        double* even = target + 2 * pair * kGroupBlocks + lane;
        some<0>(x + 4 * pair, even);
        some<kDoubles>(x + 4 * pair, even + kDoubles);
      }
    }
  }

 private:
  template <int kFrom>
  static Quads widened(const Words& x) {
    Vector<uint32_t, kVectorBytes / 2> half;
    std::memcpy(&half, reinterpret_cast<const char*>(&x) + 4 * kFrom, sizeof half);
    return __builtin_convertvector(half, Quads);
  }

  template <int kFrom>
  static void some(const Words* x, double* even) {
    const Quads last = widened<kFrom>(x[3]);
    const Doubles radius = strict_radius(widened<kFrom>(x[0]), widened<kFrom>(x[1]), last & 0xfffu);
    Doubles first, second;
    strict_turn(radius, widened<kFrom>(x[2]), last, first, second);
    store(even, first);
    store(even + kGroupBlocks, second);
  }

  StreamBlocks blocks_;
};

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
