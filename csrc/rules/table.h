// The list of rules, and what the host asks of one by its code: its position in the list.
#pragma once

#include "../generated/rules.h"

namespace onepass {

constexpr int kFlagSets = 1 << kMaxFlags;

// Floats in a row of the hyperparameter table: grad_scale, Hyper, and from kEmaDecay on the decay
// of the average of the weights and one minus it.
constexpr int kEmaDecay = 1 + kMaxScalars;
constexpr int kHyperWidth = kEmaDecay + 2;

struct RuleInfo {
  uint8_t second, relative;  // bit k: what state k is (Kind in formats/table.h)
  uint8_t scalar_states;
  uint32_t valid;  // bit f: flags f go together
};

namespace detail {
template <template <unsigned> class Rule, unsigned Flags = 0>
constexpr uint32_t valid_flags() {
  if constexpr (Flags < kFlagSets)
    return static_cast<uint32_t>(Rule<Flags>::kValid) << Flags | valid_flags<Rule, Flags + 1>();
  return 0;
}
template <template <unsigned> class Rule>
constexpr RuleInfo info_of() {
  static_assert(sizeof(typename Rule<0>::Hyper) <= kMaxScalars * sizeof(float), "a row too narrow");
  return {Rule<0>::kSecond, Rule<0>::kRelative, Rule<0>::kScalarStates, valid_flags<Rule>()};
}
}  // namespace detail
static_assert(kFlagSets <= 32, "a bit for each set of flags");

#define ONEPASS_RULE_INFO(CODE, RULE, ARG) detail::info_of<RULE>(),
constexpr RuleInfo kRuleInfo[kRules] = {ONEPASS_FOR_EACH_RULE(ONEPASS_RULE_INFO, )};
#undef ONEPASS_RULE_INFO

// The state that comes first where states are decoded and encoded: the first second moment, whose
// root mx4 measures the others in.
constexpr int front_state(unsigned second) {
  for (int k = 0; k < kMaxStates; ++k)
    if (second >> k & 1) return k;
  return 0;
}

}  // namespace onepass
