// Adam and AdamW. Kingma and Ba, "Adam" (2015); Loshchilov and Hutter, "Decoupled weight decay
// regularization" (2019); amsgrad: Reddi, Kale, Kumar, "On the convergence of Adam" (2018).
#pragma once

#include "rule.h"

namespace onepass {

// Flag 0: decoupled weight decay (AdamW); flag 1: amsgrad, with state 2 as max_exp_avg_sq; flag 2:
// cautious weight decay.
template <unsigned Flags>
struct Adam : RuleDefaults {
  static constexpr bool kDecoupled = Flags & 1;
  static constexpr bool kAmsgrad = Flags & 2;
  static constexpr bool kCautious = Flags & 4;
  static constexpr bool kValid = Flags < 8 && (kDecoupled || !kCautious);
  static constexpr bool kUncommon = kCautious;
  static constexpr bool kPaired = !kAmsgrad && !kCautious;
  static constexpr int kStates = 3;
  static constexpr unsigned kSlots = kAmsgrad ? 0b111 : 0b011;
  static constexpr unsigned kSecond = 0b110, kRelative = 0b001;     // kinds of its states
  static constexpr uint32_t kReducedPrecision = 1u << 0 | 1u << 1;  // Adam, AdamW

  // derive folds the bias corrections into two scalars, so that an update has one division and one
  // square root:
  // step_size = lr * sqrt(1 - beta2^t) / (1 - beta1^t), eps = eps * sqrt(1 - beta2^t).
  struct Hyper {
    float step_size, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  };

  ONEPASS_HD static Hyper derive(const Options& o, const StepOf& step) {
    const double beta1 = o.own[0], beta2 = o.own[1], eps = o.own[2];
    const double root = sqrt_rn(1.0 - power(beta2, step.number));
    const double step_size = div_rn(o.lr * root, 1.0 - power(beta1, step.number));
    return {
        rounded(step_size), rounded(decay_of(o, o.lr)), rounded(beta1),     rounded(1.0 - beta1),
        rounded(beta2),     rounded(1.0 - beta2),       rounded(eps * root)};
  }

  template <class T, class Math = Exact>
  ONEPASS_HD static void update(
      const Hyper& h, T& param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq,
      Math&& math = Math()) {
    if constexpr (!kDecoupled) grad = grad + h.weight_decay * param;
    exp_avg = h.beta1 * exp_avg + h.one_minus_beta1 * grad;
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * (grad * grad);
    T second = exp_avg_sq;
    if constexpr (kAmsgrad) {
      max_exp_avg_sq = max_exp_avg_sq >= exp_avg_sq ? max_exp_avg_sq : exp_avg_sq;
      second = max_exp_avg_sq;
    }
    const T denom = math.sqrt_of_state(second) + h.eps;
    T delta = h.step_size * math.div_by_root(exp_avg, denom);
    if constexpr (kCautious)
      delta = cautious(delta, h.weight_decay * param, param);
    else if constexpr (kDecoupled)
      delta = delta + h.weight_decay * param;
    param = param - delta;
  }
};

}  // namespace onepass
