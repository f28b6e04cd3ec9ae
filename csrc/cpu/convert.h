// Conversions of arrays between integers of different widths, for one instruction set: see
// kernels_impl.h.
#pragma once

#include "simd/simd.h"

namespace onepass::cpu {
namespace {

// Converts n elements. Conversions are loops of their own, without arithmetic, because a vectoriser
// chooses the vector length by the narrowest type of a loop and splits all wider types to match.
template <class To, class From>
ONEPASS_HD void convert(const From* __restrict from, To* __restrict to, int n) {
  int first = 0;
  if (simd::kConverted != 0)
    for (; first + simd::kConverted <= n; first += simd::kConverted)
      simd::convert(from + first, to + first);
#pragma omp simd
  for (int i = first; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

// Unpacks bytes of two 4-bit codes into one code per byte; the first code is in the lower half. The
// array of codes has an even number of elements. A byte and its copy shifted by 4, in 16 bits, are
// both codes after masking.
ONEPASS_HD void split_nibbles(const uint8_t* __restrict from, uint8_t* __restrict to, int pairs) {
#pragma omp simd
  for (int i = 0; i < pairs; ++i) {
    const uint16_t both = static_cast<uint16_t>((from[i] | from[i] << 4) & 0x0F0F);
    __builtin_memcpy(to + 2 * i, &both, sizeof both);
  }
}
// Packs two 4-bit codes into each byte; the inverse of split_nibbles.
ONEPASS_HD void join_nibbles(const uint32_t* __restrict from, uint8_t* __restrict to, int pairs) {
  int first = 0;
  if (simd::kNibblePairs != 0)
    for (; first + simd::kNibblePairs <= pairs; first += simd::kNibblePairs)
      simd::join_nibbles(from + 2 * first, to + first);
#pragma omp simd
  for (int i = first; i < pairs; ++i)
    to[i] = static_cast<uint8_t>(from[2 * i] | from[2 * i + 1] << 4);
}

}  // namespace
}  // namespace onepass::cpu
