// NAdam. Dozat, "Incorporating Nesterov momentum into Adam" (2016), with the momentum schedule of
// torch.optim.NAdam.
#pragma once

#include "rule.h"

namespace onepass {

// Flag 0: decoupled weight decay; flag 1: cautious weight decay.
template <unsigned Flags>
struct Nadam : RuleDefaults {
  static constexpr bool kDecoupled = Flags & 1;
  static constexpr bool kCautious = Flags & 2;
  static constexpr bool kValid = Flags < 4 && (kDecoupled || !kCautious);
  static constexpr bool kUncommon = kCautious;
  static constexpr int kStates = 2;
  static constexpr unsigned kSlots = 0b11;
  static constexpr unsigned kSecond = 0b10, kRelative = 0b01;  // kinds of its states
  static constexpr int kScalarStates = 1;                      // mu_product

  // derive folds the bias corrections into three scalars, so that an update has one division and
  // one square root.
  struct Hyper {
    float grad_size, avg_size, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  };

  // mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2)
  ONEPASS_HD static double momentum(const Options& o, int64_t number) {
    const double beta1 = o.own[0], warm_up = o.own[3];
    return beta1 * (1.0 - 0.5 * power(warm_up, number));
  }

  // mu_product is the product of mu_1 to mu_t.
  ONEPASS_HD static void advance(const Options& o, int64_t number, double* scalar_states) {
    scalar_states[0] = scalar_states[0] * momentum(o, number);
  }

  ONEPASS_HD static Hyper derive(const Options& o, const StepOf& step) {
    const double beta1 = o.own[0], beta2 = o.own[1], eps = o.own[2];
    const double mu = momentum(o, step.number), mu_next = momentum(o, step.number + 1);
    const double mu_product = step.scalar_states[0];
    const double root = sqrt_rn(1.0 - power(beta2, step.number));
    const double scale = o.lr * root;
    const double grad_size = div_rn(scale * (1.0 - mu), 1.0 - mu_product);
    const double avg_size = div_rn(scale * mu_next, 1.0 - mu_product * mu_next);
    return {rounded(grad_size),   rounded(avg_size),    rounded(decay_of(o, o.lr)),
            rounded(beta1),       rounded(1.0 - beta1), rounded(beta2),
            rounded(1.0 - beta2), rounded(eps * root)};
  }

  template <class Math = Exact>
  ONEPASS_HD static void update(
      const Hyper& h, float& param, float grad, float& exp_avg, float& exp_avg_sq,
      Math&& math = Math()) {
    if (!kDecoupled) grad = grad + h.weight_decay * param;
    exp_avg = h.beta1 * exp_avg + h.one_minus_beta1 * grad;
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * (grad * grad);
    const float denom = math.sqrt_of_state(exp_avg_sq) + h.eps;
    float delta = math.div_by_root(h.grad_size * grad + h.avg_size * exp_avg, denom);
    if (kCautious)
      delta = cautious(delta, h.weight_decay * param, param);
    else if (kDecoupled)
      delta = delta + h.weight_decay * param;
    param = param - delta;
  }
};

}  // namespace onepass
