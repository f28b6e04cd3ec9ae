// The primitives of plain.h with AVX2 intrinsics.
#pragma once

#include <immintrin.h>  // always inlined: no copy of these functions reaches the linker

#include "../strip.h"

namespace onepass::cpu {
namespace {
namespace simd {

// --- constants ---

constexpr int kWords = 8;
constexpr int kNarrowed = 1;
constexpr bool kSaturates = true;
constexpr int kConverted = 8;
constexpr int kNibblePairs = 0;
constexpr bool kPrefetchesInPlace = false;
constexpr bool kOpensFirst = true;
constexpr bool kInterleavesTiles = false;

// --- vectors: not used above the primitives ---

// Unaligned loads and stores, and a word broadcast to all lanes.
ONEPASS_HD __m128i load_64(const void* from) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(from));
}
ONEPASS_HD __m128i load_128(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}
ONEPASS_HD __m256i load_256(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
ONEPASS_HD void store_256(void* to, __m256i value) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), value);
}
ONEPASS_HD __m256i all_of(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }
// join() of strip.h.
ONEPASS_HD __m256i join_256(__m256i low, __m256i high) {
  return _mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xAA);
}

// --- widths ---

// GCC 12 vectorises a loop that converts in two halves, which it joins through memory. A load that
// spans two stores cannot be forwarded: these stalls took a fifth of an mx4 step.
ONEPASS_HD void convert(const uint8_t* from, uint32_t* to) {
  store_256(to, _mm256_cvtepu8_epi32(load_64(from)));
}
ONEPASS_HD void convert(const int8_t* from, int32_t* to) {
  store_256(to, _mm256_cvtepi8_epi32(load_64(from)));
}
ONEPASS_HD void convert(const uint16_t* from, uint32_t* to) {
  store_256(to, _mm256_cvtepu16_epi32(load_128(from)));
}
ONEPASS_HD void convert(const int16_t* from, int32_t* to) {
  store_256(to, _mm256_cvtepi16_epi32(load_128(from)));
}
template <class To, class From>
ONEPASS_HD void convert(const From* from, To* to) {
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
ONEPASS_HD void join_nibbles(const uint32_t*, uint8_t*) {}

ONEPASS_HD void widen_scales(const uint8_t* bytes, uint32_t* scales) {
  static_assert(kStrips == kConverted, "one call");
  convert(bytes, scales);
}
ONEPASS_HD void narrow_scales(const uint32_t* scales, uint8_t* bytes) { convert(scales, bytes); }

ONEPASS_HD void widen(const uint8_t* from, uint16_t* to) {
  for (int i = 0; i < kStrip; i += 16) store_256(to + i, _mm256_cvtepu8_epi16(load_128(from + i)));
}
ONEPASS_HD void widen(const int8_t* from, int16_t* to) {
  for (int i = 0; i < kStrip; i += 16) store_256(to + i, _mm256_cvtepi8_epi16(load_128(from + i)));
}

template <Order Of>
ONEPASS_HD void narrow(const uint32_t (*pairs)[kPairs], uint8_t* to) {
  const __m128i lane = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m256i halves = _mm256_broadcastsi128_si256(lane);
  const __m256i words = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  const __m256i bytes = _mm256_packus_epi16(load_256(pairs[0]), load_256(pairs[0] + kWords));
  if (Of == kByPairs)
    store_256(to, _mm256_permute4x64_epi64(bytes, 0xD8));
  else
    store_256(to, _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(bytes, halves), words));
}

ONEPASS_HD void second_bytes(const uint32_t (*words)[kStrip], uint32_t flip, uint8_t* to) {
  alignas(64) uint32_t bytes[1][kPairs];
  for (int i = 0; i < kPairs; i += kWords) {
    const __m256i even = load_256(words[0] + i), odd = load_256(words[0] + kPairs + i);
    const __m256i both = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xAA);
    store_256(bytes[0] + i, _mm256_xor_si256(_mm256_srli_epi16(both, 8), all_of(twice(flip))));
  }
  narrow<kByPairs>(bytes, to);
}

// --- pairs ---

ONEPASS_HD void join_strip(const uint32_t* __restrict words, Pair* __restrict pairs) {
  for (int i = 0; i < kPairs; i += kWords)
    store_256(pairs + i, join_256(load_256(words + i), load_256(words + kPairs + i)));
}

template <class Code>
ONEPASS_HD void fold_signs(Pair* __restrict codes) {
  constexpr int kBack = Code::kRandomShift + Code::kWidth - 7;  // distance within the upper byte
  const __m256i bytes = all_of(twice(1u << 8 << kBack | 1u));
  for (int i = 0; i < kPairs; i += kWords)
    store_256(codes + i, _mm256_maddubs_epi16(load_256(codes + i), bytes));
}

ONEPASS_HD void join_split8(const Pair* pairs, const int8_t* companion, float* __restrict values) {
  const __m256i least = all_of(twice(0x8000)), above = all_of(0xFFFF0000u);
  for (int i = 0; i < kPairs; i += kWords) {
    const __m256i weight = load_256(pairs + i);
    const __m256i any = _mm256_cvtepi8_epi16(load_128(companion + 2 * i));
    const __m256i zero = _mm256_cmpeq_epi16(_mm256_add_epi16(weight, weight), all_of(0));
    const __m256i kept = _mm256_max_epi16(any, _mm256_andnot_si256(zero, least));
    const __m256i even = _mm256_madd_epi16(kept, all_of(256));
    const __m256i odd = _mm256_madd_epi16(kept, all_of(256 << 16));
    store_256(values + i, _mm256_add_epi32(_mm256_slli_epi32(weight, 16), even));
    store_256(values + kPairs + i, _mm256_add_epi32(_mm256_and_si256(weight, above), odd));
  }
}

template <class Code>
ONEPASS_HD void lift_signed(
    const float* values, Random random, float lowest, uint32_t base, uint32_t, uint32_t* codes) {
  const __m256i sign = all_of(~kMagnitude), half = all_of(0xFFFF);
  const __m256i lift = all_of(to_bits(lowest));
  const auto lifted = [&](int i) {
    const __m256i value = load_256(values + i), word = load_256(random.words + i);
    const __m256i with_sign = _mm256_or_si256(_mm256_and_si256(value, sign), lift);
    const __m256 sum = _mm256_castsi256_ps(value) + _mm256_castsi256_ps(with_sign);
    const __m256i drawn = random.shift ? _mm256_srli_epi32(word, 16) : _mm256_and_si256(word, half);
    return _mm256_add_epi32(_mm256_srli_epi32(_mm256_castps_si256(sum), Code::kRandomShift), drawn);
  };
  for (int i = 0; i < kPairs; i += kWords)
    store_256(codes + i, _mm256_sub_epi32(join_256(lifted(i), lifted(i + kPairs)), all_of(base)));
}

// --- comparison ---

ONEPASS_HD void copy_line(const void* from, void* to) {
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  for (int i = 0; i < 64; i += 32) store_256(target + i, load_256(source + i));
}

ONEPASS_HD uint32_t differences(const uint16_t* a, const uint16_t* b) {
  const __m256i low = _mm256_cmpeq_epi16(load_256(a), load_256(b));
  const __m256i high = _mm256_cmpeq_epi16(load_256(a + 16), load_256(b + 16));
  // packs takes the lower and upper halves of both vectors in turn.
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8);
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}
ONEPASS_HD uint32_t differences(const uint32_t* a, const uint32_t* b) {
  uint32_t equal = 0;
  for (int i = 0; i < kStrip; i += 8) {
    const __m256i same = _mm256_cmpeq_epi32(load_256(a + i), load_256(b + i));
    equal |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(same))) << i;
  }
  return ~equal;
}

// --- tests and maxima ---

ONEPASS_HD bool has_zero(const uint8_t* bytes) {
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(load_256(bytes), all_of(0))) != 0;
}

ONEPASS_HD bool are_ordered(const float (*values)[kStrip]) {
  const auto unordered = [&](int i) {
    const __m256 low = _mm256_loadu_ps(values[0] + i), high = _mm256_loadu_ps(values[0] + i + 8);
    return _mm256_cmp_ps(low, high, _CMP_UNORD_Q);
  };
  return _mm256_movemask_ps(_mm256_or_ps(unordered(0), unordered(16))) == 0;
}

ONEPASS_HD void largest_of(const uint32_t (*values)[kWords], uint32_t* __restrict largest) {
  static_assert(kStrips == 8, "the tree is of eight");
  const auto larger = [](__m256i a, __m256i b) { return _mm256_max_epu32(a, b); };
  __m256i twos[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    const __m256i a = load_256(values[2 * i]), b = load_256(values[2 * i + 1]);
    twos[i] = larger(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 2; ++i) {
    const __m256i a = twos[2 * i], b = twos[2 * i + 1];
    fours[i] = larger(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  }
  const __m256i low = _mm256_permute2x128_si256(fours[0], fours[1], 0x20);
  const __m256i high = _mm256_permute2x128_si256(fours[0], fours[1], 0x31);
  store_256(largest, larger(low, high));
}

}  // namespace simd
}  // namespace
}  // namespace onepass::cpu
