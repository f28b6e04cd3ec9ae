// The primitives of plain.h with AVX-512 intrinsics. They have masks of ones, because those without
// a mask cause warnings about undefined values in GCC's own headers.
#pragma once

#include <immintrin.h>  // always inlined: no copy of these functions reaches the linker

#include "../strip.h"

namespace onepass::cpu {
namespace {
namespace simd {

// --- constants ---

constexpr int kWords = 16;
constexpr int kNarrowed = 2;
constexpr bool kSaturates = true;
constexpr int kConverted = 16;
constexpr int kNibblePairs = 8;
constexpr bool kPrefetchesInPlace = true;
constexpr bool kOpensFirst = false;
constexpr bool kInterleavesTiles = true;

// --- vectors: not used above the primitives ---

constexpr __mmask16 kAll = 0xFFFF;

// Unaligned loads and stores, a word broadcast to all lanes, and a right shift of words.
ONEPASS_HD __m128i load_128(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}
ONEPASS_HD __m256i load_256(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
ONEPASS_HD __m512i load_512(const void* from) { return _mm512_loadu_si512(from); }
ONEPASS_HD void store_512(void* to, __m512i value) { _mm512_storeu_si512(to, value); }
ONEPASS_HD __m512i all_of(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
ONEPASS_HD __m512i right_512(__m512i value, int shift) {
  return _mm512_maskz_srli_epi32(kAll, value, shift);
}
// In each 16-byte lane, replaces the bytes of `to` that mask selects by the bytes of `from` whose
// indices are in `lane`.
ONEPASS_HD __m512i move_bytes(__m512i to, __mmask64 mask, __m512i from, __m128i lane) {
  return _mm512_mask_shuffle_epi8(to, mask, from, _mm512_maskz_broadcast_i32x4(kAll, lane));
}
// join() of strip.h.
ONEPASS_HD void join_512(__m512i low, __m512i high, void* pairs) {
  const __m128i upper = _mm_set_epi32(0x0F0E, 0x0B0A, 0x0706, 0x0302);
  store_512(pairs, move_bytes(high, 0x3333333333333333, low, upper));
}
// Reorders two strips whose 64-bit parts alternate, so that one strip follows the other.
ONEPASS_HD __m512i strips_apart(__m512i bytes) {
  return _mm512_maskz_permutexvar_epi64(0xFF, _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), bytes);
}

// --- widths ---

// GCC 12 vectorises a loop that converts in two halves, which it joins through memory. A load that
// spans two stores cannot be forwarded: these stalls took a third of an mx8 step.
ONEPASS_HD void convert(const uint8_t* from, uint32_t* to) {
  store_512(to, _mm512_maskz_cvtepu8_epi32(kAll, load_128(from)));
}
ONEPASS_HD void convert(const int8_t* from, int32_t* to) {
  store_512(to, _mm512_maskz_cvtepi8_epi32(kAll, load_128(from)));
}
ONEPASS_HD void convert(const uint16_t* from, uint32_t* to) {
  store_512(to, _mm512_maskz_cvtepu16_epi32(kAll, load_256(from)));
}
ONEPASS_HD void convert(const int16_t* from, int32_t* to) {
  store_512(to, _mm512_maskz_cvtepi16_epi32(kAll, load_256(from)));
}
template <class To, class From>
ONEPASS_HD void convert(const From* from, To* to) {
  static_assert(sizeof(From) == 4 && sizeof(To) <= 2, "no such conversion");
  const __m512i wide = load_512(from);
  if constexpr (sizeof(To) == 1)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(kAll, wide));
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(kAll, wide));
}

ONEPASS_HD void join_nibbles(const uint32_t* from, uint8_t* to) {
  const __m512i pair = load_512(from);  // a pair of codes is a 64-bit word
  const __m512i upper = _mm512_maskz_srli_epi64(0xFF, pair, 28);
  const __m128i bytes = _mm512_maskz_cvtepi64_epi8(0xFF, _mm512_or_si512(pair, upper));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bytes);
}

ONEPASS_HD void widen_scales(const uint8_t* bytes, uint32_t* scales) {
  for (int i = 0; i < kStrips; ++i) scales[i] = bytes[i];
}
ONEPASS_HD void narrow_scales(const uint32_t* scales, uint8_t* bytes) {
  for (int i = 0; i < kStrips; ++i) bytes[i] = static_cast<uint8_t>(scales[i]);
}

ONEPASS_HD void widen(const uint8_t* from, uint16_t* to) {
  store_512(to, _mm512_maskz_cvtepu8_epi16(0xFFFFFFFF, load_256(from)));
}
ONEPASS_HD void widen(const int8_t* from, int16_t* to) {
  store_512(to, _mm512_maskz_cvtepi8_epi16(0xFFFFFFFF, load_256(from)));
}

template <Order Of>
ONEPASS_HD void narrow(const uint32_t (*pairs)[kPairs], uint8_t* to) {
  const __m512i words = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m128i halves = _mm_set_epi8(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0);
  const __m512i bytes = _mm512_packus_epi16(load_512(pairs[0]), load_512(pairs[1]));
  if (Of == kByPairs) {
    store_512(to, strips_apart(bytes));
  } else {
    const __m512i apart = _mm512_shuffle_epi8(bytes, _mm512_maskz_broadcast_i32x4(kAll, halves));
    store_512(to, _mm512_maskz_permutexvar_epi32(kAll, words, apart));
  }
}

// Each of the four moves fills every other byte of eight; the bytes of the second strip go to the
// upper eight bytes of a lane.
ONEPASS_HD void second_bytes(const uint32_t (*words)[kStrip], uint32_t flip, uint8_t* to) {
  const __m512i lane = _mm512_set1_epi64(0x0D0D090905050101);
  const auto move = [&](__m512i bytes, int k, int half) {
    const __mmask64 places = 0x0001000100010001 * (0x55ull << (8 * k + half));
    return _mm512_mask_shuffle_epi8(bytes, places, load_512(words[k] + half * kPairs), lane);
  };
  const __m512i bytes = move(move(move(move(all_of(0), 0, 0), 0, 1), 1, 0), 1, 1);
  store_512(to, _mm512_xor_si512(strips_apart(bytes), all_of(flip * 0x01010101)));
}

// --- pairs ---

ONEPASS_HD void join_strip(const uint32_t* __restrict words, Pair* __restrict pairs) {
  join_512(load_512(words), load_512(words + kPairs), pairs);
}

template <class Code>
ONEPASS_HD void fold_signs(Pair* __restrict codes) {
  constexpr int kBack = Code::kRandomShift + Code::kWidth - 7;  // distance within the upper byte
  const __m512i bytes = all_of(twice(1u << 8 << kBack | 1u));
  store_512(codes, _mm512_maddubs_epi16(load_512(codes), bytes));
}

ONEPASS_HD void join_split8(const Pair* pairs, const int8_t* companion, float* __restrict values) {
  const __m512i weight = load_512(pairs);
  const __m512i any = _mm512_maskz_cvtepi8_epi16(0xFFFFFFFF, load_256(companion));
  const __mmask32 zero = _mm512_testn_epi16_mask(weight, all_of(twice(0x7FFF)));
  const __m512i kept = _mm512_mask_max_epi16(any, zero, any, all_of(0));
  const __m512i even = _mm512_madd_epi16(kept, all_of(256)), above = all_of(0xFFFF0000u);
  const __m512i odd = _mm512_madd_epi16(kept, all_of(256 << 16));
  store_512(values, _mm512_add_epi32(_mm512_maskz_slli_epi32(kAll, weight, 16), even));
  store_512(values + kPairs, _mm512_add_epi32(_mm512_and_si512(weight, above), odd));
}

// Three-operand logic instructions: the compiler does not combine operations across the float and
// integer types.
template <class Code>
ONEPASS_HD void lift_signed(
    const float* values, Random random, float lowest, uint32_t, uint32_t minus, uint32_t* codes) {
  constexpr int kBitOr = 0xEA;  // (a & b) | c
  const __m512i sign = all_of(~kMagnitude), half = all_of(0xFFFF), subtract = all_of(minus);
  const __m512i lift = all_of(to_bits(lowest));
  const auto lifted = [&](int i) {
    const __m512i value = load_512(values + i), word = load_512(random.words + i);
    const __m512i with_sign = _mm512_ternarylogic_epi32(value, sign, lift, kBitOr);
    const __m512 sum = _mm512_castsi512_ps(value) + _mm512_castsi512_ps(with_sign);
    const __m512i drawn = random.shift ? _mm512_or_si512(right_512(word, 16), subtract)
                                       : _mm512_ternarylogic_epi32(word, half, subtract, kBitOr);
    return _mm512_add_epi32(right_512(_mm512_castps_si512(sum), Code::kRandomShift), drawn);
  };
  join_512(lifted(0), lifted(kPairs), codes);
}

// --- comparison ---

ONEPASS_HD void copy_line(const void* from, void* to) { store_512(to, load_512(from)); }

ONEPASS_HD uint32_t differences(const uint16_t* a, const uint16_t* b) {
  return _mm512_cmpneq_epi16_mask(load_512(a), load_512(b));
}
ONEPASS_HD uint32_t differences(const uint32_t* a, const uint32_t* b) {
  const uint32_t low = _mm512_cmpneq_epi32_mask(load_512(a), load_512(b));
  const uint32_t high = _mm512_cmpneq_epi32_mask(load_512(a + 16), load_512(b + 16));
  return low | high << 16;
}

// --- tests and maxima ---

ONEPASS_HD bool has_zero(const uint8_t* bytes) {
  const __m512i all = load_512(bytes);
  return _mm512_testn_epi8_mask(all, all) != 0;
}

ONEPASS_HD bool are_ordered(const float (*values)[kStrip]) {
  static_assert(kNarrowed == 2, "one strip and the next");
  const auto unordered = [&](int k) {
    const __m512 low = _mm512_loadu_ps(values[k]), high = _mm512_loadu_ps(values[k] + kPairs);
    return _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q);
  };
  return _kortestz_mask16_u8(unordered(0), unordered(1)) != 0;
}

ONEPASS_HD void largest_of(const uint32_t (*values)[kWords], uint32_t* __restrict largest) {
  static_assert(kStrips == 8, "the tree is of eight");
  const auto larger = [](__m512i a, __m512i b) { return _mm512_maskz_max_epu32(kAll, a, b); };
  __m512i twos[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    const __m512i a = load_512(values[2 * i]), b = load_512(values[2 * i + 1]);
    twos[i] = larger(
        _mm512_maskz_shuffle_i32x4(kAll, a, b, 0x44), _mm512_maskz_shuffle_i32x4(kAll, a, b, 0xEE));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512i a = twos[2 * i], b = twos[2 * i + 1];
    fours[i] = larger(
        _mm512_maskz_shuffle_i32x4(kAll, a, b, 0x88), _mm512_maskz_shuffle_i32x4(kAll, a, b, 0xDD));
  }
  const __m512i both = larger(
      _mm512_maskz_unpacklo_epi64(0xFF, fours[0], fours[1]),
      _mm512_maskz_unpackhi_epi64(0xFF, fours[0], fours[1]));
  const __m512i one = larger(both, _mm512_maskz_srli_epi64(0xFF, both, 32));
  const __m512i order = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 10, 6, 2, 12, 8, 4, 0);
  const __m512i ordered = _mm512_maskz_permutexvar_epi32(kAll, order, one);
  // (A masked store would not be forwarded to the loads that follow.)
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(largest), _mm512_maskz_extracti64x4_epi64(0xF, ordered, 0));
}

}  // namespace simd
}  // namespace
}  // namespace onepass::cpu
