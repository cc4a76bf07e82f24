// SPDX-License-Identifier: Apache-2.0
// Box-Muller (Box and Muller, 1958) on a radius of 64 bits and an angle of 32. For v = 2^32 high + low,
//
//   u = (v + 1/2) 2^-64,  theta = 2 pi (angle + 1/2) 2^-32,  (cos theta, sin theta) sqrt(-2 ln u),
//
// so that the largest number is sqrt(2 ln 2^65) = 9.49. In float32 by the same multiplications and additions
// in the same order on every instruction set, and in float64 by the C library.
#pragma once

#include <cmath>

#include "chacha.h"
#include "convert.h"

namespace wavedp::WAVEDP_ISA {
namespace {

using Floats = Vector<float, kVectorBytes>;
using Ints = Vector<int32_t, kVectorBytes>;

inline Floats square_root(const Floats& x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Floats)_mm_sqrt_ps((__m128)x);
#else
  Floats root;
  for (int lane = 0; lane < kLanes; ++lane) root[lane] = std::sqrt(x[lane]);
  return root;
#endif
}

// Rounded once: the halves are exact, and so is each one's product.
inline Floats unsigned_to_float(const Words& x) {
#if defined(__AVX512F__)
  return __builtin_convertvector(x, Floats);
#else
  return __builtin_convertvector((Ints)(x >> 16), Floats) * 65536.0f +
         __builtin_convertvector((Ints)(x & 0xffffu), Floats);
#endif
}

inline Floats signed_to_float(const Ints& x) { return __builtin_convertvector(x, Floats); }

// sqrt(-2 ln u). The complement of v tells 1 - u where u is above 1/2, so that both ends keep their digits.
// ln(1 + f) = f - f^2/2 + f^3 Q(f), Q a minimax polynomial of the relative error, which is 2^-27.3, on
// [1/sqrt(2) - 1, sqrt(2) - 1].
inline Floats radius_of(const Words& high, const Words& low) {
  const Words upper_half = (Words)((Ints)high >> 31);
  const Floats w = signed_to_float((Ints)(high ^ upper_half)) * 0x1p-32f +
                   (unsigned_to_float(low ^ upper_half) + 0.5f) * 0x1p-64f;
  const Floats u = (Ints)upper_half ? 1.0f - w : w;
  const Words bits = bits_as<Words>(u);
  const Ints exponent = (Ints)(bits - 0x3f3504f3u) >> 23;  // the bits of 1/sqrt(2)
  const Floats f = exponent == 0 ? -w : bits_as<Floats>(bits - ((Words)exponent << 23)) - 1.0f;
  const Floats e = signed_to_float(exponent), square = f * f;
  Floats q = f * -0x1.38b544p-4f + 0x1.055b5ep-3f;
  q = q * f - 0x1.0d8548p-3f;
  q = q * f + 0x1.22da1ep-3f;
  q = q * f - 0x1.547244p-3f;
  q = q * f + 0x1.99a008p-3f;
  q = q * f - 0x1.000226p-2f;
  q = q * f + 0x1.555554p-2f;
  // ln 2 in two parts, of which the first has 10 bits.
  const Floats small = (q * f * square + e * -0x1.bd0106p-13f) - square * 0.5f;
  return square_root(((f + small) + e * 0x1.63p-1f) * -2.0f);
}

// radius * (cos theta, sin theta), from the nearest multiple of a quarter turn: x is the rest, at most half
// of it either way, in quarter turns.
inline void turn(const Floats& radius, const Words& angle, Floats& first, Floats& second) {
  const Words quarter = (angle + 0x20000000u) >> 30;
  const Words rest = angle - (quarter << 30);
  const Floats x = signed_to_float((Ints)(rest + rest + 1u)) * 0x1p-31f, z = x * x;
  Floats s = z * -0x1.2d9bb8p-8f + 0x1.465ec6p-4f;
  s = s * z - 0x1.4abbbap-1f;
  s = (s * z + 0x1.921fb6p+0f) * x;
  Floats c = z * 0x1.d9d57ep-11f - 0x1.55c5e0p-6f;
  c = c * z + 0x1.03c1dep-2f;
  c = (c * z - 0x1.3bd3ccp+0f) * z + 1.0f;
  const Ints odd = (Ints)(quarter & 1u) != 0;
  const Words cosine = bits_as<Words>(odd ? s : c) ^ ((quarter + 1u) & 2u) << 30;
  const Words sine = bits_as<Words>(odd ? c : s) ^ (quarter & 2u) << 30;
  first = radius * bits_as<Floats>(cosine);
  second = radius * bits_as<Floats>(sine);
}

// The same for one pair in float64.
inline void turn_wide(uint32_t high, uint32_t low, uint32_t angle, double& first, double& second) {
  const bool upper_half = high >> 31;
  const uint32_t mask = upper_half ? 0xffffffffu : 0u;
  const double w = double(high ^ mask) * 0x1p-32 + (double(low ^ mask) + 0.5) * 0x1p-64;
  const double radius = std::sqrt(-2.0 * (upper_half ? std::log1p(-w) : std::log(w)));
  const double theta = (double(angle) + 0.5) * (6.283185307179586477 * 0x1p-32);
  first = radius * std::cos(theta);
  second = radius * std::sin(theta);
}

// The numbers of a stream by groups of sixteen blocks.
template <class Number>
class Normals {
 public:
  using Real = Number;
  static constexpr int64_t kGroup = kGroupNormals;

  explicit Normals(const NoiseStream& stream) : key_(stream.key), step_(stream.step) {}

  // The 160 numbers of a group.
  void group(uint64_t number, Real* target) const {
    for (int lane = 0; lane < kGroupBlocks; lane += kLanes) some(number * kGroupBlocks + lane, target + lane);
  }

 private:
  void some(uint64_t block, Real* target) const {
    Words x[kBlockWords];
    stream_blocks(key_, step_, kNoiseDomain, block, x);
    for (int pair = 0; pair < kBlockNormals / 2; ++pair) {
      Real *even = target + 2 * pair * kGroupBlocks, *odd = even + kGroupBlocks;
      const Words &high = x[3 * pair], &low = x[3 * pair + 1], &angle = x[3 * pair + 2];
      if constexpr (sizeof(Real) == 4) {
        Floats first, second;
        turn(radius_of(high, low), angle, first, second);
        store(even, first);
        store(odd, second);
      } else {
        for (int lane = 0; lane < kLanes; ++lane) {
          turn_wide(high[lane], low[lane], angle[lane], even[lane], odd[lane]);
        }
      }
    }
  }

  const KeyWords key_;
  const uint32_t step_;
};

// Tensors one after the other: tensor t has the elements from starts[t] up to starts[t + 1].
struct Row {
  const int64_t* starts;
  int64_t tensors;

  int64_t size() const { return starts[tensors]; }

  // The tensor that holds an element below size().
  int64_t holder(int64_t element) const {
    int64_t low = 0, high = tensors - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (starts[middle + 1] <= element) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // act(tensor, first element in it, count) for what lies in [begin, end); `tensor` is at or before the
  // holder of `begin`, and returned is one at or before that of `end`.
  template <class Act>
  int64_t each(int64_t tensor, int64_t begin, int64_t end, const Act& act) const {
    while (begin < end) {
      while (starts[tensor + 1] <= begin) ++tensor;
      const int64_t until = starts[tensor + 1] < end ? starts[tensor + 1] : end;
      act(tensor, begin - starts[tensor], until - begin);
      begin = until;
    }
    return tensor;
  }
};

// Groups that are made at a time: their numbers stay in the first-level cache.
constexpr int64_t kChunkGroups = 4;

// Groups [begin, end) of those that hold the elements of the row: use(tensor, element, count, normals) for
// each stretch of one tensor. Before a group is made, ahead(tensor, element, count) is called for what it is
// for, so that memory is fetched meanwhile. Unless `wanted`, nothing is drawn.
template <class Source, class Ahead, class Use>
inline void over_elements(const NoiseStream& stream, bool wanted, const Row& row, int64_t begin, int64_t end,
                          const Ahead& ahead, const Use& use) {
  using Real = typename Source::Real;
  constexpr int64_t kGroup = Source::kGroup;
  alignas(kLineBytes) Real normals[kChunkGroups * kGroup];
  const Source source(stream);
  const uint64_t first_group = stream.offset / kGroup;
  const int64_t skipped = static_cast<int64_t>(stream.offset % kGroup);
  const auto element_of = [&](int64_t group) {
    const int64_t element = group * kGroup - skipped;
    return element < 0 ? 0 : element < row.size() ? element : row.size();
  };
  int64_t tensor = row.holder(element_of(begin)), next = tensor;
  for (int64_t g = begin; g < end; g += kChunkGroups) {
    const int64_t stop = end - g < kChunkGroups ? end : g + kChunkGroups;
    for (int64_t group = g; group < stop; ++group) {
      next = row.each(next, element_of(group), element_of(group + 1), ahead);
      if (wanted) source.group(first_group + group, normals + (group - g) * kGroup);
    }
    const int64_t origin = g * kGroup - skipped;  // the element of normals[0]
    tensor =
        row.each(tensor, element_of(g), element_of(stop), [&](int64_t t, int64_t element, int64_t count) {
          use(t, element, count, normals + (row.starts[t] + element - origin));
        });
  }
}

// Lines of memory that are read soon.
inline void prefetch(const void* address, int64_t bytes) {
  const char* line = static_cast<const char*>(address);
  for (int64_t k = 0; k < bytes; k += kLineBytes) __builtin_prefetch(line + k);
}

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
