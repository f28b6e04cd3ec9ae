// RMSprop. Hinton, "Neural networks for machine learning", lecture 6e (2012); centered: Graves,
// "Generating sequences with recurrent neural networks" (2013).
#pragma once

#include "rule.h"

namespace onepass {

// Flag 0: decoupled weight decay; flag 1: momentum; flag 2: centered; flag 3: eps inside the square
// root.
template <unsigned Flags>
struct Rmsprop : RuleDefaults {
  static constexpr bool kDecoupled = Flags & 1;
  static constexpr bool kMomentum = Flags & 2;
  static constexpr bool kCentered = Flags & 4;
  static constexpr bool kEpsInSqrt = Flags & 8;
  static constexpr bool kValid = Flags < 16;
  static constexpr int kStates = 3;
  static constexpr unsigned kSlots = 0b001 | (kMomentum ? 0b010 : 0) | (kCentered ? 0b100 : 0);
  static constexpr unsigned kSecond = 0b001, kRelative = 0;  // kinds of its states

  struct Hyper {
    float lr, weight_decay, alpha, one_minus_alpha, eps, momentum;
  };

  ONEPASS_HD static Hyper derive(const Options& o, const StepOf&) {
    const double alpha = o.own[0], eps = o.own[1], momentum = o.own[2];
    return {rounded(o.lr), rounded(decay_of(o, o.lr)), rounded(alpha), rounded(1.0 - alpha),
            rounded(eps),  rounded(momentum)};
  }

  template <class Math = Exact>
  ONEPASS_HD static void update(
      const Hyper& h, float& param, float grad, float& square_avg, float& momentum_buffer,
      float& grad_avg, Math&& math = Math()) {
    if (!kDecoupled) grad = grad + h.weight_decay * param;
    square_avg = h.alpha * square_avg + h.one_minus_alpha * (grad * grad);
    float variance = square_avg;
    if (kCentered) {
      grad_avg = h.alpha * grad_avg + h.one_minus_alpha * grad;
      variance = square_avg - grad_avg * grad_avg;
      // Rounding can make the variance negative, where torch.optim computes NaN. A NaN is kept.
      variance = variance < 0.0f ? 0.0f : variance;
    }
    const float denom = kEpsInSqrt ? math.sqrt(variance + h.eps) : math.sqrt(variance) + h.eps;
    float direction = math.div_by_root(grad, denom);
    if (kMomentum) {
      momentum_buffer = h.momentum * momentum_buffer + direction;
      direction = momentum_buffer;
    }
    float delta = h.lr * direction;
    if (kDecoupled) delta = delta + h.weight_decay * param;
    param = param - delta;
  }
};

}  // namespace onepass
