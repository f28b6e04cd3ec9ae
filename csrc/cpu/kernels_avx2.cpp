#include "kernels_impl.h"

namespace onepass::cpu {
extern const Kernels kKernelsAvx2 = ONEPASS_KERNELS;
}
