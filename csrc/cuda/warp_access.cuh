// How a warp reads and writes its 256 elements of all tensors of a chunk.
#pragma once

#include "dispatch.cuh"

namespace onepass::cuda {

// The addresses of the elements of a thread in each tensor of a chunk.
struct Places {
  Stored param;
  void* grad;
  Stored states[kMaxStates];
};

// The addresses of a thread. Source is Memory or Ring::Source; Near is that of offset_by, for
// addresses in global memory.
template <bool Near, class Rules, class Formats, class Source>
__device__ __forceinline__ Places places_of(
    const Rules& rules, const Formats& formats, const Source& source,
    const Lanes<Formats::kVector>& lanes) {
  constexpr int kVector = Formats::kVector;
  constexpr bool kNear = Near && !Source::kShared;
  using Sample = typename Rules::Sample;
  const int offset = source.offset;
  Places to = {};
  formats.param([&](auto format) {
    constexpr Format F = decltype(format)::value;
    constexpr int kCompanion = companion_bits_of(F);
    const Stored& base = source.param();
    to.param.data = Codes<bits_of(F), kVector>::template address<kNear>(base.data, offset, lanes);
    if constexpr (kCompanion > 0)
      to.param.extra =
          Codes<kCompanion, kVector>::template address<kNear>(base.extra, offset, lanes);
  });
  formats.grad([&](auto format) {
    constexpr int kBits = bits_of(decltype(format)::value);
    to.grad = Codes<kBits, kVector>::template address<kNear>(source.grad(), offset, lanes);
  });
  for_each_slot<Sample::kStates>([&](auto slot) {
    constexpr int k = decltype(slot)::value;
    if (!rules.has(k)) return;
    formats.held([&](auto format) {
      constexpr Format F = format_in<Sample, k>(decltype(format)::value);
      to.states[k] = StateCodec<F, kind_in<Sample, k>(F), kVector>::template place<kNear>(
          source.template state<k>(), offset, lanes);
    });
  });
  return to;
}

// The data of a warp, as in memory.
template <int Vector>
struct Loaded {
  Raw param, companions, grad;
  State<Vector> states[kMaxStates];
};

// Loads 256 elements. Full and Shared are those of Codes::load.
template <bool Full, bool Shared, class Rules, class Formats>
__device__ __forceinline__ void load_warp(
    const Rules& rules, const Formats& formats, const Places& from,
    const Lanes<Formats::kVector>& lanes, Loaded<Formats::kVector>& to) {
  constexpr int kVector = Formats::kVector;
  using Sample = typename Rules::Sample;
  formats.param([&](auto format) {
    constexpr Format F = decltype(format)::value;
    constexpr int kCompanion = companion_bits_of(F);
    Codes<bits_of(F), kVector>::template load<Full, Shared>(from.param.data, lanes, to.param);
    if constexpr (kCompanion > 0)
      Codes<kCompanion, kVector>::template load<Full, Shared>(
          from.param.extra, lanes, to.companions);
  });
  formats.grad([&](auto format) {
    constexpr int kBits = bits_of(decltype(format)::value);
    Codes<kBits, kVector>::template load<Full, Shared>(from.grad, lanes, to.grad);
  });
  for_each_slot<Sample::kStates>([&](auto slot) {
    constexpr int k = decltype(slot)::value;
    if (!rules.has(k)) return;
    formats.held([&](auto format) {
      constexpr Format F = format_in<Sample, k>(decltype(format)::value);
      StateCodec<F, kind_in<Sample, k>(F), kVector>::template load<Full, Shared>(
          from.states[k], lanes, to.states[k]);
    });
  });
}

// Prefetches what load_warp<true> reads Ahead elements later.
template <int Ahead, class Rules, class Formats>
__device__ __forceinline__ void fetch_warp(
    const Rules& rules, const Formats& formats, const Places& from) {
  constexpr int kVector = Formats::kVector;
  using Sample = typename Rules::Sample;
  formats.param([&](auto format) {
    if constexpr (!Sample::kReadsWeight) return;
    constexpr Format F = decltype(format)::value;
    constexpr int kCompanion = companion_bits_of(F);
    Codes<bits_of(F), kVector>::template fetch<Ahead>(from.param.data);
    if constexpr (kCompanion > 0)
      Codes<kCompanion, kVector>::template fetch<Ahead>(from.param.extra);
  });
  formats.grad([&](auto format) {
    constexpr int kBits = bits_of(decltype(format)::value);
    Codes<kBits, kVector>::template fetch<Ahead>(from.grad);
  });
  for_each_slot<Sample::kStates>([&](auto slot) {
    constexpr int k = decltype(slot)::value;
    if (!rules.has(k)) return;
    formats.held([&](auto format) {
      constexpr Format F = format_in<Sample, k>(decltype(format)::value);
      StateCodec<F, kind_in<Sample, k>(F), kVector>::template fetch<Ahead>(from.states[k]);
    });
  });
}

// Writes the new codes of 256 elements, and zeroes their gradients if zero_grads is set. Full is
// that of Codes::load.
template <bool Full, class Rules, class Formats>
__device__ __forceinline__ void store_warp(
    const Rules& rules, const Formats& formats, const Places& to, bool zero_grads,
    const Lanes<Formats::kVector>& lanes, const Loaded<Formats::kVector>& loaded) {
  constexpr int kVector = Formats::kVector;
  using Sample = typename Rules::Sample;
  formats.param([&](auto format) {
    constexpr Format F = decltype(format)::value;
    constexpr int kCompanion = companion_bits_of(F);
    Codes<bits_of(F), kVector>::template store<Full>(to.param.data, lanes, loaded.param);
    if constexpr (kCompanion > 0)
      Codes<kCompanion, kVector>::template store<Full>(to.param.extra, lanes, loaded.companions);
  });
  for_each_slot<Sample::kStates>([&](auto slot) {
    constexpr int k = decltype(slot)::value;
    if (!rules.has(k)) return;
    formats.held([&](auto format) {
      constexpr Format F = format_in<Sample, k>(decltype(format)::value);
      StateCodec<F, kind_in<Sample, k>(F), kVector>::template store<Full>(
          to.states[k], lanes, loaded.states[k]);
    });
  });
  // Gradients are zeroed last: writing to memory that is still being read doubles the time of the
  // sweep.
  if (zero_grads) {
    formats.grad([&](auto format) {
      constexpr int kBits = bits_of(decltype(format)::value);
      const Raw zeros = {};
      Codes<kBits, kVector>::template store<Full>(to.grad, lanes, zeros);
    });
  }
}

// Reads a chunk from global memory, and prefetches what the warp reads in the next round.
template <class Rules, class Formats>
struct Memory {
  static constexpr bool kShared = false;
  const Rules& rules;
  const Formats& formats;
  const Chunk& chunk;
  const void* grad_at;
  int offset;  // of the elements of the warp in the chunk

  __device__ __forceinline__ const Stored& param() const { return chunk.param; }
  __device__ __forceinline__ const void* grad() const { return grad_at; }
  template <int Slot>
  __device__ __forceinline__ const Stored& state() const {
    return chunk.states[Slot];
  }
  // Called when the loads from these addresses have been issued.
  template <bool Full>
  __device__ __forceinline__ void loaded(const Places& from) const {
    if constexpr (Full) {
      constexpr int kNext = Formats::kThreads * kElements;
      if (Formats::kFetch && offset + kNext + kWarpElements <= chunk.count)
        fetch_warp<kNext>(rules, formats, from);
      // Without it, ptxas moves the prefetches, and some of the loads, behind most of the
      // arithmetic.
      __syncwarp();
    }
  }
};

}  // namespace onepass::cuda
