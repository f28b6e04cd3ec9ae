// The combinations of formats that have a specialized kernel. A parameter list whose chunks all
// have one such combination runs that kernel. Every other list runs a kernel of its rule that reads
// the formats, or the flags and formats, from each chunk. Every combination of flags of every rule
// has a kernel for fp32 tensors. The flags that a rule lists in kReducedPrecision also have the
// combinations below, and a kernel for lists that mix formats.
#pragma once

#include <type_traits>

#include "../formats/table.h"
#include "../rules/table.h"
#include "tuning.h"

namespace onepass::cuda {

// The kernels of a tuning variant (kVariant in tuning.h): AdamW in the formats below.
template <class Rule>
constexpr bool is_tuned() {
  return std::is_same_v<Rule, Adam<1>>;
}
constexpr bool is_tuned(Format weight, Format states) {
  switch (weight) {
    case Format::kFp32:
      return states == Format::kFp32;
    case Format::kSplit16:
      return states == Format::kBf16Stochastic || states == Format::kMx8;
    case Format::kSplit8:
      return states == Format::kMx8;
    case Format::kBf16Stochastic:
      return states == Format::kMx4;
    default:
      return false;
  }
}

}  // namespace onepass::cuda

// COMBINATION(weight, gradient, states)
#define ONEPASS_COMBINATIONS(COMBINATION)              \
  COMBINATION(kFp32, kFp32, kBf16Stochastic)           \
  COMBINATION(kFp32, kFp32, kMx8)                      \
  COMBINATION(kFp32, kFp32, kDynamic8)                 \
  COMBINATION(kBf16, kBf16, kFp32)                     \
  COMBINATION(kBf16, kBf16, kBf16Stochastic)           \
  COMBINATION(kBf16, kBf16, kMx8)                      \
  COMBINATION(kBf16, kBf16, kDynamic8)                 \
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
