// Compile-time and run-time dispatch over the formats and flags of a chunk.
#pragma once

#include <type_traits>

#include "codecs.cuh"
#include "fast_path.cuh"

namespace onepass::cuda {

// Formats that are known at compile time. Its methods call work with the format of the parameter,
// the gradient or the states as a Tag. Any has the same methods for formats that each chunk stores;
// they branch uniformly over a block.
template <Format Param, Format Grad, Format Held>
struct Fixed {
  static constexpr Format kParam = Param, kGrad = Grad, kHeld = Held;
  static constexpr bool kDraws = is_stochastic(Param) || is_stochastic(Held);
  using Math = Quick<Held == Format::kMx8 || Held == Format::kMx4>;
  static constexpr bool kMaps = Held == Format::kDynamic8;  // reads shared_map
  // A ring and the maps of dynamic8 would need more than 48 KiB of shared memory.
  static constexpr bool kRing = kTuning.ring > 0 && kHasBulkCopies && !kMaps;
  static constexpr bool kFetch = kTuning.prefetch && !kRing;
  // Elements of a vector access. It is at most kWidestAccess bytes of the widest tensor, or 16
  // bytes in the shared memory of a ring; with 4-byte elements in 16 bytes, a thread takes two
  // vectors.
  static constexpr bool kWide = bits_of(Param) == 32 || bits_of(Grad) == 32 ||
                                bits_of(Held) == 32 || companion_bits_of(Param) == 32;
  static constexpr int kVector = kWide && (kRing || kWidestAccess < 32) ? 4 : 8;
  // The addresses of the tensors of a plain chunk (is_plain) are multiples of this.
  static constexpr int kAlignment = kWide && kVector == 8 ? 32 : 16;
  static constexpr Shape kShape = shape_of(Param, Held);
  static constexpr int kThreads = kShape.threads;

  ONEPASS_HD explicit Fixed(const Chunk&) {}
  // Whether a state draws random bits. The formats of a parameter without states hold fp32.
  ONEPASS_HD static constexpr bool states_draw() { return is_stochastic(Held); }
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

// Formats that each chunk stores.
struct Any {
  static constexpr int kVector = 4, kAlignment = 16;
  static constexpr bool kDraws = true;
  using Math = Careful;  // too few registers for eight elements in every format
  static constexpr bool kMaps = false;
  static constexpr bool kRing = false;
  static constexpr bool kFetch = false;
  static constexpr int kThreads = kTuning.threads;
  Format param_, grad_, held_;

  ONEPASS_HD explicit Any(const Chunk& chunk)
      : param_(chunk.param_format), grad_(chunk.grad_format), held_(chunk.state_format) {}
  ONEPASS_HD bool states_draw() const { return is_stochastic(held_); }

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

// A rule with flags that are known at compile time. with calls work with the rule.
template <template <unsigned> class Rule, unsigned Flags>
struct FixedRule {
  using Sample = Rule<Flags>;  // for kStates and the kinds of states, which do not depend on flags
  ONEPASS_HD explicit FixedRule(const Chunk&) {}
  ONEPASS_HD static constexpr bool has(int slot) { return Rule<Flags>::kSlots >> slot & 1; }
  template <class Work>
  ONEPASS_HD void with(const Work& work) const {
    work(Rule<Flags>{});
  }
};

// A rule with the flags that each chunk stores.
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
    if constexpr (Flags < kFlagSets) {
      if constexpr (Rule<Flags>::kValid) {
        if (flags_ == Flags) return work(Rule<Flags>{});
      }
      from<Flags + 1>(work);
    }
  }
};

// Whether Math computes the divisors of a rule with these scalars; see Quick::covers.
template <class Math, class Hyper, class = void>
struct Covered {
  ONEPASS_HD static bool by(const Hyper&) { return true; }
};
template <class Math, class Hyper>
struct Covered<Math, Hyper, std::void_t<decltype(Hyper::eps), decltype(Math::covers(0.0f))>> {
  ONEPASS_HD static bool by(const Hyper& hyper) { return Math::covers(hyper.eps); }
};

// Calls work with each slot below Count except Skip, as an integral_constant.
template <int Count, int Slot = 0, int Skip = -1, class Work>
__device__ __forceinline__ void for_each_slot(const Work& work) {
  if constexpr (Slot < Count) {
    if constexpr (Slot != Skip) work(std::integral_constant<int, Slot>{});
    for_each_slot<Count, Slot + 1, Skip>(work);
  }
}

// for_each_slot over the states of a rule, with front_state first.
template <class Rule, class Work>
__device__ __forceinline__ void for_each_slot_in_order(const Work& work) {
  constexpr int kFront = front_state(Rule::kSecond);
  work(std::integral_constant<int, kFront>{});
  for_each_slot<Rule::kStates, 0, kFront>(work);
}

}  // namespace onepass::cuda
