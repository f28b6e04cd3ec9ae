// The CUDA sweep. A block takes one chunk, and each of its warps 256 elements at a time: it reads
// all tensors, decodes them, applies the rule, encodes the results and writes them. This file is
// independent of the rules and formats.
#pragma once

#include <cstring>

#include "dispatch.cuh"

namespace onepass::cuda {

// Prefetches what sweep_warp<true> reads Ahead elements later.
template <int Ahead, class Rules, class Formats>
__device__ __forceinline__ void fetch_warp(
    const Rules& rules, const Formats& formats, const Chunk& chunk, const void* grad_at,
    int offset) {
  constexpr int kVector = Formats::kVector;
  using Sample = typename Rules::Sample;
  const Lanes<kVector> lanes{static_cast<int>(threadIdx.x) % kWarp, chunk.count - offset};
  const auto at = [&](const void* base, int bits) {
    return static_cast<const char*>(base) + int64_t{offset} * bits / 8;
  };
  formats.param([&](auto format) {
    constexpr Format F = decltype(format)::value;
    constexpr int kCompanion = companion_bits_of(F);
    Codes<bits_of(F), kVector>::template fetch<Ahead>(at(chunk.param.data, bits_of(F)), lanes);
    if constexpr (kCompanion > 0)
      Codes<kCompanion, kVector>::template fetch<Ahead>(at(chunk.param.extra, kCompanion), lanes);
  });
  formats.grad([&](auto format) {
    constexpr int kBits = bits_of(decltype(format)::value);
    Codes<kBits, kVector>::template fetch<Ahead>(at(grad_at, kBits), lanes);
  });
  for_each_slot<Sample::kStates>([&](auto slot) {
    constexpr int k = decltype(slot)::value;
    if (!rules.has(k)) return;
    formats.held([&](auto format) {
      constexpr Format F = format_in<Sample, k>(decltype(format)::value);
      StateCodec<F, kind_in<Sample, k>(F), kVector>::template fetch<Ahead>(
          chunk.states[k], offset, lanes);
    });
  });
}

// Updates 256 elements of a chunk with one warp, from position offset on. Full is that of
// Codes::load; Math is Quick or Careful of fast_path.cuh. Returns false, and writes nothing, if
// Quick met a special case.
template <bool Full, class Math, class Rules, class Formats>
__device__ __forceinline__ bool sweep_warp(
    const Rules& rules, const Formats& formats, const Chunk& chunk, const void* grad_at,
    const float* row, const Random& keys, bool zero_grads, int offset) {
  constexpr int kVector = Formats::kVector;
  using Sample = typename Rules::Sample;
  const Lanes<kVector> lanes{static_cast<int>(threadIdx.x) % kWarp, chunk.count - offset};
  const auto at = [&](const void* base, int bits) {
    return static_cast<char*>(const_cast<void*>(base)) + int64_t{offset} * bits / 8;
  };

  Raw param_codes, companions, grad_codes;
  State<kVector> states[kMaxStates];
  formats.param([&](auto format) {
    constexpr Format F = decltype(format)::value;
    Codes<bits_of(F), kVector>::template load<Full>(
        at(chunk.param.data, bits_of(F)), lanes, param_codes);
    if constexpr (companion_bits_of(F) > 0)
      Codes<companion_bits_of(F), kVector>::template load<Full>(
          at(chunk.param.extra, companion_bits_of(F)), lanes, companions);
  });
  formats.grad([&](auto format) {
    constexpr Format F = decltype(format)::value;
    Codes<bits_of(F), kVector>::template load<Full>(at(grad_at, bits_of(F)), lanes, grad_codes);
  });
  for_each_slot<Sample::kStates>([&](auto slot) {
    constexpr int k = decltype(slot)::value;
    if (!rules.has(k)) return;
    formats.held([&](auto format) {
      constexpr Format F = format_in<Sample, k>(decltype(format)::value);
      StateCodec<F, kind_in<Sample, k>(F), kVector>::template load<Full>(
          chunk.states[k], offset, lanes, states[k]);
    });
  });

  // Prefetch the next elements of the warp, so that their loads hit L2.
  constexpr int kNext = kTuning.threads * kElements;
  if (Full && Formats::kFetch && offset + kNext + kWarpElements <= chunk.count)
    fetch_warp<kNext>(rules, formats, chunk, grad_at, offset);

  Math math;
  float param[kElements], grad[kElements], values[kMaxStates][kElements] = {}, roots[kElements];
  formats.param([&](auto format) {
    constexpr Format F = decltype(format)::value;
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const uint32_t code = Codes<bits_of(F), kVector>::get(param_codes, j);
      param[j] = decode_one<F, Math::kQuick>(code, companion_at<F, kVector>(companions, j));
    }
  });
  formats.grad([&](auto format) {
    constexpr Format F = decltype(format)::value;
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      grad[j] = row[0] * decode_one<F, false>(Codes<bits_of(F), kVector>::get(grad_codes, j), 0);
  });
  for_each_slot_in_order<Sample>([&](auto slot) {
    constexpr int k = decltype(slot)::value;
    if (!rules.has(k)) return;
    formats.held([&](auto format) {
      constexpr Format F = format_in<Sample, k>(decltype(format)::value);
      StateCodec<F, kind_in<Sample, k>(F), kVector>::decode(states[k], values[k], roots, math);
    });
  });

  rules.with([&](auto rule) {
    using Rule = decltype(rule);
    typename Rule::Hyper hyper;
    memcpy(&hyper, row + 1, sizeof hyper);
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      update_element<Rule>(
          hyper, param[j], grad[j], values[0][j], values[1][j], values[2][j], values[3][j], math);
      math.note_finite(param[j]);
    }
  });

  Random random = keys;
  random.low += static_cast<uint32_t>(offset);
  formats.param([&](auto format) {
    constexpr Format F = decltype(format)::value;
    constexpr int kCompanion = companion_bits_of(F);
    uint32_t codes[kElements], beside[kElements];
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const auto draw = [&] { return random.draw(weight_use(F), lanes.at(j)); };
      const Pair pair = encode_one<F, Math::kQuick>(param[j], draw);
      codes[j] = pair.code, beside[j] = pair.companion;
    }
    Codes<bits_of(F), kVector>::template pack<code_bit(F)>(codes, param_codes);
    if constexpr (kCompanion > 0)
      Codes<kCompanion, kVector>::template pack<companion_bit(F)>(beside, companions);
  });
  for_each_slot_in_order<Sample>([&](auto slot) {
    constexpr int k = decltype(slot)::value;
    if (!rules.has(k)) return;
    formats.held([&](auto format) {
      constexpr Format F = format_in<Sample, k>(decltype(format)::value);
      StateCodec<F, kind_in<Sample, k>(F), kVector>::template encode<Full>(
          values[k], random, state_use(k), lanes, states[k], roots, math);
    });
  });
  // All lanes must take the same path, because lanes share a scale.
  if (Math::kQuick && !__all_sync(~0u, math.right())) return false;

  formats.param([&](auto format) {
    constexpr Format F = decltype(format)::value;
    Codes<bits_of(F), kVector>::template store<Full>(
        at(chunk.param.data, bits_of(F)), lanes, param_codes);
    if constexpr (companion_bits_of(F) > 0)
      Codes<companion_bits_of(F), kVector>::template store<Full>(
          at(chunk.param.extra, companion_bits_of(F)), lanes, companions);
  });
  for_each_slot<Sample::kStates>([&](auto slot) {
    constexpr int k = decltype(slot)::value;
    if (!rules.has(k)) return;
    formats.held([&](auto format) {
      constexpr Format F = format_in<Sample, k>(decltype(format)::value);
      StateCodec<F, kind_in<Sample, k>(F), kVector>::template store<Full>(
          chunk.states[k], offset, lanes, states[k]);
    });
  });
  // Gradients are zeroed last: writing to memory that is still being read doubles the time of the
  // sweep.
  if (zero_grads) {
    formats.grad([&](auto format) {
      constexpr int kBits = bits_of(decltype(format)::value);
      const Raw zeros = {};
      Codes<kBits, kVector>::template store<Full>(at(grad_at, kBits), lanes, zeros);
    });
  }
  return true;
}

// Zeroes memory with a whole block. The address and the size must be even, as those of gradients
// are.
__device__ __forceinline__ void zero_bytes(char* to, int bytes) {
  const int wide = reinterpret_cast<uintptr_t>(to) % 16 == 0 ? bytes / 16 * 16 : 0;
  const uint32_t zeros[4] = {};
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x) * 16; at < wide; at += kTuning.threads * 16)
    Access<16>::store(zeros, global(to + at));
#pragma unroll 1
  for (int at = wide + static_cast<int>(threadIdx.x) * 2; at < bytes; at += kTuning.threads * 2)
    Access<2>::store(zeros, global(to + at));
}

// Updates one chunk with one block.
template <class Rules, class Formats>
__device__ __forceinline__ void sweep_chunk(const Tables& tables) {
  // A copy of the chunk, because the compiler must assume that stores to tensors change the table.
  // It is in shared memory, because its addresses would take up to a third of the registers.
  __shared__ Chunk chunk;
  constexpr int kWords = sizeof(Chunk) / sizeof(uint32_t);
  const auto* from = reinterpret_cast<const uint32_t*>(tables.chunks + blockIdx.x);
  if (threadIdx.x < kWords) reinterpret_cast<uint32_t*>(&chunk)[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  const Rules rules(chunk);
  const Formats formats(chunk);
  const char* grad = static_cast<const char*>(tables.grads[chunk.entry]);
  formats.grad([&](auto format) { grad += chunk.start * bits_of(decltype(format)::value) / 8; });
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (Formats::kFetch && (warp + 1) * kWarpElements <= chunk.count)
    fetch_warp<0>(rules, formats, chunk, grad, warp * kWarpElements);
  float row[kHyperWidth];
#pragma unroll
  for (int i = 0; i < kHyperWidth; ++i)
    row[i] = tables.step.hyper[static_cast<int64_t>(chunk.row) * kHyperWidth + i];
  const int64_t* counters = tables.step.counters + static_cast<int64_t>(chunk.row) * 2;
  if (counters[1] == 0) {
    if (tables.step.zero_grads)
      formats.grad([&](auto format) {
        zero_bytes(const_cast<char*>(grad), chunk.count * (bits_of(decltype(format)::value) / 8));
      });
    return;
  }
  // One thread per key computes it; in every thread, this would be about 5 % of all instructions.
  constexpr int kDrawn = Rules::Sample::kStates > 3 ? kRandomWords : 2;
  __shared__ RandomKey words[kDrawn];
  if (Formats::kDraws) {
    if (threadIdx.x < kDrawn) {
      const uint64_t stream = random_stream(
          static_cast<uint64_t>(counters[0]), static_cast<uint64_t>(counters[1]),
          static_cast<uint64_t>(chunk.param_id));
      words[threadIdx.x] =
          random_key(stream, static_cast<uint32_t>(chunk.index >> 32), threadIdx.x);
    }
    __syncthreads();
  }
  Random keys{{}, static_cast<uint32_t>(chunk.index)};
#pragma unroll
  for (int word = 0; word < kDrawn; ++word) keys.keys[word] = words[word];
  uintptr_t addresses = reinterpret_cast<uintptr_t>(grad) |
                        reinterpret_cast<uintptr_t>(chunk.param.data) |
                        reinterpret_cast<uintptr_t>(chunk.param.extra);
  for_each_slot<Rules::Sample::kStates>([&](auto slot) {
    if (rules.has(slot)) addresses |= reinterpret_cast<uintptr_t>(chunk.states[slot].data);
  });
  const bool aligned = addresses % 16 == 0;
#pragma unroll 1
  for (int offset = warp * kWarpElements; offset < chunk.count;
       offset += kTuning.threads * kElements) {
    const auto sweep = [&](auto full, auto math, int from) {
      return sweep_warp<decltype(full)::value, decltype(math)>(
          rules, formats, chunk, grad, row, keys, tables.step.zero_grads, from);
    };
    const bool full = aligned && offset + kWarpElements <= chunk.count;
    using First = std::conditional_t<Formats::kQuick, Quick, Careful>;
    if (full && sweep(std::true_type{}, First{}, offset)) continue;
    // The shuffle returns the same offset, but hides this from the compiler, which would otherwise
    // keep all loaded values in registers and spill others. This path accesses memory element by
    // element (Full is false), because a third copy of the code would take as long to compile as
    // the other two.
    sweep(std::false_type{}, Careful{}, __shfl_xor_sync(~0u, offset, 1));
  }
}

// The kernel for a list with one combination of rule, flags and formats.
template <template <unsigned> class Rule, unsigned Flags, class Formats>
__global__ void __launch_bounds__(kTuning.threads, Formats::kBlocks) sweep_fixed(Tables tables) {
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
