// The kernels of one instruction set: included once by each of kernels_{plain,avx2,avx512}.cpp,
// which setup.py compiles with that set's flags. Plain loops over headers that CUDA shares, which
// the compiler vectorises, and the primitives of simd/. Headers of the standard library are not
// included: the linker could keep a copy of an inline function that was compiled here, which other
// machines cannot run.
#pragma once

#include "codecs_impl.h"
#include "extras_impl.h"
#include "in_place_impl.h"
#include "norm_impl.h"
#include "tiles_impl.h"

namespace onepass::cpu {
namespace {

template <Kind>
using Fp32State = Fp32;
using Bf16 = Half<ToBf16>;

// The fused loop of a rule and its flags for one combination of formats. Null if the flags are not
// valid together, or if the generic tiles of sweep.cpp run instead: the loops other than kInFp32
// hold at most three states, and the loops that convert exist only for flags in kReducedPrecision,
// because each takes about two CPU-seconds to compile.
enum Loop { kInFp32, kInBf16, kBf16Fp32, kFp32Mx8, kSplit8Mx8, kStochasticMx8, kStochasticMx4 };
template <template <unsigned> class Rules, unsigned Flags, Loop L>
constexpr RuleFn loop_of() {
  using Rule = Rules<Flags>;
  if constexpr (!Rule::kValid)
    return nullptr;
  else if constexpr (L == kInFp32)
    return apply_fp32<Rule>;
  else if constexpr (Rule::kStates > 3 || Rule::kUncommon)
    return nullptr;
  else if constexpr (L == kInBf16)
    return apply_bf16<Rule>;
  else if constexpr (!(Rule::kReducedPrecision >> Flags & 1))
    return nullptr;
  else if constexpr (L == kBf16Fp32)
    return apply_tiles<Rule, Bf16, Bf16, Fp32State>;
  else if constexpr (L == kFp32Mx8)
    return apply_tiles<Rule, Fp32, Fp32, Mx8State>;
  else if constexpr (L == kSplit8Mx8)
    return apply_tiles<Rule, Split8Weight, Bf16, Mx8State>;
  else if constexpr (L == kStochasticMx8)
    return apply_tiles<Rule, Half<DitherBf16>, Bf16, Mx8State>;
  else
    return apply_tiles<Rule, Half<DitherBf16>, Bf16, Mx4State>;
}

// Fills the table entries of a rule, one for each combination of flags.
template <template <unsigned> class Rule, Loop L, unsigned Flags = 0>
constexpr void fill(RuleFn* of_flags) {
  if constexpr (Flags < kFlagSets) {
    of_flags[Flags] = loop_of<Rule, Flags, L>();
    fill<Rule, L, Flags + 1>(of_flags);
  }
}
// The table of one combination of formats, for all rules.
template <Loop L>
constexpr Direct direct(Format weight, Format grad, Format state, int step) {
  Direct found{weight, grad, state, step, {}};
#define ONEPASS_FILL(CODE, RULE, ARG) fill<RULE, L>(found.rules[CODE]);
  ONEPASS_FOR_EACH_RULE(ONEPASS_FILL, )
#undef ONEPASS_FILL
  return found;
}

}  // namespace

#define ONEPASS_KERNELS                                                                        \
  {                                                                                            \
      {                                                                                        \
          direct<kInFp32>(Format::kFp32, Format::kFp32, Format::kFp32, 1),                     \
          direct<kInBf16>(Format::kBf16, Format::kBf16, Format::kBf16Stochastic, 1),           \
          direct<kBf16Fp32>(Format::kBf16, Format::kBf16, Format::kFp32, kTile),               \
          direct<kFp32Mx8>(Format::kFp32, Format::kFp32, Format::kMx8, kTile),                 \
          direct<kSplit8Mx8>(Format::kSplit8, Format::kBf16, Format::kMx8, kTile),             \
          direct<kStochasticMx8>(Format::kBf16Stochastic, Format::kBf16, Format::kMx8, kTile), \
          direct<kStochasticMx4>(Format::kBf16Stochastic, Format::kBf16, Format::kMx4, kTile), \
      },                                                                                       \
      ONEPASS_FORMATS(load),                                                                   \
      ONEPASS_FORMATS(store),                                                                  \
      ONEPASS_NORMS,                                                                           \
      average_tile,                                                                            \
      measure_tile,                                                                            \
      {compare_codes<uint16_t>, compare_codes<uint32_t>},                                      \
  }

}  // namespace onepass::cpu
