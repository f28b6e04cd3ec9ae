// The floating-point mode of the processor during a step.
#pragma once

#include <cstdint>

#if defined(ONEPASS_X86)
#include <xmmintrin.h>
#endif

namespace onepass::cpu {

// Sets rounding to nearest and keeps denormals for the lifetime of the object, because results must
// not depend on torch.set_flush_denormal.
class DefaultRounding {
#if defined(ONEPASS_X86)
 public:
  DefaultRounding() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultRounding() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  // An FPCR of 0 rounds to nearest and keeps denormals.
  DefaultRounding() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, xzr" : : : "memory");
  }
  ~DefaultRounding() { asm volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }

 private:
  uint64_t saved_;
#endif
};

}  // namespace onepass::cpu
