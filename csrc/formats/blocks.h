// mx8 and mx4: a block of 32 elements in memory order shares a power of two. A code is the upper
// part of an fp32 whose exponent counts from the scale byte, so that all of it is integer
// arithmetic on the bits; onepass/reference/blocks.py specifies it.
#pragma once

#include "../macros.h"

namespace onepass {

constexpr int kMxBlock = 32;
constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
constexpr uint32_t kInfinity = 0x7F800000u;
constexpr uint32_t kNotFinite = 255;  // the scale of a block that holds a NaN or an infinity
constexpr uint32_t kLowestRoot = 54;  // the squares of 2^-73 and above are exact, and not zero
constexpr uint32_t kRatioLimit = 0x40E00000u;  // 7: bounds what mx4 can make of Adam's step

ONEPASS_HD uint32_t max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }

// 16 random bits in the upper half of a word whose lower half is zero; elsewhere they are its
// value.
struct Upper16 {
  uint32_t word;
};

template <int Exponent, int Mantissa>
struct Minifloat {
  static constexpr int kMantissa = Mantissa;
  static constexpr int kDropped = 23 - Mantissa;      // bits of an fp32 below the code's last
  static constexpr int kRandomShift = kDropped - 16;  // the upper 16 of them are random
  static constexpr uint32_t kSpan = (1u << Exponent) - 1;
  static constexpr uint32_t kSign = 0;     // of a code that has a sign, its bit
  static constexpr bool kHasZero = false;  // a code of its own for zero
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
};

// encode is for a finite block; every code of others is kNan. measure is what the scale is made of
// the largest of.

// Values of at least zero; code 0 is zero and nothing else.
template <int Exponent, int Mantissa>
struct Unsigned : Minifloat<Exponent, Mantissa> {
  using Base = Minifloat<Exponent, Mantissa>;
  static constexpr bool kHasZero = true;

  ONEPASS_HD static uint32_t measure(float value) { return to_bits(value); }
  ONEPASS_HD static uint32_t scale(uint32_t largest) { return Base::lowest(largest, 0); }
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

// Values of at least zero without a code for zero: only a block of zeros, of scale 0, holds any.
template <int Exponent, int Mantissa>
struct Positive : Minifloat<Exponent, Mantissa> {
  using Base = Minifloat<Exponent, Mantissa>;

  ONEPASS_HD static uint32_t measure(float value) { return to_bits(value); }
  ONEPASS_HD static uint32_t scale(uint32_t largest) {
    return largest == 0 ? 0u : Base::lowest(largest, kLowestRoot);
  }
  template <class Random>
  ONEPASS_HD static uint32_t encode(float value, Random random, uint32_t scale) {
    const uint32_t code = Base::round(max_u32(to_bits(value), scale << 23), random, scale);
    return scale == 0 ? 0u : code;
  }
  ONEPASS_HD static float decode(uint32_t code, uint32_t scale) {
    return scale == 0 ? 0.0f : Base::value(code, scale);
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
  ONEPASS_HD static uint32_t scale(uint32_t largest) { return Base::lowest(largest, 1, kLift); }
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
  const bool over = magnitude > kRatioLimit && magnitude < kInfinity;
  return from_bits((over ? kRatioLimit : magnitude) | (bits & ~kMagnitude));
}

// The codes of each kind of moment.
template <bool IsSecond>
struct Mx8 : Signed<4, 3> {};
template <>
struct Mx8<true> : Unsigned<5, 3> {};

template <bool IsSecond>
struct Mx4 : Signed<2, 1> {};  // of exp_avg / sqrt(exp_avg_sq) where there is a second moment
template <>
struct Mx4<true> : Positive<3, 1> {};  // of the root

}  // namespace onepass
