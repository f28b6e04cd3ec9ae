// The arithmetic of a sweep: Quick omits the special cases and detects when one occurred; Careful
// handles all of them.
#pragma once

#include "../formats/table.h"
#include "float_pair.cuh"

namespace onepass::cuda {

// The arithmetic as the formats and rules define it, with all special cases.
struct Careful : Exact {
  ONEPASS_HD static void note_codes(uint32_t, uint32_t) {}
  ONEPASS_HD static void note_finite(float) {}
  ONEPASS_HD static void note_largest(uint32_t) {}
  ONEPASS_HD static void note_seconds(uint32_t, uint32_t) {}
  ONEPASS_HD static void note_divisor(uint32_t) {}
  ONEPASS_HD static void note_roots(bool) {}
  ONEPASS_HD static void note_ratios(uint32_t) {}
  ONEPASS_HD static bool right() { return true; }
};

// Arithmetic without branches, so that the eight elements of a thread are computed in parallel. It
// records the range of all operands; right() checks that range once, at the end. If right() returns
// false, the elements are computed again with Careful.
//
// Square roots and quotients use the approximation instructions and Newton steps, as compiled code
// does. The results are correctly rounded if no intermediate overflows or is below the normal
// numbers. The compiler tests this for each operation, and a branch per operation prevents
// overlapping the elements. Zero has a root and is a dividend, because a row of zero gradients (of
// an embedding) has both.
//
// NotedStates: the format of the states calls note_seconds and note_largest for every state of kind
// kSecond, so that roots of these states need no check of their own.
template <bool NotedStates>
struct Quick {
  static constexpr bool kQuick = true;
  // The bits of 2^-101 and 2^40, the range of operands other than zero. The lower bound makes every
  // remainder x - y * q exact, because its last bit is at least 2^-148, and makes roots equal those
  // of compiled code. Both bounds keep quotients normal.
  static constexpr uint32_t kLeast = 0x0D000000u, kMost = 0x53800000u;
  // The range of what a rule adds to its divisors: a quotient is normal or overflows.
  static constexpr float kLeastEps = 0x1p-100f, kMostEps = 0x1p20f;

  // The smallest noted bits less 1, of which those of zero are the largest integer.
  uint32_t least = ~0u;
  uint32_t most = 0, zeros = 0, smallest_second = ~0u;
  bool zero_roots = false;
  float magnitudes = -0.0f;  // a sum; the compiler drops the addition of -0

  // Whether a number that a rule adds to its divisors makes them large enough for div_by_root.
  ONEPASS_HD static bool covers(float eps) { return eps >= kLeastEps && eps <= kMostEps; }

  ONEPASS_HD float sqrt(float x) {
    note(x);
    return root_in_range(x);
  }
  ONEPASS_HD float sqrt_of_state(float x) { return NotedStates ? root_in_range(x) : sqrt(x); }

  // y is a root from above plus eps, or such a root of a number plus eps. The quotient of a rule
  // becomes a part of the weight, so an x that makes it overflow makes the weight infinite or a
  // NaN.
  ONEPASS_HD float div_by_root(float x, float y) {
    note_least(to_bits(x) & kMagnitude);
    return div_in_range(x, y);
  }
  // The root of a second moment of mx4. note_largest_root records the upper bound.
  ONEPASS_HD float sqrt_of_code(float x) {
    note_least(to_bits(x));
    return root_in_range(x);
  }
  // Divides by a root that mx4 decoded from a code, 2^e times 1, 1.25, 1.5 or 1.75. The inverse
  // needs no Newton step. A quotient by such a number is not between two floats within 1/14 of
  // their distance of the middle, because 4, 5, 6 or 7 times the middle has 25 bits or more, and
  // the remainder is exact, so that an error of 1 in the last place of the inverse moves the result
  // by 2^-22 of that distance.
  ONEPASS_HD float div_by_code(float x, float y) {
    note_finite(x);
    note_least(to_bits(x) & kMagnitude);
#if defined(__CUDA_ARCH__)
    const float inverse = approximate_rcp(y);
    const float quotient = x * inverse;
    return __fmaf_rn(-__fmaf_rn(y, quotient, -x), inverse, quotient);
#else
    return div_rn(x, y);
#endif
  }
  // Divides if both operands are in the range by construction, or x is zero. The signs of the last
  // line keep the sign of zero.
  ONEPASS_HD static float div_in_range(float x, float y) {
#if defined(__CUDA_ARCH__)
    float inverse = approximate_rcp(y);
    inverse = __fmaf_rn(inverse, __fmaf_rn(-y, inverse, 1.0f), inverse);
    const float quotient = x * inverse;
    return __fmaf_rn(-__fmaf_rn(y, quotient, -x), inverse, quotient);
#else
    return div_rn(x, y);
#endif
  }

  // The same for pairs.
  __device__ __forceinline__ FloatPair sqrt_of_state(FloatPair x) {
#if defined(__CUDA_ARCH__)
    if (!NotedStates) note(first_of(x)), note(second_of(x));
    const FloatPair shifted = x + 0x1p-126f;
    const FloatPair inverse =
        pair_of(approximate_rsqrt(first_of(shifted)), approximate_rsqrt(second_of(shifted)));
    const FloatPair root = x * inverse;
    return fma_rn(fma_rn(-root, root, x), 0.5f * inverse, root);
#else
    return pair_of(sqrt_of_state(first_of(x)), sqrt_of_state(second_of(x)));
#endif
  }
  __device__ __forceinline__ FloatPair div_by_root(FloatPair x, FloatPair y) {
#if defined(__CUDA_ARCH__)
    note_least(to_bits(first_of(x)) & kMagnitude);
    note_least(to_bits(second_of(x)) & kMagnitude);
    // div_in_range with the negatives of the inverse and of x, which need fewer changes of sign.
    const FloatPair start = pair_of(approximate_rcp(-first_of(y)), approximate_rcp(-second_of(y)));
    const FloatPair inverse = fma_rn(start, fma_rn(y, start, pair_of(1.0f, 1.0f)), start);
    const FloatPair minus = -x, quotient = minus * inverse;
    return fma_rn(fma_rn(y, quotient, minus), inverse, quotient);
#else
    return pair_of(div_by_root(first_of(x), first_of(y)), div_by_root(second_of(x), second_of(y)));
#endif
  }

  // Records whether one of four codes of a second moment is 0. decode_upper_normal is wrong for
  // code 0 unless the scale is 0 too.
  ONEPASS_HD void note_codes(uint32_t four, uint32_t scale) {
    zeros |= scale == 0 ? 0u : (four - 0x01010101u) & ~four & 0x80808080u;
  }
  // Records a value that must be finite: an operand, a state without a scale, or a weight.
  // joined_plain returns a NaN for a stale split companion. A sum is used because half as many
  // integer comparisons as additions fit into a cycle, and in 8-bit formats the integer units are
  // the bottleneck: each magnitude is at most the sum, and an infinity or a NaN makes the sum one.
  ONEPASS_HD void note_finite(float value) { magnitudes = magnitudes + magnitude(value); }
  // Records the bits of the largest magnitude of a block, all values of which must be finite.
  ONEPASS_HD void note_largest(uint32_t bits) { note_most(bits); }
  // Records the bits of the largest root of a second moment of mx4. A square up to 2^40 has a root
  // up to 2^20.
  ONEPASS_HD void note_largest_root(uint32_t bits) {
    note_most(to_bits(from_bits(bits) * 0x1p20f));
  }
  // Records whether the scale of the roots of mx4 is 0, and then the codes of the ratios. A root of
  // zero counts as 1 in the decoding of ratios, which Quick omits: all of these codes must be zero.
  ONEPASS_HD void note_roots(bool zero) { zero_roots = zero_roots || zero; }
  ONEPASS_HD void note_ratios(uint32_t eight) { zeros |= zero_roots ? eight & 0x77777777u : 0u; }
  // Records the bits of the smallest second moment of a thread, and of the largest of its block:
  // the bits of each must exceed every code, unless all are zero.
  ONEPASS_HD void note_seconds(uint32_t smallest, uint32_t largest) {
    const uint32_t noted = largest == 0 ? ~0u : smallest;
    smallest_second = noted < smallest_second ? noted : smallest_second;
  }

  // Records the bits of the largest magnitude of a block of dynamic8, by which its values are
  // divided. Quotients below 2^-23 need not be correctly rounded, because all of them have the code
  // of zero. In the others the dividend is thus at least 2^-101.
  ONEPASS_HD void note_divisor(uint32_t bits) { note_least(to_bits(from_bits(bits) * 0x1p-23f)); }

  // Whether all results have the same bits as those of Careful. A sum with a NaN has the bits of
  // one, which exceed every bound.
  ONEPASS_HD bool right() const {
    return least >= kLeast - 1 && smallest_second >= kLeast && most <= kMost && zeros == 0 &&
           to_bits(magnitudes) <= kMost;
  }

 private:
  // The root of a number in the range, or of zero. 2^-126 is below half of the last bit of a number
  // in the range, and gives zero a finite inverse.
  ONEPASS_HD static float root_in_range(float x) {
#if defined(__CUDA_ARCH__)
    const float inverse = approximate_rsqrt(x + 0x1p-126f);
    const float root = x * inverse;
    return __fmaf_rn(__fmaf_rn(-root, root, x), inverse * 0.5f, root);
#else
    return sqrt_rn(x);
#endif
  }
#if defined(__CUDA_ARCH__)
  __device__ __forceinline__ static float approximate_rsqrt(float x) {
    float inverse;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    return inverse;
  }
  __device__ __forceinline__ static float approximate_rcp(float x) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    return inverse;
  }
#endif
  ONEPASS_HD void note(float x) {
    note_least(to_bits(x));
    note_most(to_bits(x));
  }
  ONEPASS_HD void note_least(uint32_t bits) { least = bits - 1 < least ? bits - 1 : least; }
  ONEPASS_HD void note_most(uint32_t bits) { most = max_u32(most, bits); }
};

}  // namespace onepass::cuda
