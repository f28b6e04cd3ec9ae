// Lion. Chen et al., "Symbolic discovery of optimization algorithms" (2023), program 1.
#pragma once

#include "rule.h"

namespace onepass {

// Flag 0: decoupled weight decay; flag 1: cautious weight decay.
template <unsigned Flags>
struct Lion : RuleDefaults {
  static constexpr bool kDecoupled = Flags & 1;
  static constexpr bool kCautious = Flags & 2;
  static constexpr bool kValid = Flags < 4 && (kDecoupled || !kCautious);
  static constexpr bool kUncommon = kCautious;
  static constexpr int kStates = 1;
  static constexpr unsigned kSlots = 0b001;
  static constexpr unsigned kSecond = 0, kRelative = 0;  // kinds of its states
  static constexpr uint32_t kReducedPrecision = 1u << 1;

  struct Hyper {
    float lr, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
  };

  ONEPASS_HD static Hyper derive(const Options& o, const StepOf&) {
    const double beta1 = o.own[0], beta2 = o.own[1];
    return {rounded(o.lr),  rounded(decay_of(o, o.lr)), rounded(beta1), rounded(1.0 - beta1),
            rounded(beta2), rounded(1.0 - beta2)};
  }

  template <class Math = Exact>
  ONEPASS_HD static void update(
      const Hyper& h, float& param, float grad, float& exp_avg, Math&& = Math()) {
    if (!kDecoupled) grad = grad + h.weight_decay * param;
    const float blend = h.beta1 * exp_avg + h.one_minus_beta1 * grad;
    // sign(0) is 0. sign(NaN) is NaN, so that a NaN gradient is visible in the weights at once.
    const float sign = blend > 0.0f ? 1.0f : (blend < 0.0f ? -1.0f : blend);
    exp_avg = h.beta2 * exp_avg + h.one_minus_beta2 * grad;
    float delta = h.lr * sign;
    if (kCautious)
      delta = cautious(delta, h.weight_decay * param, param);
    else if (kDecoupled)
      delta = delta + h.weight_decay * param;
    param = param - delta;
  }
};

}  // namespace onepass
