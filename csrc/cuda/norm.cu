#include "kernels.h"
#include "norm.cuh"

namespace onepass::cuda {
const NormKernels kNormKernels{norm_chunks, norm_total};
}
