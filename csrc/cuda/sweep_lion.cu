#include "instances.cuh"

namespace onepass::cuda {
extern const RuleKernels kLionKernels{find_fixed<Lion, 4>, sweep_any<Lion>};
}
