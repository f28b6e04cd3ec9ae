#include "instances.cuh"

namespace onepass::cuda {
const RuleKernels kRmspropKernels{
    find_fixed<Rmsprop, 2>, find_formats<Rmsprop, 2>, find_any<Rmsprop>()};
}
