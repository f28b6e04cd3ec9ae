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

template <int Exponent, int Mantissa>
struct Minifloat {
  static constexpr int kMantissa = Mantissa;
  static constexpr int kDropped = 23 - Mantissa;      // bits of an fp32 below the code's last
  static constexpr int kRandomShift = kDropped - 16;  // the upper 16 of them are random
  static constexpr uint32_t kSpan = (1u << Exponent) - 1;
  static constexpr uint32_t kSign = 0;  // of a code that has a sign, its bit
  static constexpr uint32_t kNan = 1u
                                   << (Mantissa - 1);  // every code of a block that is not finite

  // The lowest exponent of a block, at least least, so that its largest value, lifted and rounded
  // up, still has a code.
  ONEPASS_HD static uint32_t lowest(uint32_t largest, uint32_t least, uint32_t lift = 0) {
    const uint32_t top = (largest + ((1u << kDropped) - 1 + lift)) >> 23;
    const uint32_t e = max_u32(top, kSpan + least) - kSpan;
    return largest >= kInfinity ? kNotFinite : e;
  }
  // The code of bits that are at least those of the lowest exponent; random16 becomes the upper of
  // the bits that are dropped.
  ONEPASS_HD static uint32_t round(uint32_t bits, uint32_t random16, uint32_t scale) {
    return ((bits + (random16 << (kDropped - 16))) >> kDropped) - (scale << Mantissa);
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

  ONEPASS_HD static uint32_t measure(float value) { return to_bits(value); }
  ONEPASS_HD static uint32_t scale(uint32_t largest) { return Base::lowest(largest, 0); }
  ONEPASS_HD static uint32_t encode(float value, uint32_t random16, uint32_t scale) {
    const uint32_t bits = to_bits(value);
    const int32_t steps = static_cast<int32_t>(Base::round(bits, random16, scale));
    const uint32_t code = static_cast<uint32_t>(steps > 1 ? steps : 1);
    return code < bits ? code : bits;
  }
  ONEPASS_HD static float decode(uint32_t code, uint32_t scale) {
    return code == 0 ? 0.0f : Base::value(code, scale);
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
  ONEPASS_HD static uint32_t encode(float value, uint32_t random16, uint32_t scale) {
    const uint32_t code = Base::round(max_u32(to_bits(value), scale << 23), random16, scale);
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
  ONEPASS_HD static uint32_t encode(float value, uint32_t random16, uint32_t scale) {
    const uint32_t bits = to_bits(value);
    const float lifted = from_bits(bits & kMagnitude) + from_bits(scale << 23);
    const uint32_t code = Base::round(to_bits(lifted), random16, scale);
    return code | (bits >> (31 - kWidth) & 1u << kWidth);
  }
  ONEPASS_HD static float decode(uint32_t stored, uint32_t scale) {
    const uint32_t code = stored & ((1u << kWidth) - 1);
    const float value = Base::value(code, scale) - from_bits(scale << 23);
    return from_bits(to_bits(value) | (stored << (31 - kWidth) & 1u << 31));
  }
};

// value / root as mx4 codes it, held to the limit where it is finite.
ONEPASS_HD float ratio(float value, float root) {
  const uint32_t bits = to_bits(div_rn(value, root == 0.0f ? 1.0f : root));
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
