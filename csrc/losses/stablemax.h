// StableMax: the formulas, compiled by every engine.
//
//   s(x) = 1 + x        for x >= 0        StableMax(x)_j = s(x_j) / S,   S = sum_k s(x_k)
//   s(x) = 1 / (1 - x)  for x <  0
//
// With r(x) = 1 / (1 + |x|) the derivative is s'(x) = r s, and log s(x) = sign(x) log(1 + |x|).
// Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv:2501.04697.
#pragma once

#include "core/precise.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// r(x) = 1 / (1 + |x|), in (0, 1].
template <typename A>
FUSEE_HOST_DEVICE A reciprocal(A x) {
  return A(1) / (A(1) + absolute(x));
}
#if defined(__CUDA_ARCH__)
// A quarter of the denominator is within the range of the quick inverse.
template <>
FUSEE_HOST_DEVICE float reciprocal<float>(float x) {
  return 0.25f * quick_inverse(fmaf(absolute(x), 0.25f, 0.25f));
}
#endif

template <typename A>
FUSEE_HOST_DEVICE A stable_exp(A x) {
  return x >= A(0) ? A(1) + x : reciprocal(x);
}

// s'(x) = s(x) r(x), simplified so that infinite x gives no 0 * inf.
template <typename A>
FUSEE_HOST_DEVICE A stable_exp_derivative(A x, A r) {
  return x >= A(0) ? A(1) : r * r;
}

// log s(x), the "symlog" of x.
template <typename A>
FUSEE_HOST_DEVICE A symlog(A x) {
  const A magnitude = log1p_nonnegative(absolute(x));
  return x >= A(0) ? magnitude : -magnitude;
}

// The terms of S = sum_j s(x_j).
//
// Terms of positive x can reach the largest finite number and terms of negative x the smallest, so
// the two are kept apart, the first scaled down: neither overflows below 2^24 (2^64) terms.
template <typename A>
struct StableSum {
  static constexpr A kScale = sizeof(A) == 4 ? A(0x1p-24) : A(0x1p-64);

  static FUSEE_HOST_DEVICE A positive_term(A x) { return x >= A(0) ? kScale + x * kScale : A(0); }
  // A NaN fails the comparison and so lands here, and stays.
  static FUSEE_HOST_DEVICE A negative_term(A x) { return x >= A(0) ? A(0) : reciprocal(x); }
};

// The same sum over a whole row, in double, together with what must not overflow on the way.
struct RowSum {
  double positive = 0;  // times 2^-64
  double negative = 0;

  // From the two sums of StableSum<A>.
  template <typename A>
  static FUSEE_HOST_DEVICE RowSum from(double positive, double negative) {
    return {positive * (sizeof(A) == 4 ? 0x1p-40 : 1.0), negative};
  }

  // The sum itself from the same two.
  template <typename A>
  static FUSEE_HOST_DEVICE double value_from(double positive, double negative) {
    return positive * (sizeof(A) == 4 ? 0x1p24 : 0x1p64) + negative;
  }

  // S itself; finite for finite float logits, while a float64 row may round to infinity.
  FUSEE_HOST_DEVICE double value() const { return positive * 0x1p64 + negative; }
  FUSEE_HOST_DEVICE double scaled() const { return positive + negative * 0x1p-64; }

  FUSEE_HOST_DEVICE bool large() const {
    return positive > 1.0 && positive <= std::numeric_limits<double>::max();
  }

  FUSEE_HOST_DEVICE double log() const {
    return large() ? log_nonnegative(scaled()) + 64 * 0.693147180559945309417
                   : log_nonnegative(value());
  }
};

// s_j / S as (s_j * unit) / total, where neither S, nor its inverse, nor the quotient overflows in A.
template <typename A>
struct Normalizer {
  A unit, total, inverse;

  Normalizer() = default;
  FUSEE_HOST_DEVICE explicit Normalizer(const RowSum& sum)
      : Normalizer(sum.large()          ? A(0x1p-64)
                   : small(sum.value()) ? A(0x1p64)
                                        : A(1),
                   sum.large()          ? sum.scaled()
                   : small(sum.value()) ? sum.value() * 0x1p64
                                        : sum.value()) {}
  // From the saved S, which is infinite only where every quotient may round to zero.
  FUSEE_HOST_DEVICE explicit Normalizer(double sum)
      : Normalizer(sum > 0x1p64 ? A(0x1p-64)
                   : small(sum) ? A(0x1p64)
                                : A(1),
                   sum > 0x1p64 ? sum * 0x1p-64
                   : small(sum) ? sum * 0x1p64
                                : sum) {}

  FUSEE_HOST_DEVICE A operator()(A term) const {
    const A scaled = term * unit;
#if defined(__CUDA_ARCH__) || defined(FUSEE_EMULATED)
    // The steps of a division that differ from term to term.
    const A quotient = scaled * inverse;
    const A corrected = fused(fused(-quotient, total, scaled), inverse, quotient);
    return total <= std::numeric_limits<A>::max() ? corrected : quotient;
#else
    return scaled / total;
#endif
  }

 private:
  FUSEE_HOST_DEVICE Normalizer(A unit_, double total_)
      : unit(unit_), total(static_cast<A>(total_)), inverse(A(1) / total) {}
  static FUSEE_HOST_DEVICE bool small(double sum) { return sum < 0x1p-64; }
};

// log(s_j / S). The logarithm of the quotient is right where the share is near one and the logarithms
// would cancel; their difference, with log s_j = +-log(1 + |x|), is right where the quotient would
// underflow.
template <typename A>
FUSEE_HOST_DEVICE A log_share(A x, const Normalizer<A>& normalize, A log_sum) {
  const A u = A(1) + absolute(x);
  const A share = normalize(x >= A(0) ? u : reciprocal(x));
  const bool tiny = share < A(1e-30);
  const A argument = tiny ? u : share;
  // Infinity and NaN go through as what is added last.
  const A log = log_normal(argument, argument <= std::numeric_limits<A>::max() ? A(0) : argument);
  return tiny ? (x >= A(0) ? log : -log) - log_sum : log;
}

// d output / d input of one element, given the row's dot product:
//   StableMax:      dx_j = s'_j / S (g_j - sum_k g_k y_k)
//   log StableMax:  dx_j = r_j g_j - s'_j / S sum_k g_k
template <typename A>
FUSEE_HOST_DEVICE A stablemax_derivative(A x, A g, A dot, A inverse_sum, bool log) {
  const A r = reciprocal(x);
  const A slope = stable_exp_derivative(x, r) * inverse_sum;
  return log ? r * g - slope * dot : slope * (g - dot);
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
