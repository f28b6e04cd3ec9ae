// The tables that the host passes to the kernels.
#pragma once

#include "../entry.h"

namespace onepass::cuda {

// A contiguous part of one parameter, which one block updates. The addresses are those of the first
// element of the chunk.
struct alignas(16) Chunk {
  Stored param;
  Stored states[kMaxStates];
  int64_t start;     // position of the first element in the parameter and gradient
  uint64_t index;    // its index in the unsharded parameter; selects the random bits
  int64_t param_id;  // selects the random bits too
  int32_t entry;     // row of the gradient table
  int32_t row;       // row of the hyperparameter and counter tables
  int32_t count;     // number of elements; index + count crosses no multiple of 2^32
  uint8_t flags;     // the flags of the rule
  Format param_format, grad_format, state_format;
};

// The arguments of a sweep kernel.
struct Tables {
  const Chunk* chunks;
  const void* const* grads;  // addresses of whole gradients, which change from step to step
  StepArgs step;
};

// The result of the norm kernels over some gradients.
struct Norm {
  double squares;    // sum of the squares
  double largest;    // largest magnitude; NaN is ignored
  double nonfinite;  // number of infinities and NaNs
};

}  // namespace onepass::cuda
