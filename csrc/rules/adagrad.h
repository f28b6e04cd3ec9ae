// Adagrad. Duchi, Hazan, Singer, "Adaptive subgradient methods" (2011).
#pragma once

#include "rule.h"

namespace onepass {

// Flag 0: decoupled weight decay; flag 1: eps inside the square root.
template <unsigned Flags>
struct Adagrad : RuleDefaults {
  static constexpr bool kDecoupled = Flags & 1;
  static constexpr bool kEpsInSqrt = Flags & 2;
  static constexpr bool kValid = Flags < 4;
  static constexpr int kStates = 1;
  static constexpr unsigned kSlots = 0b001;
  static constexpr unsigned kSecond = 0b001, kRelative = 0;  // kinds of its states

  struct Hyper {
    float lr, weight_decay, eps;
  };

  // lr_t = lr / (1 + (t - 1) lr_decay)
  ONEPASS_HD static Hyper derive(const Options& o, const StepOf& step) {
    const double eps = o.own[0], lr_decay = o.own[1];
    const double lr = div_rn(o.lr, 1.0 + static_cast<double>(step.number - 1) * lr_decay);
    return {rounded(lr), rounded(decay_of(o, lr)), rounded(eps)};
  }

  template <class Math = Exact>
  ONEPASS_HD static void update(
      const Hyper& h, float& param, float grad, float& sum, Math&& math = Math()) {
    if (!kDecoupled) grad = grad + h.weight_decay * param;
    sum = sum + grad * grad;
    const float denom = kEpsInSqrt ? math.sqrt(sum + h.eps) : math.sqrt_of_state(sum) + h.eps;
    float delta = h.lr * math.div_by_root(grad, denom);
    if (kDecoupled) delta = delta + h.weight_decay * param;
    param = param - delta;
  }
};

}  // namespace onepass
