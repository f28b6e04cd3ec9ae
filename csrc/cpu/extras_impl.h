// The optional work of a step, the average of the weight, telemetry and the record of changes, for
// one instruction set: see kernels_impl.h.
#pragma once

#include "../prefetch.h"
#include "kernels.h"
#include "simd/simd.h"

namespace onepass::cpu {
namespace {

// Updates the exponential moving average of a weight.
void average_tile(const float* row, const float* __restrict param, int n, float* __restrict ema) {
  const float decay = row[kEmaDecay], one_minus_decay = row[kEmaDecay + 1];
#pragma omp simd
  for (int i = 0; i < n; ++i) ema[i] = decay * ema[i] + one_minus_decay * param[i];
}

// Adds a tile to the telemetry of its row. The number of lanes, and so the order of additions, is
// the same on every instruction set.
void measure_tile(
    const float* __restrict grad, const float* __restrict before, const float* __restrict after,
    int n, Telemetry* into) {
  constexpr int kSumLanes = 16;
  double grads[kSumLanes] = {}, weights[kSumLanes] = {}, updates[kSumLanes] = {};
  int32_t nonfinite = 0;
  const auto add = [&](int i, int lane) {
    const double g = grad[i], w = after[i], u = after[i] - before[i];
    grads[lane] += g * g;
    weights[lane] += w * w;
    updates[lane] += u * u;
  };
  int first = 0;
  for (; first + kSumLanes <= n; first += kSumLanes) {
#pragma omp simd
    for (int lane = 0; lane < kSumLanes; ++lane) add(first + lane, lane);
  }
  for (int lane = 0; first + lane < n; ++lane) add(first + lane, lane);
#pragma omp simd reduction(+ : nonfinite)
  for (int i = 0; i < n; ++i) nonfinite += (to_bits(grad[i]) & kMagnitude) >= kInfinity;
  for (int lane = 0; lane < kSumLanes; ++lane) {
    into->grads += grads[lane];
    into->weights += weights[lane];
    into->updates += updates[lane];
  }
  into->nonfinite += nonfinite;
}

// See CompareFn. A strip has as many elements as a word of the record has bits.
template <class Code>
void compare_codes(
    const void* before, const void* after, int64_t n, int64_t first, uint32_t* changed) {
  const Code *from = static_cast<const Code*>(before), *to = static_cast<const Code*>(after);
  int64_t i = 0;
  if (first % kStrip == 0)
    for (; i + kStrip <= n; i += kStrip)
      changed[(first + i) / kStrip] |= simd::differences(from + i, to + i);
  while (i < n) {
    const int64_t word = (first + i) / kStrip, shift = (first + i) % kStrip;
    uint32_t found = 0;
    for (int64_t bit = shift; bit < kStrip && i < n; ++bit, ++i) {
      Code old, now;
      __builtin_memcpy(&old, from + i, sizeof(Code));
      __builtin_memcpy(&now, to + i, sizeof(Code));
      found |= uint32_t{old != now} << bit;
    }
    changed[word] |= found;
  }
}

// An integer type of 2 or of 4 bytes.
template <int Bytes>
struct CodeOf {
  using type = uint32_t;
};
template <>
struct CodeOf<2> {
  using type = uint16_t;
};

// The codes of at most Most weights before an update. keep copies them, and record sets the bits of
// those that have changed since. changed points to the word of the record of changes whose bit 0 is
// that of the first weight; if it is null, nothing is recorded.
template <int Bytes, int Most>
struct Before {
  using Code = typename CodeOf<Bytes>::type;
  static constexpr int kLine = 64 / Bytes;
  alignas(64) Code codes[Most];

  ONEPASS_HD void keep(const void* weights, int n, const uint32_t* changed) {
    if (!changed) return;
    const Code* from = static_cast<const Code*>(weights);
    if (__builtin_expect(n == Most, 1))
#pragma GCC unroll 1
      for (int i = 0; i < Most; i += kLine) simd::copy_line(from + i, codes + i);
    else
      for (int i = 0; i < n; ++i) __builtin_memcpy(codes + i, from + i, Bytes);
  }
  ONEPASS_HD void record(const void* weights, int n, uint32_t* changed) const {
    if (!changed) return;
    const Code* to = static_cast<const Code*>(weights);
    if (__builtin_expect(n == Most, 1))
#pragma GCC unroll 1
      for (int i = 0; i < Most; i += kStrip)
        changed[i / kStrip] |= simd::differences(codes + i, to + i);
    else
      compare_codes<Code>(codes, weights, n, 0, changed);
  }
};

}  // namespace
}  // namespace onepass::cpu
