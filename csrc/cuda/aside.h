// The dynamic shared memory of a sweep.
#pragma once

#include <cstddef>

#include "chunk.h"
#include "tuning.h"

namespace onepass::cuda {

// What a block puts aside for the optional work. A launch has this memory only if its list has
// averages or telemetry. Registers that held the weights until the end of a round would spill.
template <int Threads>
struct Aside {
  // The weights after the update, before they are rounded to their format: element j of a thread is
  // number j % 4 of weights[j / 4][thread].
  alignas(16) float weights[kElements / 4][Threads][4];
  double sums[Threads][kTelemetryWidth];  // the telemetry of each thread
};

constexpr size_t aside_bytes(int threads) {
  return static_cast<size_t>(threads) *
         (kElements * sizeof(float) + kTelemetryWidth * sizeof(double));
}
static_assert(sizeof(Aside<kTuning.threads>) == aside_bytes(kTuning.threads), "no padding");

}  // namespace onepass::cuda
