#include "kernels_impl.h"

namespace onepass::cpu {
extern const Kernels kKernelsPlain = ONEPASS_KERNELS;
}
