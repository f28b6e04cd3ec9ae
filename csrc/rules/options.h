// What derive makes the scalars of a step from: a row of the options table, and float64 arithmetic
// that is IEEE's on every target.
#pragma once

#include "../macros.h"

namespace onepass {

// In the order of the columns of the table (onepass/rules/__init__.py).
struct Options {
  double sign, decoupled, lr, weight_decay;
  double own[3];  // of one rule
  double ema_decay;
};
constexpr int kOptionsWidth = 8;
static_assert(sizeof(Options) == kOptionsWidth * sizeof(double), "a row of doubles");

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

}  // namespace onepass
