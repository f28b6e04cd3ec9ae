#include "instances.cuh"

namespace onepass::cuda {
const RuleKernels kAdamKernels{find_fixed<Adam, 3>, find_formats<Adam, 3>, find_any<Adam>()};
}
