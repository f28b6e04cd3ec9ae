// The parts that all rules share: the arguments of derive, float64 arithmetic that is IEEE on every
// target, and update_element, which calls the update of a rule.
//
// A rule is a struct template over its flags; bit f of the argument is flag f. Its members:
//   kValid               whether this combination of flags is valid
//   kStates              the number of states with all flags set
//   kSlots               bit k: state k exists with these flags
//   kSecond, kRelative   bit k: state k is of that kind (Kind in formats/blocks.h)
//   kWeights             bit k: state k is a second weight; see RuleDefaults
//   Hyper, derive        the fp32 scalars of a step, and the function that computes them
//   update               the step of one element
#pragma once

#include "../generated/limits.h"
#include "../portability.h"

namespace onepass {

// A row of the options table; the members are its columns in order (onepass/rules/base.py).
struct Options {
  double sign, decoupled, lr, weight_decay;
  double own[kMaxOptions];  // of one rule
  double ema_decay;
};
constexpr int kOptionsWidth = 5 + kMaxOptions;
static_assert(sizeof(Options) == kOptionsWidth * sizeof(double), "a row of doubles");

// The step for which derive computes scalars.
struct StepOf {
  int64_t number;  // counted from 1
  bool first;      // whether this is the first step with these states
  double scalar_states[kMaxScalarStates];
};

// Default values of the members of a rule.
struct RuleDefaults {
  // The number of scalar states, which a parameter stores beside its step counter. A rule with
  // scalar states defines advance(options, number, scalar_states), which updates them to a step.
  static constexpr int kScalarStates = 0;
  // Bit f: with flags f the rule has specialised kernels for reduced-precision formats: the fused
  // tiles of cpu/tiles_impl.h and the combinations of cuda/combinations.h. With other flags,
  // these formats run the kernels that serve every format.
  static constexpr uint32_t kReducedPrecision = 0;
  // States that are weights, which formats with blocks store in fp32 (StateFormat.for_weights).
  static constexpr unsigned kWeights = 0;
  // Whether update reads the weight. If not, CUDA kernels do not prefetch it.
  static constexpr bool kReadsWeight = true;
  // Whether these flags run only the kernels that serve all flags and formats: the fp32 loop of the
  // CPU, and the kernel of a rule that reads flags and formats from each chunk on CUDA.
  static constexpr bool kUncommon = false;
  // Whether update also takes the elements as pairs (cuda/float_pair.cuh), which have no
  // comparisons.
  static constexpr bool kPaired = false;
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

// base to the power of exponent, by repeated squaring. pow() differs between C libraries and
// devices.
ONEPASS_HD double power(double base, int64_t exponent) {
  double result = 1.0;
  while (exponent) {
    if (exponent & 1) result = result * base;
    base = base * base;
    exponent >>= 1;
  }
  return result;
}

// e^x for a finite x <= 0 by IEEE operations: see onepass/rules/base.py.
ONEPASS_HD double exponential(double x) {
  int halvings = 0;
  while (x < -0.0625) {
    x = x * 0.5;
    ++halvings;
  }
  double result = 1.0;
  for (int k = 10; k > 0; --k) result = 1.0 + div_rn(result * x, static_cast<double>(k));
  for (int i = 0; i < halvings; ++i) result = result * result;
  return result;
}

// The natural logarithm of x in (0, 1] by IEEE operations: see onepass/rules/base.py.
ONEPASS_HD double logarithm(double x) {
  int doublings = 0;
  while (x < 0.5 && doublings < 1100) {
    x = x * 2.0;
    ++doublings;
  }
  const double part = div_rn(x - 1.0, x + 1.0);
  const double square = part * part;
  double series = 0.0;
  for (int k = 41; k > 0; k -= 2) series = series * square + div_rn(1.0, static_cast<double>(k));
  return 2.0 * part * series - 0.6931471805599453 * static_cast<double>(doublings);
}

// The weight-decay coefficient: lr * weight_decay if decoupled, else weight_decay.
ONEPASS_HD double decay_of(const Options& o, double lr) {
  return o.decoupled != 0.0 ? lr * o.weight_decay : o.weight_decay;
}

// Rounds a scalar from float64 to fp32.
ONEPASS_HD float rounded(double value) { return static_cast<float>(value); }

// delta + decayed where delta * param >= 0, else delta: see onepass/rules/base.py.
ONEPASS_HD float cautious(float delta, float decayed, float param) {
  const bool opposed = (delta < 0.0f && param > 0.0f) || (delta > 0.0f && param < 0.0f);
  return opposed ? delta : delta + decayed;
}

// Updates one element, or a pair if the rule is kPaired. Passes the first kStates of the four
// states to the rule.
template <class Rule, class T, class Math = Exact>
ONEPASS_HD void update_element(
    const typename Rule::Hyper& hyper, T& param, T grad, T& state0, T& state1, T& state2, T& state3,
    Math&& math = Math()) {
  static_assert(
      Rule::kStates >= 1 && Rule::kStates <= kMaxStates, "a rule has 1 to kMaxStates states");
  if constexpr (Rule::kStates == 1) Rule::update(hyper, param, grad, state0, math);
  if constexpr (Rule::kStates == 2) Rule::update(hyper, param, grad, state0, state1, math);
  if constexpr (Rule::kStates == 3) Rule::update(hyper, param, grad, state0, state1, state2, math);
  if constexpr (Rule::kStates == 4)
    Rule::update(hyper, param, grad, state0, state1, state2, state3, math);
}

}  // namespace onepass
