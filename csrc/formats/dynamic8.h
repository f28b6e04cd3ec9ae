// dynamic8: 8-bit codes of the dynamic map of bitsandbytes (Dettmers et al., "8-bit optimizers via
// block-wise quantization", 2022), in blocks of 256 elements with an fp32 scale.
// onepass/formats/dynamic8.py specifies it.
#pragma once

#include "blocks.h"

namespace onepass {

constexpr int kDynamicBlock = 256;

// A value >= 0 belongs to the cell of the upper 16 bits of its fp32 (the signed map: the upper 15
// bits), and a negative value to that of the complement of these bits, so that the code grows with
// the bits in both. A cell contains at most one midpoint between neighbouring values of the map.
// Values below 2^-23 have the code of zero, as all values of its cell have.
constexpr int kDynamicCells = 3072;
constexpr uint32_t kDynamicLeast = 0x34000000u;  // the bits of 2^-23
constexpr int cell_shift(bool is_signed) { return is_signed ? 17 : 16; }

// The values of the codes, and the table of encode_dynamic.
struct alignas(16) DynamicMap {
  float values[256];  // in ascending order
  // For each cell, a number whose sum with the shifted bits of a value has the code in its upper 8
  // bits: the code of the lowest bits of the cell, less the 8 lowest bits of the number of the
  // cell, then a number from which the bits of a value behind the midpoint carry into the code.
  uint32_t cells[kDynamicCells];
};

// Builds the signed or the unsigned map.
constexpr DynamicMap dynamic_map(bool is_signed) {
  DynamicMap map{};
  constexpr double kDecades[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  const int zero = is_signed ? 127 : 0;  // the code of zero
  int code = zero + 1;
  for (int decade = 0; decade < 7; ++decade) {
    const int parts = 1 << (is_signed ? decade : decade + 1);
    for (int j = 0; j < parts; ++j, ++code) {
      const double value = (0.1 + 0.9 * ((j + 0.5) / parts)) * kDecades[decade];
      map.values[code] = static_cast<float>(value);
      if (is_signed) map.values[2 * zero - code] = -static_cast<float>(value);
    }
  }
  map.values[code] = 1.0f;

  const int shift = cell_shift(is_signed), left = 24 - shift;
  const uint32_t least = kDynamicLeast >> shift, size = 1u << shift;
  const auto set = [&](uint32_t cell, int lowest_code, uint32_t carry) {
    map.cells[cell - least] = ((static_cast<uint32_t>(lowest_code) - cell) << 24) + carry;
  };
  double lowest = 0x1p-23, unit = 0x1p-46;  // of the cell: its lowest value, and that of one bit
  int below = zero;                         // the code of values just below the cell
  for (uint32_t cell = least; cell <= 0x3F800000u >> shift; ++cell, lowest += size * unit) {
    if (cell > least && ((cell << shift) & 0x7FFFFFu) == 0) unit *= 2;
    const float edge = below < 255 ? (map.values[below] + map.values[below + 1]) * 0.5f : 2.0f;
    const bool inside = edge < lowest + size * unit;
    const uint32_t at = inside ? static_cast<uint32_t>((edge - lowest) / unit) : 0;
    set(cell, below, inside ? (1u << 24) - ((at + 1) << left) : 0);
    // A value equal to a midpoint gets the lower code: a negative value, the larger magnitude. The
    // lowest code is 0: the map has no -1.
    const int above = below + inside;
    if (is_signed) set(0x3FFFu - cell, above < 254 ? 254 - above : 0, above < 255 ? at << left : 0);
    below = above;
  }
  return map;
}

// A word with the code of a value in its upper 8 bits. The value is in [-1, 1], or in [0, 1] for
// the unsigned map, which codes a negative value as 0; a NaN has the code of zero. It has no
// branches, so that loops over it vectorise.
template <bool Signed>
ONEPASS_HD uint32_t encode_dynamic_upper(float value, const DynamicMap& map) {
  constexpr int kShift = cell_shift(Signed);
  const uint32_t sign = Signed ? to_bits(value) >> 31 : 0u;
  const float size = Signed ? magnitude(value) : value;
  const uint32_t kept = to_bits(size > 0x1p-23f ? size : 0x1p-23f);
  const uint32_t bits = kept ^ ((0u - sign) & kMagnitude);
  const int32_t cell =
      static_cast<int32_t>(bits >> kShift) - static_cast<int32_t>(kDynamicLeast >> kShift);
  return map.cells[cell] + (bits << (24 - kShift));
}

// The code of such a value.
template <bool Signed>
ONEPASS_HD uint32_t encode_dynamic(float value, const DynamicMap& map) {
  return encode_dynamic_upper<Signed>(value, map) >> 24;
}

}  // namespace onepass
