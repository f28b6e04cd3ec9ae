// The momentum of Muon. Jordan et al., "Muon: an optimizer for hidden layers in neural networks"
// (2024).
#pragma once

#include "rule.h"

namespace onepass {

// Flag 0: Nesterov momentum.
template <unsigned Flags>
struct Muon : RuleDefaults {
  static constexpr bool kNesterov = Flags & 1;
  static constexpr bool kValid = Flags < 2;
  static constexpr int kStates = 1;
  static constexpr unsigned kSlots = 0b001;
  static constexpr unsigned kSecond = 0, kRelative = 0;  // kinds of its states
  static constexpr bool kReadsWeight = false;

  // The order is that of Sgd::Hyper: the sweep after the products reads the first two.
  struct Hyper {
    float lr, weight_decay, momentum, one_minus_momentum;
  };

  ONEPASS_HD static Hyper derive(const Options& o, const StepOf&) {
    const double momentum = o.own[0];
    return {
        rounded(o.lr), rounded(o.lr * o.weight_decay), rounded(momentum), rounded(1.0 - momentum)};
  }

  // Writes the direction that is orthogonalised, in place of the weight.
  template <class Math = Exact>
  ONEPASS_HD static void update(
      const Hyper& h, float& param, float grad, float& momentum_buffer, Math&& = Math()) {
    momentum_buffer = h.momentum * momentum_buffer + h.one_minus_momentum * grad;
    float direction = momentum_buffer;
    if (kNesterov) direction = h.momentum * momentum_buffer + h.one_minus_momentum * grad;
    param = direction;
  }
};

}  // namespace onepass
