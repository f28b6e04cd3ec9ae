// The launch shapes of all kernels.
#pragma once

#include "../formats/table.h"

// Each value can be overridden by a macro. bench/tuning_variants.py lists the variants that are
// built this way for comparison. The launch shape is overridden for every format at once.
#if defined(ONEPASS_THREADS)
#define ONEPASS_ONE_SHAPE true
#else
#define ONEPASS_ONE_SHAPE false
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
#if !defined(ONEPASS_TAPER)
#define ONEPASS_TAPER 2
#endif
#if !defined(ONEPASS_PREFETCH)
#define ONEPASS_PREFETCH 1
#endif
#if !defined(ONEPASS_RING)
#define ONEPASS_RING 0
#endif

namespace onepass::cuda {

// A launch shape.
struct Shape {
  int threads;        // threads per block
  int blocks_per_sm;  // the minimum for __launch_bounds__, which limits registers per thread
};

// The parameters of the kernels.
struct Tuning {
  int threads;        // of every kernel, except the sweeps for which shape_of has another shape
  int blocks_per_sm;  // likewise
  int chunk;          // elements per chunk (one chunk per block), a multiple of kWarpElements
  int wide_chunk;     // elements per chunk if the states are fp32; about as many bytes
  int taper;  // waves (all resident blocks) of chunks of a quarter of that, which end a list
  int norm_blocks_per_sm;
  bool prefetch;  // whether a warp prefetches its next elements while it computes
  // Stages of the ring of ring.cuh, which replaces the prefetch on compute capability 9.0 and
  // later; 0: no ring. It has not run on a GPU.
  int ring;
};

// Tuned on NVIDIA H200, 2026-11-26 (docs/performance.md has the runs). Six blocks of 128 threads
// allow 80 registers per thread. A chunk is long enough to amortize the setup of a block, and short
// enough to keep the tail of a sweep, where few blocks are left, short.
constexpr Tuning kTuning{ONEPASS_THREADS,       ONEPASS_BLOCKS_PER_SM, ONEPASS_CHUNK,
                         ONEPASS_WIDE_CHUNK,    ONEPASS_TAPER,         16,
                         ONEPASS_PREFETCH != 0, ONEPASS_RING};
static_assert(kTuning.ring == 0 || kTuning.ring > 1, "a stage is refilled while another is read");

// A tuning variant has only the kernels that is_tuned of combinations.h selects, so that its build
// takes seconds. A step on any other list is an error.
#if defined(ONEPASS_TUNING)
constexpr bool kVariant = true;
#else
constexpr bool kVariant = false;
#endif

// Whether the architecture has the bulk copies of a ring.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasBulkCopies = false;
#else
constexpr bool kHasBulkCopies = true;
#endif

// Bytes of the widest access to global memory. The tests also compile the stand-in with 32.
#if defined(ONEPASS_WIDEST_ACCESS)
constexpr int kWidestAccess = ONEPASS_WIDEST_ACCESS;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kWidestAccess = 32;
#else
constexpr int kWidestAccess = 16;
#endif

constexpr int kWarp = 32;
constexpr int kElements = 8;                      // elements that a thread holds at once
constexpr int kWarpElements = kWarp * kElements;  // 256: every block of a format is in one warp
static_assert(
    kTuning.chunk % (4 * kWarpElements) == 0 && kTuning.wide_chunk % (4 * kWarpElements) == 0,
    "chunks, and quarters of them, are whole rounds of a warp");
static_assert(kTuning.threads % kWarp == 0 && kTuning.threads >= 128, "blocks are whole warps");

// Resident threads per multiprocessor of a sweep with fixed formats, few enough that no register
// spills: a thread has 80 registers with 768 resident threads, 96 with 640 and 128 with 512.
constexpr int resident_threads(Format weight, Format states) {
  const bool mx8 = states == Format::kMx8;
  const int companion = block_of(weight) > 1 ? 0 : static_cast<int>(extra_bytes_of(weight, 1) * 8);
  const bool fp16 = weight == Format::kFp16Stochastic || weight == Format::kMasterFp16;
  const bool ring = kTuning.ring > 0 && kHasBulkCopies;
  const int fewer = (companion == 8 || (mx8 && companion == 32) || fp16) + (mx8 && fp16) +
                    (weight == Format::kFp16 && (mx8 || states == Format::kBf16Stochastic)) +
                    (ring && !mx8 && companion == 16);
  return 768 - 128 * fewer;
}

// The launch shape of a sweep with fixed formats: one row per kind of states. A shape that is not
// that of kTuning is predicted, not measured on a GPU (docs/cuda.md has the reasons).
constexpr Shape shape_of(Format weight, Format states) {
  const int resident = resident_threads(weight, states);
  const int most = resident / kTuning.threads;
  const Shape base = {
      kTuning.threads,
      resident < 768 && most < kTuning.blocks_per_sm ? most : kTuning.blocks_per_sm};
  if (ONEPASS_ONE_SHAPE || kTuning.ring > 0 || resident < 768) return base;
  switch (states) {
    case Format::kFp32:
    case Format::kBf16Stochastic:
    case Format::kDynamic8:  // each block has 26 KiB of maps in shared memory
      return {256, 3};
    default:
      return base;
  }
}

}  // namespace onepass::cuda
