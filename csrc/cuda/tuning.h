// The one table of launch shapes.
#pragma once

namespace onepass::cuda {

struct Tuning {
  int threads;        // of a block
  int blocks_per_sm;  // that registers are rationed for
  int chunk;          // elements of one parameter that a block takes, a multiple of kWarpElements
  int norm_blocks_per_sm;
};

// Device, date measured: none yet. No GPU has run these; they follow from arithmetic. A thread
// holds eight elements, so two blocks of 256 threads have 64 KiB of an fp32 AdamW step's reads in
// flight on each multiprocessor, about twice what its share of the memory's speed times the
// memory's latency asks for; a chunk is eight rounds of a block, which hide reading its row.
constexpr Tuning kTuning{256, 2, 16384, 8};

constexpr int kWarp = 32;
constexpr int kElements = 8;                      // that a thread holds at once
constexpr int kWarpElements = kWarp * kElements;  // 256: every block of a format lies in one warp
static_assert(kTuning.chunk % kWarpElements == 0, "chunks are whole rounds of a warp");

}  // namespace onepass::cuda
