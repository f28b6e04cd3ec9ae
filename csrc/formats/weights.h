// How a 16-bit weight keeps its precision: the weight and a companion beside it;
// onepass/reference/weights.py specifies it.
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

// The value is the bits of the weight, 65536 times, plus low as a signed integer.
struct Split16 {
  uint16_t weight;
  int16_t low;
};
ONEPASS_HD Split16 encode_split16(float value) {
  const uint16_t weight = static_cast<uint16_t>(round_half_away(value) >> 16);
  const int16_t low = static_cast<int16_t>(to_bits(value) & 0xFFFFu);
  return {weight, value != value ? int16_t{0} : low};
}
ONEPASS_HD float decode_split16(uint16_t weight, int16_t low) {
  return from_bits((static_cast<uint32_t>(weight) << 16) + static_cast<uint32_t>(int32_t{low}));
}

// The upper 24 bits, the lowest of them rounded stochastically by 8 random bits.
struct Split8 {
  uint16_t weight;
  int8_t low;
};
ONEPASS_HD Split8 encode_split8(float value, uint32_t random8) {
  const uint32_t kept = (to_bits(value) + random8) >> 8;
  const uint32_t weight = (kept + 0x80u) >> 8;
  const uint32_t low = kept & 0xFFu;
  const bool nan = value != value;
  return {
      static_cast<uint16_t>(nan ? kBf16Nan >> 16 : weight), static_cast<int8_t>(nan ? 0u : low)};
}
ONEPASS_HD float decode_split8(uint16_t weight, int8_t low) {
  const uint32_t below = static_cast<uint32_t>(int32_t{low}) << 8;
  return from_bits((static_cast<uint32_t>(weight) << 16) + below);
}

}  // namespace onepass
