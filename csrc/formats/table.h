// The one list of formats. Python names a format by this number (onepass/formats.py).
#pragma once

#include "bf16.h"
#include "fp16.h"
#include "random.h"

namespace onepass {

enum class Format : uint8_t {
  kFp32 = 0,
  kBf16 = 1,            // nearest: weights, gradients
  kFp16 = 2,            // nearest: weights, gradients
  kBf16Stochastic = 3,  // states
};

constexpr int kFormats = 4;

}  // namespace onepass
