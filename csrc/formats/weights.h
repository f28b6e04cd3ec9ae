// How a 16-bit weight keeps its precision: the weight and a companion beside it;
// kahan.py, master.py, split16.py and split8.py in onepass/formats specify it.
#pragma once

#include "bf16.h"
#include "fp16.h"

namespace onepass {

ONEPASS_HD bool is_finite(float value) { return (to_bits(value) & 0x7F800000u) != 0x7F800000u; }

// What rounding a value to its weight left over; 0 for an infinity or NaN.
ONEPASS_HD float left_over(float value, float weight) {
  return is_finite(weight) ? value - weight : 0.0f;
}

// To nearest, ties away from zero. Ties to even would give two values that are a tie apart the same
// weight and the same bits below it, and a split could not be exact.
ONEPASS_HD uint32_t round_half_away(float value) {
  const uint32_t rounded = to_bits(value) + 0x8000u;
  return value != value ? kBf16Nan : rounded;
}

// A weight of 16 bits, and what the bits of the value have below it: a signed integer in as many
// bits as are kept, whose upper bits do not matter.
struct Split {
  uint32_t weight, low;
};

ONEPASS_HD Split encode_split16(float value) {
  const bool nan = value != value;
  return {round_half_away(value) >> 16, nan ? 0u : to_bits(value)};
}
// Less than nothing below a weight of zero is left of a weight that was set to zero since: the sum
// would be a NaN.
ONEPASS_HD float joined(uint32_t weight, int32_t low) {
  const int32_t positive = low > 0 ? low : 0;
  const int32_t kept = (weight & 0x7FFFu) == 0 ? positive : low;
  return from_bits((weight << 16) + static_cast<uint32_t>(kept));
}
// Of any other weight: of such a one it is that NaN.
ONEPASS_HD float joined_plain(uint32_t weight, int32_t low) {
  return from_bits((weight << 16) + static_cast<uint32_t>(low));
}
ONEPASS_HD float decode_split16(uint32_t weight, int32_t low) { return joined(weight, low); }

// The upper 24 bits, the lowest of them rounded stochastically by the lower 8 of 16 random bits.
ONEPASS_HD Split encode_split8(float value, uint32_t random16) {
  const uint32_t kept = (to_bits(value) + (random16 & 0xFFu)) >> 8;
  const bool nan = value != value;
  return {nan ? kBf16Nan >> 16 : (kept + 0x80u) >> 8, nan ? 0u : kept};
}
ONEPASS_HD float decode_split8(uint32_t weight, int32_t low) { return joined(weight, low * 256); }

}  // namespace onepass
