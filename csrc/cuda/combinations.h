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

// A sample of the kernels, for machines that compile the library but have no GPU: those whose
// machine code the tests read. It compiles in a third of the time. Only AdamW has a kernel for
// lists that mix flags and formats, so Python refuses such a library (cuda_refusal in
// device_ops.cpp).
#if defined(ONEPASS_SAMPLE_KERNELS)
constexpr bool kSample = true;
#else
constexpr bool kSample = false;
#endif

// The kernels of ONEPASS_FEW_KERNELS, which the tests define for the CPU stand-in because they
// compile in half the time: every format of weights and every format of states, but not every pair;
// AdamW alone has kernels for low-precision formats; and flags have a kernel of their own one at a
// time only. Lists without a kernel of their own run the kernel for every list.
#if defined(ONEPASS_FEW_KERNELS)
constexpr bool kFewKernels = true;
#else
constexpr bool kFewKernels = kSample;
#endif
constexpr bool is_in_few(Format weight, Format states) {
  switch (weight) {
    case Format::kFp32:
      return true;
    case Format::kBf16:
      return states == Format::kFp32 ||
             (kSample && (states == Format::kBf16Stochastic || states == Format::kDynamic8));
    case Format::kFp16Stochastic:
      return states == Format::kFp32;
    case Format::kMasterBf16:
    case Format::kMasterFp16:
      return states == Format::kBf16Stochastic;
    case Format::kFp16:
      return states == Format::kMx8;
    default:
      return is_tuned(weight, states);
  }
}

// Whether this build has the kernel of a combination.
constexpr bool is_built(Format weight, Format states) {
  return (!kVariant || is_tuned(weight, states)) && (!kFewKernels || is_in_few(weight, states));
}
// Whether this build has kernels for a rule with these flags alone.
template <class Rule>
constexpr bool is_built(unsigned flags) {
  return Rule::kValid && !Rule::kUncommon && (!kVariant || is_tuned<Rule>()) &&
         (!kFewKernels || (flags & (flags - 1)) == 0);
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
