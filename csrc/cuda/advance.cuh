// The kernels that run before a sweep: judge_step decides on the step, and advance_rows derives the
// scalars of its rows. Each runs as a single block, because there are few rows. They keep these
// numbers on the device, so nothing waits for the host.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "../rules/table.h"
#include "step_tables.h"
#include "tuning.h"

namespace onepass::cuda {

// Writes the verdict on a step (csrc/verdict.h).
__global__ void __launch_bounds__(kTuning.threads) judge_step(Judged of, Verdict* verdict) {
  if (threadIdx.x == 0)
    *verdict = judge(
        of.found, of.grad_scale, of.found_inf, of.max_norm, of.largest, of.skip_nonfinite,
        verdict->skipped);
}

// Writes one row of the hyperparameter table; factor is that of the verdict.
template <class Hyper>
__device__ __forceinline__ void write_row(const Options& o, double factor, Hyper made, float* row) {
  constexpr int kScalars = sizeof(Hyper) / sizeof(float);
  float scalars[kScalars];
  memcpy(scalars, &made, sizeof made);
  row[0] = rounded(o.sign * factor);
#pragma unroll
  for (int i = 1; i < kEmaDecay; ++i) row[i] = i <= kScalars ? scalars[(i - 1) % kScalars] : 0.0f;
  row[kEmaDecay] = rounded(o.ema_decay);
  row[kEmaDecay + 1] = rounded(1.0 - o.ema_decay);
}

// Counts the step of row r and derives its scalars.
template <class Rule>
__device__ __forceinline__ void advance_row(const Rows& rows, int64_t r, double factor) {
  const Options o = rows.options[r];
  StepOf step{static_cast<int64_t>(rows.steps[r]) + 1, rows.fresh[r] != 0.0f, {}};
  if constexpr (Rule::kScalarStates > 0) {
    for (int k = 0; k < Rule::kScalarStates; ++k)
      step.scalar_states[k] = static_cast<double>(rows.scalar_states[k * rows.count + r]);
    Rule::advance(o, step.number, step.scalar_states);
    for (int k = 0; k < Rule::kScalarStates; ++k)
      rows.scalar_states[k * rows.count + r] = rounded(step.scalar_states[k]);
  }
  write_row(o, factor, Rule::derive(o, step), rows.hyper + r * kHyperWidth);
  rows.counters[2 * r + 1] = step.number;
  rows.steps[r] = rows.steps[r] + 1.0f;
  rows.fresh[r] = 0.0f;
}

// Advances every row, or sets its step number to 0 if the verdict skips the step.
__global__ void __launch_bounds__(kTuning.threads) advance_rows(int rule, Rows rows) {
  const bool skip = rows.verdict && rows.verdict->skip != 0.0;
  const double factor = rows.verdict ? rows.verdict->factor : 1.0;
  for (int64_t r = threadIdx.x; r < rows.count; r += kTuning.threads) {
    if (skip) {
      rows.counters[2 * r + 1] = 0;
      continue;
    }
    switch (rule) {
#define ONEPASS_ADVANCE(CODE, RULE, ARG)   \
  case CODE:                               \
    advance_row<RULE<0>>(rows, r, factor); \
    break;
      ONEPASS_FOR_EACH_RULE(ONEPASS_ADVANCE, )
#undef ONEPASS_ADVANCE
    }
  }
}

}  // namespace onepass::cuda
