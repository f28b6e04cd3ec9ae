#include "instances.cuh"

namespace onepass::cuda {
extern const RuleKernels kRmspropKernels{find_fixed<Rmsprop, 2>, sweep_any<Rmsprop>};
}
