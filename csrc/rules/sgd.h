// SGD with momentum and Nesterov momentum, with the formulas of torch.optim.SGD.
// Sutskever et al., "On the importance of initialization and momentum in deep learning" (2013).
#pragma once

#include "rule.h"

namespace onepass {

// Flag 0: decoupled weight decay; flag 1: momentum; flag 2: Nesterov momentum; flag 3: cautious
// weight decay.
template <unsigned Flags>
struct Sgd : RuleDefaults {
  static constexpr bool kDecoupled = Flags & 1;
  static constexpr bool kMomentum = Flags & 2;
  static constexpr bool kNesterov = Flags & 4;
  static constexpr bool kCautious = Flags & 8;
  static constexpr bool kValid =
      Flags < 16 && (kMomentum || !kNesterov) && (kDecoupled || !kCautious);
  static constexpr bool kUncommon = kCautious;
  static constexpr int kStates = 1;
  static constexpr unsigned kSlots = kMomentum ? 0b001 : 0;
  static constexpr unsigned kSecond = 0, kRelative = 0;   // kinds of its states
  static constexpr uint32_t kReducedPrecision = 1u << 2;  // momentum

  struct Hyper {
    float lr, weight_decay, momentum, one_minus_dampening;
  };

  ONEPASS_HD static Hyper derive(const Options& o, const StepOf& step) {
    const double momentum = o.own[0], dampening = o.own[1];
    const double kept = step.first ? 1.0 : 1.0 - dampening;
    return {rounded(o.lr), rounded(decay_of(o, o.lr)), rounded(momentum), rounded(kept)};
  }

  // one_minus_dampening is 1 on the first step, because torch initializes the momentum buffer with
  // the gradient.
  template <class Math = Exact>
  ONEPASS_HD static void update(
      const Hyper& h, float& param, float grad, float& momentum_buffer, Math&& = Math()) {
    if (!kDecoupled) grad = grad + h.weight_decay * param;
    float direction = grad;
    if (kMomentum) {
      momentum_buffer = h.momentum * momentum_buffer + h.one_minus_dampening * grad;
      direction = kNesterov ? grad + h.momentum * momentum_buffer : momentum_buffer;
    }
    float delta = h.lr * direction;
    if (kCautious)
      delta = cautious(delta, h.weight_decay * param, param);
    else if (kDecoupled)
      delta = delta + h.weight_decay * param;
    param = param - delta;
  }
};

}  // namespace onepass
