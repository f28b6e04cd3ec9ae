#include "kernels.h"
#include "norm.cuh"

namespace onepass::cuda {
extern const NormKernels kNormKernels{norm_chunks, norm_total};
}
