// The one table of launch shapes.
#pragma once

namespace onepass::cuda {

struct Tuning {
  int threads;        // of a block
  int blocks_per_sm;  // that registers are rationed for
  int chunk;          // elements of one parameter that a block takes, a multiple of kWarpElements
  int wide_chunk;     // likewise, of those whose states are fp32: about as many bytes
  int norm_blocks_per_sm;
};

// NVIDIA H200, 2026-11-26 (docs/performance.md has the runs). Six blocks of 128 threads leave a
// thread 80 registers. A chunk is long enough to hide what a block does before its first element,
// and short enough that the last blocks of a sweep do not run alone for long.
constexpr Tuning kTuning{128, 6, 16384, 8192, 16};

constexpr int kWarp = 32;
constexpr int kElements = 8;                      // that a thread holds at once
constexpr int kWarpElements = kWarp * kElements;  // 256: every block of a format lies in one warp
static_assert(
    kTuning.chunk % kWarpElements == 0 && kTuning.wide_chunk % kWarpElements == 0,
    "chunks are whole rounds of a warp");

}  // namespace onepass::cuda
