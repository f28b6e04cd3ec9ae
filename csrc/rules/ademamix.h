// AdEMAMix. Pagliardini, Ablin, Grangier, "The AdEMAMix optimizer: better, faster, older" (2024).
#pragma once

#include "rule.h"

namespace onepass {

// Flag 0: decoupled weight decay.
template <unsigned Flags>
struct Ademamix : RuleDefaults {
  static constexpr bool kDecoupled = Flags & 1;
  static constexpr bool kValid = Flags < 2;
  static constexpr int kStates = 3;
  static constexpr unsigned kSlots = 0b111;
  static constexpr unsigned kSecond = 0b100, kRelative = 0b011;  // kinds of its states

  // derive folds the bias corrections and alpha into the step sizes and eps, so that an update has
  // one division and one square root.
  struct Hyper {
    float fast_size, slow_size, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, beta3,
        one_minus_beta3, eps;
  };

  ONEPASS_HD static Hyper derive(const Options& o, const StepOf& step) {
    const double beta1 = o.own[0], beta2 = o.own[1], eps = o.own[3];
    const double t_alpha = o.own[5], t_beta3 = o.own[6];
    const double log_beta1 = o.own[7], log_beta3 = o.own[8];
    const double number = static_cast<double>(step.number);
    double beta3 = o.own[2], alpha = o.own[4];
    if (number < t_alpha) alpha = alpha * div_rn(number, t_alpha);
    if (number < t_beta3) {
      const double part = div_rn(number, t_beta3);
      const double mixed = (1.0 - part) * log_beta3 + part * log_beta1;
      beta3 = exponential(div_rn(log_beta1 * log_beta3, mixed));
    }
    const double root = sqrt_rn(1.0 - power(beta2, step.number));
    const double fast_size = div_rn(o.lr * root, 1.0 - power(beta1, step.number));
    const double slow_size = o.lr * root * alpha;
    return {rounded(fast_size),   rounded(slow_size), rounded(decay_of(o, o.lr)), rounded(beta1),
            rounded(1.0 - beta1), rounded(beta2),     rounded(1.0 - beta2),       rounded(beta3),
            rounded(1.0 - beta3), rounded(eps * root)};
  }

  template <class Math = Exact>
  ONEPASS_HD static void update(
      const Hyper& h, float& param, float grad, float& exp_avg, float& exp_avg_slow,
      float& exp_avg_sq, Math&& math = Math()) {
    if (!kDecoupled) grad = grad + h.weight_decay * param;
    exp_avg = h.beta1 * exp_avg + h.one_minus_beta1 * grad;
    exp_avg_slow = h.beta3 * exp_avg_slow + h.one_minus_beta3 * grad;
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * (grad * grad);
    const float denom = math.sqrt_of_state(exp_avg_sq) + h.eps;
    float delta = math.div_by_root(h.fast_size * exp_avg + h.slow_size * exp_avg_slow, denom);
    if (kDecoupled) delta = delta + h.weight_decay * param;
    param = param - delta;
  }
};

}  // namespace onepass
