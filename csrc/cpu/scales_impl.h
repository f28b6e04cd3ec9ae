// The scales and codes of a tile of strips in blocks, for one instruction set: see kernels_impl.h.
// What they compute is csrc/formats, two values to a word.
#pragma once

#include "pairs_impl.h"

namespace onepass::cpu {
namespace {

// What codes need of the scales of a tile. From memory they are broadcast for nothing, from a
// general register by the unit that permutes.
struct Scales {
  alignas(32) uint32_t scale[kStrips];
  alignas(32) uint32_t base[kStrips];   // the code of its lowest exponent, in both halves
  alignas(32) uint32_t least[kStrips];  // one more in the upper half
  alignas(32) float lowest[kStrips];    // its lowest power of two
  alignas(32) uint32_t shift[kStrips];  // of a Root's bits, to where codes are in the upper half
  alignas(32) float per_step[kStrips];  // of a Ratio
};

// A code, dithered, above base in the upper half of a word.
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

// The codes of a strip, each in a half of a pair.
template <class Code>
ONEPASS_HD void code_strip(
    const float* __restrict values, Random random, const Scales& of, int strip,
    uint32_t* __restrict codes) {
  if (__builtin_expect(of.scale[strip] == kNotFinite, 0)) {
    for (int i = 0; i < kPairs; ++i) codes[i] = twice(Code::kNan);
    return;
  }
  uint32_t lifted[kStrip];
  if constexpr (Code::kHasZero) {  // without the care of lift, unless a value needs it
#pragma omp simd
    for (int i = 0; i < kStrip; ++i)
      lifted[i] = (to_bits(values[i]) >> Code::kRandomShift) + random[i];
    join_strip(lifted, codes);
    if (__builtin_expect(subtract_base(codes, of.base[strip]), 1)) return;
  }
#pragma omp simd
  for (int i = 0; i < kStrip; ++i) lifted[i] = lift(Code(), values[i], random[i], of, strip);
  join_strip(lifted, codes);
#pragma omp simd
  for (int i = 0; i < kPairs; ++i) codes[i] -= of.base[strip];
  if constexpr (Code::kSign != 0) fold_signs<Code>(codes);
}

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

template <int Exponent, int Mantissa>
ONEPASS_HD void derive(Minifloat<Exponent, Mantissa>, Scales& of, int strip) {
  of.base[strip] = twice(of.scale[strip] << Mantissa);
  of.least[strip] = of.base[strip] + 0x10000u;
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
template <class Code>
ONEPASS_HD void read_scales(const Stored& at, int64_t first, Scales& of) {
  const uint8_t* bytes = static_cast<const uint8_t*>(at.extra) + first / kMxBlock;
  for (int i = 0; i < kStrips; ++i) of.scale[i] = bytes[i];
  derive_scales<Code>(of);
}
// Those of a tile that is measured.
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
