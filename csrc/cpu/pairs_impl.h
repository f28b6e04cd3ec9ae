// Strips of 32 elements with two 8-bit or 16-bit values per 32-bit word, for one instruction set:
// see kernels_impl.h. Packing two values per word halves the arithmetic on codes. Processing a tile
// of strips at a time amortizes operations across lanes, such as the block maxima. Both matter
// because a division and a square root per element leave few execution slots.
#pragma once

#include "formats_impl.h"
#include "pair.h"

namespace onepass::cpu {
namespace {

constexpr int kStrips = kTile / kStrip;
constexpr int kPairs = kStrip / 2;

// The order of the fp32 elements of a strip in its buffer; buffer elements i and i + kPairs form
// pair i. kInOrder: as in memory, so the elements of a pair are kPairs apart. kByPairs: pair i has
// the elements 2i and 2i + 1 in memory, so it is a word of a 16-bit tensor.
enum Order { kInOrder, kByPairs };

typedef uint16_t Half16 __attribute__((may_alias));  // one half of a pair

// 32-bit words per vector.
#if defined(__AVX2__) && !defined(__AVX512BW__)
constexpr int kWords = 8;
#else
constexpr int kWords = 16;
#endif

// A value in both halves of a word.
constexpr uint32_t twice(uint32_t value) { return value << 16 | value; }

// Draws one random word per element of a strip.
template <Order Of>
ONEPASS_HD void draw_strip(
    const TileRandom& random, int word, int offset, uint32_t* __restrict words) {
  constexpr uint32_t kNext = Of == kByPairs ? 2 * kWeyl : kWeyl;
  constexpr uint32_t kSecond = Of == kByPairs ? kWeyl : kPairs * kWeyl;
  const RandomKey key = random.keys[word];
  const uint32_t start = random_start(key, random.low + static_cast<uint32_t>(offset));
#pragma omp simd
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t at = start + static_cast<uint32_t>(i) * kNext;
    words[i] = random_mix(key, at);
    words[i + kPairs] = random_mix(key, at + kSecond);
  }
}

// --- AVX-512 intrinsics ---

#if defined(__AVX512BW__)
// Unaligned loads and stores of 512 bits, a word broadcast to all lanes, and a right shift of
// words.
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
// join() of pair.h on vectors.
ONEPASS_HD void join_512(__m512i low, __m512i high, void* pairs) {
  const __m128i upper = _mm_set_epi32(0x0F0E, 0x0B0A, 0x0706, 0x0302);
  store_512(pairs, move_bytes(high, 0x3333333333333333, low, upper));
}
// Reorders two strips whose 64-bit parts alternate, so that one strip follows the other.
ONEPASS_HD __m512i strips_apart(__m512i bytes) {
  return _mm512_maskz_permutexvar_epi64(0xFF, _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), bytes);
}
#endif

// --- AVX2 intrinsics ---

#if defined(__AVX2__) && !defined(__AVX512BW__)
ONEPASS_HD __m256i all_of(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }
// join() of pair.h on vectors.
ONEPASS_HD __m256i join_256(__m256i low, __m256i high) {
  return _mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xAA);
}
#endif

// Joins the upper halves of the words of a strip into pairs.
ONEPASS_HD void join_strip(const uint32_t* __restrict words, Pair* __restrict pairs) {
#if defined(__AVX512BW__)
  join_512(load_512(words), load_512(words + kPairs), pairs);
#elif defined(__AVX2__)
  for (int i = 0; i < kPairs; i += kWords)
    store_256(pairs + i, join_256(load_256(words + i), load_256(words + kPairs + i)));
#else
#pragma omp simd
  for (int i = 0; i < kPairs; ++i) pairs[i] = join(words[i], words[i + kPairs]);
#endif
}

// Moves the sign bits of codes in pairs to their place in a byte. Encoding shifted the sign
// together with the other bits of the fp32, so it is further up than in the code.
template <class Code>
ONEPASS_HD void fold_signs(Pair* __restrict codes) {
#if defined(__AVX2__)
  constexpr int kBack = Code::kRandomShift + Code::kWidth - 7;  // distance within the upper byte
  const auto bytes = all_of(twice(1u << 8 << kBack | 1u));
#endif
#if defined(__AVX512BW__)
  store_512(codes, _mm512_maddubs_epi16(load_512(codes), bytes));
#elif defined(__AVX2__)
  for (int i = 0; i < kPairs; i += kWords)
    store_256(codes + i, _mm256_maddubs_epi16(load_256(codes + i), bytes));
#else
#pragma omp simd
  for (int i = 0; i < kPairs; ++i)
    codes[i] =
        (codes[i] & twice(Code::kSign - 1)) | (codes[i] >> Code::kRandomShift & twice(Code::kSign));
#endif
}

// --- bytes ---

// Widens 32 bytes to 16 bits each.
template <class From, class To>
ONEPASS_HD void widen(const From* from, To* to) {
#if defined(__AVX512BW__)
  const __m256i bytes = load_256(from);
  const __mmask32 all = 0xFFFFFFFF;
  const bool with_sign = static_cast<From>(-1) < 0;
  store_512(
      to,
      with_sign ? _mm512_maskz_cvtepi8_epi16(all, bytes) : _mm512_maskz_cvtepu8_epi16(all, bytes));
#elif defined(__AVX2__)
  for (int i = 0; i < kStrip; i += 16) {
    const __m128i bytes = load_128(from + i);
    const bool with_sign = static_cast<From>(-1) < 0;
    store_256(to + i, with_sign ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes));
  }
#else
#pragma omp simd
  for (int i = 0; i < kStrip; ++i) to[i] = from[i];
#endif
}

// Narrows the pairs of kNarrowed strips to bytes in memory order. The byte of a value is the lower
// byte of its half of a pair. The intrinsics saturate: a negative half becomes zero.
#if defined(__AVX512BW__)
constexpr int kNarrowed = 2;
#else
constexpr int kNarrowed = 1;
#endif
template <Order Of>
ONEPASS_HD void narrow(const uint32_t (*pairs)[kPairs], uint8_t* to) {
#if defined(__AVX512BW__)
  const __m512i words = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m128i halves = _mm_set_epi8(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0);
  const __m512i bytes = _mm512_packus_epi16(load_512(pairs[0]), load_512(pairs[1]));
  if (Of == kByPairs) {
    store_512(to, strips_apart(bytes));
  } else {
    const __m512i apart = _mm512_shuffle_epi8(bytes, _mm512_maskz_broadcast_i32x4(kAll, halves));
    store_512(to, _mm512_maskz_permutexvar_epi32(kAll, words, apart));
  }
#elif defined(__AVX2__)
  const __m128i lane = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m256i halves = _mm256_broadcastsi128_si256(lane);
  const __m256i words = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  const __m256i bytes = _mm256_packus_epi16(load_256(pairs[0]), load_256(pairs[0] + kWords));
  if (Of == kByPairs)
    store_256(to, _mm256_permute4x64_epi64(bytes, 0xD8));
  else
    store_256(to, _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(bytes, halves), words));
#else
  const uint32_t* __restrict pair = pairs[0];
  if (Of == kByPairs) {
    uint32_t both[kPairs];
    uint16_t words[kPairs];
#pragma omp simd
    for (int i = 0; i < kPairs; ++i) both[i] = pair[i] | pair[i] >> 8;
    convert(both, words, kPairs);
    __builtin_memcpy(to, words, kStrip);
  } else {
    uint32_t upper[kPairs];
#pragma omp simd
    for (int i = 0; i < kPairs; ++i) upper[i] = pair[i] >> 16;
    convert(pair, to, kPairs);
    convert(upper, to + kPairs, kPairs);
  }
#endif
}

// Writes the second-lowest byte of each word of kNarrowed strips, xor flip, in memory order.
ONEPASS_HD void second_bytes(const uint32_t (*words)[kStrip], uint32_t flip, uint8_t* to) {
#if defined(__AVX512BW__)
  // Each of the four moves fills every other byte of eight; the bytes of the second strip go to the
  // upper eight bytes of a lane.
  const __m512i lane = _mm512_set1_epi64(0x0D0D090905050101);
  const auto move = [&](__m512i bytes, int k, int half) {
    const __mmask64 places = 0x0001000100010001 * (0x55ull << (8 * k + half));
    return _mm512_mask_shuffle_epi8(bytes, places, load_512(words[k] + half * kPairs), lane);
  };
  const __m512i bytes = move(move(move(move(all_of(0), 0, 0), 0, 1), 1, 0), 1, 1);
  store_512(to, _mm512_xor_si512(strips_apart(bytes), all_of(flip * 0x01010101)));
#else
  alignas(64) uint32_t bytes[1][kPairs];
#if defined(__AVX2__)
  for (int i = 0; i < kPairs; i += kWords) {
    const __m256i even = load_256(words[0] + i), odd = load_256(words[0] + kPairs + i);
    const __m256i both = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xAA);
    store_256(bytes[0] + i, _mm256_xor_si256(_mm256_srli_epi16(both, 8), all_of(twice(flip))));
  }
#else
#pragma omp simd
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t even = words[0][i], odd = words[0][i + kPairs];
    bytes[0][i] = ((even >> 8 & 0xFF) | (odd << 8 & 0xFF0000)) ^ twice(flip);
  }
#endif
  narrow<kByPairs>(bytes, to);
#endif
}

// Whether any byte of kNarrowed strips is zero.
#if defined(__AVX2__)
constexpr bool kFindsZeros = true;
ONEPASS_HD bool has_zero(const uint8_t* bytes) {
#if defined(__AVX512BW__)
  const __m512i all = load_512(bytes);
  return _mm512_testn_epi8_mask(all, all) != 0;
#else
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(load_256(bytes), all_of(0))) != 0;
#endif
}
#else
constexpr bool kFindsZeros = false;  // here narrow does not turn negative halves into zero
ONEPASS_HD bool has_zero(const uint8_t*) { return true; }
#endif

// Whether kNarrowed strips hold no NaN.
ONEPASS_HD bool are_ordered(const float (*values)[kStrip]) {
#if defined(__AVX512BW__)
  static_assert(kNarrowed == 2, "one strip and the next");
  const auto unordered = [&](int k) {
    const __m512 low = _mm512_loadu_ps(values[k]), high = _mm512_loadu_ps(values[k] + kPairs);
    return _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q);
  };
  return _kortestz_mask16_u8(unordered(0), unordered(1)) != 0;
#elif defined(__AVX2__)
  const auto unordered = [&](int i) {
    const __m256 low = _mm256_loadu_ps(values[0] + i), high = _mm256_loadu_ps(values[0] + i + 8);
    return _mm256_cmp_ps(low, high, _CMP_UNORD_Q);
  };
  return _mm256_movemask_ps(_mm256_or_ps(unordered(0), unordered(16))) == 0;
#else
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < kStrip; ++i) largest = max_u32(largest, to_bits(values[0][i]) & kMagnitude);
  return largest <= kInfinity;
#endif
}

// The maximum of each strip of a tile. values holds kWords partial maxima per strip.
ONEPASS_HD void largest_of(const uint32_t (*values)[kWords], uint32_t* __restrict largest) {
#if defined(__AVX512BW__)
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
#elif defined(__AVX2__)
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
#else
  for (int strip = 0; strip < kStrips; ++strip) {
    uint32_t most = 0;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < kWords; ++i) most = max_u32(most, values[strip][i]);
    largest[strip] = most;
  }
#endif
}

}  // namespace
}  // namespace onepass::cpu
