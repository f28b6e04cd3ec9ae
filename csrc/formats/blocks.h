// The block formats mx8 and mx4 of states, with 8 and 4 bits per element. A block of 32 elements in
// memory order shares a scale byte, which is the biased exponent of a power of two (Root and Ratio
// below give it another meaning). A code is the upper bits of an fp32 whose exponent is relative to
// that scale, so encoding and decoding are integer arithmetic on the bits. onepass/formats/mx8.py
// and mx4.py specify the formats.
#pragma once

#include "random.h"

namespace onepass {

constexpr int kMxBlock = 32;
constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
constexpr uint32_t kInfinity = 0x7F800000u;
constexpr uint32_t kNotFinite = 255;  // the scale of a block that holds a NaN or an infinity
constexpr uint32_t kLowestRoot = 54;  // exponent of 2^-73: from there codes have exact squares > 0
constexpr uint32_t kRatioLimit = 0x40E00000u;  // 7.0f: bounds the Adam step that mx4 can produce
constexpr uint32_t kNan32 = 0x7FC00000u;

// The kinds of states. kFirst: a signed mean (first moment). kSecond: a mean of squares (second
// moment). kRelative: a first moment that is coded as a multiple of the square root of the first
// second moment of its rule.
enum Kind : uint8_t { kFirst, kSecond, kRelative, kKinds };

// The magnitude of a value. On a GPU it is a modifier of the operand and takes no instruction.
ONEPASS_HD float magnitude(float value) {
#if defined(__CUDA_ARCH__)
  return fabsf(value);
#else
  return from_bits(to_bits(value) & kMagnitude);
#endif
}

// The larger of two unsigned integers.
ONEPASS_HD uint32_t max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The common part of codes with Exponent bits of exponent and Mantissa bits of mantissa.
template <int Exponent, int Mantissa>
struct Minifloat {
  static constexpr int kMantissa = Mantissa;
  static constexpr int kDropped = 23 - Mantissa;      // mantissa bits of an fp32 that are dropped
  static constexpr int kRandomShift = kDropped - 16;  // aligns 16 random bits with the dropped ones
  static constexpr uint32_t kSpan = (1u << Exponent) - 1;  // the largest relative exponent
  static constexpr uint32_t kSign = 0;        // the sign bit of a code; 0 if it has none
  static constexpr bool kHasZero = false;     // whether code 0 is reserved for zero
  static constexpr bool kTakesLeast = false;  // whether scale() also takes the block minimum
  static constexpr uint32_t kNan = 1u
                                   << (Mantissa - 1);  // every code of a block that is not finite

  // The scale of a block: the smallest exponent, at least `least`, at which the largest value,
  // plus lift and rounded up, still has a code.
  ONEPASS_HD static uint32_t lowest(uint32_t largest, uint32_t least, uint32_t lift = 0) {
    const uint32_t top = (largest + ((1u << kDropped) - 1 + lift)) >> 23;
    const uint32_t e = max_u32(top, kSpan + least) - kSpan;
    return largest >= kInfinity ? kNotFinite : e;
  }
  // The code of an fp32 whose bits are at least those of the scale's power of two.
  template <class Random>
  ONEPASS_HD static uint32_t round(uint32_t bits, Random random, uint32_t scale) {
    return (add_random(bits, random, kRandomShift) >> kDropped) - (scale << Mantissa);
  }
  ONEPASS_HD static float value(uint32_t code, uint32_t scale) {
    return from_bits((code + (scale << Mantissa)) << kDropped);
  }
  ONEPASS_HD static uint32_t decoder(uint32_t scale) { return scale; }
  template <class Math = Exact>
  ONEPASS_HD static uint32_t encoder(uint32_t scale, Math&& = Math()) {
    return scale;
  }
};

// The interface of every code below. measure(value) returns bits whose block maximum is passed to
// scale(); if kTakesLeast, scale() takes the block minimum too. encoder(scale) and decoder(scale)
// return the scale in the form that encode() and decode() take. encode() is for a finite block;
// every code of another block is kNan.

// Codes of values >= 0. Only zero has code 0.
template <int Exponent, int Mantissa>
struct Unsigned : Minifloat<Exponent, Mantissa> {
  using Base = Minifloat<Exponent, Mantissa>;
  static constexpr bool kHasZero = true;

  ONEPASS_HD static uint32_t measure(float value) { return to_bits(value); }
  template <class Math = Exact>
  ONEPASS_HD static uint32_t scale(uint32_t largest, Math&& = Math()) {
    return Base::lowest(largest, 0);
  }
  template <class Random>
  ONEPASS_HD static uint32_t encode(float value, Random random, uint32_t scale) {
    const uint32_t bits = to_bits(value);
    const uint32_t code = encode_from(1, value, random, scale);
    return code < bits ? code : bits;
  }
  // encode() for a value whose bits, as an integer, exceed every code. least is the lowest code: 1,
  // or 0 in a block of zeros, which this function encodes too.
  template <class Random>
  ONEPASS_HD static uint32_t encode_from(
      int32_t least, float value, Random random, uint32_t scale) {
    const int32_t steps = static_cast<int32_t>(Base::round(to_bits(value), random, scale));
    return static_cast<uint32_t>(steps > least ? steps : least);
  }
  ONEPASS_HD static float decode(uint32_t code, uint32_t scale) {
    return code == 0 ? 0.0f : Base::value(code, scale);
  }
  // decode() of a code in the upper bits of a word whose other bits are zero.
  ONEPASS_HD static float decode_upper(uint32_t word, uint32_t scale) {
    return word == 0 ? 0.0f : decode_upper_normal(word, scale);
  }
  // decode_upper() for a code other than 0; code 0 is allowed if the scale is 0.
  ONEPASS_HD static float decode_upper_normal(uint32_t word, uint32_t scale) {
    return from_bits((word >> (32 - Exponent - Mantissa - Base::kDropped)) + (scale << 23));
  }
};

// Codes of the square root of a second moment, in E2M2 if all 32 roots of a block are within its
// range, else in E3M1; the scale selects the layout. There is no code for zero: only a block of
// zeros, which has scale 0, decodes to zeros.
struct Root {
  using Coarse = Minifloat<3, 1>;
  using Fine = Minifloat<2, 2>;
  static constexpr uint32_t kSign = 0;
  static constexpr bool kHasZero = false;
  static constexpr bool kTakesLeast = true;
  static constexpr uint32_t kNan = Coarse::kNan;
  static constexpr uint32_t kFine = 132;                    // scales from here on select E2M2
  static constexpr uint32_t kCoarseBias = kLowestRoot - 1;  // E3M1: lowest exponent - scale
  static constexpr uint32_t kFineBias = 66;                 // E2M2: scale - lowest exponent

  // A decoded scale: the number of mantissa bits, and the bits of the lowest power of two as fp32.
  struct Unit {
    uint32_t mantissa, lowest;
  };
  ONEPASS_HD static Unit decoder(uint32_t scale) {
    const bool fine = scale >= kFine && scale != kNotFinite;
    const bool kept = scale == 0 || scale == kNotFinite;
    const uint32_t e = kept ? scale : fine ? scale - kFineBias : scale + kCoarseBias;
    return {fine ? 2u : 1u, e << 23};
  }
  template <class Math = Exact>
  ONEPASS_HD static Unit encoder(uint32_t scale, Math&& = Math()) {
    return decoder(scale);
  }

  ONEPASS_HD static uint32_t measure(float value) { return to_bits(value); }
  // least is the block minimum; pass 0 for a block of fewer than 32 elements.
  ONEPASS_HD static uint32_t scale(uint32_t largest, uint32_t least) {
    const uint32_t fine = Fine::lowest(largest, kLowestRoot);
    const uint32_t coarse = Coarse::lowest(largest, kLowestRoot) - kCoarseBias;
    const bool fits = least >= fine << 23 && fine >= kFine - kFineBias;
    const uint32_t finite = fits ? fine + kFineBias : coarse;
    return largest >= kInfinity ? kNotFinite : largest == 0 ? 0u : finite;
  }
  template <class Random>
  ONEPASS_HD static uint32_t encode(float value, Random random, Unit unit) {
    // Signed, because a GPU subtracts and takes a signed maximum in one instruction.
    const int32_t above = static_cast<int32_t>(to_bits(value) - unit.lowest);
    const uint32_t kept = static_cast<uint32_t>(above > 0 ? above : 0);
    return add_random(kept, random, 7 - unit.mantissa) >> (23 - unit.mantissa);  // 0 for a zero
  }
  ONEPASS_HD static float decode(uint32_t code, Unit unit) {
    return from_bits((code << (23 - unit.mantissa)) + unit.lowest);
  }
  // The unit from which decode() returns the divisor of a ratio: 1 for the codes of a block of
  // zeros, otherwise the root.
  ONEPASS_HD static Unit divisor(Unit unit, uint32_t scale) {
    return {unit.mantissa, scale == 0 ? 0x3F800000u : unit.lowest};
  }
};

// Codes of a ratio of magnitude at most kRatioLimit (or not finite): a sign bit above a number of
// even steps from 0 to 7. The step of a block is the smallest float with three mantissa bits, no
// smaller than the step of scale 0, such that 7 steps reach the block maximum.
struct Ratio {
  static constexpr int kWidth = 3;
  static constexpr uint32_t kSign = 1u << kWidth;
  static constexpr bool kHasZero = false;
  static constexpr bool kTakesLeast = false;
  static constexpr uint32_t kNan = 1;
  static constexpr int kRandomShift = 6;          // shifts the sign of an fp32 above the code
  static constexpr uint32_t kLeastStep = 762;     // the upper 12 bits of the step 1.25 * 2^-32
  static constexpr uint32_t kLeast = 0x310C0000;  // the bits of 7 times that step

  // The step of a block.
  ONEPASS_HD static float decoder(uint32_t scale) {
    return from_bits(scale == kNotFinite ? kNan32 : (scale + kLeastStep) << 20);
  }
  // The factor from values to steps in fixed point with 16 fraction bits.
  template <class Math = Exact>
  ONEPASS_HD static float encoder(uint32_t scale, Math&& math = Math()) {
    return math.div_in_range(65536.0f, decoder(scale));
  }

  ONEPASS_HD static uint32_t measure(float value) { return to_bits(value) & kMagnitude; }
  template <class Math = Exact>
  ONEPASS_HD static uint32_t scale(uint32_t largest, Math&& math = Math()) {
    const float seventh = math.div_in_range(from_bits(max_u32(largest, kLeast)), 7.0f);
    const uint32_t finite = ((to_bits(seventh) + 0xFFFFF) >> 20) - kLeastStep;
    return largest >= kInfinity ? kNotFinite : finite;
  }
  template <class Random>
  ONEPASS_HD static uint32_t encode(float value, Random random, float per_step) {
    const uint32_t sign = to_bits(value) >> (31 - kWidth) & kSign;
    return dithered(value, random, per_step) >> 16 | sign;
  }
  // The number of steps, stochastically rounded, in the upper half of the word.
  template <class Random>
  ONEPASS_HD static uint32_t dithered(float value, Random random, float per_step) {
    const float steps = magnitude(value) * per_step;
    return add_random(static_cast<uint32_t>(static_cast<int32_t>(steps)), random, 0);
  }
  // The magnitude of a number that ratio() has not clamped; it must not be a NaN.
  ONEPASS_HD static float clamped(float value) {
    const float limit = from_bits(kRatioLimit), size = magnitude(value);
    return size < limit ? size : limit;
  }
  // The magnitude that decode() returns, from 2^23 + the number of steps. It has at most 6
  // significant bits, so that every operation is exact.
  ONEPASS_HD static float decode_lifted(float lifted, float step) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(lifted, step, -0x1p23f * step);
#else
    return (lifted - 0x1p23f) * step;
#endif
  }
  ONEPASS_HD static float decode(uint32_t stored, float step) {
    const float value = static_cast<float>(static_cast<int32_t>(stored & (kSign - 1))) * step;
    return from_bits(to_bits(value) | (stored << (31 - kWidth) & 1u << 31));
  }
};

// Codes of values of any sign: a sign bit above the code of the magnitude. The magnitude is encoded
// as magnitude + T, where T is the power of two of the scale. Below T the codes are thus evenly
// spaced down to zero; far above T they are spaced like a float's.
template <int Exponent, int Mantissa>
struct Signed : Minifloat<Exponent, Mantissa> {
  using Base = Minifloat<Exponent, Mantissa>;
  static constexpr int kWidth = Exponent + Mantissa;
  static constexpr uint32_t kSign = 1u << kWidth;
  static constexpr uint32_t kLift = 1u << (23 - Base::kSpan);  // T as a mantissa of the top binade

  ONEPASS_HD static uint32_t measure(float value) { return to_bits(value) & kMagnitude; }
  template <class Math = Exact>
  ONEPASS_HD static uint32_t scale(uint32_t largest, Math&& = Math()) {
    return Base::lowest(largest, 1, kLift);
  }
  template <class Random>
  ONEPASS_HD static uint32_t encode(float value, Random random, uint32_t scale) {
    const uint32_t sign = to_bits(value) >> (31 - kWidth) & kSign;
    return encode_magnitude(value, random, scale) | sign;
  }
  template <class Random>
  ONEPASS_HD static uint32_t encode_magnitude(float value, Random random, uint32_t scale) {
    const float lifted = magnitude(value) + from_bits(scale << 23);
    return Base::round(to_bits(lifted), random, scale);
  }
  ONEPASS_HD static float decode(uint32_t stored, uint32_t scale) {
    const uint32_t code = stored & ((1u << kWidth) - 1);
    const float value = Base::value(code, scale) - from_bits(scale << 23);
    return from_bits(to_bits(value) | (stored << (31 - kWidth) & 1u << 31));
  }
  // decode() of a code in the upper bits of a word whose other bits are zero.
  ONEPASS_HD static float decode_upper(uint32_t word, uint32_t scale) {
    const uint32_t magnitude = (word & kMagnitude) >> (31 - kWidth - Base::kDropped);
    const float value = from_bits(magnitude + (scale << 23)) - from_bits(scale << 23);
    return from_bits(to_bits(value) | (word & ~kMagnitude));
  }
};

// value / root, the number that mx4 codes. A finite ratio is clamped to +-kRatioLimit, and a root
// of zero counts as 1.
ONEPASS_HD float ratio(float value, float root) {
  const uint32_t bits = to_bits(div_rn(value, root == 0.0f ? 1.0f : root));
  const uint32_t magnitude = bits & kMagnitude;
  const bool over = magnitude > kRatioLimit && magnitude < kInfinity;
  return from_bits((over ? kRatioLimit : magnitude) | (bits & ~kMagnitude));
}

// The code of each kind of state in mx8 and mx4.
template <Kind Of>
struct Mx8 : Signed<4, 3> {};
template <>
struct Mx8<kSecond> : Unsigned<5, 3> {};

template <Kind Of>
struct Mx4 : Signed<2, 1> {};
template <>
struct Mx4<kSecond> : Root {};
template <>
struct Mx4<kRelative> : Ratio {};  // of exp_avg / sqrt(exp_avg_sq)

}  // namespace onepass
