// The kernels of one instruction set: rules and formats on a tile, a buffer of fp32 values in L1.
// Rules and formats are separate functions, which sweep.cpp combines through these tables. Their
// number is therefore the sum of rules and formats, not the product.
#pragma once

#include "../entry.h"

namespace onepass::cpu {

// The source of the random bits of a tile: one key per random word of an element, and the lower
// half of the index of the first element, which does not wrap inside a tile.
struct TileRandom {
  RandomKey keys[kRandomWords];
  uint32_t low;
};

// The number of elements of a tile. Five fp32 tiles (weight, gradient, three states) take 5 KiB of
// L1. 256 is the fastest of 64 to 2048 elements (AVX-512, two cores, 2026-11). A block of dynamic8
// is one tile.
constexpr int kTile = kDynamicBlock;

// Applies a rule to n elements. row is the row of the hyperparameter table; states has one element
// per slot of the rule. changed is null, or the word of a record of changes whose bit 0 is that of
// the first element; the bits of the elements whose stored weights change are set.
using RuleFn = void (*)(
    const float* row, int n, const Stored& param, const void* grad, const Stored* states,
    const TileRandom& random, uint32_t* changed);
// Decodes elements [first, first + n) into a tile. roots holds the square roots of the first second
// moment: mx4 writes it when it decodes that moment, and reads it when it decodes a relative
// moment.
using DecodeFn = void (*)(const Stored& src, int64_t first, int n, float* tile, float* roots);
// Encodes a tile into elements [first, first + n). use selects the 16 random bits: state_use of a
// slot, or weight_use.
using EncodeFn = void (*)(
    const float* tile, int64_t first, int n, const Stored& dst, const TileRandom& random, int use,
    float* roots);

// A direct kernel: an update for one combination of formats that reads and writes the stored
// tensors itself, without the tiles of sweep.cpp. Its conversions use execution units that the
// division and square root leave idle, so they take no extra time.
struct Direct {
  Format weight, grad, state;
  int step;                         // n must be a multiple of this
  RuleFn rules[kRules][kFlagSets];  // null: use the generic tiles
};
constexpr int kDirect = 7;

// The result of a norm over some gradients.
struct Norm {
  double squares;     // sum of the squares
  double largest;     // largest magnitude; NaN is ignored
  int64_t nonfinite;  // number of infinities and NaNs
};
// Adds n elements of the gradient at src to *norm.
using NormFn = void (*)(const void* src, int64_t n, Norm* norm);

// The first formats in Format, which gradients and ordinary torch weights have: fp32, bf16, fp16.
constexpr int kNativeFormats = 3;

// Updates the exponential moving average of a weight; row is that of the rule.
using AverageFn = void (*)(const float* row, const float* param, int n, float* ema);
// Adds n elements to the telemetry of their row.
using MeasureFn =
    void (*)(const float* grad, const float* before, const float* after, int n, Telemetry* into);

// Sets bit first + i of a record of changes where element i of two arrays of codes differs, for n
// elements of 2 or 4 bytes.
using CompareFn =
    void (*)(const void* before, const void* after, int64_t n, int64_t first, uint32_t* changed);

// All kernels of one instruction set.
struct Kernels {
  Direct direct[kDirect];  // the first is for fp32 tensors; it also applies the rule to tiles
  DecodeFn decode[kFormats][kKinds];
  EncodeFn encode[kFormats][kKinds];
  NormFn norm[kNativeFormats];
  AverageFn average;
  MeasureFn measure;
  CompareFn compare[2];  // of elements of 2 and of 4 bytes
};

extern const Kernels kKernelsPlain;
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;

}  // namespace onepass::cpu
