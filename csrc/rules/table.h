// The one list of rules. Python names a rule by its position here (onepass/rules/__init__.py), a variant by
// that position and the rule's flags; a new rule is one header and one line.
#pragma once

#include "adagrad.h"
#include "adam.h"
#include "lion.h"
#include "rmsprop.h"
#include "sgd.h"

#define ONEPASS_FOR_EACH_RULE(RULE, ARG) \
  RULE(0, Sgd, ARG)                      \
  RULE(1, Adagrad, ARG)                  \
  RULE(2, Rmsprop, ARG)                  \
  RULE(3, Adam, ARG)                     \
  RULE(4, Lion, ARG)

namespace onepass {

constexpr int kRules = 5;
constexpr int kMaxFlags = 16;  // a rule has at most four booleans
constexpr int kMaxStates = 3;  // and at most three states
// Floats in a row of the hyperparameter table: grad_scale, Hyper, and from kEmaDecay on the decay
// of the average of the weights and one minus it.
constexpr int kHyperWidth = 10;
constexpr int kEmaDecay = 8;

// Bit k: what state k of a rule is (Kind in formats/table.h); first moments are neither.
struct RuleKinds {
  uint8_t second, relative;
};
#define ONEPASS_RULE_KINDS(CODE, RULE, ARG) {RULE<0>::kSecond, RULE<0>::kRelative},
constexpr RuleKinds kRuleKinds[kRules] = {ONEPASS_FOR_EACH_RULE(ONEPASS_RULE_KINDS, )};
#undef ONEPASS_RULE_KINDS

}  // namespace onepass
