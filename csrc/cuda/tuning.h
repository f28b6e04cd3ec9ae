// The one table of launch shapes.
#pragma once

// Each value can be overridden by a macro. bench/tuning_variants.py has the variants that are built
// this way and measured beside each other.
#if !defined(ONEPASS_THREADS)
#define ONEPASS_THREADS 128
#endif
#if !defined(ONEPASS_BLOCKS_PER_SM)
#define ONEPASS_BLOCKS_PER_SM 6
#endif
#if !defined(ONEPASS_CHUNK)
#define ONEPASS_CHUNK 16384
#endif
#if !defined(ONEPASS_WIDE_CHUNK)
#define ONEPASS_WIDE_CHUNK 8192
#endif
#if !defined(ONEPASS_PREFETCH)
#define ONEPASS_PREFETCH 1
#endif

namespace onepass::cuda {

struct Tuning {
  int threads;        // of a block
  int blocks_per_sm;  // that registers are rationed for
  int chunk;          // elements of one parameter that a block takes, a multiple of kWarpElements
  int wide_chunk;     // likewise, of those whose states are fp32: about as many bytes
  int norm_blocks_per_sm;
  bool prefetch;  // a warp asks for its next elements while it computes
};

// NVIDIA H200, 2026-11-26 (docs/performance.md has the runs). Six blocks of 128 threads leave a
// thread 80 registers. A chunk is long enough to hide what a block does before its first element,
// and short enough that the last blocks of a sweep do not run alone for long.
constexpr Tuning kTuning{
    ONEPASS_THREADS,      ONEPASS_BLOCKS_PER_SM, ONEPASS_CHUNK, ONEPASS_WIDE_CHUNK, 16,
    ONEPASS_PREFETCH != 0};

// A variant that is built to be measured has the kernels of is_tuned in combinations.h alone, so
// that its build takes seconds. A step of any other list is an error.
#if defined(ONEPASS_TUNING)
constexpr bool kVariant = true;
#else
constexpr bool kVariant = false;
#endif

constexpr int kWarp = 32;
constexpr int kElements = 8;                      // that a thread holds at once
constexpr int kWarpElements = kWarp * kElements;  // 256: every block of a format lies in one warp
static_assert(
    kTuning.chunk % kWarpElements == 0 && kTuning.wide_chunk % kWarpElements == 0,
    "chunks are whole rounds of a warp");
static_assert(kTuning.threads % kWarp == 0 && kTuning.threads >= 128, "blocks are whole warps");

}  // namespace onepass::cuda
