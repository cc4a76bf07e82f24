// SPDX-License-Identifier: Apache-2.0
// The ChaCha block function (RFC 8439, section 2.3) on as many blocks at a time as a vector has lanes.
#pragma once

#include "../noise.h"
#include "vector.h"

namespace wavedp::WAVEDP_ISA {
namespace {

using Words = Vector<uint32_t, kVectorBytes>;
constexpr int kLanes = kVectorBytes / 4;
static_assert(kGroupBlocks % kLanes == 0);

template <int kBits>
inline Words rotated(const Words& x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (kBits % 8 == 0) {  // whole bytes move in one instruction
    constexpr char kFrom = 4 - kBits / 8;
    constexpr char a = kFrom % 4, b = (kFrom + 1) % 4, c = (kFrom + 2) % 4, d = (kFrom + 3) % 4;
    const __m256i places = _mm256_setr_epi8(
        a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12, a,
        b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12);
    return (Words)_mm256_shuffle_epi8((__m256i)x, places);
  }
#endif
  return x << kBits | x >> (32 - kBits);
}

template <int kBits>
inline uint32_t rotated(uint32_t x) {
  return x << kBits | x >> (32 - kBits);
}

template <int kBits, class Word>
WAVEDP_INLINED void mix(Word& a, const Word& b, Word& d) {
  a += b, d = rotated<kBits>(d ^ a);
}

template <class Word>
WAVEDP_INLINED void quarter_round(Word& a, Word& b, Word& c, Word& d) {
  mix<16>(a, b, d), mix<12>(c, d, b), mix<8>(a, b, d), mix<7>(c, d, b);
}

inline uint32_t little_endian(const unsigned char* bytes) {
  return bytes[0] | uint32_t(bytes[1]) << 8 | uint32_t(bytes[2]) << 16 | uint32_t(bytes[3]) << 24;
}

// The constants and the key: words 0 to 11 of the state.
struct KeyWords {
  uint32_t word[12] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};  // "expand 32-byte k"

  explicit KeyWords(const unsigned char* key) {
    for (int k = 0; k < 8; ++k) word[4 + k] = little_endian(key + 4 * k);
  }
  KeyWords(const KeyWords&) = delete;
  ~KeyWords() {
    for (volatile uint32_t& one : word) one = 0;
  }
};

WAVEDP_INLINED void column_round(Words (&x)[kBlockWords]) {
  quarter_round(x[0], x[4], x[8], x[12]);
  quarter_round(x[1], x[5], x[9], x[13]);
  quarter_round(x[2], x[6], x[10], x[14]);
  quarter_round(x[3], x[7], x[11], x[15]);
}

WAVEDP_INLINED void diagonal_round(Words (&x)[kBlockWords]) {
  quarter_round(x[0], x[5], x[10], x[15]);
  quarter_round(x[1], x[6], x[11], x[12]);
  quarter_round(x[2], x[7], x[8], x[13]);
  quarter_round(x[3], x[4], x[9], x[14]);
}

// x[w] is word w of each lane's block; `last` holds words 12 to 15 of the state.
inline void chacha_blocks(const KeyWords& key, const Words (&last)[4], int rounds, Words (&x)[kBlockWords]) {
  for (int w = 0; w < 12; ++w) x[w] = Words{} + key.word[w];
  for (int w = 0; w < 4; ++w) x[12 + w] = last[w];
  for (int round = 0; round < rounds; round += 2) column_round(x), diagonal_round(x);
  for (int w = 0; w < 12; ++w) x[w] += Words{} + key.word[w];
  for (int w = 0; w < 4; ++w) x[12 + w] += last[w];
}

template <int kStage>
using Stage = std::integral_constant<int, kStage>;

// The blocks of a stream, in vectors. Only word 12 of their states differs, so that most of the first column
// round, and a little of the first diagonal one, is the same for all of them and done once.
class StreamBlocks {
 public:
  StreamBlocks(const unsigned char* key, uint32_t step, uint32_t domain) : key_(key) {
    last_[0] = 0, last_[2] = step, last_[3] = domain << 24;
    prepare(0);
  }
  StreamBlocks(const StreamBlocks&) = delete;
  ~StreamBlocks() {
    for (volatile uint32_t& one : mixed_) one = 0;
  }

  // Words of blocks `block` to `block + kLanes - 1`; `block` is a multiple of kLanes. amid(k, Stage<s>()) is
  // called after round 4 k + s of the 20: work that is no part of the cipher, for what the cipher leaves
  // idle.
  template <class Amid>
  void make(uint64_t block, Words (&words)[kBlockWords], const Amid& amid) {
    if (block >> 32 != last_[1]) prepare(static_cast<uint32_t>(block >> 32));
    Words counter = Words{} + static_cast<uint32_t>(block);
    for (int lane = 0; lane < kLanes; ++lane) counter[lane] += lane;  // never carries
    Words x[kBlockWords];
    every_word([&](auto w) { x[w] = Words{} + mixed_[w]; });
    x[12] = rotated<16>(counter ^ x[0]);
    mix<12>(x[8], x[12], x[4]), mix<8>(x[0], x[4], x[12]), mix<7>(x[8], x[12], x[4]);
    amid(0, Stage<0>());
    quarter_round(x[0], x[5], x[10], x[15]);
    x[12] = rotated<16>(x[12] ^ x[1]);
    mix<12>(x[11], x[12], x[6]), mix<8>(x[1], x[6], x[12]), mix<7>(x[11], x[12], x[6]);
    mix<12>(x[8], x[13], x[7]), mix<8>(x[2], x[7], x[13]), mix<7>(x[8], x[13], x[7]);
    quarter_round(x[3], x[4], x[9], x[14]);
    amid(0, Stage<1>());
    column_round(x);
    amid(0, Stage<2>());
    diagonal_round(x);
    amid(0, Stage<3>());
    for (int k = 1; k < 5; ++k) {
      column_round(x);
      amid(k, Stage<0>());
      diagonal_round(x);
      amid(k, Stage<1>());
      column_round(x);
      amid(k, Stage<2>());
      diagonal_round(x);
      amid(k, Stage<3>());
    }
    every_word([&](auto w) {
      if constexpr (w < 12) {
        words[w] = x[w] + key_.word[w];
      } else if constexpr (w == 12) {
        words[w] = x[w] + counter;
      } else {
        words[w] = x[w] + last_[w - 12];
      }
    });
  }

  void make(uint64_t block, Words (&words)[kBlockWords]) {
    make(block, words, [](int, auto) {});
  }

 private:
  template <class Act, int... kWord>
  static void every_word(const Act& act, std::integer_sequence<int, kWord...>) {
    (act(std::integral_constant<int, kWord>()), ...);
  }
  template <class Act>
  static void every_word(const Act& act) {
    every_word(act, std::make_integer_sequence<int, kBlockWords>());
  }

  void prepare(uint32_t counter_high) {
    last_[1] = counter_high;
    uint32_t* x = mixed_;
    for (int w = 0; w < 12; ++w) x[w] = key_.word[w];
    for (int w = 1; w < 4; ++w) {
      x[12 + w] = last_[w];
      quarter_round(x[w], x[4 + w], x[8 + w], x[12 + w]);
    }
    x[0] += x[4];
    x[1] += x[6];
    mix<16>(x[2], x[7], x[13]);
  }

  const KeyWords key_;
  uint32_t last_[4], mixed_[kBlockWords];
};

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
