// The arithmetic of a sweep: Quick omits the special cases and detects when one occurred; Careful
// handles all of them.
#pragma once

#include "../formats/table.h"

namespace onepass::cuda {

// The arithmetic as the formats and rules define it, with all special cases.
struct Careful : Exact {
  ONEPASS_HD static void note_codes(uint32_t, uint32_t) {}
  ONEPASS_HD static void note_finite(float) {}
  ONEPASS_HD static void note_largest(uint32_t) {}
  ONEPASS_HD static void note_second(float) {}
  ONEPASS_HD static bool right() { return true; }
};

// Arithmetic without branches, so that the eight elements of a thread are computed in parallel. It
// records the range of all operands; right() checks that range once, at the end. If right() returns
// false, the elements are computed again with Careful.
//
// Square roots and quotients use the approximation instructions and Newton steps, as compiled code
// does. The results are correctly rounded if no intermediate overflows or is below the normal
// numbers. The compiler tests this for each operation, and a branch per operation prevents
// overlapping the elements.
//
// Half as many integer comparisons as additions fit into a cycle, and in 8-bit formats the integer
// units are the bottleneck. Upper bounds are therefore tested by sums of magnitudes: each magnitude
// is at most the sum, and an infinity or a NaN makes the sum one.
struct Quick {
  static constexpr bool kQuick = true;
  // The bits of 2^-101 and 2^20, the range of operands. The lower bound makes every remainder
  // x - y * q exact, because its last bit is at least 2^-148, and makes roots equal those of
  // compiled code. Both bounds keep quotients normal.
  static constexpr uint32_t kLeast = 0x0D000000u, kMost = 0x49800000u;
  // The bits of 2^50. An inverse of at most 2^50 has a divisor of at least 2^-50, or a square root
  // of at least 2^-50.
  static constexpr uint32_t kMostInverse = 0x58800000u;

  uint32_t least = ~0u, most = 0, zeros = 0;
  float magnitudes = 0.0f, inverses = 0.0f;  // sums

  // A root is a part of a divisor or is encoded, so notes of both bound x from above. The inverse
  // of 0 is infinite, and that of a negative x is a NaN.
  ONEPASS_HD float sqrt(float x) {
#if defined(__CUDA_ARCH__)
    float inverse;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    inverses = inverses + inverse;
    const float root = x * inverse;
    return __fmaf_rn(__fmaf_rn(-root, root, x), inverse * 0.5f, root);
#else
    const float root = sqrt_rn(x);
    inverses = inverses + 1.0f / root;
    return root;
#endif
  }

  // Divides by any y.
  ONEPASS_HD float div(float x, float y) {
    note_finite(x);
    float inverse;
#if defined(__CUDA_ARCH__)
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
#else
    inverse = 1.0f / y;
#endif
    inverses = inverses + magnitude(inverse);
    return div_by_root(x, y);
  }
  // Divides by a root from sqrt plus a number >= 0; the notes of the root bound y from below. The
  // quotient of a rule becomes a part of the weight, so an x that makes it overflow makes the
  // weight infinite or a NaN.
  ONEPASS_HD float div_by_root(float x, float y) {
    note_least(to_bits(x) & kMagnitude);
    note_finite(y);
    return div_in_range(x, y);
  }
  // Divides if both operands are in the range by construction.
  ONEPASS_HD static float div_in_range(float x, float y) {
#if defined(__CUDA_ARCH__)
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
    inverse = __fmaf_rn(inverse, __fmaf_rn(-y, inverse, 1.0f), inverse);
    const float quotient = x * inverse;
    return __fmaf_rn(__fmaf_rn(-y, quotient, x), inverse, quotient);
#else
    return div_rn(x, y);
#endif
  }

  // Records whether one of four codes of a second moment is 0. decode_upper_normal is wrong for
  // code 0 unless the scale is 0 too.
  ONEPASS_HD void note_codes(uint32_t four, uint32_t scale) {
    zeros |= scale == 0 ? 0u : (four - 0x01010101u) & ~four & 0x80808080u;
  }
  // Records a value that must be finite: an operand, a state without a scale, or a weight.
  // joined_plain returns a NaN for a stale split companion.
  ONEPASS_HD void note_finite(float value) { magnitudes = magnitudes + magnitude(value); }
  // Records the bits of the largest magnitude of a block, all values of which must be finite.
  ONEPASS_HD void note_largest(uint32_t bits) { note_most(bits); }
  // Records a second moment, whose bits must exceed every one of its codes.
  ONEPASS_HD void note_second(float value) { note_least(to_bits(value)); }

  // Whether all results have the same bits as those of Careful. A sum with a NaN has the bits of
  // one, which exceed every bound.
  ONEPASS_HD bool right() const {
    return least >= kLeast && most <= kMost && zeros == 0 && to_bits(magnitudes) <= kMost &&
           to_bits(inverses) <= kMostInverse;
  }

 private:
  ONEPASS_HD void note_least(uint32_t bits) { least = bits < least ? bits : least; }
  ONEPASS_HD void note_most(uint32_t bits) { most = max_u32(most, bits); }
};

}  // namespace onepass::cuda
