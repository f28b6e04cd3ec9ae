#include "advance.cuh"
#include "kernels.h"

namespace onepass::cuda {
const StepKernels kStepKernels{judge_step, advance_rows};
}
