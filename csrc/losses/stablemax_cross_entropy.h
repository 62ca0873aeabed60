// StableMax cross entropy: the formulas of one row, compiled by every engine.
//
// A row has logits x_j, coefficients c_j >= 0 (a one-hot target with class weights and smoothing, or
// a probability vector) with K = sum c_j, and a pivot t: the target class, or the largest c_j. With
// R = S - s_t summed without the pivot's term,
//
//   loss = sum_j c_j (log S - log s_j) + z (log S)^2
//        = K log1p(R / s_t) + sum_j c_j (log s_t - log s_j) + z (log S)^2
//   d loss / d x_j = r_j (A s_j / S - c_j),   A = K + 2 z log S
//
// The form with log1p loses no digits when the target's probability approaches one, where
// log S - log s_t rounds to zero; where the pivot holds most of S its derivative is written with
// Q = R / S for the same reason:
//
//   d loss / d x_t = r_t ((K - c_t) - K Q + 2 z log S s_t / S).
#pragma once

#include "losses/stablemax.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// The numbers that the operators take for `reduction`, as in torch.
constexpr int64_t kReductionNone = 0;
constexpr int64_t kReductionMean = 1;

// Where a row's pivot stands when it is not among the classes at hand.
constexpr int64_t kNoLoss = -1;      // the target is ignored or out of range
constexpr int64_t kOtherBlock = -2;  // the target is a class of another block

// The target of one row: the pivot, the sum K of its coefficients, and K - c_t.
struct Pivot {
  int64_t at;
  double total;
  double remainder;
};

// What the forward pass saves for a row, in the accumulation type.
template <typename A>
struct RowStats {
  A sum;   // S
  A rest;  // Q = R / S
};

struct CrossEntropyOptions {
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
};

// Negative class weights have no meaning here: they poison what they touch.
template <typename A>
FUSEE_HOST_DEVICE A checked_class_weight(A weight) {
  return weight >= A(0) ? weight : std::numeric_limits<A>::quiet_NaN();
}

// The odds R / s_t against the pivot, where `rest` sums the row without it. A float64 R may overflow
// where the quotient does not.
FUSEE_HOST_DEVICE double odds_against(const RowSum& rest, double s_t) {
  return rest.large() ? rest.scaled() / (s_t * 0x1p-64) : rest.value() / s_t;
}

// log1p(R / s_t). Only a float64 row has odds past the range of double; their logarithm is taken apart.
template <typename A>
FUSEE_HOST_DEVICE double log_odds(double odds, const RowSum& rest, A x_t) {
  const double result = log1p_nonnegative(odds);
  if constexpr (sizeof(A) == 8) return odds > 1e300 ? rest.log() - symlog(x_t) : result;
  return result;
}

// Q = R / S from the odds, right from zero to infinity.
FUSEE_HOST_DEVICE double rest_share(double odds) { return 1.0 / (1.0 + 1.0 / odds); }

// z (log S)^2, with log S = log s_t + log1p(R / s_t).
template <typename A>
FUSEE_HOST_DEVICE double z_term(double log_odds, A x_t, double z_loss) {
  const double log_sum = log_odds + symlog(static_cast<double>(x_t));
  return z_loss * log_sum * log_sum;
}

// d loss / d x_j of an ordinary class, from h A / S and h c_j.
template <typename A>
FUSEE_HOST_DEVICE A row_derivative(A x, A over_sum, A coefficient) {
  const A r = reciprocal(x);
  return over_sum * stable_exp_derivative(x, r) - coefficient * r;
}

// The row's factors in the derivative, with the incoming gradient h already multiplied in.
template <typename A>
struct RowGradient {
  A over_sum;      // h A / S
  A pivot;         // h ((K - c_t) - K Q + 2 z log S s_t / S), times r_t the pivot's derivative
  A own;           // h c_t
  bool confident;  // s_t / S > 1/2, where the pivot's derivative cancels unless written with Q

  // `rest` is Q and `remainder` is K - c_t, which the caller knows without cancellation.
  FUSEE_HOST_DEVICE RowGradient(A h, A sum, A rest, double total, double remainder, A z_loss) {
    const A z = z_loss == A(0) ? A(0) : A(2) * z_loss * log_nonnegative(sum);
    const A k = static_cast<A>(total);
    // A row of the most negative numbers has a subnormal S; kept finite, its quotient times r^2 is 0.
    const A quotient = h * (k + z) / sum;
    const A limit = std::numeric_limits<A>::max();
    over_sum = quotient > limit ? limit : quotient < -limit ? -limit : quotient;
    pivot = h * (static_cast<A>(remainder) - k * rest + z * (A(1) - rest));
    own = h * static_cast<A>(total - remainder);
    confident = rest < A(0.5);
  }

  // Of any class, given its h c_j where it is not the pivot.
  FUSEE_HOST_DEVICE A at(A x, A coefficient, bool is_pivot) const {
    const A r = reciprocal(x);
    const A plain = over_sum * stable_exp_derivative(x, r) - (is_pivot ? own : coefficient) * r;
    return is_pivot && confident ? pivot * r : plain;
  }
  FUSEE_HOST_DEVICE A at_pivot(A x) const { return at(x, own, true); }
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
