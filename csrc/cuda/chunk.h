// What the host hands to the kernels: the chunk table and the tables beside it.
#pragma once

#include "../entry.h"

namespace onepass::cuda {

// A stretch of one parameter, the work of one block; every address is that of its first element.
struct alignas(16) Chunk {
  Stored param;
  Stored states[kMaxStates];
  int64_t start;     // of the chunk in its parameter and gradient
  uint64_t index;    // of its first element in the whole parameter; keys the random bits
  int64_t param_id;  // likewise
  int32_t entry;     // of the gradient table
  int32_t row;       // of the hyperparameter and counter tables
  int32_t count;     // elements; no chunk crosses a multiple of 2^32 of index
  uint8_t flags;     // of the rule
  Format param_format, grad_format, state_format;
};

struct Tables {
  const Chunk* chunks;
  const void* const* grads;  // addresses of whole gradients, which change from step to step
  StepArgs step;
};

// Sums over some gradients.
struct Norm {
  double squares;
  double largest;    // magnitude; NaN is passed over
  double nonfinite;  // how many infinities and NaNs there are
};

}  // namespace onepass::cuda
