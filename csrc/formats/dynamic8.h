// The dynamic map of bitsandbytes (Dettmers et al., "8-bit optimizers via block-wise quantization",
// 2022) over blocks of 256 with an fp32 scale; onepass/reference/blocks.py specifies it.
#pragma once

#include "../macros.h"

namespace onepass {

constexpr int kDynamicBlock = 256;

struct DynamicMap {
  float values[256];  // ascending
  float edges[255];   // what is above edges[k] has a code above k
};

constexpr DynamicMap dynamic_map(bool is_signed) {
  DynamicMap map{};
  constexpr double kDecades[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  const int zero = is_signed ? 127 : 0;
  int code = zero;
  map.values[code++] = 0.0f;
  for (int decade = 0; decade < 7; ++decade) {
    const int parts = 1 << (is_signed ? decade : decade + 1);
    for (int j = 0; j < parts; ++j, ++code) {
      const double value = (0.1 + 0.9 * ((j + 0.5) / parts)) * kDecades[decade];
      map.values[code] = static_cast<float>(value);
      if (is_signed) map.values[2 * zero - code] = -static_cast<float>(value);
    }
  }
  map.values[code] = 1.0f;
  for (int k = 0; k < 255; ++k) map.edges[k] = (map.values[k] + map.values[k + 1]) * 0.5f;
  return map;
}

// The code of a value in [-1, 1]: a binary search without branches.
ONEPASS_HD uint32_t encode_dynamic(float value, const float* edges) {
  uint32_t code = 0;
  for (uint32_t step = 128; step; step >>= 1) code += value > edges[code + step - 1] ? step : 0u;
  return code;
}

}  // namespace onepass
