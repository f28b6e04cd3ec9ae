// 16-bit weights with a companion, a second tensor with the precision that the weight lacks.
// kahan.py, master.py, split16.py and split8.py in onepass/formats specify these formats.
#pragma once

#include "bf16.h"
#include "fp16.h"

namespace onepass {

// Whether a value is neither infinite nor NaN.
ONEPASS_HD bool is_finite(float value) { return (to_bits(value) & 0x7F800000u) != 0x7F800000u; }

// The rounding error value - weight; 0 if the weight is an infinity or NaN.
ONEPASS_HD float left_over(float value, float weight) {
  return is_finite(weight) ? value - weight : 0.0f;
}

// Rounds to bf16 (in the upper half of a word) to nearest, ties away from zero. With ties to even,
// two values could get the same weight and the same low bits, so a split would not be exact.
ONEPASS_HD uint32_t round_half_away(float value) {
  const uint32_t rounded = to_bits(value) + 0x8000u;
  return value != value ? kBf16Nan : rounded;
}

// A value split into a bf16 weight and the low bits of its companion. low is a signed integer of 16
// or 8 bits; its upper bits are ignored.
struct Split {
  uint32_t weight, low;
};

// split16: the companion keeps all 16 lower bits, so the split is exact.
ONEPASS_HD Split encode_split16(float value) {
  const bool nan = value != value;
  return {round_half_away(value) >> 16, nan ? 0u : to_bits(value)};
}
// The fp32 whose bits are weight * 2^16 + low. A negative low under a zero weight is stale: the
// weight was set to zero after the step. It is treated as 0, because the sum would be a NaN.
ONEPASS_HD float joined(uint32_t weight, int32_t low) {
  const int32_t positive = low > 0 ? low : 0;
  const int32_t kept = (weight & 0x7FFFu) == 0 ? positive : low;
  return from_bits((weight << 16) + static_cast<uint32_t>(kept));
}
// joined() without that check; it returns the NaN in that case.
ONEPASS_HD float joined_plain(uint32_t weight, int32_t low) {
  return from_bits((weight << 16) + static_cast<uint32_t>(low));
}
ONEPASS_HD float decode_split16(uint32_t weight, int32_t low) { return joined(weight, low); }

// split8: keeps the upper 24 bits of the value, rounded stochastically by the lower 8 of 16 random
// bits.
ONEPASS_HD Split encode_split8(float value, uint32_t random16) {
  const uint32_t kept = (to_bits(value) + (random16 & 0xFFu)) >> 8;
  const bool nan = value != value;
  return {nan ? kBf16Nan >> 16 : (kept + 0x80u) >> 8, nan ? 0u : kept};
}
ONEPASS_HD float decode_split8(uint32_t weight, int32_t low) { return joined(weight, low * 256); }

}  // namespace onepass
