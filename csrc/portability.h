// What the rules and formats need from the compiler, so that the same header serves the CPU
// sweeps (one per instruction set) and the CUDA sweep.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ONEPASS_HD __host__ __device__ __forceinline__
#else
// Always inlined: every translation unit is built for another instruction set, and a shared
// out-of-line copy could be the one that this machine cannot run.
#define ONEPASS_HD inline __attribute__((always_inline))
#endif

namespace onepass {

ONEPASS_HD uint32_t to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

ONEPASS_HD float from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Correctly rounded on every target; a plain '/' and sqrtf are as well under the flags that
// setup.py passes, but nvcc would let --use_fast_math change them.
ONEPASS_HD float sqrt_rn(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

ONEPASS_HD float div_rn(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(x, y);
#else
  return x / y;
#endif
}

// The roots and quotients of a rule, unless a sweep brings others of the same bits.
struct Exact {
  static constexpr bool kQuick = false;  // whether it is only asked of what is finite

  ONEPASS_HD static float sqrt(float x) { return sqrt_rn(x); }
  ONEPASS_HD static float div(float x, float y) { return div_rn(x, y); }
};

}  // namespace onepass
