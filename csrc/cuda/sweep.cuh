// The CUDA sweep: a block takes a chunk, each of its warps 256 elements at a time: read everything,
// decode, rule, encode, write. It knows neither algorithms nor formats.
#pragma once

#include <cstring>
#include <type_traits>

#include "codecs.cuh"

namespace onepass::cuda {

// The formats of a chunk, known when the kernel is compiled. Any is what every chunk of a mixed
// list says for itself; the code below is the same, with a branch that a whole block takes.
template <Format Param, Format Grad, Format Held>
struct Fixed {
  // 16 bytes of the widest tensor at once, and of a list of fp32 two such vectors.
  static constexpr bool kWide = bits_of(Param) == 32 || bits_of(Grad) == 32 ||
                                bits_of(Held) == 32 || companion_bits_of(Param) == 32;
  static constexpr int kVector = kWide ? 4 : 8;
  static constexpr bool kDraws = is_stochastic(Param) || is_stochastic(Held);

  ONEPASS_HD explicit Fixed(const Chunk&) {}
  template <class Work>
  ONEPASS_HD void param(const Work& work) const {
    work(Tag<Param>{});
  }
  template <class Work>
  ONEPASS_HD void grad(const Work& work) const {
    work(Tag<Grad>{});
  }
  template <class Work>
  ONEPASS_HD void held(const Work& work) const {
    work(Tag<Held>{});
  }
};

struct Any {
  static constexpr int kVector = 4;
  static constexpr bool kDraws = true;
  Format param_, grad_, held_;

  ONEPASS_HD explicit Any(const Chunk& chunk)
      : param_(chunk.param_format), grad_(chunk.grad_format), held_(chunk.state_format) {}

#define ONEPASS_CASE(NAME) \
  case Format::NAME:       \
    return work(Tag<Format::NAME>{});
  template <class Work>
  ONEPASS_HD void param(const Work& work) const {
    switch (param_) {
      ONEPASS_CASE(kFp32)
      ONEPASS_CASE(kBf16)
      ONEPASS_CASE(kFp16)
      ONEPASS_CASE(kBf16Stochastic)
      ONEPASS_CASE(kFp16Stochastic)
      ONEPASS_CASE(kKahanBf16)
      ONEPASS_CASE(kKahanFp16)
      ONEPASS_CASE(kMasterBf16)
      ONEPASS_CASE(kMasterFp16)
      ONEPASS_CASE(kSplit16)
      ONEPASS_CASE(kSplit8)
      default:
        return;
    }
  }
  template <class Work>
  ONEPASS_HD void grad(const Work& work) const {
    switch (grad_) {
      ONEPASS_CASE(kFp32)
      ONEPASS_CASE(kBf16)
      ONEPASS_CASE(kFp16)
      default:
        return;
    }
  }
  template <class Work>
  ONEPASS_HD void held(const Work& work) const {
    switch (held_) {
      ONEPASS_CASE(kFp32)
      ONEPASS_CASE(kBf16Stochastic)
      ONEPASS_CASE(kMx8)
      ONEPASS_CASE(kMx4)
      ONEPASS_CASE(kDynamic8)
      default:
        return;
    }
  }
#undef ONEPASS_CASE
};

// The flags of a rule, likewise.
template <template <unsigned> class Rule, unsigned Flags>
struct FixedRule {
  using Sample = Rule<Flags>;  // whose kinds of states are those of every flag
  ONEPASS_HD explicit FixedRule(const Chunk&) {}
  ONEPASS_HD static constexpr bool has(int slot) { return Rule<Flags>::kSlots >> slot & 1; }
  template <class Work>
  ONEPASS_HD void with(const Work& work) const {
    work(Rule<Flags>{});
  }
};

template <template <unsigned> class Rule>
struct AnyRule {
  using Sample = Rule<0>;
  unsigned flags_;
  ONEPASS_HD explicit AnyRule(const Chunk& chunk) : flags_(chunk.flags) {}
  ONEPASS_HD bool has(int slot) const {
    unsigned slots = 0;
    with([&](auto rule) { slots = decltype(rule)::kSlots; });
    return slots >> slot & 1;
  }
  template <class Work>
  ONEPASS_HD void with(const Work& work) const {
    from<0>(work);
  }

 private:
  template <unsigned Flags, class Work>
  ONEPASS_HD void from(const Work& work) const {
    if constexpr (Flags < kMaxFlags) {
      if constexpr (Rule<Flags>::kValid) {
        if (flags_ == Flags) return work(Rule<Flags>{});
      }
      from<Flags + 1>(work);
    }
  }
};

template <class Work>
__device__ __forceinline__ void for_each_slot(const Work& work) {
  work(std::integral_constant<int, 0>{});
  work(std::integral_constant<int, 1>{});
  work(std::integral_constant<int, 2>{});
}

// The slots with the first second moment in front, which mx4's other states depend on.
template <class Rule, class Work>
__device__ __forceinline__ void for_each_slot_in_order(const Work& work) {
  constexpr unsigned kSecond = Rule::kSecond;
  constexpr int kFront = kSecond & 1 ? 0 : kSecond & 2 ? 1 : kSecond & 4 ? 2 : 0;
  work(std::integral_constant<int, kFront>{});
  work(std::integral_constant<int, kFront == 0 ? 1 : 0>{});
  work(std::integral_constant<int, kFront == 2 ? 1 : 2>{});
}

// 256 elements of a chunk, by one warp. offset: of the first of them; Full as in Codes.
template <bool Full, class Rules, class Formats>
__device__ __forceinline__ void sweep_warp(
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
  for_each_slot([&](auto slot) {
    constexpr int k = decltype(slot)::value;
    if (!rules.has(k)) return;
    formats.held([&](auto format) {
      constexpr Format F = decltype(format)::value;
      StateCodec<F, kind_in<Sample, k>(F), kVector>::template load<Full>(
          chunk.states[k], offset, lanes, states[k]);
    });
  });

  // After every read has been asked for, which the compiler does not move over a write.
  if (zero_grads) {
    formats.grad([&](auto format) {
      constexpr int kBits = bits_of(decltype(format)::value);
      const Raw zeros = {};
      Codes<kBits, kVector>::template store<Full>(at(grad_at, kBits), lanes, zeros);
    });
  }

  float param[kElements], grad[kElements], values[kMaxStates][kElements] = {}, roots[kElements];
  formats.param([&](auto format) {
    constexpr Format F = decltype(format)::value;
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      uint32_t companion = 0;
      if constexpr (companion_bits_of(F) > 0)
        companion = Codes<companion_bits_of(F), kVector>::get(companions, j);
      param[j] = decode_one<F>(Codes<bits_of(F), kVector>::get(param_codes, j), companion);
    }
  });
  formats.grad([&](auto format) {
    constexpr Format F = decltype(format)::value;
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      grad[j] = row[0] * decode_one<F>(Codes<bits_of(F), kVector>::get(grad_codes, j), 0);
  });
  for_each_slot_in_order<Sample>([&](auto slot) {
    constexpr int k = decltype(slot)::value;
    if (!rules.has(k)) return;
    formats.held([&](auto format) {
      constexpr Format F = decltype(format)::value;
      StateCodec<F, kind_in<Sample, k>(F), kVector>::decode(states[k], values[k], roots);
    });
  });

  rules.with([&](auto rule) {
    using Rule = decltype(rule);
    typename Rule::Hyper hyper;
    static_assert(sizeof hyper <= (kHyperWidth - 1) * sizeof(float), "row too narrow");
    memcpy(&hyper, row + 1, sizeof hyper);
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      Rule::update(hyper, param[j], grad[j], values[0][j], values[1][j], values[2][j]);
  });

  Random random = keys;
  random.low += static_cast<uint32_t>(offset);
  formats.param([&](auto format) {
    constexpr Format F = decltype(format)::value;
    using C = Codes<bits_of(F), kVector>;
    using Companions = Codes<companion_bits_of(F) ? companion_bits_of(F) : 32, kVector>;
    C::clear(param_codes);
    Companions::clear(companions);
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const auto draw = [&] { return random.draw(weight_use(F), lanes.at(j)); };
      const Pair pair = encode_one<F>(param[j], draw);
      C::put(param_codes, j, pair.code);
      Companions::put(companions, j, pair.companion);
    }
    C::template store<Full>(at(chunk.param.data, bits_of(F)), lanes, param_codes);
    if constexpr (companion_bits_of(F) > 0)
      Companions::template store<Full>(
          at(chunk.param.extra, companion_bits_of(F)), lanes, companions);
  });
  for_each_slot_in_order<Sample>([&](auto slot) {
    constexpr int k = decltype(slot)::value;
    if (!rules.has(k)) return;
    formats.held([&](auto format) {
      using Codec =
          StateCodec<decltype(format)::value, kind_in<Sample, k>(decltype(format)::value), kVector>;
      Codec::template encode<Full>(values[k], random, k, lanes, states[k], roots);
      Codec::template store<Full>(chunk.states[k], offset, lanes, states[k]);
    });
  });
}

// By a whole block; a gradient starts and ends at an even address.
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

template <class Rules, class Formats>
__device__ __forceinline__ void sweep_chunk(const Tables& tables) {
  // A copy: for all that the compiler knows, writes to a tensor could change the table. In shared
  // memory, for its addresses would take up to a third of the registers.
  __shared__ Chunk chunk;
  constexpr int kWords = sizeof(Chunk) / sizeof(uint32_t);
  const auto* from = reinterpret_cast<const uint32_t*>(tables.chunks + blockIdx.x);
  if (threadIdx.x < kWords) reinterpret_cast<uint32_t*>(&chunk)[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  const Rules rules(chunk);
  const Formats formats(chunk);
  const char* grad = static_cast<const char*>(tables.grads[chunk.entry]);
  formats.grad([&](auto format) { grad += chunk.start * bits_of(decltype(format)::value) / 8; });
  float row[kHyperWidth];
#pragma unroll
  for (int i = 0; i < kHyperWidth; ++i)
    row[i] = tables.hyper[static_cast<int64_t>(chunk.row) * kHyperWidth + i];
  const int64_t* counters = tables.counters + static_cast<int64_t>(chunk.row) * 2;
  if (counters[1] == 0) {
    if (tables.zero_grads)
      formats.grad([&](auto format) {
        zero_bytes(const_cast<char*>(grad), chunk.count * (bits_of(decltype(format)::value) / 8));
      });
    return;
  }
  Random keys{};
  if (Formats::kDraws) {
    const uint64_t stream = random_stream(
        static_cast<uint64_t>(counters[0]), static_cast<uint64_t>(counters[1]),
        static_cast<uint64_t>(chunk.param_id));
    const uint32_t high = static_cast<uint32_t>(chunk.index >> 32);
    keys = {
        {random_key(stream, high, 0), random_key(stream, high, 1)},
        static_cast<uint32_t>(chunk.index)};
  }
  uintptr_t addresses = reinterpret_cast<uintptr_t>(grad) |
                        reinterpret_cast<uintptr_t>(chunk.param.data) |
                        reinterpret_cast<uintptr_t>(chunk.param.extra);
  for_each_slot([&](auto slot) {
    if (rules.has(slot)) addresses |= reinterpret_cast<uintptr_t>(chunk.states[slot].data);
  });
  const bool aligned = addresses % 16 == 0;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll 1
  for (int offset = warp * kWarpElements; offset < chunk.count;
       offset += kTuning.threads * kElements) {
    if (aligned && offset + kWarpElements <= chunk.count)
      sweep_warp<true>(rules, formats, chunk, grad, row, keys, tables.zero_grads, offset);
    else
      sweep_warp<false>(rules, formats, chunk, grad, row, keys, tables.zero_grads, offset);
  }
}

// One combination of rule, flags and formats: a list that has no other.
template <template <unsigned> class Rule, unsigned Flags, class Formats>
__global__ void __launch_bounds__(kTuning.threads, kTuning.blocks_per_sm)
    sweep_fixed(Tables tables) {
  sweep_chunk<FixedRule<Rule, Flags>, Formats>(tables);
}

// Any formats, each chunk its own, of a rule whose flags are all one.
template <template <unsigned> class Rule, unsigned Flags>
__global__ void __launch_bounds__(kTuning.threads)  // as many registers as it takes not to spill
    sweep_formats(Tables tables) {
  sweep_chunk<FixedRule<Rule, Flags>, Any>(tables);
}

// Any formats and flags. Not rationed: three states in any format do not fit into the registers
// that two blocks leave each other.
template <template <unsigned> class Rule>
__global__ void __launch_bounds__(kTuning.threads) sweep_any(Tables tables) {
  sweep_chunk<AnyRule<Rule>, Any>(tables);
}

}  // namespace onepass::cuda
