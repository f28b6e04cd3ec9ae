// bfloat16: the upper half of an fp32. Decoding is exact.
#pragma once

#include "../macros.h"

namespace onepass {

ONEPASS_HD float decode_bf16(uint16_t code) { return from_bits(static_cast<uint32_t>(code) << 16); }

// A NaN keeps its upper bits and becomes quiet; adding to its mantissa could make it infinite.
ONEPASS_HD uint32_t is_nan_bits(uint32_t bits) { return (bits & 0x7FFFFFFFu) > 0x7F800000u; }

// To nearest, ties to even.
ONEPASS_HD uint16_t encode_bf16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  const uint32_t kept = is_nan_bits(bits) ? (bits | 0x400000u) : rounded;
  return static_cast<uint16_t>(kept >> 16);
}

// Up with the probability of the 16 bits that are dropped: right on average, at zero and at
// denormals as well. random is below 2^16. Infinities stay.
ONEPASS_HD uint16_t encode_bf16_stochastic(float value, uint32_t random) {
  const uint32_t bits = to_bits(value);
  const uint32_t kept = is_nan_bits(bits) ? (bits | 0x400000u) : bits + random;
  return static_cast<uint16_t>(kept >> 16);
}

}  // namespace onepass
