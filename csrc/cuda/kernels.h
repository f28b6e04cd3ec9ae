// The kernels that the host launches. Each .cu file is compiled separately and defines one constant
// that is declared here.
#pragma once

#include "chunk.h"
#include "step_tables.h"

namespace onepass::cuda {

using SweepKernel = void (*)(Tables);

// The sweep kernels of one rule. fixed() returns the kernel for a list with one combination of
// flags and formats, and formats() the kernel for a list with one combination of flags; both return
// null if combinations.h has none. any is the kernel for every list; it is null in a tuning variant
// (tuning.h) and in most rules of a sample (combinations.h).
struct RuleKernels {
  SweepKernel (*fixed)(unsigned flags, Format weight, Format grad, Format states);
  SweepKernel (*formats)(unsigned flags);
  SweepKernel any;
};

// The kernels of norm.cuh.
struct NormKernels {
  void (*chunks)(Tables, int64_t chunks, Norm* partials);
  void (*total)(const Norm* partials, int64_t count, Norm* total);
};

// The kernels of telemetry.cuh.
struct TelemetryKernels {
  void (*skipped)(Tables, int64_t rows);
  void (*total)(Tables, const Span* spans);
};

// The kernels of advance.cuh.
struct StepKernels {
  void (*judge)(Judged, Verdict* verdict);
  void (*advance)(int rule, Rows);
};

#define ONEPASS_DECLARE(CODE, RULE, ARG) extern const RuleKernels k##RULE##Kernels;
ONEPASS_FOR_EACH_RULE(ONEPASS_DECLARE, )
#undef ONEPASS_DECLARE
extern const NormKernels kNormKernels;
extern const TelemetryKernels kTelemetryKernels;
extern const StepKernels kStepKernels;

}  // namespace onepass::cuda
