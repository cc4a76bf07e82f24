// SPDX-License-Identifier: Apache-2.0
// The ChaCha block function (RFC 8439, section 2.3) of one thread. What the files noise_*.h hold runs on the
// device, and g++ compiles it for the CPU, where tests compare it with the definition.
#pragma once

#include <cmath>
#include <cstring>

#include "../noise.h"

#ifdef __CUDACC__
#define WAVEDP_DEVICE __device__
#define WAVEDP_CONSTANT __constant__  // operands of instructions, where a literal of float64 takes two more
#else
#define WAVEDP_DEVICE
#define WAVEDP_CONSTANT const
#endif

namespace wavedp {
namespace {

template <class To, class From>
WAVEDP_DEVICE inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Memory that a kernel touches once, and a cache need not keep.
template <class Number>
WAVEDP_DEVICE inline Number read_once(const Number* from) {
#ifdef __CUDACC__
  return __ldcs(from);
#else
  return *from;
#endif
}

template <class Number>
WAVEDP_DEVICE inline void write_once(Number* to, Number x) {
#ifdef __CUDACC__
  __stcs(to, x);
#else
  *to = x;
#endif
}

template <int kBits>
WAVEDP_DEVICE inline uint32_t rotated(uint32_t x) {
  return x << kBits | x >> (32 - kBits);
}

WAVEDP_DEVICE inline void quarter_round(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  a += b, d = rotated<16>(d ^ a);
  c += d, b = rotated<12>(b ^ c);
  a += b, d = rotated<8>(d ^ a);
  c += d, b = rotated<7>(b ^ c);
}

// x: the words of the block whose state has the words `last` behind constants and key. The key's bytes are
// words as GPUs and this project's CPUs read them, low byte first.
template <int kUnrolled>
WAVEDP_DEVICE inline void chacha_block(const uint32_t* key, const uint32_t (&last)[4], int rounds,
                                       uint32_t (&x)[kBlockWords]) {
  constexpr uint32_t kConstants[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};  // "expand 32-byte k"
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    x[w] = kConstants[w];
    x[4 + w] = key[w];
    x[8 + w] = key[4 + w];
    x[12 + w] = last[w];
  }
#pragma unroll kUnrolled
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
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    x[w] += kConstants[w];
    x[4 + w] += key[w];
    x[8 + w] += key[4 + w];
    x[12 + w] += last[w];
  }
}

// A block of the stream of one use under a key and a step.
template <int kUnrolled>
WAVEDP_DEVICE inline void stream_block(const uint32_t* key, uint64_t block, uint32_t step, uint32_t domain,
                                       uint32_t (&x)[kBlockWords]) {
  const uint32_t last[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), step,
                            domain << 24};
  chacha_block<kUnrolled>(key, last, 20, x);
}

// x[index] by selections, as registers have no index.
WAVEDP_DEVICE inline uint32_t word_at(const uint32_t (&x)[kBlockWords], int index) {
  uint32_t y[kBlockWords];
#pragma unroll
  for (int w = 0; w < kBlockWords; ++w) y[w] = x[w];
#pragma unroll
  for (int bit = 0, half = kBlockWords / 2; bit < 4; ++bit, half /= 2) {
#pragma unroll
    for (int w = 0; w < half; ++w) y[w] = index >> bit & 1 ? y[2 * w + 1] : y[2 * w];
  }
  return y[0];
}

}  // namespace
}  // namespace wavedp
