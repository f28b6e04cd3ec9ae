// The table of rules. The code of a rule is its position in the list of csrc/generated/rules.h.
#pragma once

#include "../generated/rules.h"

namespace onepass {

constexpr int kFlagSets = 1 << kMaxFlags;  // combinations of flags, valid or not

// The columns of a row of the hyperparameter table: grad_scale, the scalars of Rule::Hyper, and
// from column kEmaDecay on the decay d of the average of the weights and 1 - d.
constexpr int kEmaDecay = 1 + kMaxScalars;
constexpr int kHyperWidth = kEmaDecay + 2;

// The properties of a rule that the host looks up by its code.
struct RuleInfo {
  uint8_t second, relative;  // bit k: state k is of that kind (Kind in formats/blocks.h)
  uint8_t weights;           // bit k: state k is a weight; see state_format
  uint8_t scalar_states;     // number of scalar states
  uint32_t valid;            // bit f: the combination of flags f is valid
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
  return {
      Rule<0>::kSecond, Rule<0>::kRelative, Rule<0>::kWeights, Rule<0>::kScalarStates,
      valid_flags<Rule>()};
}
}  // namespace detail
static_assert(kFlagSets <= 32, "a bit for each set of flags");

#define ONEPASS_RULE_INFO(CODE, RULE, ARG) detail::info_of<RULE>(),
constexpr RuleInfo kRuleInfo[kRules] = {ONEPASS_FOR_EACH_RULE(ONEPASS_RULE_INFO, )};
#undef ONEPASS_RULE_INFO

// The state that is decoded and encoded before the others: the first second moment, because mx4
// codes relative states as multiples of its square root; state 0 if the rule has none.
constexpr int front_state(unsigned second) {
  for (int k = 0; k < kMaxStates; ++k)
    if (second >> k & 1) return k;
  return 0;
}

}  // namespace onepass
