// The kernels of one rule. Each csrc/generated/cuda/sweep_<rule>.cu includes this header once, so
// that the rules compile in parallel.
#pragma once

#include "combinations.h"
#include "kernels.h"
#include "sweep.cuh"

namespace onepass::cuda {

// The kernel for one combination of formats, or null if the table does not have it.
template <template <unsigned> class Rule, unsigned Flags, bool Reduced>
SweepKernel fixed_kernel(Format weight, Format grad, Format states) {
#define ONEPASS_FIND(WEIGHT, GRAD, STATES)                                            \
  if constexpr (is_built(Format::WEIGHT, Format::STATES))                             \
    if (weight == Format::WEIGHT && grad == Format::GRAD && states == Format::STATES) \
      return sweep_fixed<Rule, Flags, Fixed<Format::WEIGHT, Format::GRAD, Format::STATES>>;
  ONEPASS_FIND(kFp32, kFp32, kFp32)
  if constexpr (Reduced) {
    ONEPASS_COMBINATIONS(ONEPASS_FIND)
  }
#undef ONEPASS_FIND
  return nullptr;
}

// Whether a rule lists these flags in kReducedPrecision.
template <class Rule, unsigned Flags>
constexpr bool has_reduced() {
  if (kFewKernels && (!std::is_same_v<Rule, Adam<0>> || Flags != 1)) return false;
  return (Rule::kReducedPrecision >> Flags & 1) != 0;
}

// The kernel for a list with one combination of flags and formats, or null if there is none.
template <template <unsigned> class Rule, unsigned Flags = 0>
SweepKernel find_fixed(unsigned flags, Format weight, Format grad, Format states) {
  if constexpr (Flags < kFlagSets) {
    if constexpr (is_built<Rule<Flags>>(Flags)) {
      if (flags == Flags)
        return fixed_kernel<Rule, Flags, has_reduced<Rule<0>, Flags>()>(weight, grad, states);
    }
    return find_fixed<Rule, Flags + 1>(flags, weight, grad, states);
  }
  return nullptr;
}

// The kernel for a list with one combination of flags, or null if there is none.
template <template <unsigned> class Rule, unsigned Flags = 0>
SweepKernel find_formats(unsigned flags) {
  if constexpr (Flags < kFlagSets) {
    if constexpr (!kVariant && has_reduced<Rule<0>, Flags>()) {
      if (flags == Flags) return sweep_formats<Rule, Flags>;
    }
    return find_formats<Rule, Flags + 1>(flags);
  }
  return nullptr;
}

// All kernels of a rule. A tuning variant omits the kernel for every list, and a sample has that of
// AdamW only.
template <template <unsigned> class Rule>
constexpr RuleKernels kernels_of() {
  if constexpr (kVariant || (kSample && !std::is_same_v<Rule<0>, Adam<0>>))
    return {find_fixed<Rule>, find_formats<Rule>, nullptr};
  else
    return {find_fixed<Rule>, find_formats<Rule>, sweep_any<Rule>};
}

}  // namespace onepass::cuda
