// The ring of a block: stages in shared memory, into which bulk copies bring the next elements of a
// chunk while the warps compute. It replaces the loads and prefetches of a sweep on compute
// capability 9.0 and later, if kTuning.ring is set.
#pragma once

#include "bulk_copy.cuh"
#include "warp_access.cuh"

namespace onepass::cuda {

// The part of a stage that one tensor fills.
struct Stream {
  const char* from;  // of the first stage of the chunk
  unsigned bytes;    // per stage
  unsigned at;       // position in a stage
};

// A round is the elements that the warps of a block update at once: 256 each. A stage is one or
// more rounds. Whole stages of a chunk come from the ring; the rest of a chunk, and chunks with a
// tensor that does not start at a multiple of 16 bytes, are read from global memory.
//
// Every stage has two barriers: `full` ends a phase when its copies have arrived, and `empty` when
// every warp has read it. The warps refill in turn, so that none has more to do than the others.
// The stage that was read in the round before is refilled first, and then the next stage is read.
template <class Rules, class Formats>
struct Ring {
  using Sample = typename Rules::Sample;
  static constexpr int kWarps = Formats::kThreads / kWarp;
  static constexpr int kRound = Formats::kThreads * kElements;
  // Of all stages: six blocks fit into a multiprocessor of compute capability 9.0.
  static constexpr int kMostBytes = 36 << 10;

  // The parts of a stage: weight, companion, gradient, then the codes and the scales of each state.
  static constexpr int kParts = 3 + 2 * kMaxStates;
  static constexpr Format format_of(int part) {
    if (part < 2) return Formats::kParam;
    return part == 2 ? Formats::kGrad
                     : state_format(Formats::kHeld, Sample::kWeights, (part - 3) / 2);
  }
  static constexpr bool has(int part) {
    if (part >= 3 && !Rules::has((part - 3) / 2)) return false;
    const FormatInfo info = info_of(format_of(part));
    const bool companion = part == 1 && info.block == 1 && info.extra != Dtype::kNone;
    return part == 1 ? companion : part < 3 || part % 2 == 1 || info.block > 1;
  }
  // Bytes of a part, for this number of elements.
  static constexpr int bytes_of_part(int part, int elements) {
    if (!has(part)) return 0;
    const bool extra = part == 1 || (part > 3 && part % 2 == 0);
    return static_cast<int>(
        extra ? extra_bytes_of(format_of(part), elements) : bytes_of(format_of(part), elements));
  }
  // Bytes of the parts before this one.
  static constexpr int bytes_before(int part, int elements) {
    int sum = 0;
    for (int p = 0; p < part; ++p) sum += bytes_of_part(p, elements);
    return sum;
  }
  // The position of a part among those that exist.
  static constexpr int index_of(int part) {
    int index = 0;
    for (int p = 0; p < part; ++p) index += has(p);
    return index;
  }
  static constexpr int kStreams = index_of(kParts);
  static constexpr int kStages = kTuning.ring > 2 &&
                                         kTuning.ring* bytes_before(kParts, kRound) <= kMostBytes
                                     ? kTuning.ring
                                     : 2;
  static constexpr int kRounds = kStages * bytes_before(kParts, 2 * kRound) <= kMostBytes ? 2 : 1;
  static constexpr int kStage = kRounds * kRound;  // elements
  static constexpr int kBytes = bytes_before(kParts, kStage);
  static_assert(kStreams <= kWarp, "each lane copies one part");
  // A block has at most 48 KiB of shared memory unless it asks for more.
  static constexpr bool kFits = kStages * kBytes <= 47 << 10;

  struct Shared {
    alignas(128) char stages[kStages][kBytes];
    Mbarrier full[kStages], empty[kStages];
    Stream streams[kStreams];
  };
  __device__ __forceinline__ static Shared& shared() {
    __shared__ Shared ring;
    return ring;
  }

  Shared& ring;
  int end;     // the position of the chunk where its whole stages end
  int refill;  // the next position of the chunk at which this warp refills a stage

  // Initializes the barriers. A __syncthreads() must follow.
  __device__ __forceinline__ static void init() {
    if (threadIdx.x != 0) return;
    for (int s = 0; s < kStages; ++s) {
      shared().full[s].init(1);
      shared().empty[s].init(kWarps * kRounds);
    }
    fence_async();
  }

  // Starts to copy the first stages. A __syncthreads() must follow, before the first round.
  __device__ __forceinline__ Ring(const Chunk& chunk, const char* grad)
      : ring(*keep_address(&shared())) {
    const unsigned thread = threadIdx.x;
    uintptr_t addresses = 0;
    Stream own{};
    for_each_slot<kParts>([&](auto slot) {
      constexpr int kPart = decltype(slot)::value;
      if constexpr (has(kPart)) {
        const char* from = address_of<kPart>(chunk, grad);
        addresses |= reinterpret_cast<uintptr_t>(from);
        if (thread == index_of(kPart))
          own = {from, bytes_of_part(kPart, kStage), bytes_before(kPart, kStage)};
      }
    });
    end = addresses % 16 == 0 ? chunk.count / kStage * kStage : 0;
    refill = static_cast<int>(thread) / kWarp * (kStage + kWarpElements);
    if (thread < kStreams) ring.streams[thread] = own;
    if (thread >= kWarp) return;
    __syncwarp();
    for (int stage = 0; stage < kStages - 1 && stage * kStage < end; ++stage) issue(stage);
  }

  // Whether the elements from this position of the chunk on come from the ring.
  __device__ __forceinline__ bool has_round(int offset) const { return offset < end; }

  // What a warp reads in one round.
  struct Source {
    static constexpr bool kShared = true;
    const char* stage;
    Mbarrier& empty;
    int offset;  // of the elements of the warp in the stage

    template <int Part>
    __device__ __forceinline__ void* part() const {
      return const_cast<char*>(stage) + bytes_before(Part, kStage);
    }
    __device__ __forceinline__ Stored param() const { return {part<0>(), part<1>()}; }
    __device__ __forceinline__ const void* grad() const { return part<2>(); }
    template <int Slot>
    __device__ __forceinline__ Stored state() const {
      return {part<3 + 2 * Slot>(), part<4 + 2 * Slot>()};
    }
    // Called when the loads have been issued: the warp has read its part of the stage.
    template <bool Full>
    __device__ __forceinline__ void loaded(const Places&) const {
      __syncwarp();
      if (threadIdx.x % kWarp == 0) empty.arrive();
    }
  };

  // Refills the stage that has become free, if it is the turn of this warp, and waits for the
  // elements from this position of the chunk on.
  __device__ __forceinline__ Source begin(int offset) {
    const unsigned stage = static_cast<unsigned>(offset) / kStage, slot = stage % kStages;
    if (offset == refill) {
      const unsigned next = stage + kStages - 1;
      if (next * kStage < static_cast<unsigned>(end)) {
        if (stage > 0) {
          ring.empty[next % kStages].wait((stage - 1) / kStages % 2);
          fence_async();
        }
        issue(next);
      }
      refill += kWarps * kStage;
    }
    ring.full[slot].wait(stage / kStages % 2);
    const unsigned within = static_cast<unsigned>(offset) % kStage;
    return {ring.stages[slot], ring.empty[slot], static_cast<int>(within)};
  }

  // Ends the ring before its first round: waits for the copies that the constructor started.
  __device__ __forceinline__ void abandon() {
    for (int stage = 0; stage < kStages - 1 && stage * kStage < end; ++stage)
      ring.full[stage].wait(0);
    end = 0;
  }

 private:
  template <int Part>
  __device__ __forceinline__ static const char* address_of(const Chunk& chunk, const char* grad) {
    if constexpr (Part == 2) return grad;
    const Stored& of = Part < 2 ? chunk.param : chunk.states[Part < 2 ? 0 : (Part - 3) / 2];
    return static_cast<const char*>(Part == 1 || (Part > 3 && Part % 2 == 0) ? of.extra : of.data);
  }

  // Starts the copies of a stage with the lanes of one warp.
  __device__ __forceinline__ void issue(unsigned stage) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const unsigned slot = stage % kStages;
    Mbarrier& full = ring.full[slot];
    if (lane == 0) full.arrive_expecting(kBytes);
    __syncwarp();
    if (lane < kStreams) {
      const Stream stream = ring.streams[lane];
      copy_bulk(
          ring.stages[slot] + stream.at, stream.from + int64_t{stage} * stream.bytes, stream.bytes,
          full);
    }
  }
};

// In place of a Ring, where a sweep reads global memory.
struct NoRing {
  ONEPASS_HD static void init() {}
  ONEPASS_HD NoRing(const Chunk&, const char*) {}
  ONEPASS_HD static void abandon() {}
};

// The Ring or NoRing of a kernel.
template <class Rules, class Formats, bool = Formats::kRing>
struct RingOf {
  using type = NoRing;
};
template <class Rules, class Formats>
struct RingOf<Rules, Formats, true> {
  using type = std::conditional_t<Ring<Rules, Formats>::kFits, Ring<Rules, Formats>, NoRing>;
};

}  // namespace onepass::cuda
