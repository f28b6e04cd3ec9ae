// What one instruction set offers: the rules and formats over a tile of fp32 values in L1. They
// are compiled apart and meet in sweep.cpp through these tables, so that they add, not multiply.
#pragma once

#include "../formats/table.h"
#include "../rules/table.h"

namespace onepass::cpu {

// Applies a rule to n elements. row is the group's row of the hyperparameter table.
using RuleFn = void (*)(
    const float* row, int n, float* param, const float* grad, float* const* states);
// Reads elements [first, first + n) of the tensor at src.
using DecodeFn = void (*)(const void* src, int64_t first, int n, float* tile);
// Writes elements [first, first + n) of the tensor at dst. shift picks the half of the random word.
using EncodeFn = void (*)(
    const float* tile, int64_t first, int n, void* dst, RandomKey key, uint32_t low, int shift);

struct Kernels {
  RuleFn rules[kRules][kMaxFlags];
  DecodeFn decode[kFormats];
  EncodeFn encode[kFormats];
};

extern const Kernels kKernelsPlain;
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;

}  // namespace onepass::cpu
