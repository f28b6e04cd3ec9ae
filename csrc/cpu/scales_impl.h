// The scales and codes of the block formats on a tile of strips, for one instruction set: see
// kernels_impl.h. The results are those of csrc/formats, computed with two values per word.
#pragma once

#include "pairs_impl.h"

namespace onepass::cpu {
namespace {

// The scale of each strip of a tile, and constants that derive() computes from it for encoding and
// decoding. Broadcasting them from memory avoids the shuffle port, which a broadcast from a general
// register uses.
struct Scales {
  alignas(32) uint32_t scale[kStrips];
  alignas(32) uint32_t base[kStrips];   // the code of the lowest exponent, in both halves
  alignas(32) uint32_t least[kStrips];  // Unsigned: base plus one in the upper half
  alignas(32) uint32_t minus[kStrips];  // Signed: adding it subtracts base in the upper half
  alignas(32) float lowest[kStrips];    // Signed, Root: the lowest power of two
  alignas(32) uint32_t shift[kStrips];  // Root: shift that aligns codes with the upper half
  alignas(32) float per_step[kStrips];  // Ratio: its encoder
};

// lift returns a stochastically rounded code plus base in the upper half of a word.
template <int Exponent, int Mantissa>
ONEPASS_HD uint32_t
lift(Unsigned<Exponent, Mantissa>, float value, uint32_t random16, const Scales& of, int strip) {
  const uint32_t bits = to_bits(value);
  const uint32_t least = of.least[strip], none = of.base[strip];
  const uint32_t code = (bits >> Unsigned<Exponent, Mantissa>::kRandomShift) + random16;
  const uint32_t kept = max_u32(code, least);
  return bits == 0 ? none : kept;
}
ONEPASS_HD uint32_t lift(Root, float value, uint32_t random16, const Scales& of, int strip) {
  const uint32_t bits = max_u32(to_bits(value), to_bits(of.lowest[strip]));
  return (bits >> of.shift[strip]) + random16;
}
ONEPASS_HD uint32_t lift(Ratio, float value, uint32_t random16, const Scales& of, int strip) {
  const uint32_t sign = (to_bits(value) & ~kMagnitude) >> Ratio::kRandomShift;
  return Ratio::dithered(value, random16, of.per_step[strip]) + sign;
}
template <int Exponent, int Mantissa>
ONEPASS_HD uint32_t
lift(Signed<Exponent, Mantissa>, float value, uint32_t random16, const Scales& of, int strip) {
  const uint32_t sign = to_bits(value) & ~kMagnitude;
  const float lifted = value + from_bits(sign | to_bits(of.lowest[strip]));
  return (to_bits(lifted) >> Signed<Exponent, Mantissa>::kRandomShift) + random16;
}

// Whether a code is a Signed.
template <int Exponent, int Mantissa>
constexpr bool is_signed(Signed<Exponent, Mantissa>) {
  return true;
}
constexpr bool is_signed(...) { return false; }

// The codes of a strip, in pairs. Signs are above the codes and are not yet in place; see
// fold_signs.
template <class Code>
ONEPASS_HD void lift_strip(
    const float* __restrict values, Random random, const Scales& of, int strip,
    uint32_t* __restrict codes) {
  uint32_t lifted[kStrip];
#pragma omp simd
  for (int i = 0; i < kStrip; ++i) lifted[i] = lift(Code(), values[i], random[i], of, strip);
  join_strip(lifted, codes);
#pragma omp simd
  for (int i = 0; i < kPairs; ++i) codes[i] -= of.base[strip];
}
#if defined(__AVX512BW__)
// lift_strip for Signed, with three-operand logic instructions: the compiler does not combine
// operations across the float and integer types.
template <class Code>
ONEPASS_HD void lift_signed(
    const float* values, Random random, const Scales& of, int strip, uint32_t* codes) {
  constexpr int kBitOr = 0xEA;  // (a & b) | c
  const __m512i sign = all_of(~kMagnitude), half = all_of(0xFFFF), minus = all_of(of.minus[strip]);
  const __m512i lowest = all_of(to_bits(of.lowest[strip]));
  const auto lifted = [&](int i) {
    const __m512i value = load_512(values + i), word = load_512(random.words + i);
    const __m512i with_sign = _mm512_ternarylogic_epi32(value, sign, lowest, kBitOr);
    const __m512 sum = _mm512_castsi512_ps(value) + _mm512_castsi512_ps(with_sign);
    const __m512i drawn = random.shift ? _mm512_or_si512(right_512(word, 16), minus)
                                       : _mm512_ternarylogic_epi32(word, half, minus, kBitOr);
    return _mm512_add_epi32(right_512(_mm512_castps_si512(sum), Code::kRandomShift), drawn);
  };
  join_512(lifted(0), lifted(kPairs), codes);
}
#endif

// The codes of a strip, each in a half of a pair.
template <class Code>
ONEPASS_HD void code_strip(
    const float* __restrict values, Random random, const Scales& of, int strip,
    uint32_t* __restrict codes) {
  if (__builtin_expect(of.scale[strip] == kNotFinite, 0)) {
    for (int i = 0; i < kPairs; ++i) codes[i] = twice(Code::kNan);
    return;
  }
#if defined(__AVX512BW__)
  if constexpr (is_signed(Code()))
    lift_signed<Code>(values, random, of, strip, codes);
  else
#endif
    lift_strip<Code>(values, random, of, strip, codes);
  if constexpr (Code::kSign != 0) fold_signs<Code>(codes);
}

// code_strip of an Unsigned code for values that all have codes of at least 1. A zero byte in the
// narrowed result means that a value needs code_strip instead.
template <class Code>
ONEPASS_HD void code_above(
    const float* __restrict values, Random random, const Scales& of, int strip,
    uint32_t* __restrict codes) {
  uint32_t lifted[kStrip];
#pragma omp simd
  for (int i = 0; i < kStrip; ++i)
    lifted[i] = (to_bits(values[i]) >> Code::kRandomShift) + random[i];
  join_strip(lifted, codes);
  alignas(64) uint32_t bases[kPairs];
  const uint32_t base = of.base[strip];
#pragma omp simd
  for (int i = 0; i < kPairs; ++i) bases[i] = base;
  Half16* halves = reinterpret_cast<Half16*>(codes);
  const Half16* subtract = reinterpret_cast<const Half16*>(bases);
#pragma omp simd
  for (int i = 0; i < kStrip; ++i) halves[i] = static_cast<Half16>(halves[i] - subtract[i]);
}

// Encodes kNarrowed strips to bytes, from number `strip` of the tile on.
template <class Code, Order Of>
ONEPASS_HD void code_strips(
    const float (*values)[kStrip], const uint32_t (*words)[kStrip], int shift, const Scales& of,
    int strip, uint8_t* bytes) {
  alignas(64) uint32_t codes[kNarrowed][kPairs];
  bool above = Code::kHasZero && kFindsZeros;
  for (int i = 0; i < kNarrowed; ++i) above = above && of.scale[strip + i] != kNotFinite;
  if (__builtin_expect(above, 1)) {
    for (int i = 0; i < kNarrowed; ++i)
      code_above<Code>(values[i], {words[i], shift}, of, strip + i, codes[i]);
    narrow<Of>(codes, bytes);
    if (__builtin_expect(!has_zero(bytes), 1)) return;
  }
  for (int i = 0; i < kNarrowed; ++i)
    code_strip<Code>(values[i], {words[i], shift}, of, strip + i, codes[i]);
  narrow<Of>(codes, bytes);
}

// Writes kWords partial maxima of the measures of a strip to most.
template <class Code>
ONEPASS_HD void measure_strip(const float* __restrict values, uint32_t* __restrict most) {
  const auto at = [&](int i) { return Code::measure(values[i]); };
#pragma omp simd
  for (int i = 0; i < kWords; ++i) {
    most[i] = max_u32(at(i), at(i + kPairs));
    if (kWords < kPairs)
      most[i] = max_u32(most[i], max_u32(at(i + kWords), at(i + kPairs + kWords)));
  }
}

// derive computes the constants of Scales for one strip.
template <int Exponent, int Mantissa>
ONEPASS_HD void derive(Unsigned<Exponent, Mantissa>, Scales& of, int strip) {
  of.base[strip] = twice(of.scale[strip] << Mantissa);
  of.least[strip] = of.base[strip] + 0x10000u;
}
template <int Exponent, int Mantissa>
ONEPASS_HD void derive(Signed<Exponent, Mantissa>, Scales& of, int strip) {
  of.base[strip] = twice(of.scale[strip] << Mantissa);
  of.minus[strip] = 0u - (of.scale[strip] << (16 + Mantissa));
  of.lowest[strip] = from_bits(of.scale[strip] << 23);
}
ONEPASS_HD void derive(Root, Scales& of, int strip) {
  const Root::Unit unit = Root::decoder(of.scale[strip]);
  of.base[strip] = twice(unit.lowest >> (23 - unit.mantissa));
  of.lowest[strip] = from_bits(unit.lowest);
  of.shift[strip] = 7 - unit.mantissa;
}
ONEPASS_HD void derive(Ratio, Scales& of, int strip) {
  of.base[strip] = 0;
  of.per_step[strip] = Ratio::encoder(of.scale[strip]);
}

template <class Code>
ONEPASS_HD void derive_scales(Scales& of) {
#pragma omp simd
  for (int i = 0; i < kStrips; ++i) derive(Code(), of, i);
}
// Reads the scales of a tile from memory.
template <class Code>
ONEPASS_HD void read_scales(const Stored& at, int64_t first, Scales& of) {
  const uint8_t* bytes = static_cast<const uint8_t*>(at.extra) + first / kMxBlock;
  for (int i = 0; i < kStrips; ++i) of.scale[i] = bytes[i];
  derive_scales<Code>(of);
}
// Chooses the scales of a tile from the results of measure_strip and writes them to memory.
template <class Code>
ONEPASS_HD void choose_scales(
    const uint32_t (*most)[kWords], const uint32_t* least, const Stored& at, int64_t first,
    Scales& of) {
  alignas(64) uint32_t largest[kStrips];
  largest_of(most, largest);
#pragma omp simd
  for (int i = 0; i < kStrips; ++i) {
    if constexpr (Code::kTakesLeast)
      of.scale[i] = Code::scale(largest[i], least[i]);
    else
      of.scale[i] = Code::scale(largest[i]);
  }
  derive_scales<Code>(of);
  uint8_t* bytes = static_cast<uint8_t*>(at.extra) + first / kMxBlock;
  for (int i = 0; i < kStrips; ++i) bytes[i] = static_cast<uint8_t>(of.scale[i]);
}

}  // namespace
}  // namespace onepass::cpu
