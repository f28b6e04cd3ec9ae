#include "instances.cuh"

namespace onepass::cuda {
const RuleKernels kLionKernels{find_fixed<Lion, 4>, find_formats<Lion, 4>, find_any<Lion>()};
}
