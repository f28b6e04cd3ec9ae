// mx8 and mx4: a block of 32 elements in memory order shares a power of two. A code is the upper
// part of an fp32 whose exponent counts from the scale byte, so that all of it is integer
// arithmetic on the bits; onepass/formats/mx8.py and mx4.py specify it.
#pragma once

#include "../portability.h"

namespace onepass {

constexpr int kMxBlock = 32;
constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
constexpr uint32_t kInfinity = 0x7F800000u;
constexpr uint32_t kNotFinite = 255;  // the scale of a block that holds a NaN or an infinity
constexpr uint32_t kLowestRoot = 54;  // the squares of 2^-73 and above are exact, and not zero
constexpr uint32_t kRatioLimit = 0x40E00000u;  // 7: bounds what mx4 can make of Adam's step
constexpr uint32_t kNan32 = 0x7FC00000u;

// What a state is: a mean with a sign; a mean of squares; a first moment whose size goes with the
// root of the rule's first second moment.
enum Kind : uint8_t { kFirst, kSecond, kRelative, kKinds };

ONEPASS_HD uint32_t max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }

// 16 random bits in the upper half of a word whose lower half is zero; elsewhere they are its
// value.
struct Upper16 {
  uint32_t word;
};
ONEPASS_HD uint32_t value16(uint32_t random16) { return random16; }
ONEPASS_HD uint32_t value16(Upper16 random) { return random.word >> 16; }

template <int Exponent, int Mantissa>
struct Minifloat {
  static constexpr int kMantissa = Mantissa;
  static constexpr int kDropped = 23 - Mantissa;      // bits of an fp32 below the code's last
  static constexpr int kRandomShift = kDropped - 16;  // the upper 16 of them are random
  static constexpr uint32_t kSpan = (1u << Exponent) - 1;
  static constexpr uint32_t kSign = 0;        // of a code that has a sign, its bit
  static constexpr bool kHasZero = false;     // a code of its own for zero
  static constexpr bool kTakesLeast = false;  // for the scale, beside the largest of a block
  static constexpr uint32_t kNan = 1u
                                   << (Mantissa - 1);  // every code of a block that is not finite

  // The lowest exponent of a block, at least least, so that its largest value, lifted and rounded
  // up, still has a code.
  ONEPASS_HD static uint32_t lowest(uint32_t largest, uint32_t least, uint32_t lift = 0) {
    const uint32_t top = (largest + ((1u << kDropped) - 1 + lift)) >> 23;
    const uint32_t e = max_u32(top, kSpan + least) - kSpan;
    return largest >= kInfinity ? kNotFinite : e;
  }
  // The 16 random bits become the upper of the bits that are dropped.
  ONEPASS_HD static uint32_t spread(uint32_t random16) { return random16 << kRandomShift; }
  ONEPASS_HD static uint32_t spread(Upper16 random) { return random.word >> (32 - kDropped); }
  // The code of bits that are at least those of the lowest exponent.
  template <class Random>
  ONEPASS_HD static uint32_t round(uint32_t bits, Random random, uint32_t scale) {
    return ((bits + spread(random)) >> kDropped) - (scale << Mantissa);
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

// encode is for a finite block; every code of others is kNan. measure is what the scale is made of
// the largest of, and of a Root of the least as well. encoder and decoder are what encode and
// decode take of a scale.

// Values of at least zero; code 0 is zero and nothing else.
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
    const uint32_t code = encode_normal(value, random, scale);
    return code < bits ? code : bits;
  }
  // Of a value whose bits are more than any code.
  template <class Random>
  ONEPASS_HD static uint32_t encode_normal(float value, Random random, uint32_t scale) {
    const int32_t steps = static_cast<int32_t>(Base::round(to_bits(value), random, scale));
    return static_cast<uint32_t>(steps > 1 ? steps : 1);
  }
  ONEPASS_HD static float decode(uint32_t code, uint32_t scale) {
    return code == 0 ? 0.0f : Base::value(code, scale);
  }
  // Of a code in the upper bits of a word whose other bits are zero.
  ONEPASS_HD static float decode_upper(uint32_t word, uint32_t scale) {
    return word == 0 ? 0.0f : decode_upper_normal(word, scale);
  }
  // Likewise; the code is not 0, unless the scale is 0 as well.
  ONEPASS_HD static float decode_upper_normal(uint32_t word, uint32_t scale) {
    return from_bits((word >> (32 - Exponent - Mantissa - Base::kDropped)) + (scale << 23));
  }
};

// The root of a second moment, without a code for zero: only a block of zeros, of scale 0, holds
// any. E2M2 where all 32 of a block lie within its range, else E3M1; the scale says which.
struct Root {
  using Coarse = Minifloat<3, 1>;
  using Fine = Minifloat<2, 2>;
  static constexpr uint32_t kSign = 0;
  static constexpr bool kHasZero = false;
  static constexpr bool kTakesLeast = true;
  static constexpr uint32_t kNan = Coarse::kNan;
  static constexpr uint32_t kFine = 132;                    // the first scale of E2M2
  static constexpr uint32_t kCoarseBias = kLowestRoot - 1;  // from a scale to the lowest exponent
  static constexpr uint32_t kFineBias = 66;                 // and from the lowest exponent to one

  // What a scale says: bits of the mantissa, and the bits of the lowest power of two.
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
  // least: of a block of 32; 0 in a shorter one.
  ONEPASS_HD static uint32_t scale(uint32_t largest, uint32_t least) {
    const uint32_t fine = Fine::lowest(largest, kLowestRoot);
    const uint32_t coarse = Coarse::lowest(largest, kLowestRoot) - kCoarseBias;
    const bool fits = least >= fine << 23 && fine >= kFine - kFineBias;
    const uint32_t finite = fits ? fine + kFineBias : coarse;
    return largest >= kInfinity ? kNotFinite : largest == 0 ? 0u : finite;
  }
  template <class Random>
  ONEPASS_HD static uint32_t encode(float value, Random random, Unit unit) {
    const uint32_t bits = max_u32(to_bits(value), unit.lowest);
    const uint32_t dithered = bits - unit.lowest + (value16(random) << (7 - unit.mantissa));
    return dithered >> (23 - unit.mantissa);  // of a zero, 0
  }
  ONEPASS_HD static float decode(uint32_t code, Unit unit) {
    return from_bits((code << (23 - unit.mantissa)) + unit.lowest);
  }
};

// A ratio of at most kRatioLimit: the sign above the number of steps, at most 7. The step is the
// least float of three bits of mantissa, and of at least that of scale 0, of which 7 reach the
// largest of a block.
struct Ratio {
  static constexpr int kWidth = 3;
  static constexpr uint32_t kSign = 1u << kWidth;
  static constexpr bool kHasZero = false;
  static constexpr bool kTakesLeast = false;
  static constexpr uint32_t kNan = 1;
  static constexpr int kRandomShift = 6;          // by which signs come to lie above codes
  static constexpr uint32_t kLeastStep = 762;     // the upper 12 bits of 1.25 * 2^-32
  static constexpr uint32_t kLeast = 0x310C0000;  // seven of that

  // The step.
  ONEPASS_HD static float decoder(uint32_t scale) {
    return from_bits(scale == kNotFinite ? kNan32 : (scale + kLeastStep) << 20);
  }
  // What makes steps of values, with 16 bits below the point.
  template <class Math = Exact>
  ONEPASS_HD static float encoder(uint32_t scale, Math&& math = Math()) {
    return math.div(65536.0f, decoder(scale));
  }

  ONEPASS_HD static uint32_t measure(float value) { return to_bits(value) & kMagnitude; }
  template <class Math = Exact>
  ONEPASS_HD static uint32_t scale(uint32_t largest, Math&& math = Math()) {
    const float seventh = math.div(from_bits(max_u32(largest, kLeast)), 7.0f);
    const uint32_t finite = ((to_bits(seventh) + 0xFFFFF) >> 20) - kLeastStep;
    return largest >= kInfinity ? kNotFinite : finite;
  }
  template <class Random>
  ONEPASS_HD static uint32_t encode(float value, Random random, float per_step) {
    const uint32_t sign = to_bits(value) >> (31 - kWidth) & kSign;
    return dithered(value, value16(random), per_step) >> 16 | sign;
  }
  // The number of steps in the upper half.
  ONEPASS_HD static uint32_t dithered(float value, uint32_t random16, float per_step) {
    const float steps = from_bits(to_bits(value) & kMagnitude) * per_step;
    return static_cast<uint32_t>(static_cast<int32_t>(steps)) + random16;
  }
  ONEPASS_HD static float decode(uint32_t stored, float step) {
    const float value = static_cast<float>(static_cast<int32_t>(stored & (kSign - 1))) * step;
    return from_bits(to_bits(value) | (stored << (31 - kWidth) & 1u << 31));
  }
};

// Values of any sign, the sign above the magnitude. A magnitude is lifted by T, the lowest power of
// two: its codes lie evenly below T, down to zero, and come to lie as a float's do far above.
template <int Exponent, int Mantissa>
struct Signed : Minifloat<Exponent, Mantissa> {
  using Base = Minifloat<Exponent, Mantissa>;
  static constexpr int kWidth = Exponent + Mantissa;
  static constexpr uint32_t kSign = 1u << kWidth;
  static constexpr uint32_t kLift = 1u << (23 - Base::kSpan);  // T beside the top binade

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
    const float lifted = from_bits(to_bits(value) & kMagnitude) + from_bits(scale << 23);
    return Base::round(to_bits(lifted), random, scale);
  }
  ONEPASS_HD static float decode(uint32_t stored, uint32_t scale) {
    const uint32_t code = stored & ((1u << kWidth) - 1);
    const float value = Base::value(code, scale) - from_bits(scale << 23);
    return from_bits(to_bits(value) | (stored << (31 - kWidth) & 1u << 31));
  }
  // Of a code in the upper bits of a word whose other bits are zero.
  ONEPASS_HD static float decode_upper(uint32_t word, uint32_t scale) {
    const uint32_t magnitude = (word & kMagnitude) >> (31 - kWidth - Base::kDropped);
    const float value = from_bits(magnitude + (scale << 23)) - from_bits(scale << 23);
    return from_bits(to_bits(value) | (word & ~kMagnitude));
  }
};

// value / root as mx4 codes it, held to the limit where it is finite.
template <class Math = Exact>
ONEPASS_HD float ratio(float value, float root, Math&& math = Math()) {
  const uint32_t bits = to_bits(math.div(value, root == 0.0f ? 1.0f : root));
  const uint32_t magnitude = bits & kMagnitude;
  const bool over = magnitude > kRatioLimit && (math.kQuick || magnitude < kInfinity);
  return from_bits((over ? kRatioLimit : magnitude) | (bits & ~kMagnitude));
}

// The codes of each kind of moment.
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
