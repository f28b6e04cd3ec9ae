#include "instances.cuh"

namespace onepass::cuda {
const RuleKernels kRmspropKernels{find_fixed<Rmsprop, 2>, sweep_any<Rmsprop>};
}
