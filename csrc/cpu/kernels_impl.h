// The kernels of one instruction set: included once by each of kernels_{plain,avx2,avx512}.cpp,
// which setup.py compiles with that set's flags. Plain loops over headers that CUDA shares; the
// compiler vectorises them. No other header than ours: an inline function of the standard library
// compiled here could be the copy that the linker keeps for everybody.
#pragma once

#include "../prefetch.h"
#include "extras_impl.h"
#include "formats_impl.h"
#include "kernels.h"
#include "norm_impl.h"
#include "strips_impl.h"

namespace onepass::cpu {
namespace {

template <class Rule>
typename Rule::Hyper load_hyper(const float* row) {
  static_assert(sizeof(typename Rule::Hyper) <= (kEmaDecay - 1) * sizeof(float), "row too narrow");
  typename Rule::Hyper hyper;
  __builtin_memcpy(&hyper, row + 1, sizeof hyper);
  return hyper;
}

// How far ahead prefetching reaches: the hardware's own ends at every page. Loops that only compute
// do it in rounds of kBlock elements, worth 10 % of an fp32 and of a bf16 AdamW step (AVX-512,
// Intel, two cores, 2026-11; 128 and 1024 were the best of 64 to 256 and 512 to 2048). With AVX2
// such a round cost 20 % of an fp32 step, and a smaller one gained nothing (AMD Zen 3, two cores,
// 2026-11); the single lines of prefetch_strip gained 3 to 15 %.
constexpr int kBlock = 128, kAheadBytes = 1024;
#if defined(__AVX512BW__)
constexpr bool kRounds = true;
#else
constexpr bool kRounds = false;
#endif

// Asks for the block that lies kAheadBytes after the one at offset, in each of the rule's streams.
template <unsigned Slots, int Block>
ONEPASS_HD void prefetch(
    int64_t offset, const void* param, const void* grad, const Stored* states) {
  const auto lines = [=](const void* base) {
    prefetch_lines(static_cast<const char*>(base) + offset + kAheadBytes, Block);
  };
  lines(param);
  lines(grad);
  if (Slots & 1) lines(states[0].data);
  if (Slots & 2) lines(states[1].data);
  if (Slots & 4) lines(states[2].data);
}

template <class Rule>
void apply_fp32(
    const float* row, int n, const Stored& param_at, const void* grad_ptr, const Stored* states,
    const TileRandom&) {
  constexpr bool kHas0 = Rule::kSlots & 1, kHas1 = Rule::kSlots & 2, kHas2 = Rule::kSlots & 4;
  const auto hyper = load_hyper<Rule>(row);
  const float grad_scale = row[0];
  auto* __restrict param = static_cast<float*>(param_at.data);
  auto* __restrict grad = static_cast<const float*>(grad_ptr);
  auto* __restrict state0 = static_cast<float*>(states[0].data);
  auto* __restrict state1 = static_cast<float*>(states[1].data);
  auto* __restrict state2 = static_cast<float*>(states[2].data);
  for (int block = 0; block < n; block += kBlock) {
    const int end = n - block < kBlock ? n : block + kBlock;
    if (kRounds && block + kAheadBytes / 4 < n)
      prefetch<Rule::kSlots, kBlock * 4>(int64_t{4} * block, param_at.data, grad_ptr, states);
#pragma omp simd
    for (int i = block; i < end; ++i) {
      float value0 = 0, value1 = 0, value2 = 0;
      if (kHas0) value0 = state0[i];
      if (kHas1) value1 = state1[i];
      if (kHas2) value2 = state2[i];
      Rule::update(hyper, param[i], grad_scale * grad[i], value0, value1, value2);
      if (kHas0) state0[i] = value0;
      if (kHas1) state1[i] = value1;
      if (kHas2) state2[i] = value2;
    }
  }
}

// round_bf16 without its care for NaN. Here a NaN comes from a bf16 or is the processor's default
// one: its lower half is zero, so that no addition carries out of it.
ONEPASS_HD uint32_t nearest(float value) {
  const uint32_t bits = to_bits(value);
  return bits + (0x7FFFu + ((bits >> 16) & 1u));
}
ONEPASS_HD uint32_t dithered(float value, uint32_t random) { return to_bits(value) + random; }

template <class Rule, bool Scaled>
ONEPASS_HD void update_pair(
    const typename Rule::Hyper& hyper, float grad_scale, const TileRandom& random, uint32_t start0,
    uint32_t start1, uint32_t& param, uint32_t grad, uint32_t& state0, uint32_t& state1,
    uint32_t& state2) {
  constexpr bool kHas0 = Rule::kSlots & 1, kHas1 = Rule::kSlots & 2, kHas2 = Rule::kSlots & 4;
  float p = lower(param), s0 = lower(state0), s1 = lower(state1), s2 = lower(state2);
  float q = upper(param), t0 = upper(state0), t1 = upper(state1), t2 = upper(state2);
  Rule::update(hyper, p, Scaled ? grad_scale * lower(grad) : lower(grad), s0, s1, s2);
  Rule::update(hyper, q, Scaled ? grad_scale * upper(grad) : upper(grad), t0, t1, t2);
  param = join(nearest(p), nearest(q));
  if (kHas0 || kHas1) {
    const uint32_t a = random_mix(random.keys[0], start0);
    const uint32_t b = random_mix(random.keys[0], start0 + kWeyl);
    if (kHas0) state0 = join(dithered(s0, a & 0xFFFFu), dithered(t0, b & 0xFFFFu));
    if (kHas1) state1 = join(dithered(s1, a >> 16), dithered(t1, b >> 16));
  }
  if (kHas2) {
    const uint32_t a = random_mix(random.keys[1], start1);
    const uint32_t b = random_mix(random.keys[1], start1 + kWeyl);
    state2 = join(dithered(s2, a & 0xFFFFu), dithered(t2, b & 0xFFFFu));
  }
}

template <class Rule, bool Scaled>
void apply_bf16_scaled(
    const float* row, int n, const Stored& param_at, const void* grad_ptr, const Stored* states,
    const TileRandom& random_ref) {
  const TileRandom random = random_ref;  // a copy: the stores below could alias the original
  constexpr bool kHas0 = Rule::kSlots & 1, kHas1 = Rule::kSlots & 2, kHas2 = Rule::kSlots & 4;
  const auto hyper = load_hyper<Rule>(row);
  const float grad_scale = row[0];
  auto* __restrict param = static_cast<Pair*>(param_at.data);
  auto* __restrict grad = static_cast<const Pair*>(grad_ptr);
  auto* __restrict state0 = static_cast<Pair*>(states[0].data);
  auto* __restrict state1 = static_cast<Pair*>(states[1].data);
  auto* __restrict state2 = static_cast<Pair*>(states[2].data);
  const int pairs = n / 2;
  uint32_t start0 = random_start(random.keys[0], random.low);
  uint32_t start1 = random_start(random.keys[1], random.low);
  for (int block = 0; block < pairs; block += kBlock / 2) {
    const int end = pairs - block < kBlock / 2 ? pairs : block + kBlock / 2;
    if (kRounds && block + kAheadBytes / 4 < pairs)
      prefetch<Rule::kSlots, kBlock * 2>(int64_t{4} * block, param_at.data, grad_ptr, states);
#pragma omp simd linear(start0, start1 : 2 * kWeyl)
    for (int i = block; i < end; ++i) {
      uint32_t value = param[i], value0 = 0, value1 = 0, value2 = 0;
      if (kHas0) value0 = state0[i];
      if (kHas1) value1 = state1[i];
      if (kHas2) value2 = state2[i];
      update_pair<Rule, Scaled>(
          hyper, grad_scale, random, start0, start1, value, grad[i], value0, value1, value2);
      start0 += 2 * kWeyl;
      start1 += 2 * kWeyl;
      param[i] = value;
      if (kHas0) state0[i] = value0;
      if (kHas1) state1[i] = value1;
      if (kHas2) state2[i] = value2;
    }
  }
  if (n % 2) {  // the last element, with nothing above it
    const auto half = [&](const void* base) {
      return static_cast<uint32_t>(static_cast<const uint16_t*>(base)[n - 1]);
    };
    const auto set_half = [&](void* base, uint32_t pair) {
      static_cast<uint16_t*>(base)[n - 1] = static_cast<uint16_t>(pair);
    };
    uint32_t value = half(param_at.data), value0 = 0, value1 = 0, value2 = 0;
    if (kHas0) value0 = half(states[0].data);
    if (kHas1) value1 = half(states[1].data);
    if (kHas2) value2 = half(states[2].data);
    update_pair<Rule, Scaled>(
        hyper, grad_scale, random, start0, start1, value, half(grad_ptr), value0, value1, value2);
    set_half(param_at.data, value);
    if (kHas0) set_half(states[0].data, value0);
    if (kHas1) set_half(states[1].data, value1);
    if (kHas2) set_half(states[2].data, value2);
  }
}

// The gradient's scale is nearly always one, and a multiplication by one a fiftieth of this loop.
template <class Rule>
void apply_bf16(
    const float* row, int n, const Stored& param, const void* grad, const Stored* states,
    const TileRandom& random) {
  const auto apply =
      row[0] == 1.0f ? apply_bf16_scaled<Rule, false> : apply_bf16_scaled<Rule, true>;
  apply(row, n, param, grad, states, random);
}

template <class Rule>
constexpr Kind kind_of(int slot) {
  if (Rule::kSecond >> slot & 1) return kSecond;
  return Rule::kRelative >> slot & 1 ? kRelative : kFirst;
}

// Asks for what lies kAheadBytes after a strip: of the tensor and of the companion of a weight.
// Scales are a byte of each strip.
template <class Format>
ONEPASS_HD void prefetch_strip(const Stored& at, int64_t first) {
  const auto lines = [](const void* base, int64_t offset, int64_t bytes) {
    prefetch_lines(static_cast<const char*>(base) + offset + kAheadBytes, bytes);
  };
  constexpr int64_t kExtra = extra_bytes_of(Format::kFormat, kStrip);
  lines(at.data, bytes_of(Format::kFormat, first), bytes_of(Format::kFormat, kStrip));
  if (kExtra > 1) lines(at.extra, extra_bytes_of(Format::kFormat, first), kExtra);
}

// A slot as a type, so that a loop over slots leaves constants.
template <int Index>
struct Slot {
  static constexpr int kIndex = Index;
};
// Calls body(slot) for the slots that a rule has, the first second moment first: mx4 measures
// relative ones in its root.
template <class Rule, class Body>
ONEPASS_HD void for_each_slot(const Body& body) {
  constexpr unsigned kSecond = Rule::kSecond & Rule::kSlots;
  constexpr int kLead = kSecond & 1 ? 0 : kSecond & 2 ? 1 : kSecond & 4 ? 2 : 0;
  if constexpr (Rule::kSlots >> kLead & 1) body(Slot<kLead>());
  if constexpr (kLead != 0 && (Rule::kSlots & 1)) body(Slot<0>());
  if constexpr (kLead != 1 && (Rule::kSlots & 2)) body(Slot<1>());
  if constexpr (kLead != 2 && (Rule::kSlots & 4)) body(Slot<2>());
}

// A tile of each of a rule's states.
template <class Rule, Order Of, template <Kind> class State>
struct StateTiles {
  Tile<Of, State<kind_of<Rule>(0)>> tile0;
  Tile<Of, State<kind_of<Rule>(1)>> tile1;
  Tile<Of, State<kind_of<Rule>(2)>> tile2;
  template <int Index>
  ONEPASS_HD auto& of(Slot<Index>) {
    if constexpr (Index == 0) return tile0;
    if constexpr (Index == 1) return tile1;
    if constexpr (Index == 2) return tile2;
  }
};

// Any formats, a tile at a time. Separate loops over its strips: the division and the root leave
// room for the rest of the first of them, and for no more. (Tried with AVX2 on Zen 3: encoding a
// tile between the strips of the next, more than a tenth slower; a loop of its own for decoding, up
// to 5 % faster with mx8 and 8 % slower with mx4; roots in one loop and quotients in the next, 5 %
// faster, for a second function in every rule. With AVX-512 on Sapphire Rapids or later, in cache:
// 2 % faster, 5 % slower and 5 % slower.)
template <class Rule, class Weight, class Grad, template <Kind> class State>
void apply_tiles(
    const float* row, int n, const Stored& param, const void* grad_ptr, const Stored* states_ref,
    const TileRandom& random_ref) {
  const TileRandom random = random_ref;  // copies: the stores below could alias the originals
  const Stored weight = param, grad{const_cast<void*>(grad_ptr), nullptr};
  const Stored states[kMaxStates] = {states_ref[0], states_ref[1], states_ref[2]};
  const auto hyper = load_hyper<Rule>(row);
  const float grad_scale = row[0];
  constexpr unsigned kSlots = Rule::kSlots;
  constexpr bool kFloats =
      Weight::kFormat == Format::kFp32 || State<kFirst>::kFormat == Format::kFp32;
  constexpr Order kOrder = kFloats ? kInOrder : kByPairs;
  constexpr bool kDraws = State<kFirst>::kDraws;
  constexpr int kUse = weight_use(Weight::kFormat);
  // Which words are drawn, and who takes them.
  constexpr bool kDraws0 = ((kSlots & 3) && kDraws) || (Weight::kDraws && kUse / 2 == 0);
  constexpr bool kDraws1 = ((kSlots & 4) && kDraws) || (Weight::kDraws && kUse / 2 == 1);
  using Params = Strip<Weight, kOrder>;
  for (int tile = 0; tile < n; tile += kTile) {
    alignas(64) float params[kStrips][kStrip], roots[kStrips][kStrip];
    StateTiles<Rule, kOrder, State> tiles;
    alignas(64) uint32_t words[2][kStrips][kStrip];
    for_each_slot<Rule>([&](auto slot) __attribute__((always_inline)) {
      tiles.of(slot).begin(states[decltype(slot)::kIndex], tile);
    });
    for (int strip = 0; strip < kStrips; ++strip) {
      const int first = tile + strip * kStrip;
      float grad_strip[kStrip];
      prefetch_strip<Weight>(weight, first);
      prefetch_strip<Grad>(grad, first);
      float* __restrict p = Params::open(weight, first, params[strip]);
      const float* __restrict g = Strip<Grad, kOrder>::open(grad, first, grad_strip);
      if (__builtin_expect(grad_scale != 1.0f, 0)) {
#pragma omp simd
        for (int i = 0; i < kStrip; ++i) grad_strip[i] = grad_scale * g[i];
        g = grad_strip;
      }
      float* open[kMaxStates] = {};
      for_each_slot<Rule>([&](auto slot) __attribute__((always_inline)) {
        constexpr int k = decltype(slot)::kIndex;
        prefetch_strip<State<kind_of<Rule>(k)>>(states[k], first);
        open[k] = tiles.of(slot).open(states[k], first, strip, roots[strip]);
      });
      float* __restrict t0 = open[0], * __restrict t1 = open[1], * __restrict t2 = open[2];
      if (kDraws0) draw_strip<kOrder>(random, 0, first, words[0][strip]);
      if (kDraws1) draw_strip<kOrder>(random, 1, first, words[1][strip]);
#pragma omp simd
      for (int i = 0; i < kStrip; ++i) {
        float value0 = 0, value1 = 0, value2 = 0;
        if (kSlots & 1) value0 = t0[i];
        if (kSlots & 2) value1 = t1[i];
        if (kSlots & 4) value2 = t2[i];
        Rule::update(hyper, p[i], g[i], value0, value1, value2);
        if (kSlots & 1) t0[i] = value0;
        if (kSlots & 2) t1[i] = value1;
        if (kSlots & 4) t2[i] = value2;
      }
      for_each_slot<Rule>([&](auto slot)
                              __attribute__((always_inline)) { tiles.of(slot).measure(strip); });
      if constexpr (!Weight::kDraws) Params::store(p, weight, first);
    }
    if constexpr (Weight::kDraws) {
      for (int strip = 0; strip < kStrips; strip += kNarrowed)
        Params::store_dithered(
            params + strip, weight, tile + strip * kStrip, words[kUse / 2] + strip, kUse % 2 * 16);
    }
    for_each_slot<Rule>([&](auto slot) __attribute__((always_inline)) {
      constexpr int k = decltype(slot)::kIndex;
      tiles.of(slot).store(states[k], tile, words[k / 2], k % 2 * 16, roots);
    });
  }
}

template <Kind>
using Fp32State = Fp32;
using Bf16 = Half<ToBf16>;

// A rule that some flags do not go with has no kernel there.
template <class Rule, bool = Rule::kValid>
struct Pick {
  static constexpr RuleFn fp32 = apply_fp32<Rule>;
  static constexpr RuleFn bf16 = apply_bf16<Rule>;
  static constexpr RuleFn bf16_fp32 = apply_tiles<Rule, Bf16, Bf16, Fp32State>;
  static constexpr RuleFn fp32_mx8 = apply_tiles<Rule, Fp32, Fp32, Mx8State>;
  static constexpr RuleFn split8_mx8 = apply_tiles<Rule, Split8Weight, Bf16, Mx8State>;
  static constexpr RuleFn stochastic_mx8 = apply_tiles<Rule, Half<DitherBf16>, Bf16, Mx8State>;
  static constexpr RuleFn stochastic_mx4 = apply_tiles<Rule, Half<DitherBf16>, Bf16, Mx4State>;
};
template <class Rule>
struct Pick<Rule, false> {
  static constexpr RuleFn fp32 = nullptr, bf16 = nullptr, bf16_fp32 = nullptr, fp32_mx8 = nullptr,
                          split8_mx8 = nullptr, stochastic_mx8 = nullptr, stochastic_mx4 = nullptr;
};

}  // namespace

#define ONEPASS_VARIANTS(CODE, RULE, KIND)                                                 \
  {Pick<RULE<0>>::KIND,  Pick<RULE<1>>::KIND,  Pick<RULE<2>>::KIND,  Pick<RULE<3>>::KIND,  \
   Pick<RULE<4>>::KIND,  Pick<RULE<5>>::KIND,  Pick<RULE<6>>::KIND,  Pick<RULE<7>>::KIND,  \
   Pick<RULE<8>>::KIND,  Pick<RULE<9>>::KIND,  Pick<RULE<10>>::KIND, Pick<RULE<11>>::KIND, \
   Pick<RULE<12>>::KIND, Pick<RULE<13>>::KIND, Pick<RULE<14>>::KIND, Pick<RULE<15>>::KIND},

#define ONEPASS_DIRECT(WEIGHT, GRAD, STATE, STEP, KIND)  \
  {                                                      \
    Format::WEIGHT, Format::GRAD, Format::STATE, STEP, { \
      ONEPASS_FOR_EACH_RULE(ONEPASS_VARIANTS, KIND)      \
    }                                                    \
  }

#define ONEPASS_KERNELS                                                        \
  {                                                                            \
      {                                                                        \
          ONEPASS_DIRECT(kFp32, kFp32, kFp32, 1, fp32),                        \
          ONEPASS_DIRECT(kBf16, kBf16, kBf16Stochastic, 1, bf16),              \
          ONEPASS_DIRECT(kBf16, kBf16, kFp32, kTile, bf16_fp32),               \
          ONEPASS_DIRECT(kFp32, kFp32, kMx8, kTile, fp32_mx8),                 \
          ONEPASS_DIRECT(kSplit8, kBf16, kMx8, kTile, split8_mx8),             \
          ONEPASS_DIRECT(kBf16Stochastic, kBf16, kMx8, kTile, stochastic_mx8), \
          ONEPASS_DIRECT(kBf16Stochastic, kBf16, kMx4, kTile, stochastic_mx4), \
      },                                                                       \
      ONEPASS_FORMATS(load),                                                   \
      ONEPASS_FORMATS(store),                                                  \
      ONEPASS_NORMS,                                                           \
      average_tile,                                                            \
      measure_tile,                                                            \
  }

}  // namespace onepass::cpu
