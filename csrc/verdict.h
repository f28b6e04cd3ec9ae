// The verdict on a step: whether it is skipped, and the factor of its gradients (loss scale and
// clipping). The arithmetic has the line order of onepass/numerics/verdict.py.
#pragma once

#include "rules/rule.h"

namespace onepass {

// One verdict, in the column order of verdict.py.
struct Verdict {
  double factor;     // gradients are multiplied by this
  double skip;       // 1 if the step changes nothing, else 0
  double norm;       // of the gradients divided by the loss scale, before clipping
  double nonfinite;  // number of infinite or NaN gradients
  double skipped;    // number of skipped steps so far, this one included
  double scale;      // the loss scale
};
constexpr int kVerdictWidth = 6;
static_assert(sizeof(Verdict) == kVerdictWidth * sizeof(double), "a row of doubles");

constexpr double kTiny = 1e-6;  // added to the norm that max_norm is divided by

// Decides on a step. found points to the sum of squares, the largest magnitude and the number of
// non-finite elements of the gradients. found, scale and found_inf may be null. A negative max_norm
// turns clipping off; largest selects the largest magnitude as the norm.
ONEPASS_HD Verdict judge(
    const double* found, const float* scale, const float* found_inf, double max_norm, bool largest,
    bool skip_nonfinite, double skipped) {
  const double squares = found ? found[0] : 0.0, top = found ? found[1] : 0.0;
  const double nonfinite = found ? found[2] : 0.0;
  const double unit = scale ? static_cast<double>(*scale) : 1.0;
  // The largest magnitude ignores NaN; the sum of squares does not.
  double norm = largest ? (squares == squares ? top : squares) : sqrt_rn(squares);
  norm = div_rn(norm, unit);
  double coefficient = 1.0;
  if (max_norm >= 0.0) {
    coefficient = div_rn(max_norm, norm + kTiny);
    if (coefficient > 1.0) coefficient = 1.0;
  }
  const double factor = div_rn(coefficient, unit);
  const bool skip = (found_inf && *found_inf != 0.0f) || (skip_nonfinite && nonfinite != 0.0);
  return {factor, skip ? 1.0 : 0.0, norm, nonfinite, skipped + (skip ? 1.0 : 0.0), unit};
}

}  // namespace onepass
