#include "instances.cuh"

namespace onepass::cuda {
const RuleKernels kAdagradKernels{
    find_fixed<Adagrad, 1>, find_formats<Adagrad, 1>, find_any<Adagrad>()};
}
