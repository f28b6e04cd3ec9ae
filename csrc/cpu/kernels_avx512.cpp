#include "kernels_impl.h"

namespace onepass::cpu {
extern const Kernels kKernelsAvx512 = ONEPASS_KERNELS;
}
