// bfloat16: the upper 16 bits of an fp32. Decoding is exact.
#pragma once

#include "../portability.h"

namespace onepass {

// The value of a code.
ONEPASS_HD float decode_bf16(uint16_t code) { return from_bits(static_cast<uint32_t>(code) << 16); }

// The functions below return the code in the upper half of a word; callers drop the lower half.
// Every NaN becomes this one: rounding its own mantissa could carry into the exponent, or drop the
// only bit that is set.
constexpr uint32_t kBf16Nan = 0x7FC00000u;

// Rounds to nearest, ties to even.
ONEPASS_HD uint32_t round_bf16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = bits + (0x7FFFu + ((bits >> 16) & 1u));
  return value != value ? kBf16Nan : rounded;
}

// Stochastic rounding: the magnitude rounds up with probability d / 2^16, where d is the value of
// the 16 dropped bits, so the result is unbiased, also for denormals. random is below 2^16.
// Infinities are kept.
ONEPASS_HD uint32_t round_bf16_stochastic(float value, uint32_t random) {
  const uint32_t rounded = to_bits(value) + random;
  return value != value ? kBf16Nan : rounded;
}

}  // namespace onepass
