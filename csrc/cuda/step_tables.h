// The arguments of the kernels that run before a sweep.
#pragma once

#include "../verdict.h"

namespace onepass::cuda {

// The inputs of a verdict (csrc/verdict.h); each pointer may be null.
struct Judged {
  const double* found;
  const float *grad_scale, *found_inf;
  double max_norm;  // negative: no clipping
  bool largest, skip_nonfinite;
};

// The tables of onepass/engine/hyper_table.py.
struct Rows {
  const Options* options;
  float *steps, *fresh, *scalar_states;  // parts of the tensor kept; the last [scalar states, rows]
  float* hyper;
  int64_t* counters;
  const Verdict* verdict;  // null: no step is skipped, and the factor is 1
  int64_t count;           // number of rows
};

}  // namespace onepass::cuda
