// The curves of the weight compander: the formulas, compiled by every engine.
//
// All are odd, so a curve works with n = |v|. A bounded or logarithmic one is w = scale f(n rate); near zero
// it is w = n slope (1 + a correction), which needs no accurate quotient. Quantities of the whole row
// are kept as sums of two numbers, so that what is rounded is, in the main, the result.
//
// Gradients need three numbers of an element: the derivative in v over its value at zero, and two terms
// F and T, whose sums give the gradients in a and b once a row.
#pragma once

#include <cmath>

#include "reparam/curve_constants.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// In the order of the names in Python.
enum class Kind : int64_t { kArctan, kTanh, kSoftsign, kAsinh, kSymlog, kMuLaw, kPowerprop };

// What the gradients need of an element, for n = |v|.
template <typename A>
struct Slopes {
  A derivative;  // in v, over its scale
  A f, t;        // the terms F and T of the parameters' gradients
};

template <typename A>
struct ParameterGradients {
  double a, b;
};

// What the curves a f(n / b) share.
template <typename A>
struct Scaled {
  A a, b;
  Expansion<A> inverse, slope;  // 1 / b and a / b

  FUSEE_HOST_DEVICE Scaled(A a_, A b_)
      : a(a_), b(b_), inverse(divide(A(1), b_)), slope(divide(a_, b_)) {}

  FUSEE_HOST_DEVICE A near_zero(A n, A correction) const {
    return fused(n, slope.high, n * (slope.high * correction + slope.low));
  }
  FUSEE_HOST_DEVICE A derivative_scale() const { return slope.high; }
  // F is df/da, and T is -df/db over the slope.
  FUSEE_HOST_DEVICE ParameterGradients<A> gradients(double f, double t) const {
    return {f, -static_cast<double>(slope.high) * t};
  }
};

template <Kind kKind, typename A>
struct Curve;

// a arctan(n / b), beyond n = b as a (pi/2 - arctan(b / n)).
template <typename A>
struct Curve<Kind::kArctan, A> : Scaled<A> {
  Expansion<A> top;  // a pi / 2
  A bound;           // the largest number that is not more

  FUSEE_HOST_DEVICE Curve(A a, A b) : Scaled<A>(a, b) {
    top.high = a * Range<A>::kHalfPi;
    const A lost = static_cast<A>(fma(a, Range<A>::kHalfPi, -top.high));
    top.low = lost + a * Range<A>::kHalfPiLow;
    bound = top.low < A(0) ? next_below(top.high) : top.high;
  }

  FUSEE_HOST_DEVICE A value(A n) const {
    const bool inside = n <= this->b;
    const A x = (inside ? n : this->b) / (inside ? this->b : n);
    const A z = x * x;
    const A correction = z * OddSeries<A>::arctan(z);
    const A near = this->near_zero(n, correction);
    // The rounding of x shows here alone.
    const A x_low = fused(-x, n, this->b) * (x * this->inverse.high);
    const A far = fused(-this->a, x, top.high) + fused(-this->a, x * correction + x_low, top.low);
    const A result = inside ? near : n > std::numeric_limits<A>::max() ? top.high : far;
    return result > bound ? bound : result;
  }

  FUSEE_HOST_DEVICE Slopes<A> slopes(A n) const {
    const bool inside = n <= this->b;
    const A x = (inside ? n : this->b) / (inside ? this->b : n);
    const A z = x * x;
    const A angle = x + x * (z * OddSeries<A>::arctan(z));
    const A r = quick_inverse(A(1) + z);
    return {inside ? r : z * r, inside ? angle : Range<A>::kHalfPi - angle, x * r};
  }
};

// a tanh(n / b), beyond n = b as a (1 - 2q / (1 + q)) with q = exp(-2n / b).
template <typename A>
struct Curve<Kind::kTanh, A> : Scaled<A> {
  Expansion<A> rate;  // -2 / (b log(2))
  A limit;            // beyond it the derivative is below the range

  FUSEE_HOST_DEVICE Curve(A a, A b)
      : Scaled<A>(a, b), limit(b * (sizeof(A) == 4 ? A(44.5) : A(355))) {
    constexpr double kTwoOverLog2 = 2.8853900817779268;
    constexpr A kHigh = static_cast<A>(-kTwoOverLog2);
    constexpr A kLow = sizeof(A) == 4 ? static_cast<A>(-kTwoOverLog2 - double(kHigh))
                                      : static_cast<A>(-4.0710547481862066e-17);
    rate = multiply(kHigh, this->inverse);
    rate.low += kLow * this->inverse.high;
  }

  // scale q
  FUSEE_HOST_DEVICE A decayed(A scale, A n) const {
    return Exp2<A>(multiply(n > limit ? limit : n, rate)).times(scale);
  }

  FUSEE_HOST_DEVICE A value(A n) const {
    const A t = n * this->inverse.high;
    const A z = t * t;
    const A near = this->near_zero(n, z * OddSeries<A>::tanh(z));
    const A q = decayed(A(1), n);
    const A far = fused(A(-2) * this->a, q / (A(1) + q), this->a);
    return t <= A(1) ? near : far;
  }

  FUSEE_HOST_DEVICE Slopes<A> slopes(A n) const {
    const A t = (n > limit ? limit : n) * this->inverse.high;
    const A z = t * t;
    const A near = t + t * (z * OddSeries<A>::tanh(z));
    const A four_q = decayed(A(4), n);
    const A r = quick_inverse(A(1) + A(0.25) * four_q);
    const bool inside = t <= A(1);
    const A f = inside ? near : A(1) - A(0.5) * four_q * r;
    const A derivative = inside ? A(1) - near * near : four_q * r * r;
    return {n > limit ? A(0) : derivative, f, t * derivative};
  }
};

// a n / (n + b).
template <typename A>
struct Curve<Kind::kSoftsign, A> : Scaled<A> {
  A limit;  // n beyond it is as good as infinite
  A tiny;

  FUSEE_HOST_DEVICE Curve(A a, A b) : Scaled<A>(a, b), tiny(b * Range<A>::kTiny) {
    const A far = b / (Range<A>::kTiny * Range<A>::kTiny);
    const A most = std::numeric_limits<A>::max() / A(4);
    limit = far < most ? far : most;
  }

  FUSEE_HOST_DEVICE A value(A n) const {
    n = n > limit ? limit : n;
    const A sum = n + this->b;
    const bool larger = n > this->b;
    const A lost = (larger ? this->b : n) - (sum - (larger ? n : this->b));
    const A inverse = A(1) / sum;
    const A q = n * inverse;
    const A q_low = (fused(-q, sum, n) - q * lost) * inverse;
    return n < tiny ? this->near_zero(n, A(0)) : fused(this->a, q, this->a * q_low);
  }

  FUSEE_HOST_DEVICE Slopes<A> slopes(A n) const {
    const A inverse = A(1) / (n + this->b);
    const A rest = this->b * inverse;
    const A f = n <= this->b ? n * inverse : A(1) - rest;
    return {rest * rest, f, f * rest};
  }
};

// n rate beyond the range of numbers, and its logarithm.
template <typename A>
struct WideProduct {
  A high, low;
  A doublings;  // what is missing, as powers of two
  bool huge;

  FUSEE_HOST_DEVICE WideProduct(A n, const Expansion<A>& rate) {
    constexpr A kDown = Range<A>::kDown;
    huge = !(n * rate.high <= Range<A>::kHuge);
    const A scale = huge ? kDown : A(1);
    const Expansion<A> product =
        multiply(n * scale, Expansion<A>{rate.high * scale, rate.low * scale});
    high = product.high;
    low = product.low;
    doublings = huge ? Range<A>::kDoublings : A(0);
  }
};

// a asinh(n / b), beyond n = (3/4) b as a log(t + sqrt(t^2 + 1)).
template <typename A>
struct Curve<Kind::kAsinh, A> : Scaled<A> {
  using Scaled<A>::Scaled;

  FUSEE_HOST_DEVICE Expansion<A> far(A n) const {
    const WideProduct<A> t(n, this->inverse);
    const A square = t.high * t.high;
    const A square_low = fused(t.high, t.high, -square);
    const A sum = square + A(1);
    const A lost = square > A(1) ? A(1) - (sum - square) : square - (sum - A(1));
    const A root = square_root(sum);
    const A root_low =
        (fused(-root, root, sum) + (lost + (square_low + A(2) * t.high * t.low))) / (A(2) * root);
    // Where t is large, the root is t.
    const bool large = t.huge || t.high > A(1) / Range<A>::kTiny;
    const A other = large ? t.high : root;
    const A u = t.high + other;
    const A low = (t.high - (u - other)) + ((large ? t.low : root_low) + t.low);
    return log_pair(u, low / u, t.doublings);
  }

  FUSEE_HOST_DEVICE A near(A n, A& t) const {
    t = n * this->inverse.high;
    const A z = t * t;
    return z * OddSeries<A>::asinh(z);
  }

  FUSEE_HOST_DEVICE A value(A n) const {
    A t;
    const A correction = near(n, t);
    const Expansion<A> log = far(n);
    const A result = fused(this->a, log.high, this->a * log.low);
    return t <= A(0.75)                         ? this->near_zero(n, correction)
           : n <= std::numeric_limits<A>::max() ? result
                                                : n;
  }

  FUSEE_HOST_DEVICE Slopes<A> slopes(A n) const {
    A t;
    const A correction = near(n, t);
    const Expansion<A> log = far(n);
    const bool large = t > A(1) / Range<A>::kTiny;
    const A r = A(1) / (large ? t : square_root(t * t + A(1)));
    const A f = t <= A(0.75)                         ? t + t * correction
                : n <= std::numeric_limits<A>::max() ? log.high + log.low
                                                     : n;
    return {r, f, large ? A(1) : t * r};
  }
};

// scale log(1 + n rate).
template <typename A>
struct Logarithmic {
  Expansion<A> rate, scale, slope;

  FUSEE_HOST_DEVICE Expansion<A> log(A n) const {
    const WideProduct<A> t(n, rate);
    const A u = t.huge ? t.high : A(1) + t.high;
    // What rounding took from u goes back in by the derivative of the logarithm.
    const A lost = t.high < A(1) ? t.high - (u - A(1)) : A(1) - (u - t.high);
    return log_pair(u, (t.huge ? t.low : lost + t.low) / u, t.doublings);
  }

  FUSEE_HOST_DEVICE A value(A n) const {
    const Expansion<A> l = log(n);
    const A result = fused(scale.high, l.high, scale.high * l.low + scale.low * l.high);
    const A tiny = fused(n, slope.high, n * slope.low);
    return n * rate.high < Range<A>::kTiny ? tiny : n <= std::numeric_limits<A>::max() ? result : n;
  }

  FUSEE_HOST_DEVICE Slopes<A> slopes(A n) const {
    const A t = n * rate.high;
    const Expansion<A> l = log(n);
    const A r = A(1) / (A(1) + t);
    const A f = t < Range<A>::kTiny ? t : n <= std::numeric_limits<A>::max() ? l.high + l.low : n;
    return {r, f, t <= A(1) ? t * r : A(1) - r};
  }
  FUSEE_HOST_DEVICE A derivative_scale() const { return slope.high; }
};

// a log(1 + n / b).
template <typename A>
struct Curve<Kind::kSymlog, A> : Logarithmic<A> {
  FUSEE_HOST_DEVICE Curve(A a, A b) : Logarithmic<A>{divide(A(1), b), {a, a - a}, divide(a, b)} {}

  FUSEE_HOST_DEVICE ParameterGradients<A> gradients(double f, double t) const {
    return {f, -static_cast<double>(this->slope.high) * t};
  }
};

// a log(1 + b n / a) / log(1 + b).
template <typename A>
struct Curve<Kind::kMuLaw, A> : Logarithmic<A> {
  double a, b, log_b;

  FUSEE_HOST_DEVICE Curve(A a_, A b_) : a(a_), b(b_), log_b(log1p_nonnegative(double(b_))) {
    this->rate = divide(b_, a_);
    this->scale = split(a / log_b);
    this->slope = split(b / log_b);
  }

  static FUSEE_HOST_DEVICE Expansion<A> split(double x) {
    const A high = static_cast<A>(x);
    return {high, static_cast<A>(x - static_cast<double>(high))};
  }

  FUSEE_HOST_DEVICE ParameterGradients<A> gradients(double f, double t) const {
    return {(f - t) / log_b, (a / b * t - a / (log_b * (1 + b)) * f) / log_b};
  }
};

// a n^b, as a 2^(b log2(n)).
template <typename A>
struct Curve<Kind::kPowerprop, A> {
  A a, b;

  FUSEE_HOST_DEVICE Curve(A a_, A b_) : a(a_), b(b_) {}

  static FUSEE_HOST_DEVICE Expansion<A> log2(A n) {
    const bool small = n < std::numeric_limits<A>::min();
    return log2_pair(small ? n * Range<A>::kUp : n, small ? -Range<A>::kUpDoublings : A(0));
  }
  static FUSEE_HOST_DEVICE bool ordinary(A n) {
    return n > A(0) && n <= std::numeric_limits<A>::max();
  }
  // scale 2^(exponent log)
  static FUSEE_HOST_DEVICE A power(A scale, A exponent, const Expansion<A>& log) {
    constexpr A kMost = Range<A>::kExponents;
    Expansion<A> y = multiply(exponent, log);
    const bool within = !(absolute(y.high) > kMost);
    y.low = within ? y.low : A(0);
    y.high = within ? y.high : y.high < A(0) ? -kMost : kMost;
    return Exp2<A>(y).times(scale);
  }

  FUSEE_HOST_DEVICE A value(A n) const {
    const A result = power(a, b, log2(n));
    return ordinary(n) ? result : n;
  }

  // The derivative is a b n^(b - 1), F is n^b and T is n^b log(n).
  FUSEE_HOST_DEVICE Slopes<A> slopes(A n) const {
    constexpr A kLog2 = static_cast<A>(0.693147180559945309417);
    const Expansion<A> log = log2(n);
    const bool usual = ordinary(n);
    const A f = power(A(1), b, log);
    const A derivative = power(a * b, b - A(1), log);
    // At zero and at infinity.
    const A infinite = std::numeric_limits<A>::infinity();
    const A at_end = (n == A(0)) == (b < A(1)) ? infinite : A(0);
    const A end = n != n ? n : b == A(1) ? a : at_end;
    return {usual ? derivative : end, usual ? f : n, usual ? f * (log.high * kLog2) : n};
  }
  FUSEE_HOST_DEVICE A derivative_scale() const { return A(1); }
  FUSEE_HOST_DEVICE ParameterGradients<A> gradients(double f, double t) const {
    return {f, static_cast<double>(a) * t};
  }
};

// The curve of a row. Parameters that are not positive and finite make all of it NaN.
template <Kind kKind, typename A>
FUSEE_HOST_DEVICE Curve<kKind, A> make_curve(A a, A b) {
  const A most = std::numeric_limits<A>::max();
  const bool valid = a > A(0) && a <= most && b > A(0) && b <= most;
  const A nan = std::numeric_limits<A>::quiet_NaN();
  return Curve<kKind, A>(valid ? a : nan, valid ? b : nan);
}

// The element: w of v.
template <typename Curve, typename A>
FUSEE_HOST_DEVICE A companded(const Curve& curve, A v) {
  return with_sign(curve.value(absolute(v)), v);
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
