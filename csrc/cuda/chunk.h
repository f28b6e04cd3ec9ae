// The tables that the host passes to the kernels.
#pragma once

#include "../entry.h"

namespace onepass::cuda {

// A contiguous part of one parameter, which one block updates. The addresses are those of the first
// element of the chunk.
struct alignas(16) Chunk {
  Stored param;
  Stored states[kMaxStates];
  float* average;     // of the weights, or null
  uint32_t* changed;  // the word of the record of changes with the first element, or null
  int64_t start;      // position of the first element in the parameter and gradient
  uint64_t index;     // its index in the unsharded parameter; selects the random bits
  int64_t param_id;   // selects the random bits too
  int32_t entry;      // row of the gradient table
  int32_t row;        // row of the hyperparameter and counter tables
  int32_t count;      // number of elements; index + count crosses no multiple of 2^32
  uint8_t flags;      // the flags of the rule
  Format param_format, grad_format, state_format;
};

// The arguments of a sweep kernel.
struct Tables {
  const Chunk* chunks;
  const void* const* grads;  // addresses of whole gradients, which change from step to step
  StepArgs step;
  Telemetry* partials;  // the telemetry of each chunk; null if step.telemetry is
  int32_t aside;        // whether the list has averages or telemetry: see Aside in extras.cuh
  int32_t extras;       // the same, or the list has records of changes
};

// The chunks of a row of the hyperparameter table: from the first to the one after the last. Chunks
// of other rows may be between them.
struct Span {
  int64_t first, end;
};

// The result of the norm kernels over some gradients.
struct Norm {
  double squares;    // sum of the squares
  double largest;    // largest magnitude; NaN is ignored
  double nonfinite;  // number of infinities and NaNs
};

}  // namespace onepass::cuda
