// The table of combinations that have a kernel of their own. A list that is all of one combination
// runs it; every other list runs a kernel of its rule that reads the formats, or flags and formats,
// from each chunk. Every flag of every rule has fp32 everything beside these.
#pragma once

#include "../formats/table.h"
#include "../rules/table.h"

namespace onepass::cuda {

// Bit f of a rule: its flags f have the combinations below, and a kernel for lists that mix
// formats.
constexpr uint32_t kReducedPrecision[kRules] = {
    1u << 2,            // SGD with momentum
    0,                  // Adagrad
    0,                  // RMSprop
    1u << 0 | 1u << 1,  // Adam, AdamW
    1u << 1,            // Lion
};

}  // namespace onepass::cuda

// COMBINATION(weight, gradient, states)
#define ONEPASS_COMBINATIONS(COMBINATION)              \
  COMBINATION(kFp32, kFp32, kBf16Stochastic)           \
  COMBINATION(kFp32, kFp32, kMx8)                      \
  COMBINATION(kBf16, kBf16, kFp32)                     \
  COMBINATION(kBf16, kBf16, kBf16Stochastic)           \
  COMBINATION(kBf16, kBf16, kMx8)                      \
  COMBINATION(kBf16Stochastic, kBf16, kFp32)           \
  COMBINATION(kBf16Stochastic, kBf16, kBf16Stochastic) \
  COMBINATION(kBf16Stochastic, kBf16, kMx8)            \
  COMBINATION(kBf16Stochastic, kBf16, kMx4)            \
  COMBINATION(kMasterBf16, kBf16, kFp32)               \
  COMBINATION(kMasterBf16, kBf16, kBf16Stochastic)     \
  COMBINATION(kMasterBf16, kBf16, kMx8)                \
  COMBINATION(kSplit16, kBf16, kFp32)                  \
  COMBINATION(kSplit16, kBf16, kBf16Stochastic)        \
  COMBINATION(kSplit16, kBf16, kMx8)                   \
  COMBINATION(kSplit8, kBf16, kFp32)                   \
  COMBINATION(kSplit8, kBf16, kBf16Stochastic)         \
  COMBINATION(kSplit8, kBf16, kMx8)                    \
  COMBINATION(kFp16, kFp16, kFp32)                     \
  COMBINATION(kFp16, kFp16, kBf16Stochastic)           \
  COMBINATION(kFp16, kFp16, kMx8)                      \
  COMBINATION(kFp16Stochastic, kFp16, kFp32)           \
  COMBINATION(kFp16Stochastic, kFp16, kBf16Stochastic) \
  COMBINATION(kFp16Stochastic, kFp16, kMx8)            \
  COMBINATION(kMasterFp16, kFp16, kFp32)               \
  COMBINATION(kMasterFp16, kFp16, kBf16Stochastic)     \
  COMBINATION(kMasterFp16, kFp16, kMx8)
