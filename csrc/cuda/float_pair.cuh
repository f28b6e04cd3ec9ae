// Two fp32 numbers. Compute capability 10.0 and later add or multiply both in one instruction, with
// the results of two instructions.
#pragma once

#include "../portability.h"

namespace onepass::cuda {

// Whether a sweep updates two elements at once. Host code, which has two numbers in place of a
// pair of registers, is compiled by the tests.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
constexpr bool kHasPairs = false;
#else
constexpr bool kHasPairs = true;
#endif

struct FloatPair {
#if defined(__CUDACC__)
  uint64_t bits;  // the first number in the lower half
#else
  float first, second;
#endif
};

#if defined(__CUDACC__)
__device__ __forceinline__ FloatPair pair_of(float first, float second) {
  return {uint64_t{__float_as_uint(second)} << 32 | __float_as_uint(first)};
}
__device__ __forceinline__ float first_of(FloatPair a) {
  return __uint_as_float(static_cast<uint32_t>(a.bits));
}
__device__ __forceinline__ float second_of(FloatPair a) {
  return __uint_as_float(static_cast<uint32_t>(a.bits >> 32));
}
// a * b + c, rounded once.
__device__ __forceinline__ FloatPair fma_rn(FloatPair a, FloatPair b, FloatPair c) {
  FloatPair r{};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(r.bits) : "l"(a.bits), "l"(b.bits), "l"(c.bits));
#endif
  return r;
}
__device__ __forceinline__ FloatPair operator+(FloatPair a, FloatPair b) {
  FloatPair r{};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(r.bits) : "l"(a.bits), "l"(b.bits));
#endif
  return r;
}
// The product as a multiply-add of -0, which changes no product: ptxas of CUDA 13.0 merges
// mul.rn.f32x2 with a later add.rn.f32x2, also with --fmad=false. threadIdx.y is 0 in every launch,
// which ptxas does not know.
__device__ __forceinline__ FloatPair operator*(FloatPair a, FloatPair b) {
  const float zero = __uint_as_float(0x80000000u | threadIdx.y);
  return fma_rn(a, b, pair_of(zero, zero));
}
#else
inline FloatPair pair_of(float first, float second) { return {first, second}; }
inline float first_of(FloatPair a) { return a.first; }
inline float second_of(FloatPair a) { return a.second; }
inline FloatPair operator+(FloatPair a, FloatPair b) {
  return {a.first + b.first, a.second + b.second};
}
inline FloatPair operator*(FloatPair a, FloatPair b) {
  return {a.first * b.first, a.second * b.second};
}
#endif

// The operations of rules, in terms of those above.
__device__ __forceinline__ FloatPair operator-(FloatPair a) {
  return a * pair_of(-1.0f, -1.0f);  // one instruction: pairs have no modifier of the sign
}
__device__ __forceinline__ FloatPair operator-(FloatPair a, FloatPair b) { return a + -b; }
__device__ __forceinline__ FloatPair operator+(FloatPair a, float b) { return a + pair_of(b, b); }
__device__ __forceinline__ FloatPair operator*(float a, FloatPair b) { return pair_of(a, a) * b; }

}  // namespace onepass::cuda
