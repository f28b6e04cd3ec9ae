// Schedule-free AdamW. Defazio et al., "The road less scheduled" (2024).
#pragma once

#include "rule.h"

namespace onepass {

// Flag 0: decoupled weight decay.
template <unsigned Flags>
struct Schedulefree : RuleDefaults {
  static constexpr bool kDecoupled = Flags & 1;
  static constexpr bool kValid = Flags < 2;
  static constexpr int kStates = 2;
  static constexpr unsigned kSlots = 0b11;
  static constexpr unsigned kSecond = 0b10, kRelative = 0, kWeights = 0b01;  // kinds of its states
  static constexpr int kScalarStates = 2;

  // share is the weight of z in the average of the step; step_size and eps include the bias
  // correction.
  struct Hyper {
    float step_size, weight_decay, beta2, one_minus_beta2, eps, share, scale;
  };

  // The learning rate of a step, which rises linearly over the first warmup_steps.
  ONEPASS_HD static double warmed_up(const Options& o, int64_t number) {
    const double step = static_cast<double>(number), warmup_steps = o.own[3];
    return step < warmup_steps ? o.lr * div_rn(step, warmup_steps) : o.lr;
  }

  // weight_sum and lr_max of a step: see onepass/rules/schedulefree.py.
  ONEPASS_HD static void advance(const Options& o, int64_t number, double* scalar_states) {
    const double r = o.own[4], lr_power = o.own[5];
    const double weight_sum = scalar_states[0], lr_max = scalar_states[1];
    double largest = static_cast<double>(static_cast<float>(warmed_up(o, number)));
    if (lr_max > largest) largest = lr_max;
    double sum = 1.0;
    if (largest <= 0.0 && lr_power > 0.0) {
      sum = largest = 0.0;
    } else if (weight_sum > 0.0) {
      double exponent = 0.0;
      if (r > 0.0 && number > 1) {
        const double step = static_cast<double>(number);
        exponent = r * logarithm(div_rn(static_cast<double>(number - 1), step));
      }
      if (lr_power > 0.0 && 0.0 < lr_max && lr_max < largest)
        exponent = exponent + lr_power * logarithm(div_rn(lr_max, largest));
      sum = weight_sum * exponential(exponent) + 1.0;
    }
    scalar_states[0] = sum;
    scalar_states[1] = largest;
  }

  ONEPASS_HD static Hyper derive(const Options& o, const StepOf& step) {
    const double beta1 = o.own[0], beta2 = o.own[1], eps = o.own[2];
    const double weight_sum = step.scalar_states[0];
    const double lr = warmed_up(o, step.number);
    const double root = sqrt_rn(1.0 - power(beta2, step.number));
    const double share = weight_sum > 0.0 ? div_rn(1.0, weight_sum) : 0.0;
    const double scale = 1.0 - beta1 * (1.0 - share);
    return {rounded(lr * root),  rounded(decay_of(o, lr)), rounded(beta2), rounded(1.0 - beta2),
            rounded(eps * root), rounded(share),           rounded(scale)};
  }

  template <class Math = Exact>
  ONEPASS_HD static void update(
      const Hyper& h, float& param, float grad, float& z, float& exp_avg_sq, Math&& math = Math()) {
    if (!kDecoupled) grad = grad + h.weight_decay * param;
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * (grad * grad);
    const float denom = math.sqrt_of_state(exp_avg_sq) + h.eps;
    float delta = h.step_size * math.div_by_root(grad, denom);
    if (kDecoupled) delta = delta + h.weight_decay * param;
    param = param - (h.scale * delta - h.share * (z - param));
    z = z - delta;
  }
};

}  // namespace onepass
