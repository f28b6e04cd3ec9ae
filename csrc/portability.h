// Compiler-dependent helpers of the rules and formats, which let one header serve the CPU sweeps
// (one per instruction set) and the CUDA sweep.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ONEPASS_HD __host__ __device__ __forceinline__
#else
// Always inlined: each translation unit is built for a different instruction set, and the linker
// could keep an out-of-line copy that this machine cannot run.
#define ONEPASS_HD inline __attribute__((always_inline))
#endif

namespace onepass {

// The bits of a float.
ONEPASS_HD uint32_t to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// The float with these bits.
ONEPASS_HD float from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// The correctly rounded square root on every target. Plain sqrtf and '/' are correctly rounded too
// under the flags of setup.py, but --use_fast_math of nvcc would change them.
ONEPASS_HD float sqrt_rn(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

// The correctly rounded quotient on every target.
ONEPASS_HD float div_rn(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(x, y);
#else
  return x / y;
#endif
}

// The square roots and quotients of a rule. A sweep may pass another struct whose results have the
// same bits (Quick in cuda/fast_path.cuh).
struct Exact {
  static constexpr bool kQuick = false;  // whether all operands must be finite

  ONEPASS_HD static float sqrt(float x) { return sqrt_rn(x); }
  // sqrt of the new value of a state of kind kSecond.
  ONEPASS_HD static float sqrt_of_state(float x) { return sqrt_rn(x); }
  // x divided by a root plus the scalar `eps` of the rule, or by the root of a number >= 0 plus
  // eps.
  ONEPASS_HD static float div_by_root(float x, float y) { return div_rn(x, y); }
  // Division by a number from a range that cuda/fast_path.cuh assumes.
  ONEPASS_HD static float div_in_range(float x, float y) { return div_rn(x, y); }
};

}  // namespace onepass
