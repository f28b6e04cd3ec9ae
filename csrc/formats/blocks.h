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

ONEPASS_HD uint32_t max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }

template <int Mantissa, int Binades>
struct Minifloat {
  static constexpr int kDropped = 23 - Mantissa;  // bits of an fp32 below the code's last
  static constexpr uint32_t kSpan = Binades - 1;
  static constexpr uint32_t kHalf = 1u << (Mantissa - 1);

  // The exponent that the largest value of a block can be rounded up to.
  ONEPASS_HD static uint32_t top(uint32_t largest) {
    return (largest + ((1u << kDropped) - 1)) >> 23;
  }
  ONEPASS_HD static uint32_t lowest(uint32_t largest, uint32_t least) {
    const uint32_t above = top(largest);
    const uint32_t e = max_u32(above, kSpan + least) - kSpan;
    return largest >= kInfinity ? kNotFinite : e;
  }
  // random16 as the upper of the bits that are dropped.
  ONEPASS_HD static uint32_t round(uint32_t bits, uint32_t random16) {
    return (bits + (random16 << (kDropped - 16))) >> kDropped;
  }
};

// Values of at least zero; code 0 is zero and nothing else.
template <int Mantissa, int Binades>
struct Unsigned : Minifloat<Mantissa, Binades> {
  using Base = Minifloat<Mantissa, Binades>;
  static constexpr uint32_t kNan = Base::kHalf;

  ONEPASS_HD static uint32_t scale(uint32_t largest) { return Base::lowest(largest, 0); }
  ONEPASS_HD static uint32_t encode(float value, uint32_t random16, uint32_t scale) {
    const uint32_t bits = to_bits(value);
    const int32_t steps = static_cast<int32_t>(Base::round(bits, random16)) -
                          static_cast<int32_t>(scale << Mantissa);
    const int32_t code = steps > 1 ? steps : 1;
    const uint32_t finite = (bits & kMagnitude) == 0 ? 0u : static_cast<uint32_t>(code);
    return scale == kNotFinite ? kNan : finite;
  }
  ONEPASS_HD static float decode(uint32_t code, uint32_t scale) {
    const uint32_t bits = (code + (scale << Mantissa)) << Base::kDropped;
    return from_bits(code == 0 ? 0u : bits);
  }
};

// Values of at least zero without a code for zero: only a block of zeros, of scale 0, holds any.
template <int Mantissa, int Binades>
struct Positive : Minifloat<Mantissa, Binades> {
  using Base = Minifloat<Mantissa, Binades>;
  static constexpr uint32_t kNan = Base::kHalf;

  ONEPASS_HD static uint32_t scale(uint32_t largest) {
    return largest == 0 ? 0u : Base::lowest(largest, 1);
  }
  ONEPASS_HD static uint32_t encode(float value, uint32_t random16, uint32_t scale) {
    const uint32_t bits = max_u32(to_bits(value) & kMagnitude, scale << 23);
    const uint32_t code = Base::round(bits, random16) - (scale << Mantissa);
    const uint32_t some = scale == 0 ? 0u : code;
    return scale == kNotFinite ? kNan : some;
  }
  ONEPASS_HD static float decode(uint32_t code, uint32_t scale) {
    const uint32_t bits = (code + (scale << Mantissa)) << Base::kDropped;
    return from_bits(scale == 0 ? 0u : bits);
  }
};

// Values of any sign, the sign above the magnitude, with denormals: below the lowest normal value
// T, adding T gives the exponent of T to a sum whose mantissa counts multiples of T / 2^Mantissa.
template <int Mantissa, int Binades, int MagnitudeBits>
struct Signed : Minifloat<Mantissa, Binades> {
  using Base = Minifloat<Mantissa, Binades>;
  static constexpr uint32_t kStart = 1u << Mantissa;  // the code of T
  static constexpr uint32_t kNan = kStart + Base::kHalf;

  ONEPASS_HD static uint32_t scale(uint32_t largest) { return Base::lowest(largest, 1); }
  ONEPASS_HD static uint32_t encode(float value, uint32_t random16, uint32_t scale) {
    const uint32_t bits = to_bits(value);
    const uint32_t magnitude = bits & kMagnitude;
    const uint32_t least = scale << 23;
    const bool denormal = magnitude < least;
    const float lifted = from_bits(magnitude) + from_bits(least);
    const uint32_t rounded = Base::round(denormal ? to_bits(lifted) : magnitude, random16);
    const uint32_t code = rounded - (scale << Mantissa) + (denormal ? 0u : kStart);
    return (scale == kNotFinite ? kNan : code) | bits >> 31 << MagnitudeBits;
  }
  ONEPASS_HD static float decode(uint32_t stored, uint32_t scale) {
    const uint32_t code = stored & ((1u << MagnitudeBits) - 1);
    const uint32_t sign = stored >> MagnitudeBits << 31;
    const bool normal = code >= kStart;
    const uint32_t steps = code - (normal ? kStart : 0u) + (scale << Mantissa);
    const float value = from_bits(steps << Base::kDropped);
    const float least = from_bits(scale << 23);
    return from_bits(to_bits(normal ? value : value - least) | sign);
  }
};

// The codes of each kind of moment.
struct Mx8 {
  using First = Signed<3, 15, 7>;   // E4M3
  using Second = Unsigned<3, 32>;   // E5M3
};
struct Mx4 {
  using First = Signed<1, 3, 3>;  // E2M1; of exp_avg / sqrt(exp_avg_sq) where there is a second
  using Second = Positive<1, 8>;  // E3M1 of the root
  template <bool IsSecond, class = void>
  struct Of {
    using Code = First;
  };
  template <class Void>
  struct Of<true, Void> {
    using Code = Second;
  };
};

}  // namespace onepass
