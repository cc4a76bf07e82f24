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

inline Floats signed_to_float(const Ints& x) { return __builtin_convertvector(x, Floats); }

// A vector of pairs of numbers, in four steps: what two chains of operations can do beside a round.
//
// The words of the radius are taken as v or v - 2^64, whichever is nearer to 0, so that w is u or u - 1 and
// both ends of u keep their digits. u = (1 - g/2) 2^e with 1 - g/2 between sqrt(1/2) and sqrt(2), and -2 ln u
// = -2 ln 2 e + g + g^2 Q(g), Q a minimax polynomial of the relative error, which is 2^-25.7. x is the rest
// of the angle from the nearest multiple of a quarter turn, at most half of one either way.
struct Pairs {
  Floats g, e, q, radius, x, z, s, c;
  Words turned;  // the angle and an eighth of a turn: its upper two bits are the number of quarters

  template <int kStage>
  WAVEDP_INLINED void work(const Words& high, const Words& low, const Words& angle) {
    if constexpr (kStage == 0) {
      const Floats upper = signed_to_float((Ints)(high + (low >> 31)));
      const Floats w = upper * 0x1p-32f + (signed_to_float((Ints)low) * 0x1p-64f + 0x1p-65f);
      const Words bits = bits_as<Words>(w < 0.0f ? w + 1.0f : w);
      const Words exponent = (bits - 0x3f3504f3u) & 0xff800000u;  // the bits of sqrt(1/2)
      g = (Ints)exponent == 0 ? w * -2.0f : bits_as<Floats>(bits - exponent) * -2.0f + 2.0f;
      e = signed_to_float((Ints)exponent);  // times 2^23
    } else if constexpr (kStage == 1) {
      turned = angle + 0x20000000u;
      x = signed_to_float((Ints)(angle << 2 | 2u)) * 0x1p-32f, z = x * x;
      q = g * 0x1.7685dep-12f + 0x1.2cb56ep-10f;
      q = q * g + 0x1.317110p-9f;
      q = q * g + 0x1.51fb44p-8f;
      q = q * g + 0x1.98b556p-7f;
    } else if constexpr (kStage == 2) {
      q = q * g + 0x1.000f00p-5f;
      q = q * g + 0x1.55579ap-4f;
      q = q * g + 0x1.ffffc8p-3f;
      s = z * -0x1.2d9bb8p-8f + 0x1.465ec6p-4f;
      s = s * z - 0x1.4abbbap-1f;
      s = (s * z + 0x1.921fb6p+0f) * x;
    } else {
      radius = square_root(q * g * g + (e * -0x1.62e430p-23f + g));
      c = z * 0x1.d9d57ep-11f - 0x1.55c5e0p-6f;
      c = c * z + 0x1.03c1dep-2f;
      c = c * z - 0x1.3bd3ccp+0f;
      c = c * z + 1.0f;
    }
  }

  // radius * (cos theta, sin theta).
  WAVEDP_INLINED void finish(float* cosines, float* sines) const {
    const Ints odd = (Ints)(turned & 0x40000000u) != 0;
    const Words cosine = bits_as<Words>(odd ? s : c) ^ ((turned + 0x40000000u) & 0x80000000u);
    const Words sine = bits_as<Words>(odd ? c : s) ^ (turned & 0x80000000u);
    store(cosines, radius * bits_as<Floats>(cosine));
    store(sines, radius * bits_as<Floats>(sine));
  }
};

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

// The numbers of a stream by groups of sixteen blocks, best one group after the other: while float32 numbers
// are made from a vector of blocks, the next one is enciphered, since either alone leaves pipes of the core
// idle.
template <class Number>
class Normals {
 public:
  using Real = Number;
  static constexpr int64_t kGroup = kGroupNormals;

  explicit Normals(const NoiseStream& stream) : blocks_(stream.key, stream.step, kNoiseDomain) {}

  // The 160 numbers of a group. `more` says that those of the next group follow.
  void group(uint64_t number, bool more, Real* target) {
    for (int lane = 0; lane < kGroupBlocks; lane += kLanes) {
      some(number * kGroupBlocks + lane, more || lane + kLanes < kGroupBlocks, target + lane);
    }
  }

 private:
  void some(uint64_t block, bool more, Real* target) {
    if (!made_ || block != block_) blocks_.make(block, words_);
    if constexpr (sizeof(Real) == 4) {
      Pairs pairs;
      const auto finish = [&](int pair) {
        float* even = target + 2 * pair * kGroupBlocks;
        pairs.finish(even, even + kGroupBlocks);
      };
      const auto amid = [&](int pair, auto stage) __attribute__((always_inline)) {
        if (stage == 0 && pair > 0) finish(pair - 1);
        pairs.template work<stage>(words_[3 * pair], words_[3 * pair + 1], words_[3 * pair + 2]);
      };
      if (more) {
        blocks_.make(block + kLanes, words_, amid);
      } else {
        for (int k = 0; k < kPairs; ++k) {
          amid(k, Stage<0>()), amid(k, Stage<1>()), amid(k, Stage<2>()), amid(k, Stage<3>());
        }
      }
      finish(kPairs - 1);
      block_ = block + kLanes;
      made_ = more;
    } else {
      for (int pair = 0; pair < kPairs; ++pair) {
        const Words &high = words_[3 * pair], &low = words_[3 * pair + 1], &angle = words_[3 * pair + 2];
        Real *even = target + 2 * pair * kGroupBlocks, *odd = even + kGroupBlocks;
        for (int lane = 0; lane < kLanes; ++lane) {
          turn_wide(high[lane], low[lane], angle[lane], even[lane], odd[lane]);
        }
      }
    }
  }

  static constexpr int kPairs = kBlockNormals / 2;
  StreamBlocks blocks_;
  Words words_[kBlockWords];
  uint64_t block_ = 0;
  bool made_ = false;
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
  Source source(stream);
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
      if (wanted) source.group(first_group + group, group + 1 < end, normals + (group - g) * kGroup);
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
