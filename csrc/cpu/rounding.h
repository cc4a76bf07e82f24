// SPDX-License-Identifier: Apache-2.0
// float32 to bfloat16 with the last bit at random: see kGroupRoundings in noise.h.
#pragma once

#include "chacha.h"
#include "noisy.h"

namespace wavedp::WAVEDP_ISA {
namespace {

// The random bits of stretches that come one behind the other, so that no group is made twice.
class RoundingBits {
 public:
  explicit RoundingBits(const NoiseStream& stream) : blocks_(stream.key, stream.step, kRoundingDomain) {}

  // act(first element of those given, bits, count) for `count` elements from `element` of the stream on.
  template <class Act>
  void each(uint64_t element, int64_t count, const Act& act) {
    int64_t done = 0;
    while (done < count) {
      const uint64_t number = (element + done) / kGroupRoundings;
      const int64_t skipped = static_cast<int64_t>((element + done) % kGroupRoundings);
      if (!made_ || number != number_) make(number);
      const int64_t here =
          count - done < kGroupRoundings - skipped ? count - done : kGroupRoundings - skipped;
      act(done, bits_ + skipped, here);
      done += here;
    }
  }

 private:
  void make(uint64_t number) {
    Words x[kBlockWords];
    uint32_t lanes[kLanes];
    for (int lane = 0; lane < kGroupBlocks; lane += kLanes) {
      blocks_.make(number * kGroupBlocks + lane, x);
      for (int w = 0; w < kBlockWords; ++w) {
        uint16_t* low = bits_ + 2 * w * kGroupBlocks + lane;
        store(lanes, x[w]);
        for (int k = 0; k < kLanes; ++k) {
          low[k] = static_cast<uint16_t>(lanes[k]);
          low[k + kGroupBlocks] = static_cast<uint16_t>(lanes[k] >> 16);
        }
      }
    }
    number_ = number;
    made_ = true;
  }

  StreamBlocks blocks_;
  uint64_t number_ = 0;
  bool made_ = false;
  alignas(kLineBytes) uint16_t bits_[kGroupRoundings];
};

// The bits are added below those that are kept, and the sum is cut off; what is not finite is rounded to
// nearest.
inline void round_at_random(const float* source, const uint16_t* bits, int64_t count, uint16_t* target) {
  WAVEDP_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t x = bits_as<uint32_t>(source[i]);
    const uint32_t finite = (x + bits[i]) >> 16, special = BFloat16::store<uint32_t>(source[i]);
    target[i] = static_cast<uint16_t>((x & 0x7f800000u) == 0x7f800000u ? special : finite);
  }
}

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
