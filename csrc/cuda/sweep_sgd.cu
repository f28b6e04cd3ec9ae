#include "instances.cuh"

namespace onepass::cuda {
const RuleKernels kSgdKernels{find_fixed<Sgd, 0>, find_formats<Sgd, 0>, find_any<Sgd>()};
}
