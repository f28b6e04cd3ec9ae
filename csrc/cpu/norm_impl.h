// The norm kernels for one instruction set. The rules of kernels_impl.h on included headers apply
// to this file too.
#pragma once

#include "../prefetch.h"
#include "strip.h"

namespace onepass::cpu {
namespace {

// Returns the largest magnitude that is not a NaN, as a code, and adds the number of infinities and
// NaNs to *nonfinite. Codes are signed integers because the narrow integer comparisons of the
// instruction sets are signed.
template <class Code, Code Infinity>
ONEPASS_HD Code scan(const void* src, int n, int64_t* nonfinite) {
  const Code* __restrict codes = static_cast<const Code*>(src);
  Code largest = 0, found = 0;
#pragma omp simd reduction(max : largest) reduction(+ : found)
  for (int i = 0; i < n; ++i) {
    const Code magnitude = codes[i] & (sizeof(Code) == 4 ? 0x7FFFFFFF : 0x7FFF);
    const Code number = magnitude > Infinity ? Code{0} : magnitude;
    largest = number > largest ? number : largest;
    found = static_cast<Code>(found + (magnitude >= Infinity));
  }
  *nonfinite += found;
  return largest;
}

// Adds the squares of a stretch, which are scaled fp32 numbers, to float64 lanes. It reads 32-bit
// words of one or two elements. The number of lanes, and so the order of additions, is the same on
// every instruction set.
constexpr int kLanes = 32;

template <float (*Squares)(uint32_t, float)>
void add_squares(const void* src, int words, uint32_t last, float scale, double* __restrict into) {
  const Pair* __restrict from = static_cast<const Pair*>(src);
  float sums[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= words; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += Squares(from[i + lane], scale);
  }
  for (int lane = 0; i + lane < words; ++lane) sums[lane] += Squares(from[i + lane], scale);
  sums[kLanes - 1] += Squares(last, scale);
  const double unscale = 1.0 / scale;
#pragma omp simd
  for (int lane = 0; lane < kLanes; ++lane)
    into[lane] += static_cast<double>(sums[lane]) * (unscale * unscale);
}

// The norm of n elements, in stretches of 2 KiB. The scale of a stretch is the power of two that
// brings its largest element to between 1/2 and 4, so that no square overflows or underflows in
// fp32, which is twice as fast as float64.
template <class Code, Code Infinity, float (*Decode)(Code), float (*Squares)(uint32_t, float)>
void norm(const void* src, int64_t n, Norm* into) {
  constexpr int kStretch = 2048 / sizeof(Code), kPerWord = 4 / sizeof(Code);
  double squares[kLanes] = {};
  for (int64_t first = 0; first < n; first += kStretch) {
    const Code* codes = static_cast<const Code*>(src) + first;
    const int count = n - first < kStretch ? static_cast<int>(n - first) : kStretch;
    // Prefetch the next stretch: the hardware prefetcher detects no stream, because each stretch is
    // read twice.
    prefetch_lines(codes + kStretch, count * static_cast<int64_t>(sizeof(Code)));
    const float top = Decode(scan<Code, Infinity>(codes, count, &into->nonfinite));
    into->largest = top > into->largest ? top : into->largest;
    const int32_t exponent = (253 << 23) - static_cast<int32_t>(to_bits(top) & 0x7F800000u);
    const float scale = from_bits(exponent > 1 << 23 ? exponent : 1 << 23);
    const uint32_t last = count % kPerWord ? static_cast<uint16_t>(codes[count - 1]) : 0;
    add_squares<Squares>(codes, count / kPerWord, last, scale, squares);
  }
  for (int lane = 0; lane < kLanes; ++lane) into->squares += squares[lane];
}

ONEPASS_HD float square(float value) { return value * value; }

// The decoding of a code, and the sum of squares of the elements of a 32-bit word, for each format.
struct WordFp32 {
  ONEPASS_HD static float decode(int32_t code) { return from_bits(static_cast<uint32_t>(code)); }
  ONEPASS_HD static float squares(uint32_t word, float scale) {
    return square(scale * from_bits(word));
  }
};
struct WordBf16 {
  ONEPASS_HD static float decode(int16_t code) { return decode_bf16(static_cast<uint16_t>(code)); }
  ONEPASS_HD static float squares(uint32_t word, float scale) {
    return square(scale * lower(word)) + square(scale * upper(word));
  }
};
struct WordFp16 {
  ONEPASS_HD static float decode(int16_t code) { return decode_fp16(static_cast<uint16_t>(code)); }
  ONEPASS_HD static float squares(uint32_t word, float scale) {
    return square(scale * decode_fp16(word & 0xFFFFu)) + square(scale * decode_fp16(word >> 16));
  }
};

}  // namespace

// The norm functions, in the order of Format.
#define ONEPASS_NORMS                                              \
  {norm<int32_t, 0x7F800000, WordFp32::decode, WordFp32::squares>, \
   norm<int16_t, 0x7F80, WordBf16::decode, WordBf16::squares>,     \
   norm<int16_t, 0x7C00, WordFp16::decode, WordFp16::squares>}

}  // namespace onepass::cpu
