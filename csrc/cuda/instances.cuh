// The kernels of one rule: included once by each of sweep_<rule>.cu, which are compiled side by
// side.
#pragma once

#include "kernels.h"
#include "sweep.cuh"
#include "table.h"

namespace onepass::cuda {

template <template <unsigned> class Rule, unsigned Flags, bool Reduced>
SweepKernel fixed_kernel(Format weight, Format grad, Format states) {
#define ONEPASS_FIND(WEIGHT, GRAD, STATES)                                            \
  if constexpr (!kVariant || is_tuned(Format::WEIGHT, Format::STATES))                \
    if (weight == Format::WEIGHT && grad == Format::GRAD && states == Format::STATES) \
      return sweep_fixed<Rule, Flags, Fixed<Format::WEIGHT, Format::GRAD, Format::STATES>>;
  ONEPASS_FIND(kFp32, kFp32, kFp32)
  if constexpr (Reduced) {
    ONEPASS_COMBINATIONS(ONEPASS_FIND)
  }
#undef ONEPASS_FIND
  return nullptr;
}

// The kernel for a list of one combination, or null if the table does not have it.
template <template <unsigned> class Rule, int Code, unsigned Flags = 0>
SweepKernel find_fixed(unsigned flags, Format weight, Format grad, Format states) {
  if constexpr (Flags < kMaxFlags) {
    if constexpr (Rule<Flags>::kValid && (!kVariant || is_tuned(Code, Flags))) {
      if (flags == Flags)
        return fixed_kernel<Rule, Flags, (kReducedPrecision[Code] >> Flags & 1) != 0>(
            weight, grad, states);
    }
    return find_fixed<Rule, Code, Flags + 1>(flags, weight, grad, states);
  }
  return nullptr;
}

// The kernel for a list of one set of flags, or null if the table does not have it.
template <template <unsigned> class Rule, int Code, unsigned Flags = 0>
SweepKernel find_formats(unsigned flags) {
  if constexpr (Flags < kMaxFlags) {
    if constexpr (!kVariant && (kReducedPrecision[Code] >> Flags & 1) != 0) {
      if (flags == Flags) return sweep_formats<Rule, Flags>;
    }
    return find_formats<Rule, Code, Flags + 1>(flags);
  }
  return nullptr;
}

// The kernel for every list, which a variant does not have.
template <template <unsigned> class Rule>
constexpr SweepKernel find_any() {
  if constexpr (kVariant)
    return nullptr;
  else
    return sweep_any<Rule>;
}

}  // namespace onepass::cuda
