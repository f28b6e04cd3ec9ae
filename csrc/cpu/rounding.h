// How the processor rounds while onepass computes.
#pragma once

#if defined(ONEPASS_X86)
#include <xmmintrin.h>
#endif

namespace onepass::cpu {

// The contract keeps denormals and rounds to nearest, whatever torch.set_flush_denormal says.
class DefaultRounding {
#if defined(ONEPASS_X86)
 public:
  DefaultRounding() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultRounding() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace onepass::cpu
