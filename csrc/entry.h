// One parameter of a plan, as the sweeps of every device read it.
#pragma once

#include "formats/table.h"
#include "rules/table.h"

namespace onepass {

// A stored tensor. data holds its codes (encoded elements); extra holds the scales of its blocks,
// or the companion of a weight: a second tensor with the bits that the 16-bit weight lacks.
struct Stored {
  void* data;
  void* extra;
};

// The telemetry of one row of the hyperparameter table, in float64, in the column order of the
// telemetry table: the sums of squares of the gradients, of the weights after the step and of the
// updates, and the number of non-finite gradients.
struct Telemetry {
  double grads, weights, updates, nonfinite;
};
constexpr int kTelemetryWidth = 4;

// The arguments of one step besides the plan (StepArgs of onepass/engine/backends/base.py).
struct StepArgs {
  const float* hyper;       // the hyperparameter table, kHyperWidth floats per row
  const int64_t* counters;  // seed and step number of each row; step number 0 skips the row
  Telemetry* telemetry;     // one element per row, written by the step; null measures nothing
  bool zero_grads;          // sets every gradient to zero, also those of skipped rows
};
// Bits of the argument `switches` of the op `run`.
enum StepSwitch : int64_t { kZeroGrads = 1, kAllSwitches = 2 };

// One parameter with its gradient, states, average and record of changes. Elements are counted in
// memory order.
struct Entry {
  Stored param;
  void* grad;
  Stored states[kMaxStates];
  float* ema;  // the exponential moving average of the weight, or null
  // The record of changed weights, or null: bit i % 32 of word i / 32 is set when the step changes
  // the stored bits of element i of param.data. Bits are never cleared by a step.
  uint32_t* changed;
  int64_t numel;
  int64_t first;  // index of the first element in the unsharded tensor; selects the random bits
  int64_t param_id;
  int32_t row;  // row of the hyperparameter table
  uint16_t rule, flags;
  Format param_format, grad_format, state_formats[kMaxStates];
  Kind kinds[kMaxStates];
  uint8_t order[kMaxStates];  // in which states are decoded and encoded; see front_state
  uint8_t slots;              // bit k: the rule has state k

  bool has(int k) const { return slots >> k & 1; }
};

}  // namespace onepass
