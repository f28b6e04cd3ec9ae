// bfloat16: the upper half of an fp32. Decoding is exact.
#pragma once

#include "../portability.h"

namespace onepass {

ONEPASS_HD float decode_bf16(uint16_t code) { return from_bits(static_cast<uint32_t>(code) << 16); }

// The rounded value in the upper half of a word, the lower half to be dropped. NaN is one code: its
// own mantissa could carry into the exponent, or lose its only bit.
constexpr uint32_t kBf16Nan = 0x7FC00000u;

// To nearest, ties to even.
ONEPASS_HD uint32_t round_bf16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = bits + (0x7FFFu + ((bits >> 16) & 1u));
  return value != value ? kBf16Nan : rounded;
}

// Up with the probability of the 16 bits that are dropped: right on average, at zero and at
// denormals as well. random is below 2^16. Infinities stay.
ONEPASS_HD uint32_t round_bf16_stochastic(float value, uint32_t random) {
  const uint32_t rounded = to_bits(value) + random;
  return value != value ? kBf16Nan : rounded;
}

}  // namespace onepass
