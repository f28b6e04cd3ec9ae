// What becomes of a step: the lines of onepass/numerics/verdict.py.
#pragma once

#include "rules/rule.h"

namespace onepass {

struct Verdict {
  double factor;     // what gradients are multiplied by
  double skip;       // 1 when nothing must change, else 0
  double norm;       // of the gradients divided by the scale, before clipping
  double nonfinite;  // gradients that are infinite or NaN
  double skipped;    // steps skipped so far, this one included
  double scale;      // of the loss
};
constexpr int kVerdictWidth = 6;
static_assert(sizeof(Verdict) == kVerdictWidth * sizeof(double), "a row of doubles");

constexpr double kTiny = 1e-6;

// found: sum of squares, largest magnitude, count of non-finite elements; it, scale and found_inf
// may be null. max_norm: negative for none.
ONEPASS_HD Verdict judge(
    const double* found, const float* scale, const float* found_inf, double max_norm, bool largest,
    bool skip_nonfinite, double skipped) {
  const double squares = found ? found[0] : 0.0, top = found ? found[1] : 0.0;
  const double nonfinite = found ? found[2] : 0.0;
  const double unit = scale ? static_cast<double>(*scale) : 1.0;
  // The largest magnitude passes over NaN; the sum of squares does not.
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
