// What a plan says of one parameter, for the sweeps of every device.
#pragma once

#include "formats/table.h"
#include "rules/table.h"

namespace onepass {

// A tensor at rest: its codes, and the scales of their blocks or the companion of a weight.
struct Stored {
  void* data;
  void* extra;
};

// What a step may measure of a row, float64, in the order of a row of the telemetry table: sums of
// squares of gradients, of weights after the step and of updates; non-finite gradients.
struct Telemetry {
  double grads, weights, updates, nonfinite;
};
constexpr int kTelemetryWidth = 4;

// What a step is run with, beside the plan (StepArgs of onepass/engine/backends/base.py).
struct StepArgs {
  const float* hyper;       // kHyperWidth floats a row
  const int64_t* counters;  // seed and step of each row; a row whose step is 0 is left alone
  Telemetry* telemetry;     // a row each, to be filled; or null
  bool zero_grads;          // gradients become zero, those of rows that are left alone too
};
// The bits of the op's argument switches.
enum StepSwitch : int64_t { kZeroGrads = 1, kAllSwitches = 2 };

// One parameter with what belongs to it, in memory order.
struct Entry {
  Stored param;
  void* grad;
  Stored states[kMaxStates];
  float* ema;  // the average of the weight, or null
  int64_t numel;
  int64_t first;  // index of the first element in the whole tensor, for the random bits
  int64_t param_id;
  int32_t row;  // of the hyperparameter table
  uint16_t rule, flags;
  Format param_format, grad_format, state_formats[kMaxStates];
  Kind kinds[kMaxStates];
  uint8_t order[kMaxStates];  // of the states in a tile: the first second moment comes first
  uint8_t slots;              // bit k: the rule has state k

  bool has(int k) const { return slots >> k & 1; }
};

}  // namespace onepass
