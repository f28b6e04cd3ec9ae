// The CUDA sweep. A block takes one chunk, and each of its warps 256 elements at a time: it reads
// all tensors, decodes them, applies the rule, encodes the results and writes them. This file is
// independent of the rules and formats.
#pragma once

#include <cstring>

#include "bulk_copy.cuh"
#include "dispatch.cuh"
#include "extras.cuh"
#include "ring.cuh"
#include "warp_access.cuh"

namespace onepass::cuda {

// Does the optional work on 256 elements of a chunk, whose new codes are not stored yet. Full is
// that of load_warp.
template <bool Full, class Formats>
__device__ __forceinline__ void finish_warp(
    const Formats& formats, const Tables& tables, const Chunk& chunk, const void* grad_at,
    int offset, const Loaded<Formats::kVector>& loaded) {
  const Lanes<Formats::kVector> lanes{threadIdx.x % kWarp, chunk.count - offset};
  if (chunk.changed) record_changes<Full>(formats, chunk, offset, lanes, loaded.param);
  if (!tables.aside) return;
  formats.param([&](auto format) {
    constexpr Format F = decltype(format)::value;
    if constexpr (is_exact(F)) put_aside<F, Formats>(loaded.param, loaded.companions);
  });
  __syncwarp();
  const float* row = tables.step.hyper + int64_t{chunk.row} * kHyperWidth;
  if (chunk.average) average_warp<Full, Formats>(chunk.average, row + kEmaDecay, lanes, offset);
  if (tables.partials) {
    const Stored grad{const_cast<void*>(grad_at), nullptr};
    measure_warp<Full>(formats, chunk.param, grad, offset, lanes, [](int j, float) {
      return aside<Formats::kThreads>().weights[j / 4][threadIdx.x][j % 4];
    });
  }
  __syncwarp();
}

// Updates 256 elements of a chunk with one warp, from position offset on. Full is that of load_warp
// and Source that of places_of; Math is Quick or Careful of fast_path.cuh. Returns false, and
// writes nothing, if Quick met a special case.
template <bool Full, class Math, class Rules, class Formats, class Source>
__device__ __forceinline__ bool sweep_warp(
    const Rules& rules, const Formats& formats, const Chunk& chunk, const void* grad_at,
    const float* row, const Random& keys, const Tables& tables, AsideSlot<Formats::kThreads> slot,
    int offset, const Source& source) {
  constexpr int kVector = Formats::kVector;
  using Sample = typename Rules::Sample;
  const Lanes<kVector> lanes{threadIdx.x % kWarp, chunk.count - offset};
  const Places from = places_of<Full>(rules, formats, source, lanes);
  Loaded<kVector> loaded;
  load_warp<Full, Source::kShared>(rules, formats, from, lanes, loaded);
  source.template loaded<Full>(from);

  Math math;
  float param[kElements], grad[kElements], values[kMaxStates][kElements] = {}, roots[kElements];
  formats.param([&](auto format) {
    constexpr Format F = decltype(format)::value;
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const uint32_t code = Codes<bits_of(F), kVector>::get(loaded.param, j);
      param[j] = decode_one<F, Math::kQuick>(code, companion_at<F, kVector>(loaded.companions, j));
    }
  });
  formats.grad([&](auto format) {
    constexpr Format F = decltype(format)::value;
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      grad[j] = row[0] * decode_one<F, false>(Codes<bits_of(F), kVector>::get(loaded.grad, j), 0);
  });
  for_each_slot_in_order<Sample>([&](auto slot) {
    constexpr int k = decltype(slot)::value;
    if (!rules.has(k)) return;
    formats.held([&](auto format) {
      constexpr Format F = format_in<Sample, k>(decltype(format)::value);
      StateCodec<F, kind_in<Sample, k>(F), kVector>::decode(
          loaded.states[k], values[k], roots, math);
    });
  });

  rules.with([&](auto rule) {
    using Rule = decltype(rule);
    typename Rule::Hyper hyper;
    memcpy(&hyper, row + 1, sizeof hyper);
    if constexpr (Math::kQuick && kHasPairs && Rule::kPaired) {
#pragma unroll
      for (int j = 0; j < kElements; j += 2) {
        FloatPair p = pair_of(param[j], param[j + 1]), states[kMaxStates];
#pragma unroll
        for (int k = 0; k < kMaxStates; ++k) states[k] = pair_of(values[k][j], values[k][j + 1]);
        update_element<Rule>(
            hyper, p, pair_of(grad[j], grad[j + 1]), states[0], states[1], states[2], states[3],
            math);
        param[j] = first_of(p), param[j + 1] = second_of(p);
#pragma unroll
        for (int k = 0; k < kMaxStates; ++k)
          values[k][j] = first_of(states[k]), values[k][j + 1] = second_of(states[k]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kElements; ++j)
        update_element<Rule>(
            hyper, param[j], grad[j], values[0][j], values[1][j], values[2][j], values[3][j], math);
    }
#pragma unroll
    for (int j = 0; j < kElements; ++j) math.note_finite(param[j]);
  });
  formats.param([&](auto format) {
    if constexpr (!is_exact(decltype(format)::value)) put_aside(param, slot);
  });

  Random random = keys;
  random.low += static_cast<uint32_t>(offset);
  formats.param([&](auto format) {
    constexpr Format F = decltype(format)::value;
    constexpr int kCompanion = companion_bits_of(F);
    const int use = weight_use(F, formats.states_draw());
    uint32_t codes[kElements], beside[kElements];
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const auto draw = [&] { return random.draw(use, lanes.at(j)); };
      const Pair pair = encode_one<F, Math::kQuick>(param[j], draw);
      codes[j] = pair.code, beside[j] = pair.companion;
    }
    Codes<bits_of(F), kVector>::template pack<code_bit(F)>(codes, loaded.param);
    if constexpr (kCompanion > 0)
      Codes<kCompanion, kVector>::template pack<companion_bit(F)>(beside, loaded.companions);
  });
  for_each_slot_in_order<Sample>([&](auto slot) {
    constexpr int k = decltype(slot)::value;
    if (!rules.has(k)) return;
    formats.held([&](auto format) {
      constexpr Format F = format_in<Sample, k>(decltype(format)::value);
      StateCodec<F, kind_in<Sample, k>(F), kVector>::template encode<Full>(
          values[k], random, state_use(k), lanes, loaded.states[k], roots, math);
    });
  });
  // All lanes must take the same path, because lanes share a scale.
  const bool right = !Math::kQuick || __all_sync(~0u, math.right());
  const bool zero_grads = tables.step.zero_grads;
  // One branch for both conditions, and stores of its own for the main path.
  using InMemory = Memory<Rules, Formats>;
  if (Full && (right & (tables.extras == 0))) {
    if constexpr (Source::kShared) {
      const InMemory memory{rules, formats, chunk, grad_at, offset};
      const Places to = places_of<Full>(rules, formats, memory, lanes);
      store_warp<Full>(rules, formats, to, zero_grads, lanes, loaded);
    } else {
      store_warp<Full>(rules, formats, from, zero_grads, lanes, loaded);
    }
    return true;
  }
  if (!right) return false;
  const int hidden = Full ? hidden_from_compiler(offset) : offset;
  if (Full || tables.extras) finish_warp<Full>(formats, tables, chunk, grad_at, hidden, loaded);
  // The addresses are computed again, because keeping them would take registers. Kernels for every
  // format have no limit of registers, but so much code that the compiler would not inline it.
  if constexpr (std::is_same_v<Formats, Any>) {
    store_warp<Full>(rules, formats, from, zero_grads, lanes, loaded);
  } else {
    const InMemory memory{rules, formats, chunk, grad_at, hidden};
    const Places to = places_of<Full>(rules, formats, memory, lanes);
    store_warp<Full>(rules, formats, to, zero_grads, lanes, loaded);
  }
  if (Full) keep_apart();
  return true;
}

// Whether all tensors of a chunk start at multiples of the widest access, and no multiple of 2^32
// is inside them (offset_by).
template <class Formats, class Rules>
__device__ __forceinline__ bool is_plain(const Rules& rules, const Chunk& chunk, const void* grad) {
  bool plain = true;
  uint32_t highest = 0;
  const auto add = [&](const void* start, bool aligned) {
    const uint32_t low = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(start));
    plain = plain && (!aligned || low % Formats::kAlignment == 0);
    highest = max_u32(highest, low);
  };
  add(grad, true);
  add(chunk.param.data, true);
  add(chunk.param.extra, true);
  add(chunk.average, true);
  for_each_slot<Rules::Sample::kStates>([&](auto slot) {
    if (!rules.has(slot)) return;
    add(chunk.states[slot].data, true);
    add(chunk.states[slot].extra, false);
  });
  constexpr uint32_t kMostBytes =
      sizeof(float) * (kTuning.chunk + 2 * Formats::kThreads * kElements);
  return plain && highest < 0u - kMostBytes;
}

// Updates one chunk with one block.
template <class Rules, class Formats>
__device__ __forceinline__ void sweep_chunk(const Tables& tables) {
  using Stages = typename RingOf<Rules, Formats>::type;
  constexpr bool kRing = !std::is_same_v<Stages, NoRing>;
  // A copy of the chunk, because the compiler must assume that stores to tensors change the table.
  // It is in shared memory, because its addresses would take up to a third of the registers.
  __shared__ Chunk copy;
  const Chunk& chunk = *keep_address(&copy);
  constexpr int kWords = sizeof(Chunk) / sizeof(uint32_t);
  const auto* from = reinterpret_cast<const uint32_t*>(tables.chunks + blockIdx.x);
  if (threadIdx.x < kWords) reinterpret_cast<uint32_t*>(&copy)[threadIdx.x] = from[threadIdx.x];
  Stages::init();
  if constexpr (Formats::kMaps) {
    using Sample = typename Rules::Sample;
    for_each_slot<Sample::kStates>([&](auto slot) {
      constexpr int k = decltype(slot)::value;
      constexpr Format F = format_in<Sample, k>(Formats::kHeld);
      if constexpr (Rules::has(k) && F == Format::kDynamic8)
        share_map<
            StateCodec<F, kind_in<Sample, k>(F), Formats::kVector>::kSigned, Formats::kThreads>();
    });
  }
  if (tables.partials) clear_telemetry<Formats::kThreads>();
  __syncthreads();
  const Rules rules(chunk);
  const Formats formats(chunk);
  const char* grad = static_cast<const char*>(tables.grads[chunk.entry]);
  formats.grad([&](auto format) { grad += chunk.start * bits_of(decltype(format)::value) / 8; });
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  Stages ring(chunk, grad);
  if (Formats::kFetch && (warp + 1) * kWarpElements <= chunk.count) {
    const Lanes<Formats::kVector> lanes{threadIdx.x % kWarp, 0};
    const Memory<Rules, Formats> first{rules, formats, chunk, grad, warp * kWarpElements};
    // Not Near: a multiple of 2^32 may be inside a tensor.
    fetch_warp<0>(rules, formats, places_of<false>(rules, formats, first, lanes));
  }
  float row[kHyperWidth];
#pragma unroll
  for (int i = 0; i < kHyperWidth; ++i)
    row[i] = tables.step.hyper[static_cast<int64_t>(chunk.row) * kHyperWidth + i];
  const int64_t* counters = tables.step.counters + static_cast<int64_t>(chunk.row) * 2;
  const bool skipped = counters[1] == 0;
  // One thread per key computes it; in every thread, this would be about 5 % of all instructions.
  constexpr int kDrawn = Rules::Sample::kStates > 3 ? kRandomWords : 2;
  __shared__ RandomKey words[kDrawn];
  if (Formats::kDraws && threadIdx.x < kDrawn) {
    const uint64_t stream = random_stream(
        static_cast<uint64_t>(counters[0]), static_cast<uint64_t>(counters[1]),
        static_cast<uint64_t>(chunk.param_id));
    words[threadIdx.x] = random_key(stream, static_cast<uint32_t>(chunk.index >> 32), threadIdx.x);
  }
  if (Formats::kDraws || kRing) __syncthreads();
  if (skipped) {
    ring.abandon();
    if (tables.step.zero_grads)
      formats.grad([&](auto format) {
        zero_bytes<Formats::kThreads>(
            const_cast<char*>(grad), chunk.count * (bits_of(decltype(format)::value) / 8));
      });
    return;
  }
  Random keys{{}, static_cast<uint32_t>(chunk.index)};
#pragma unroll
  for (int word = 0; word < kDrawn; ++word) keys.keys[word] = words[word];
  bool plain = is_plain<Formats>(rules, chunk, grad);
  rules.with([&](auto rule) {
    using Hyper = typename decltype(rule)::Hyper;
    Hyper hyper;
    memcpy(&hyper, row + 1, sizeof hyper);
    plain = plain && Covered<typename Formats::Math, Hyper>::by(hyper);
  });
  if (!plain) ring.abandon();
  AsideSlot<Formats::kThreads> slot(tables.aside != 0);
  slot.keep();
#pragma unroll 1
  for (int offset = warp * kWarpElements; offset < chunk.count;
       offset += Formats::kThreads * kElements) {
    const auto sweep = [&](auto full, auto math, int from, const auto& source) {
      return sweep_warp<decltype(full)::value, decltype(math)>(
          rules, formats, chunk, grad, row, keys, tables, slot, from, source);
    };
    const auto memory = [&](int from) {
      return Memory<Rules, Formats>{rules, formats, chunk, grad, from};
    };
    using First = typename Formats::Math;
    if constexpr (kRing) {
      if (ring.has_round(offset) && sweep(std::true_type{}, First{}, offset, ring.begin(offset)))
        continue;
    } else {
      const bool full = plain && offset + kWarpElements <= chunk.count;
      if (full && sweep(std::true_type{}, First{}, offset, memory(offset))) continue;
    }
    // The shuffle returns the same offset, but hides this from the compiler, which would otherwise
    // keep all loaded values in registers and spill others. This path accesses memory element by
    // element (Full is false), because a third copy of the code would take as long to compile as
    // the other two.
    const int hidden = __shfl_xor_sync(~0u, offset, 1);
    sweep(std::false_type{}, Careful{}, hidden, memory(hidden));
  }
  if (tables.partials) leave_telemetry<Formats::kThreads>(tables.partials + blockIdx.x);
}

// The kernel for a list with one combination of rule, flags and formats.
template <template <unsigned> class Rule, unsigned Flags, class Formats>
__global__ void __launch_bounds__(Formats::kShape.threads, Formats::kShape.blocks_per_sm)
    sweep_fixed(Tables tables) {
  sweep_chunk<FixedRule<Rule, Flags>, Formats>(tables);
}

// The kernel for a list with one combination of flags, where each chunk has its own formats.
template <template <unsigned> class Rule, unsigned Flags>
__global__ void __launch_bounds__(kTuning.threads)  // no minimum of blocks, to avoid spills
    sweep_formats(Tables tables) {
  sweep_chunk<FixedRule<Rule, Flags>, Any>(tables);
}

// The kernel for a list where each chunk has its own flags and formats. It sets no minimum of
// blocks per multiprocessor: three states in any format need more registers than a second resident
// block would leave.
template <template <unsigned> class Rule>
__global__ void __launch_bounds__(kTuning.threads) sweep_any(Tables tables) {
  sweep_chunk<AnyRule<Rule>, Any>(tables);
}

}  // namespace onepass::cuda
