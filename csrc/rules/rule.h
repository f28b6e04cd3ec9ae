// What every rule is made of: what derive makes the scalars of a step from, float64 arithmetic that
// is IEEE's on every target, and the call of an update.
//
// A rule is a struct template over its flags (bit f: flag f) with kValid, whether the flags go
// together; kStates, how many states it has at most, and kSlots, a bit for each that these flags
// have; kSecond and kRelative, a bit for each state of that kind (Kind in formats/table.h); Hyper,
// its scalars; derive, which makes them; and update.
#pragma once

#include "../generated/limits.h"
#include "../portability.h"

namespace onepass {

// In the order of the columns of the options table (onepass/rules/base.py).
struct Options {
  double sign, decoupled, lr, weight_decay;
  double own[kMaxOptions];  // of one rule
  double ema_decay;
};
constexpr int kOptionsWidth = 5 + kMaxOptions;
static_assert(sizeof(Options) == kOptionsWidth * sizeof(double), "a row of doubles");

// The step that derive makes scalars for.
struct StepOf {
  int64_t number;  // from 1
  bool first;      // no step has been taken with these states
  double scalar_states[kMaxScalarStates];
};

// What a rule has unless it says otherwise.
struct RuleDefaults {
  // Numbers that a parameter keeps beside its step counter. A rule that has any also has
  // advance(options, number, scalar_states), which brings them to this step.
  static constexpr int kScalarStates = 0;
  // Bit f: flags f have kernels of their own for formats of reduced precision, the fused tiles of
  // cpu/kernels_impl.h and the combinations of cuda/combinations.h. Other flags run the kernels
  // that serve every format.
  static constexpr uint32_t kReducedPrecision = 0;
};

ONEPASS_HD double sqrt_rn(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

ONEPASS_HD double div_rn(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __ddiv_rn(x, y);
#else
  return x / y;
#endif
}

// base to the exponent, by repeated squaring: pow() differs between C libraries and devices.
ONEPASS_HD double power(double base, int64_t exponent) {
  double result = 1.0;
  while (exponent) {
    if (exponent & 1) result = result * base;
    base = base * base;
    exponent >>= 1;
  }
  return result;
}

ONEPASS_HD double decay_of(const Options& o, double lr) {
  return o.decoupled != 0.0 ? lr * o.weight_decay : o.weight_decay;
}

// The one rounding from float64.
ONEPASS_HD float rounded(double value) { return static_cast<float>(value); }

// Updates one element by a rule, with the first kStates of these states.
template <class Rule, class Math = Exact>
ONEPASS_HD void update_element(
    const typename Rule::Hyper& hyper, float& param, float grad, float& state0, float& state1,
    float& state2, float& state3, Math&& math = Math()) {
  static_assert(Rule::kStates >= 1 && Rule::kStates <= kMaxStates, "as many states as fit");
  if constexpr (Rule::kStates == 1) Rule::update(hyper, param, grad, state0, math);
  if constexpr (Rule::kStates == 2) Rule::update(hyper, param, grad, state0, state1, math);
  if constexpr (Rule::kStates == 3) Rule::update(hyper, param, grad, state0, state1, state2, math);
  if constexpr (Rule::kStates == 4)
    Rule::update(hyper, param, grad, state0, state1, state2, state3, math);
}

}  // namespace onepass
