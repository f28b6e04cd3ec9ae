// What one instruction set offers: the rules and formats over a tile of fp32 values in L1. They
// are compiled apart and meet in sweep.cpp through these tables, so that they add, not multiply.
#pragma once

#include "../entry.h"

namespace onepass::cpu {

// Where the random bits of a tile come from: the keys of each word of its elements, and the lower
// half of the first element's index, which does not wrap inside a tile.
struct TileRandom {
  RandomKey keys[kRandomWords];
  uint32_t low;
};

// Elements of an fp32 tile: five of them (weight, gradient, three states) are 5 KiB of L1. Measured
// on AVX-512, two cores, 2026-11: 256 is the fastest of 64 to 2048. dynamic8's blocks are tiles.
constexpr int kTile = kDynamicBlock;

// Applies a rule to n elements. row is the group's row of the hyperparameter table; states has an
// entry for each slot that the rule has.
using RuleFn = void (*)(
    const float* row, int n, const Stored& param, const void* grad, const Stored* states,
    const TileRandom& random);
// Reads elements [first, first + n). roots is what mx4 measures first moments in: written with the
// rule's first second moment, read with a relative one.
using DecodeFn = void (*)(const Stored& src, int64_t first, int n, float* tile, float* roots);
// Writes them. use says which 16 random bits: the slot of a state, or weight_use.
using EncodeFn = void (*)(
    const float* tile, int64_t first, int n, const Stored& dst, const TileRandom& random, int use,
    float* roots);

// Formats of weight, gradient and states whose update has a kernel of its own, which works on the
// tensors as they are, without tiles: the division and root leave the other units idle for just as
// long as converting takes. step is what n must be a multiple of.
struct Direct {
  Format weight, grad, state;
  int step;
  RuleFn rules[kRules][kFlagSets];  // null where the generic tiles serve
};
constexpr int kDirect = 7;

// What a norm needs to know of some gradients.
struct Norm {
  double squares;     // their sum
  double largest;     // magnitude; NaN is passed over
  int64_t nonfinite;  // infinities and NaNs
};
// Adds n elements of the gradient at src.
using NormFn = void (*)(const void* src, int64_t n, Norm* norm);

// Weights and gradients: the first of the formats, as torch made them.
constexpr int kNativeFormats = 3;

// Moves the average of a weight towards it; row as for a rule.
using AverageFn = void (*)(const float* row, const float* param, int n, float* ema);
// Adds what n elements have to the telemetry of their row.
using MeasureFn =
    void (*)(const float* grad, const float* before, const float* after, int n, Telemetry* into);

struct Kernels {
  Direct direct[kDirect];  // the first is all fp32, which tiles are as well
  DecodeFn decode[kFormats][kKinds];
  EncodeFn encode[kFormats][kKinds];
  NormFn norm[kNativeFormats];
  AverageFn average;
  MeasureFn measure;
};

extern const Kernels kKernelsPlain;
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;

}  // namespace onepass::cpu
