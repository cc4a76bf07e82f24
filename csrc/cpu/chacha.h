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

inline void quarter_round(Words& a, Words& b, Words& c, Words& d) {
  a += b, d = rotated<16>(d ^ a);
  c += d, b = rotated<12>(b ^ c);
  a += b, d = rotated<8>(d ^ a);
  c += d, b = rotated<7>(b ^ c);
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

// x[w] is word w of each lane's block; `last` holds words 12 to 15 of the state.
inline void chacha_blocks(const KeyWords& key, const Words (&last)[4], int rounds, Words (&x)[kBlockWords]) {
  for (int w = 0; w < 12; ++w) x[w] = Words{} + key.word[w];
  for (int w = 0; w < 4; ++w) x[12 + w] = last[w];
  for (int round = 0; round < rounds; round += 2) {
    quarter_round(x[0], x[4], x[8], x[12]);
    quarter_round(x[1], x[5], x[9], x[13]);
    quarter_round(x[2], x[6], x[10], x[14]);
    quarter_round(x[3], x[7], x[11], x[15]);
    quarter_round(x[0], x[5], x[10], x[15]);
    quarter_round(x[1], x[6], x[11], x[12]);
    quarter_round(x[2], x[7], x[8], x[13]);
    quarter_round(x[3], x[4], x[9], x[14]);
  }
  for (int w = 0; w < 12; ++w) x[w] += Words{} + key.word[w];
  for (int w = 0; w < 4; ++w) x[12 + w] += last[w];
}

// Blocks `block` to `block + kLanes - 1` of a stream; `block` is a multiple of kLanes.
inline void stream_blocks(const KeyWords& key, uint32_t step, uint32_t domain, uint64_t block,
                          Words (&x)[kBlockWords]) {
  Words counter = Words{} + static_cast<uint32_t>(block);
  for (int lane = 0; lane < kLanes; ++lane) counter[lane] += lane;  // never carries
  const Words last[4] = {counter, Words{} + static_cast<uint32_t>(block >> 32), Words{} + step,
                         Words{} + (domain << 24)};
  chacha_blocks(key, last, 20, x);
}

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
