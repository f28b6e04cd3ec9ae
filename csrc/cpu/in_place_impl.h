// Direct kernels that update fp32 tensors, and bf16 tensors, in place, for one instruction set: see
// kernels_impl.h.
#pragma once

#include "../prefetch.h"
#include "extras_impl.h"
#include "simd/simd.h"

namespace onepass::cpu {
namespace {

// The scalars of a rule in a row of the hyperparameter table.
template <class Rule>
typename Rule::Hyper load_hyper(const float* row) {
  static_assert(sizeof(typename Rule::Hyper) <= kMaxScalars * sizeof(float), "row too narrow");
  typename Rule::Hyper hyper;
  __builtin_memcpy(&hyper, row + 1, sizeof hyper);
  return hyper;
}

// The prefetch distance in bytes. Software prefetching helps because the hardware prefetcher stops
// at every page. (The best of 512 to 2048 with fp32 and bf16 states. With mx8, 512 to 4096 are
// equally good, and a step without prefetching takes a quarter longer. Two AVX-512 cores, 2026-11.)
constexpr int kAheadBytes = 1024;

// Loops that only compute prefetch in rounds of kBlock elements, worth 10 % of an fp32 and of a
// bf16 AdamW step (AVX-512, Intel, two cores, 2026-11; 128 was the best of 64 to 256). With AVX2
// such a round cost 20 % of an fp32 step, and a smaller one gained nothing (AMD Zen 3, two cores,
// 2026-11).
constexpr int kBlock = 128;

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
  if (Slots & 8) lines(states[3].data);
}

template <class Rule>
void apply_fp32(
    const float* row, int n, const Stored& param_at, const void* grad_ptr, const Stored* states,
    const TileRandom&, uint32_t* changed) {
  constexpr bool kHas0 = Rule::kSlots & 1, kHas1 = Rule::kSlots & 2, kHas2 = Rule::kSlots & 4,
                 kHas3 = Rule::kSlots & 8;
  const auto hyper = load_hyper<Rule>(row);
  const float grad_scale = row[0];
  auto* __restrict param = static_cast<float*>(param_at.data);
  auto* __restrict grad = static_cast<const float*>(grad_ptr);
  auto* __restrict state0 = static_cast<float*>(states[0].data);
  auto* __restrict state1 = static_cast<float*>(states[1].data);
  auto* __restrict state2 = static_cast<float*>(states[2].data);
  auto* __restrict state3 = static_cast<float*>(states[3].data);
  Before<4, kBlock> before;
  for (int block = 0; block < n; block += kBlock) {
    const int end = n - block < kBlock ? n : block + kBlock;
    uint32_t* const words = changed ? changed + block / kStrip : nullptr;
    before.keep(param + block, end - block, words);
    if (simd::kPrefetchesInPlace && block + kAheadBytes / 4 < n)
      prefetch<Rule::kSlots, kBlock * 4>(int64_t{4} * block, param_at.data, grad_ptr, states);
#pragma omp simd
    for (int i = block; i < end; ++i) {
      float value0 = 0, value1 = 0, value2 = 0, value3 = 0;
      if (kHas0) value0 = state0[i];
      if (kHas1) value1 = state1[i];
      if (kHas2) value2 = state2[i];
      if (kHas3) value3 = state3[i];
      update_element<Rule>(hyper, param[i], grad_scale * grad[i], value0, value1, value2, value3);
      if (kHas0) state0[i] = value0;
      if (kHas1) state1[i] = value1;
      if (kHas2) state2[i] = value2;
      if (kHas3) state3[i] = value3;
    }
    before.record(param + block, end - block, words);
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
  float none = 0;
  const float g = lower(grad), h = upper(grad);
  update_element<Rule>(hyper, p, Scaled ? grad_scale * g : g, s0, s1, s2, none);
  update_element<Rule>(hyper, q, Scaled ? grad_scale * h : h, t0, t1, t2, none);
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
    const TileRandom& random_ref, uint32_t* changed) {
  const TileRandom random = random_ref;  // a copy: the stores below could alias the original
  constexpr bool kHas0 = Rule::kSlots & 1, kHas1 = Rule::kSlots & 2, kHas2 = Rule::kSlots & 4;
  const auto hyper = load_hyper<Rule>(row);
  const float grad_scale = row[0];
  // Not auto, which would drop the attributes of Pair, its alignment of 2 among them.
  Pair* __restrict param = static_cast<Pair*>(param_at.data);
  const Pair* __restrict grad = static_cast<const Pair*>(grad_ptr);
  Pair* __restrict state0 = static_cast<Pair*>(states[0].data);
  Pair* __restrict state1 = static_cast<Pair*>(states[1].data);
  Pair* __restrict state2 = static_cast<Pair*>(states[2].data);
  const int pairs = n / 2;
  uint32_t start0 = random_start(random.keys[0], random.low);
  uint32_t start1 = random_start(random.keys[1], random.low);
  Before<2, kBlock> before;
  for (int block = 0; block < pairs; block += kBlock / 2) {
    const int end = pairs - block < kBlock / 2 ? pairs : block + kBlock / 2;
    if (simd::kPrefetchesInPlace && block + kAheadBytes / 4 < pairs)
      prefetch<Rule::kSlots, kBlock * 2>(int64_t{4} * block, param_at.data, grad_ptr, states);
    uint32_t* const words = changed ? changed + 2 * block / kStrip : nullptr;
    before.keep(param + block, 2 * (end - block), words);
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
    before.record(param + block, 2 * (end - block), words);
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
    const auto old = half(param_at.data);
    set_half(param_at.data, value);
    if (changed)
      changed[(n - 1) / kStrip] |= uint32_t{old != half(param_at.data)} << (n - 1) % kStrip;
    if (kHas0) set_half(states[0].data, value0);
    if (kHas1) set_half(states[1].data, value1);
    if (kHas2) set_half(states[2].data, value2);
  }
}

// The gradient's scale is nearly always one, and a multiplication by one a fiftieth of this loop.
template <class Rule>
void apply_bf16(
    const float* row, int n, const Stored& param, const void* grad, const Stored* states,
    const TileRandom& random, uint32_t* changed) {
  const auto apply =
      row[0] == 1.0f ? apply_bf16_scaled<Rule, false> : apply_bf16_scaled<Rule, true>;
  apply(row, n, param, grad, states, random, changed);
}

}  // namespace
}  // namespace onepass::cpu
