// Between integers of different widths, for one instruction set: see kernels_impl.h.
#pragma once

#include "../macros.h"

#if defined(__AVX2__)
#include <immintrin.h>  // always inlined: no copy of these functions reaches the linker
#endif

namespace onepass::cpu {
namespace {

// 16 elements by hand with AVX-512. GCC 12 vectorises such a loop in halves that meet in memory,
// where a load of two stores waits for both: a third of an mx8 step was waiting. (Masks of all
// ones: the functions without a mask warn of their own undefined values.)
#if defined(__AVX512BW__)
constexpr int kByHand = 16;
constexpr __mmask16 kAll = 0xFFFF;

ONEPASS_HD __m128i load_128(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}
ONEPASS_HD __m256i load_256(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
ONEPASS_HD void convert_16(const uint8_t* from, uint32_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_cvtepu8_epi32(kAll, load_128(from)));
}
ONEPASS_HD void convert_16(const int8_t* from, int32_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_cvtepi8_epi32(kAll, load_128(from)));
}
ONEPASS_HD void convert_16(const uint16_t* from, uint32_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_cvtepu16_epi32(kAll, load_256(from)));
}
ONEPASS_HD void convert_16(const int16_t* from, int32_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_cvtepi16_epi32(kAll, load_256(from)));
}
template <class To, class From>
ONEPASS_HD void convert_16(const From* from, To* to) {
  static_assert(sizeof(From) == 4 && sizeof(To) <= 2, "no such conversion");
  const __m512i wide = _mm512_loadu_si512(from);
  if constexpr (sizeof(To) == 1)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(kAll, wide));
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(kAll, wide));
}
#else
constexpr int kByHand = 0;
template <class To, class From>
ONEPASS_HD void convert_16(const From*, To*) {}
#endif

// Apart from the arithmetic: a vectoriser fills its widest vectors with the narrowest type of a
// loop, and takes everything else apart to match.
template <class To, class From>
ONEPASS_HD void convert(const From* __restrict from, To* __restrict to, int n) {
  int first = 0;
  if (kByHand != 0)
    for (; first + kByHand <= n; first += kByHand) convert_16(from + first, to + first);
#pragma omp simd
  for (int i = first; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

// Two codes of 4 bits in a byte, the first of them in its lower half: a byte beside itself in 16
// bits is two bytes of codes. The arrays of codes hold an even number of them.
ONEPASS_HD void split_nibbles(const uint8_t* __restrict from, uint8_t* __restrict to, int pairs) {
#pragma omp simd
  for (int i = 0; i < pairs; ++i) {
    const uint16_t both = static_cast<uint16_t>((from[i] | from[i] << 4) & 0x0F0F);
    __builtin_memcpy(to + 2 * i, &both, sizeof both);
  }
}
ONEPASS_HD void join_nibbles(const uint32_t* __restrict from, uint8_t* __restrict to, int pairs) {
  int first = 0;
#if defined(__AVX512BW__)
  for (; first + 8 <= pairs; first += 8) {  // pairs as words of 64 bits
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
