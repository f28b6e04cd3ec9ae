// Direct kernels for any formats, which process a tile of strips at a time, for one instruction
// set: see kernels_impl.h.
#pragma once

#include "in_place_impl.h"
#include "strip_codecs_impl.h"

namespace onepass::cpu {
namespace {

// The kind of a state of a rule.
template <class Rule>
constexpr Kind kind_of(int slot) {
  if (Rule::kSecond >> slot & 1) return kSecond;
  return Rule::kRelative >> slot & 1 ? kRelative : kFirst;
}

// Prefetches the memory kAheadBytes after a strip, of the tensor and of the companion of a weight.
// Scales are not prefetched, because a strip has only one byte of them.
template <class Format>
ONEPASS_HD void prefetch_strip(const Stored& at, int64_t first) {
  const auto lines = [](const void* base, int64_t offset, int64_t bytes) {
    prefetch_lines(static_cast<const char*>(base) + offset + kAheadBytes, bytes);
  };
  constexpr int64_t kExtra = extra_bytes_of(Format::kFormat, kStrip);
  lines(at.data, bytes_of(Format::kFormat, first), bytes_of(Format::kFormat, kStrip));
  if (kExtra > 1) lines(at.extra, extra_bytes_of(Format::kFormat, first), kExtra);
}

// A slot as a type, so that the index is a constant in a loop over slots.
template <int Index>
struct Slot {
  static constexpr int kIndex = Index;
};
// Calls body(slot) for each slot of a rule, with the first second moment first, because mx4 needs
// its square root for relative moments.
template <class Rule, class Body>
ONEPASS_HD void for_each_slot(const Body& body) {
  constexpr unsigned kSecond = Rule::kSecond & Rule::kSlots;
  constexpr int kLead = front_state(kSecond);
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

// The update for any formats, a tile at a time: the scales of all strips of a tile are chosen
// together. Out-of-order execution overlaps the division and square root with other work, but only
// within a window. With AVX2 an mx8 tile is therefore decoded in a loop of its own, so that the
// loop with divisions is short: 6 to 8 % less time on Zen 3. (With mx4 and no other change it took
// 8 % more.) Interleaving the writes of a tile with the updates of the next is 3 % faster with
// AVX-512 on Intel, and slower with AVX2 on Zen 3. docs/cpu.md has the measurements.
template <class Rule, class Weight, class Grad, template <Kind> class State>
void apply_tiles(
    const float* row, int n, const Stored& param, const void* grad_ptr, const Stored* states_ref,
    const TileRandom& random_ref, uint32_t* changed) {
  const TileRandom random = random_ref;  // copied because the stores below could alias the original
  const Stored weight = param, grad{const_cast<void*>(grad_ptr), nullptr};
  const Stored states[kMaxStates] = {states_ref[0], states_ref[1], states_ref[2]};
  const auto hyper = load_hyper<Rule>(row);
  const float grad_scale = row[0];
  const bool scales = grad_scale != 1.0f;
  constexpr unsigned kSlots = Rule::kSlots;
  constexpr bool kFloats =
      Weight::kFormat == Format::kFp32 || State<kFirst>::kFormat == Format::kFp32;
  constexpr Order kOrder = kFloats ? kInOrder : kByPairs;
  constexpr bool kDraws = State<kFirst>::kDraws;
  constexpr int kUse = weight_use(Weight::kFormat, kDraws && kSlots != 0);
  // Whether random word 0 and word 1 are drawn.
  constexpr bool kDraws0 = ((kSlots & 3) && kDraws) || (Weight::kDraws && kUse / 32 == 0);
  constexpr bool kDraws1 = ((kSlots & 4) && kDraws) || (Weight::kDraws && kUse / 32 == 1);
  constexpr bool kMx8 = State<kFirst>::kFormat == Format::kMx8;
  using Params = Strip<Weight, kOrder>;
  constexpr int kWeightBytes = static_cast<int>(bytes_of(Weight::kFormat, 1));
  const auto weights_at = [&](int first) {
    return static_cast<const char*>(weight.data) + int64_t{kWeightBytes} * first;
  };
  const auto words_at = [&](int first) { return changed ? changed + first / kStrip : nullptr; };
  struct Buffers {
    alignas(64) float params[kStrips][kStrip], roots[kStrips][kStrip];
    alignas(64) uint32_t words[2][kStrips][kStrip];
    StateTiles<Rule, kOrder, State> tiles;
  };
  // Decodes a strip, draws its random words and returns its gradient, for which grad_strip is a
  // buffer.
  const auto open = [&](int tile, int strip, Buffers& in,
                        float* __restrict grad_strip) __attribute__((always_inline)) {
    const int first = tile + strip * kStrip;
    prefetch_strip<Weight>(weight, first);
    prefetch_strip<Grad>(grad, first);
    Params::open(weight, first, in.params[strip]);
    const float* __restrict g = Strip<Grad, kOrder>::open(grad, first, grad_strip);
    if (__builtin_expect(scales, 0)) {
#pragma omp simd
      for (int i = 0; i < kStrip; ++i) grad_strip[i] = grad_scale * g[i];
      g = grad_strip;
    }
    for_each_slot<Rule>([&](auto slot) __attribute__((always_inline)) {
      constexpr int k = decltype(slot)::kIndex;
      prefetch_strip<State<kind_of<Rule>(k)>>(states[k], first);
      in.tiles.of(slot).open(states[k], first, strip, in.roots[strip]);
    });
    if (kDraws0) draw_strip<kOrder>(random, 0, first, in.words[0][strip]);
    if (kDraws1) draw_strip<kOrder>(random, 1, first, in.words[1][strip]);
    return g;
  };
  // Applies the rule to a strip and measures the states for their scales.
  const auto update = [&](int tile, int strip, Buffers& in,
                          const float* __restrict g) __attribute__((always_inline)) {
    const int first = tile + strip * kStrip;
    float* __restrict p = Params::values(weight, first, in.params[strip]);
    float* values[kMaxStates] = {};
    for_each_slot<Rule>([&](auto slot) __attribute__((always_inline)) {
      constexpr int k = decltype(slot)::kIndex;
      values[k] = in.tiles.of(slot).opened(states[k], first, strip);
    });
    float* __restrict t0 = values[0], * __restrict t1 = values[1], * __restrict t2 = values[2];
    Before<kWeightBytes, kStrip> before;
    if constexpr (!Weight::kDraws) before.keep(weights_at(first), kStrip, words_at(first));
#pragma omp simd
    for (int i = 0; i < kStrip; ++i) {
      float value0 = 0, value1 = 0, value2 = 0;
      if (kSlots & 1) value0 = t0[i];
      if (kSlots & 2) value1 = t1[i];
      if (kSlots & 4) value2 = t2[i];
      float none = 0;
      update_element<Rule>(hyper, p[i], g[i], value0, value1, value2, none);
      if (kSlots & 1) t0[i] = value0;
      if (kSlots & 2) t1[i] = value1;
      if (kSlots & 4) t2[i] = value2;
    }
    for_each_slot<Rule>([&](auto slot)
                            __attribute__((always_inline)) { in.tiles.of(slot).measure(strip); });
    if constexpr (!Weight::kDraws) {
      Params::store(p, weight, first);
      before.record(weights_at(first), kStrip, words_at(first));
    }
  };
  const auto open_and_update = [&](int tile, int strip, Buffers& in)
                                   __attribute__((always_inline)) {
                                     float grad_strip[kStrip];
                                     update(tile, strip, in, open(tile, strip, in, grad_strip));
                                   };
  // These encode simd::kNarrowed strips of the weight, and of the states after their scales are
  // chosen.
  const auto write_weight = [&](int tile, int strip, Buffers& in) __attribute__((always_inline)) {
    if constexpr (Weight::kDraws) {
      constexpr int kWritten = simd::kNarrowed * kStrip;
      const int first = tile + strip * kStrip;
      Before<kWeightBytes, kWritten> before;
      before.keep(weights_at(first), kWritten, words_at(first));
      Params::store_dithered(
          in.params + strip, weight, first, in.words[kUse / 32] + strip, kUse % 32);
      before.record(weights_at(first), kWritten, words_at(first));
    }
  };
  const auto write_states = [&](int tile, int strip, Buffers& in) __attribute__((always_inline)) {
    for_each_slot<Rule>([&](auto slot) __attribute__((always_inline)) {
      constexpr int k = decltype(slot)::kIndex, kOwn = state_use(k);
      in.tiles.of(slot).write(states[k], tile, in.words[kOwn / 32], kOwn % 32, strip);
    });
  };
  const auto begin = [&](int tile, Buffers& in) __attribute__((always_inline)) {
    for_each_slot<Rule>([&](auto slot) __attribute__((always_inline)) {
      in.tiles.of(slot).begin(states[decltype(slot)::kIndex], tile);
    });
  };
  const auto choose = [&](int tile, Buffers& in) __attribute__((always_inline)) {
    for_each_slot<Rule>([&](auto slot) __attribute__((always_inline)) {
      constexpr int k = decltype(slot)::kIndex, kOwn = state_use(k);
      in.tiles.of(slot).choose(states[k], tile, in.words[kOwn / 32], kOwn % 32, in.roots);
    });
  };
  if constexpr (simd::kInterleavesTiles && kMx8) {
    Buffers buffers[2];
    Buffers *now = buffers, *next = buffers + 1;
    begin(0, *now);
    for (int strip = 0; strip < kStrips; ++strip) open_and_update(0, strip, *now);
    choose(0, *now);
    for (int tile = kTile; tile < n; tile += kTile) {
      begin(tile, *next);
#pragma GCC unroll 1
      for (int strip = 0; strip < kStrips; strip += simd::kNarrowed) {
        open_and_update(tile, strip, *next);
        write_weight(tile - kTile, strip, *now);
        write_states(tile - kTile, strip, *now);
        for (int i = strip + 1; i < strip + simd::kNarrowed; ++i) open_and_update(tile, i, *next);
      }
      choose(tile, *next);
      Buffers* const written = now;
      now = next;
      next = written;
    }
    for (int strip = 0; strip < kStrips; strip += simd::kNarrowed) {
      write_weight(n - kTile, strip, *now);
      write_states(n - kTile, strip, *now);
    }
  } else {
    Buffers now;
    for (int tile = 0; tile < n; tile += kTile) {
      begin(tile, now);
      if constexpr (simd::kOpensFirst && kMx8) {
        alignas(64) float grads[kStrips][kStrip];
        const float* opened[kStrips];
        for (int strip = 0; strip < kStrips; ++strip)
          opened[strip] = open(tile, strip, now, grads[strip]);
        for (int strip = 0; strip < kStrips; ++strip) update(tile, strip, now, opened[strip]);
      } else {
        for (int strip = 0; strip < kStrips; ++strip) open_and_update(tile, strip, now);
      }
      for (int strip = 0; strip < kStrips; strip += simd::kNarrowed) write_weight(tile, strip, now);
      choose(tile, now);
      for (int strip = 0; strip < kStrips; strip += simd::kNarrowed) write_states(tile, strip, now);
    }
  }
}

}  // namespace
}  // namespace onepass::cpu
