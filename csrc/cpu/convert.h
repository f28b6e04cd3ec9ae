// Conversions between integers of different widths, for one instruction set: see kernels_impl.h.
#pragma once

#include "../portability.h"

#if defined(__AVX2__)
#include <immintrin.h>  // always inlined: no copy of these functions reaches the linker
#endif

namespace onepass::cpu {
namespace {

#if defined(__AVX2__)
// Unaligned loads and stores of 128 and 256 bits.
ONEPASS_HD __m128i load_128(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}
ONEPASS_HD __m256i load_256(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
ONEPASS_HD void store_256(void* to, __m256i value) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), value);
}
#endif

// Converts kByHand elements with intrinsics. GCC 12 vectorises such a loop in two halves that it
// joins through memory. A load that spans two stores cannot be forwarded: these stalls took a third
// of an mx8 step (AVX-512), and a fifth of an mx4 step (AVX2). (The intrinsics have masks of ones,
// because those without a mask cause warnings about undefined values in GCC's own headers.)
#if defined(__AVX512BW__)
constexpr int kByHand = 16;
constexpr __mmask16 kAll = 0xFFFF;

ONEPASS_HD void convert_some(const uint8_t* from, uint32_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_cvtepu8_epi32(kAll, load_128(from)));
}
ONEPASS_HD void convert_some(const int8_t* from, int32_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_cvtepi8_epi32(kAll, load_128(from)));
}
ONEPASS_HD void convert_some(const uint16_t* from, uint32_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_cvtepu16_epi32(kAll, load_256(from)));
}
ONEPASS_HD void convert_some(const int16_t* from, int32_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_cvtepi16_epi32(kAll, load_256(from)));
}
template <class To, class From>
ONEPASS_HD void convert_some(const From* from, To* to) {
  static_assert(sizeof(From) == 4 && sizeof(To) <= 2, "no such conversion");
  const __m512i wide = _mm512_loadu_si512(from);
  if constexpr (sizeof(To) == 1)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(kAll, wide));
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(kAll, wide));
}
#elif defined(__AVX2__)
constexpr int kByHand = 8;

ONEPASS_HD __m128i load_64(const void* from) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(from));
}
ONEPASS_HD void convert_some(const uint8_t* from, uint32_t* to) {
  store_256(to, _mm256_cvtepu8_epi32(load_64(from)));
}
ONEPASS_HD void convert_some(const int8_t* from, int32_t* to) {
  store_256(to, _mm256_cvtepi8_epi32(load_64(from)));
}
ONEPASS_HD void convert_some(const uint16_t* from, uint32_t* to) {
  store_256(to, _mm256_cvtepu16_epi32(load_128(from)));
}
ONEPASS_HD void convert_some(const int16_t* from, int32_t* to) {
  store_256(to, _mm256_cvtepi16_epi32(load_128(from)));
}
template <class To, class From>
ONEPASS_HD void convert_some(const From* from, To* to) {
  static_assert(sizeof(From) == 4 && sizeof(To) <= 2, "no such conversion");
  // Moves the lowest bytes of the words of each 128-bit lane to the start of that lane.
  const __m128i lane = sizeof(To) == 1 ? _mm_set_epi32(-1, -1, -1, 0x0C080400)
                                       : _mm_set_epi32(-1, -1, 0x0D0C0908, 0x05040100);
  const __m256i lanes = _mm256_broadcastsi128_si256(lane);
  const __m256i halves = _mm256_shuffle_epi8(load_256(from), lanes);
  const __m128i low = _mm256_castsi256_si128(halves), high = _mm256_extracti128_si256(halves, 1);
  if constexpr (sizeof(To) == 1)
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(low, high));
  else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi64(low, high));
}
#else
constexpr int kByHand = 0;
template <class To, class From>
ONEPASS_HD void convert_some(const From*, To*) {}
#endif

// Converts n elements. Conversions are loops of their own, without arithmetic, because a vectoriser
// chooses the vector length by the narrowest type of a loop and splits all wider types to match.
template <class To, class From>
ONEPASS_HD void convert(const From* __restrict from, To* __restrict to, int n) {
  int first = 0;
  if (kByHand != 0)
    for (; first + kByHand <= n; first += kByHand) convert_some(from + first, to + first);
#pragma omp simd
  for (int i = first; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

// Unpacks bytes of two 4-bit codes into one code per byte; the first code is in the lower half. The
// array of codes has an even number of elements. A byte and its copy shifted by 4, in 16 bits, are
// both codes after masking.
ONEPASS_HD void split_nibbles(const uint8_t* __restrict from, uint8_t* __restrict to, int pairs) {
#pragma omp simd
  for (int i = 0; i < pairs; ++i) {
    const uint16_t both = static_cast<uint16_t>((from[i] | from[i] << 4) & 0x0F0F);
    __builtin_memcpy(to + 2 * i, &both, sizeof both);
  }
}
// Packs two 4-bit codes into each byte; the inverse of split_nibbles.
ONEPASS_HD void join_nibbles(const uint32_t* __restrict from, uint8_t* __restrict to, int pairs) {
  int first = 0;
#if defined(__AVX512BW__)
  for (; first + 8 <= pairs; first += 8) {  // a pair of codes is a 64-bit word
    const __m512i pair = _mm512_loadu_si512(from + 2 * first);
    const __m512i upper = _mm512_maskz_srli_epi64(0xFF, pair, 28);
    const __m128i bytes = _mm512_maskz_cvtepi64_epi8(0xFF, _mm512_or_si512(pair, upper));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + first), bytes);
  }
#endif
#pragma omp simd
  for (int i = first; i < pairs; ++i)
    to[i] = static_cast<uint8_t>(from[2 * i] | from[2 * i + 1] << 4);
}

}  // namespace
}  // namespace onepass::cpu
