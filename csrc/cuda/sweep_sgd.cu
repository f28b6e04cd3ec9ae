#include "instances.cuh"

namespace onepass::cuda {
extern const RuleKernels kSgdKernels{find_fixed<Sgd, 0>, sweep_any<Sgd>};
}
