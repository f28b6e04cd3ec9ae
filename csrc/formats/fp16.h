// IEEE binary16 in integer arithmetic, which compilers vectorise for every instruction set.
#pragma once

#include "../portability.h"

namespace onepass {

// The value of a code; exact.
ONEPASS_HD float decode_fp16(uint16_t code) {
  const uint32_t sign = (code & 0x8000u) << 16;
  const uint32_t magnitude = code & 0x7FFFu;
  const uint32_t rebased = (magnitude << 13) + (112u << 23);
  const uint32_t special = magnitude >= 0x7C00u ? 112u << 23 : 0u;  // infinity and NaN
  const uint32_t denormal = to_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return from_bits(sign | (magnitude < 0x400u ? denormal : rebased + special));
}

// Rounds to nearest, ties to even; magnitudes from 65520 on become infinity.
ONEPASS_HD uint16_t encode_fp16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // The spacing of fp32 just above 0.5 is the smallest fp16 denormal, so this addition rounds.
  const uint32_t denormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  uint32_t code = magnitude < 0x38800000u ? denormal : normal;
  code = magnitude >= 0x477FF000u ? 0x7C00u : code;
  code = magnitude > 0x7F800000u ? 0x7E00u : code;
  return static_cast<uint16_t>(sign | code);
}

// Stochastic rounding: the magnitude rounds up with probability d / 2^13, where d is the value of
// the 13 dropped bits. Below 2^-14 they are the lowest 13 bits of the magnitude plus 2^-14, which
// are those below the spacing of fp16 denormals. random is below 2^13. Magnitudes that round above
// 65504 become infinity.
ONEPASS_HD uint16_t encode_fp16_stochastic(float value, uint32_t random) {
  const uint32_t bits = to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const bool small = magnitude < 0x38800000u;
  const uint32_t lifted = to_bits(from_bits(magnitude) + 0x1p-14f) - (113u << 23);
  uint32_t code = ((small ? lifted : magnitude - (112u << 23)) + random) >> 13;
  code = magnitude >= 0x47800000u ? 0x7C00u : code;
  code = magnitude > 0x7F800000u ? 0x7E00u : code;
  return static_cast<uint16_t>(sign | code);
}

}  // namespace onepass
