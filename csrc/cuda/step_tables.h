// What the host hands to the kernels that come before a sweep.
#pragma once

#include "../verdict.h"

namespace onepass::cuda {

// What a verdict is made from; each pointer may be null (csrc/verdict.h).
struct Judged {
  const double* found;
  const float *grad_scale, *found_inf;
  double max_norm;  // negative for none
  bool largest, skip_nonfinite;
};

// The tables of onepass/engine/hyper_table.py.
struct Rows {
  const Options* options;
  float *steps, *fresh, *scalar_states;  // of one tensor; the last [scalar states, rows]
  float* hyper;
  int64_t* counters;
  const Verdict* verdict;  // null: nothing was asked
  int64_t count;
};

}  // namespace onepass::cuda
