// The arithmetic of a sweep without its special cases, and how to know that there was none.
#pragma once

#include "../formats/table.h"

namespace onepass::cuda {

// Everything as it is defined, special cases included.
struct Careful : Exact {
  ONEPASS_HD static void note_codes(uint32_t, uint32_t) {}
  template <Kind K>
  ONEPASS_HD static void note_state(float) {}
  ONEPASS_HD static void note_weight(float) {}
  ONEPASS_HD static bool right() { return true; }
};

// Without branches and selections: eight elements side by side. It notes all operands, and one
// question at the end answers for all of them. Where the answer is no the step is taken again, with
// Careful.
//
// A root and a quotient are the hardware's approximation and the Newton steps that the compiler
// takes too. Their results are correctly rounded where nothing overflows or falls below the normal
// numbers. The compiler asks at every one of them, and a branch in the midst of each lets no two
// elements run side by side.
struct Quick {
  static constexpr bool kQuick = true;
  // 2^-101 and 2^20. The lower bound makes every remainder x - y * q exact, since its last bit is
  // at least 2^-148, and leaves a root as the compiler does; both keep quotients normal.
  static constexpr uint32_t kLeast = 0x0D000000u, kMost = 0x49800000u;

  uint32_t least = ~0u, most = 0, zeros = 0;

  // A NaN, as of a negative number, becomes a divisor, which is too large.
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

  // Four codes of a second moment: of a zero, which is only right where the scale is zero too.
  ONEPASS_HD void note_codes(uint32_t four, uint32_t scale) {
    zeros |= scale == 0 ? 0u : (four - 0x01010101u) & ~four & 0x80808080u;
  }
  // Finite; and a second moment above every code of it.
  template <Kind K>
  ONEPASS_HD void note_state(float value) {
    if (K == kSecond) {
      note_least(to_bits(value)), note_most(to_bits(value));
    } else {
      note_most(to_bits(value) & kMagnitude);
    }
  }
  // Finite, which it is not if a split weight was zero (joined_plain).
  ONEPASS_HD void note_weight(float value) { note_most(to_bits(value) & kMagnitude); }

  // Whether all that was done has the bits of Careful.
  ONEPASS_HD bool right() const { return least >= kLeast && most <= kMost && zeros == 0; }

 private:
  ONEPASS_HD void note_least(uint32_t bits) { least = bits < least ? bits : least; }
  ONEPASS_HD void note_most(uint32_t bits) { most = max_u32(most, bits); }
};

}  // namespace onepass::cuda
