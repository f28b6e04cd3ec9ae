// The primitives as plain loops, which the compiler vectorises for any processor. avx2.h and
// avx512.h define the same names with intrinsics, and give the same results.
#pragma once

#include "../strip.h"

namespace onepass::cpu {
namespace {
namespace simd {

// --- constants ---

// 32-bit words per vector.
constexpr int kWords = 16;
// Strips per call of narrow, second_bytes, has_zero and are_ordered.
constexpr int kNarrowed = 1;
// Whether narrow turns negative halves of pairs into zero.
constexpr bool kSaturates = false;
// Elements per call of convert, and pairs of codes per call of join_nibbles; 0 if a plain loop is
// as good.
constexpr int kConverted = 0;
constexpr int kNibblePairs = 0;
// Whether loops without conversions prefetch (in_place_impl.h); whether all strips of an mx8 tile
// are decoded before the first is updated, and whether writing an mx8 tile is interleaved with
// updating the next (tiles_impl.h).
constexpr bool kPrefetchesInPlace = false;
constexpr bool kOpensFirst = false;
constexpr bool kInterleavesTiles = false;

// --- comparison ---

// Copies 64 bytes, in vectors as wide as those that differences loads: a load that spans two stores
// cannot be forwarded. With AVX2, memcpy with its 16-byte vectors made a recorded bf16 step 0.4
// cycles per weight slower (AMD Zen 3, 2026-11).
ONEPASS_HD void copy_line(const void* from, void* to) { __builtin_memcpy(to, from, 64); }

// Bit i is set where elements i of two strips differ. The codes may be those of floats.
template <class Code>
ONEPASS_HD uint32_t differences(const Code* from, const Code* to) {
  typedef Code Any __attribute__((may_alias));
  const Any *a = from, *b = to;
  uint32_t found = 0;
#pragma omp simd reduction(| : found)
  for (int i = 0; i < kStrip; ++i) found |= uint32_t{a[i] != b[i]} << i;
  return found;
}

// --- widths ---

// Converts kConverted elements from 8 or 16 bits to 32 or the reverse, dropping the upper bits.
template <class To, class From>
ONEPASS_HD void convert(const From*, To*) {}
// Packs 2 * kNibblePairs codes of 4 bits into kNibblePairs bytes, the first into the lower half.
ONEPASS_HD void join_nibbles(const uint32_t*, uint8_t*) {}

// Widens the scales of a tile from bytes to words, and narrows them.
ONEPASS_HD void widen_scales(const uint8_t* bytes, uint32_t* scales) {
  for (int i = 0; i < kStrips; ++i) scales[i] = bytes[i];
}
ONEPASS_HD void narrow_scales(const uint32_t* scales, uint8_t* bytes) {
  for (int i = 0; i < kStrips; ++i) bytes[i] = static_cast<uint8_t>(scales[i]);
}

// Widens 32 bytes to 16 bits each.
template <class From, class To>
ONEPASS_HD void widen(const From* from, To* to) {
#pragma omp simd
  for (int i = 0; i < kStrip; ++i) to[i] = from[i];
}

// Narrows the pairs of kNarrowed strips to bytes in memory order. The byte of a value is the lower
// byte of its half of a pair; the upper byte is 0, or with kSaturates may be negative.
template <Order Of>
ONEPASS_HD void narrow(const uint32_t (*pairs)[kPairs], uint8_t* to) {
  const uint32_t* __restrict pair = pairs[0];
  if (Of == kByPairs) {
    uint32_t both[kPairs];
    uint16_t words[kPairs];
#pragma omp simd
    for (int i = 0; i < kPairs; ++i) both[i] = pair[i] | pair[i] >> 8;
#pragma omp simd
    for (int i = 0; i < kPairs; ++i) words[i] = static_cast<uint16_t>(both[i]);
    __builtin_memcpy(to, words, kStrip);
  } else {
    uint32_t upper[kPairs];
#pragma omp simd
    for (int i = 0; i < kPairs; ++i) upper[i] = pair[i] >> 16;
#pragma omp simd
    for (int i = 0; i < kPairs; ++i) to[i] = static_cast<uint8_t>(pair[i]);
#pragma omp simd
    for (int i = 0; i < kPairs; ++i) to[i + kPairs] = static_cast<uint8_t>(upper[i]);
  }
}

// Writes the second-lowest byte of each word of kNarrowed strips by pairs, xor flip, in memory
// order.
ONEPASS_HD void second_bytes(const uint32_t (*words)[kStrip], uint32_t flip, uint8_t* to) {
  alignas(64) uint32_t bytes[1][kPairs];
#pragma omp simd
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t even = words[0][i], odd = words[0][i + kPairs];
    bytes[0][i] = ((even >> 8 & 0xFF) | (odd << 8 & 0xFF0000)) ^ twice(flip);
  }
  narrow<kByPairs>(bytes, to);
}

// --- pairs ---

// Joins the upper halves of the words of a strip into pairs.
ONEPASS_HD void join_strip(const uint32_t* __restrict words, Pair* __restrict pairs) {
#pragma omp simd
  for (int i = 0; i < kPairs; ++i) pairs[i] = join(words[i], words[i + kPairs]);
}

// Moves the sign bits of codes in pairs to their place in a byte. Encoding shifted the sign
// together with the other bits of the fp32, so it is further up than in the code.
template <class Code>
ONEPASS_HD void fold_signs(Pair* __restrict codes) {
#pragma omp simd
  for (int i = 0; i < kPairs; ++i)
    codes[i] =
        (codes[i] & twice(Code::kSign - 1)) | (codes[i] >> Code::kRandomShift & twice(Code::kSign));
}

// The values of a strip of split8, by pairs: the fp32 whose bits are weight * 2^16 + low * 2^8, as
// joined() in csrc/formats/weights.h.
ONEPASS_HD void join_split8(const Pair* pairs, const int8_t* companion, float* __restrict values) {
  alignas(64) int16_t low[kStrip];
  widen(companion, low);
  const Half16* __restrict weight = reinterpret_cast<const Half16*>(pairs);
#pragma omp simd
  for (int i = 0; i < kStrip; ++i) {
    const int16_t positive = low[i] > 0 ? low[i] : static_cast<int16_t>(0);
    low[i] = (weight[i] & 0x7FFF) == 0 ? positive : low[i];
  }
  const Pair* lows = reinterpret_cast<const Pair*>(low);
#pragma omp simd
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t even = static_cast<uint32_t>(static_cast<int32_t>(lows[i] << 16) >> 8);
    const uint32_t odd = static_cast<uint32_t>(static_cast<int32_t>(lows[i] & ~0xFFFFu) >> 8);
    values[i] = from_bits((pairs[i] << 16) + even);
    values[i + kPairs] = from_bits((pairs[i] & 0xFFFF0000u) + odd);
  }
}

// The stochastically rounded codes of a strip of Signed (csrc/formats/blocks.h), in pairs, with
// signs as fold_signs expects them. lowest is the power of two of the scale, and base its code, in
// both halves; adding minus subtracts base in the upper half.
template <class Code>
ONEPASS_HD void lift_signed(
    const float* __restrict values, Random random, float lowest, uint32_t base, uint32_t /*minus*/,
    uint32_t* __restrict codes) {
  uint32_t lifted[kStrip];
#pragma omp simd
  for (int i = 0; i < kStrip; ++i) {
    const uint32_t sign = to_bits(values[i]) & ~kMagnitude;
    const float sum = values[i] + from_bits(sign | to_bits(lowest));
    lifted[i] = (to_bits(sum) >> Code::kRandomShift) + random[i];
  }
  join_strip(lifted, codes);
#pragma omp simd
  for (int i = 0; i < kPairs; ++i) codes[i] -= base;
}

// --- tests and maxima ---

// Whether any byte of kNarrowed strips is zero.
ONEPASS_HD bool has_zero(const uint8_t* bytes) {
  bool found = false;
  for (int i = 0; i < kStrip; ++i) found = found || bytes[i] == 0;
  return found;
}

// Whether kNarrowed strips hold no NaN.
ONEPASS_HD bool are_ordered(const float (*values)[kStrip]) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < kStrip; ++i) largest = max_u32(largest, to_bits(values[0][i]) & kMagnitude);
  return largest <= kInfinity;
}

// The maximum of each strip of a tile. values holds kWords partial maxima per strip.
ONEPASS_HD void largest_of(const uint32_t (*values)[kWords], uint32_t* __restrict largest) {
  for (int strip = 0; strip < kStrips; ++strip) {
    uint32_t most = 0;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < kWords; ++i) most = max_u32(most, values[strip][i]);
    largest[strip] = most;
  }
}

}  // namespace simd
}  // namespace
}  // namespace onepass::cpu
