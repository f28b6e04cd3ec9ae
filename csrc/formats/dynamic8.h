// dynamic8: 8-bit codes of the dynamic map of bitsandbytes (Dettmers et al., "8-bit optimizers via
// block-wise quantization", 2022), in blocks of 256 elements with an fp32 scale.
// onepass/formats/dynamic8.py specifies it.
#pragma once

#include "../portability.h"

namespace onepass {

constexpr int kDynamicBlock = 256;

// The encoder looks up a magnitude by its cell: each binade from 2^-24 to 2 has 128 cells.
constexpr int kDynamicCells = 25 * 128;
constexpr int32_t kFirstCell = 103 << 7;  // the upper 16 bits of the fp32 2^-24

// The values of the codes, and the tables that encode_dynamic searches.
struct DynamicMap {
  bool is_signed;
  float values[256];  // in ascending order
  // The midpoints between neighbouring values >= 0, padded with infinity. A value above k of them
  // has the code zero() + k; a negative value has zero() - k by its magnitude.
  float edges[256];
  // For each cell, the number of edges below its lowest magnitude; a cell contains at most two
  // edges. The element type is 32 bits wide so that vector code can gather.
  int32_t starts[kDynamicCells];

  constexpr int zero() const { return is_signed ? 127 : 0; }  // the code of zero
};

// Builds the signed or the unsigned map.
constexpr DynamicMap dynamic_map(bool is_signed) {
  DynamicMap map{};
  map.is_signed = is_signed;
  constexpr double kDecades[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  const int zero = map.zero();
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
  int edges = 0;
  for (int k = zero; k < code; ++k) map.edges[edges++] = (map.values[k] + map.values[k + 1]) * 0.5f;
  for (int k = edges; k < 256; ++k) map.edges[k] = __builtin_inff();
  int below = 0;
  double lowest = 0x1p-24, binade = 0x1p-24;
  for (int cell = 0; cell < kDynamicCells; ++cell) {
    if (cell % 128 == 0 && cell) binade *= 2;
    lowest = binade * (1.0 + (cell % 128) / 128.0);
    while (below < edges && map.edges[below] < lowest) ++below;
    map.starts[cell] = below;
  }
  return map;
}

// The code of a value in [-1, 1]. It has no branches, so that loops over it vectorise.
ONEPASS_HD int32_t encode_dynamic(float value, const DynamicMap& map) {
  const uint32_t bits = to_bits(value);
  const int32_t cell = static_cast<int32_t>((bits & 0x7FFFFFFFu) >> 16) - kFirstCell;
  const float magnitude = from_bits(bits & 0x7FFFFFFFu);
  const bool negative = static_cast<int32_t>(bits) < 0;
  int32_t above = map.starts[cell < 0 ? 0 : cell];
  // A value equal to an edge gets the lower code: for a negative value, the larger magnitude.
  for (int k = 0; k < 2; ++k) {
    const float edge = map.edges[above];
    above += negative ? magnitude >= edge : magnitude > edge;
  }
  above = cell < 0 ? 0 : above;
  const int32_t zero = map.zero(), code = negative ? zero - above : zero + above;
  return code < 0 ? 0 : code;  // -1 has no code: the lowest value is -0.993
}

}  // namespace onepass
