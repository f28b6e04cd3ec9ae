// The arithmetic of a sweep: Quick omits the special cases and detects when one occurred; Careful
// handles all of them.
#pragma once

#include "../formats/table.h"

namespace onepass::cuda {

// The arithmetic as the formats and rules define it, with all special cases.
struct Careful : Exact {
  ONEPASS_HD static void note_codes(uint32_t, uint32_t) {}
  template <Kind K>
  ONEPASS_HD static void note_state(float) {}
  ONEPASS_HD static void note_weight(float) {}
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
struct Quick {
  static constexpr bool kQuick = true;
  // The bits of 2^-101 and 2^20, the range of operands. The lower bound makes every remainder
  // x - y * q exact, because its last bit is at least 2^-148, and makes roots equal those of
  // compiled code. Both bounds keep quotients normal.
  static constexpr uint32_t kLeast = 0x0D000000u, kMost = 0x49800000u;

  uint32_t least = ~0u, most = 0, zeros = 0;

  // A NaN result, for example of a negative x, is detected when div gets it as a divisor.
  ONEPASS_HD float sqrt(float x) {
    note_least(to_bits(x));
#if defined(__CUDA_ARCH__)
    float inverse;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    const float root = x * inverse;
    return __fmaf_rn(__fmaf_rn(-root, root, x), inverse * 0.5f, root);
#else
    return sqrt_rn(x);
#endif
  }

  ONEPASS_HD float div(float x, float y) {
    const uint32_t magnitude = to_bits(x) & kMagnitude;
    note_least(magnitude), note_most(magnitude);
    note_least(to_bits(y)), note_most(to_bits(y));
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
  // Records a state, which must be finite. A second moment must also exceed every one of its codes.
  template <Kind K>
  ONEPASS_HD void note_state(float value) {
    if (K == kSecond) {
      note_least(to_bits(value)), note_most(to_bits(value));
    } else {
      note_most(to_bits(value) & kMagnitude);
    }
  }
  // Records a weight, which must be finite. joined_plain returns a NaN for a stale split companion.
  ONEPASS_HD void note_weight(float value) { note_most(to_bits(value) & kMagnitude); }

  // Whether all results have the same bits as those of Careful.
  ONEPASS_HD bool right() const { return least >= kLeast && most <= kMost && zeros == 0; }

 private:
  ONEPASS_HD void note_least(uint32_t bits) { least = bits < least ? bits : least; }
  ONEPASS_HD void note_most(uint32_t bits) { most = max_u32(most, bits); }
};

}  // namespace onepass::cuda
