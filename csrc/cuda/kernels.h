// Where the kernels meet the host: each file of kernels is compiled apart.
#pragma once

#include "chunk.h"
#include "step_tables.h"

namespace onepass::cuda {

using SweepKernel = void (*)(Tables);

// fixed: that of a list of one combination. formats: that of a list whose flags are all one. Both
// are null where combinations.h has none. any: that of every list; null in a variant (tuning.h).
struct RuleKernels {
  SweepKernel (*fixed)(unsigned flags, Format weight, Format grad, Format states);
  SweepKernel (*formats)(unsigned flags);
  SweepKernel any;
};

struct NormKernels {
  void (*chunks)(Tables, int64_t chunks, Norm* partials);
  void (*total)(const Norm* partials, int64_t count, Norm* total);
};

struct StepKernels {
  void (*judge)(Judged, Verdict* verdict);
  void (*advance)(int rule, Rows);
};

#define ONEPASS_DECLARE(CODE, RULE, ARG) extern const RuleKernels k##RULE##Kernels;
ONEPASS_FOR_EACH_RULE(ONEPASS_DECLARE, )
#undef ONEPASS_DECLARE
extern const NormKernels kNormKernels;
extern const StepKernels kStepKernels;

}  // namespace onepass::cuda
