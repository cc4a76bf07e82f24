// SPDX-License-Identifier: Apache-2.0
// Short vectors by the compiler's vector extension, so that one source serves every instruction set, and the
// stores that go past the caches. Everything has internal linkage: see haar.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef __has_builtin
#define __has_builtin(x) 0
#endif

// Of what is to be part of the loops that it stands in, which a compiler may find too long.
#if defined(__GNUC__)
#define WAVEDP_INLINED inline __attribute__((always_inline))
#else
#define WAVEDP_INLINED inline
#endif

namespace wavedp::WAVEDP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLineBytes = 64;

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T, int kBytes>
using Vector = typename VectorOf<T, kBytes>::type;

template <class V, class T>
inline V load(const T* source) {
  V v;
  std::memcpy(&v, source, sizeof v);
  return v;
}

template <class V, class T>
inline void store(T* target, const V& v) {
  std::memcpy(target, &v, sizeof v);
}

// Past the caches, where the instruction set has such a store; `target` is aligned to the vector. Only whole
// lines written one right after the other gain by it, and fence() ends them.
template <class V, class T>
inline void stream(T* target, const V& v) {
#if defined(__SANITIZE_ADDRESS__)
  store(target, v);  // AddressSanitizer sees this one, and none of those below
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(target), (__m512i)v);
#endif
#if defined(__AVX__)
  if constexpr (sizeof v == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(target), (__m256i)v);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof v == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(target), (__m128i)v);
#endif
  store(target, v);
}

inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Asks for what follows a vector that is read from memory. Where nothing large is written, the hardware runs
// too short a way ahead: `coarse` reads at 0.86 of the rate of a sum with one request 1 KiB ahead, 0.73
// without (Zen 4). What the last cache holds wants to come near, and what it does not, early (Xeon with AMX):
// of the rate of a sum, 51 and 205 MB are read at 0.69 and 0.71 without, at 0.94 and 0.84 with a request 512
// bytes ahead, 0.83 and 1.05 with one 4 KiB ahead, and 0.95 and 1.07 with these two.
constexpr int kNearBytes = 512, kFarBytes = 3072;

template <bool kAhead, class V, class T>
inline V load_ahead(const T* source) {
  if constexpr (kAhead) {
    const char* here = reinterpret_cast<const char*>(source);
    __builtin_prefetch(here + kNearBytes, 0, 3);
    __builtin_prefetch(here + kFarBytes, 0, 2);
  }
  return load<V>(source);
}

template <bool kStream, class V, class T>
inline void put(T* target, const V& v) {
  if constexpr (kStream) {
    stream(target, v);
  } else {
    store(target, v);
  }
}

inline bool on_lines(const void* address, int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % kLineBytes == 0 && bytes % kLineBytes == 0;
}

template <int... kIndices, class V>
inline V shuffled(const V& a, const V& b) {
#if defined(__clang__) || __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, kIndices...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 8, int64_t,
                                   std::conditional_t<sizeof(a[0]) == 4, int32_t, int16_t> >;
  return __builtin_shuffle(a, b, Vector<Index, sizeof(V)>{kIndices...});
#endif
}

template <class V, int... kLane>
inline std::pair<V, V> parted(const V& a, const V& b, std::integer_sequence<int, kLane...>) {
  return {shuffled<2 * kLane...>(a, b), shuffled<2 * kLane + 1 ...>(a, b)};
}

template <class V, int... kLane>
inline std::pair<V, V> joined(const V& even, const V& odd, std::integer_sequence<int, kLane...>) {
  constexpr int n = sizeof...(kLane);
  return {shuffled<(kLane / 2 + kLane % 2 * n)...>(even, odd),
          shuffled<(n / 2 + kLane / 2 + kLane % 2 * n)...>(even, odd)};
}

template <class V>
using Lanes = std::make_integer_sequence<int, static_cast<int>(sizeof(V) / sizeof(std::declval<V>()[0]))>;

// The samples at even and at odd places of `a` followed by `b`.
template <class V>
inline std::pair<V, V> parted(const V& a, const V& b) {
  return parted(a, b, Lanes<V>());
}

// The two halves of even[0], odd[0], even[1], ...
template <class V>
inline std::pair<V, V> joined(const V& even, const V& odd) {
  return joined(even, odd, Lanes<V>());
}

template <int kBlock, bool kSecond, class V, int... kLane>
inline V merged(const V& a, const V& b, std::integer_sequence<int, kLane...>) {
  constexpr int n = sizeof...(kLane), skip = kSecond ? kBlock : 0;
  return shuffled<(kLane / kBlock % 2 ? n + kLane - kBlock + skip : kLane + skip)...>(a, b);
}

// Transposes kRows vectors, taken as kRows x kRows squares of blocks of kBlock lanes side by side.
template <int kRows, int kBlock, class V>
inline void transpose(V* rows) {
  if constexpr (kRows > 1) {
    constexpr int kHalf = kRows / 2, kWide = kBlock * kHalf;
    for (int i = 0; i < kHalf; ++i) {
      const V a = rows[i], b = rows[i + kHalf];
      rows[i] = merged<kWide, false>(a, b, Lanes<V>());
      rows[i + kHalf] = merged<kWide, true>(a, b, Lanes<V>());
    }
    transpose<kHalf, kBlock>(rows);
    transpose<kHalf, kBlock>(rows + kHalf);
  }
}

}  // namespace
}  // namespace wavedp::WAVEDP_ISA
