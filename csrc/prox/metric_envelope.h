// The group envelope in a metric of elements: the formulas, compiled by every engine.
//
// With h = H, or H - lam d in the debiased form, and b = lam d, element i of group j becomes
//
//   x_i = v_i H_i u_j / (h_i u_j + b_j),
//
// where the shares u_j in [0, 1] sum up to k and solve, for one number eta of all groups,
//
//   f_j(u_j) = eta,   f_j(u) = 1 / (sqrt(d_j) |H v / (h u + b_j)|),   clipped to [0, 1].
//
// Each f_j rises and is concave, so its tangents lie above it. With a tangent in the place of each f_j the
// shares are clip(alpha_j eta - beta_j, 0, 1), the problem of groups without a metric (see envelope.h, with
// theta = 1 / eta). Its eta is never below the right one, and new tangents at its shares bring it down, from
// every start and at the end quadratically.
#pragma once

#include "prox/envelope.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// Up to four quantities to be summed over the elements of a group.
template <typename A>
struct FourTerms {
  A first = 0, second = 0, third = 0, fourth = 0;
};
using FourSums = FourTerms<double>;

// What a first pass sums: with c = H v, scaled, of c^2, h c^2, H v^2, and of the elements with h <= 0.
struct MetricMeasure {
  using A = double;
  static constexpr int kCoefficients = 2, kSums = 4;

  double bound;  // what h is less than H
  double scale;  // of c, a power of two

  template <typename Get>
  static FUSEE_HOST_DEVICE FourTerms<double> terms(double v, double H, const Get& get) {
    const double h = H - get(0), c = H * v * get(1), square = c * c;
    return {square, h * square, H * v * v, h > 0 ? 0.0 : 1.0};
  }
  FUSEE_HOST_DEVICE double coefficient(int i) const { return i == 0 ? bound : scale; }
};

// What a group's squares are scaled by where they could leave the range of double: a sum of |c|.
struct MetricSize {
  using A = double;
  static constexpr int kCoefficients = 0, kSums = 1;

  template <typename Get>
  static FUSEE_HOST_DEVICE FourTerms<double> terms(double v, double H, const Get&) {
    return {absolute(H * v), 0, 0, 0};
  }
  FUSEE_HOST_DEVICE double coefficient(int) const { return 0; }
};

// The power of two that brings a sum of |c| to about one.
FUSEE_HOST_DEVICE double scale_for(double size) {
  if (!(size > 0 && size <= std::numeric_limits<double>::max())) return 1;
  const int exponent = ilogb(size);
  return ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
}

// A tangent of a group's curve as the root search takes it: the share alpha eta - beta.
struct Tangent {
  double alpha = 0, beta = 0;

  Tangent() = default;
  FUSEE_HOST_DEVICE Tangent(double f, double slope, double u) {
    const double root = f / slope - u;
    alpha = 1 / slope;
    beta = root > 0 ? root : 0;
  }
  static FUSEE_HOST_DEVICE Tangent of(double alpha, double beta) {
    Tangent tangent;
    tangent.alpha = alpha;
    tangent.beta = beta;
    return tangent;
  }

  FUSEE_HOST_DEVICE double share(double eta) const {
    const double u = alpha * eta - beta;
    // NaN stays.
    return u < 0 ? 0 : u > 1 ? 1 : u;
  }
};

// What the search knows of a group.
struct MetricGroup {
  double b, root_weight;  // lam d and sqrt(d)
  bool debiased;
  double size, mean;   // |c|, and the mean of h with weights c^2
  double first, most;  // f and f' at u = 0
  double last, least;  // f and f' at u = 1

  FUSEE_HOST_DEVICE MetricGroup(double weight, double lam, bool debiased_)
      : b(weight == 0 ? 0 : lam * weight), root_weight(square_root(weight)), debiased(debiased_) {
    size = mean = first = most = last = least = 0;
  }

  // What h is less than H; nothing for an infinite lam, with which there is no search.
  FUSEE_HOST_DEVICE double shift() const {
    return debiased && b <= std::numeric_limits<double>::max() ? b : 0;
  }

  FUSEE_HOST_DEVICE void measure(const FourSums& sums, double scale) {
    size = square_root(sums.first) / scale;
    mean = sums.second / sums.first;
    first = b / (root_weight * size);
    most = mean / (root_weight * size);
    last = first + most;  // by the tangent at 0, until it is known
    least = most;
  }

  // Numbers that are not zero and have a weight take part in the search.
  FUSEE_HOST_DEVICE bool counts() const { return size > 0 && root_weight > 0; }

  // The chord between u = 0 and u = 1, whose slope lies between the ends' also where rounding says otherwise.
  FUSEE_HOST_DEVICE Tangent chord() const {
    const double slope = last - first;
    return Tangent(first, slope < least ? least : slope > most ? most : slope, 0);
  }
  FUSEE_HOST_DEVICE Tangent at_end(double u) const {
    return u > 0 ? Tangent(last, least, 1) : Tangent(first, most, 0);
  }
};

// The pass over a group's elements at a share u sums, with y = c / (h u + b) in units in which |y| is about
// one, y^2, (h / (h u + b)) y^2, and how much less y^2 is than at u = 0, which tells f(u) from f(0) where
// they are close. The products are ordered so that float does for c and h of many decades.
template <typename A_>
struct MetricCurve {
  using A = A_;
  static constexpr int kCoefficients = 6, kSums = 3;

  A rise, base, inverse, of_v, shift, ratio;
  double unit, fall;  // f = unit / sqrt(sum of y^2), and h / (h u + b) in units of the pass

  FUSEE_HOST_DEVICE MetricCurve(const MetricGroup& g, double u) {
    const double q = 1 / (g.b + g.mean * u);
    // f is concave, and below its tangent at 0: of the order of the mean of what bounds it.
    const double chord = u * g.last > g.first ? u * g.last : g.first;
    const double tangent = g.first + u * g.most;
    const double guess = square_root(chord) * square_root(tangent < g.last ? tangent : g.last);
    constexpr double kMost = std::is_same_v<A, float> ? 1e37 : 1e300;
    const double of_c = guess * q * g.root_weight * g.mean;
    rise = static_cast<A>(q * u);
    base = static_cast<A>(q * (g.debiased ? g.b * (1 - u) : g.b));
    inverse = static_cast<A>(1 / g.mean);
    of_v = static_cast<A>(of_c < kMost ? of_c : kMost);
    shift = static_cast<A>(g.shift() / g.mean);
    ratio = static_cast<A>(g.mean / g.b * u);
    unit = static_cast<double>(of_v) * static_cast<double>(inverse) / (q * g.root_weight);
    fall = q / static_cast<double>(inverse);
  }

  FUSEE_HOST_DEVICE A coefficient(int i) const {
    return i == 0   ? rise
           : i == 1 ? base
           : i == 2 ? inverse
           : i == 3 ? of_v
           : i == 4 ? shift
                    : ratio;
  }

  template <typename Get>
  static FUSEE_HOST_DEVICE FourTerms<A> terms(A v, A H, const Get& get) {
    const A below = A(1) / (H * get(0) + get(1));
    const A scaled = H * get(2), h = scaled - get(4);
    const A y = (v * get(3)) * (scaled * below);
    const A square = y * y, excess = h * get(5);
    return {square, h * below * square, square * (excess * (excess + A(2))), A(0)};
  }

  // f and f' at the share.
  struct Value {
    double f, slope;
  };
  FUSEE_HOST_DEVICE Value value(const MetricGroup& g, const FourSums& sums) const {
    double f = unit / square_root(sums.first);
    if (sums.third < sums.first) {
      const double part = g.first / unit;
      f = g.first / square_root(1 - sums.third * part * part);
    }
    return {f, f * (sums.second / sums.first) * fall};
  }
};

// The end of the work on a group: what its elements become.
struct MetricScale {
  // Beside the shares from 0 to 1.
  static constexpr double kKeep = 2;

  double rise, base;

  // NaN goes through.
  FUSEE_HOST_DEVICE MetricScale(const MetricGroup& g, double share) : rise(1), base(0) {
    if (share == kKeep) return;
    const double q = 1 / (g.b + g.mean * share);
    rise = share == 0 ? 0 : q * share;
    base = share == 0 ? 1 : q * (g.debiased ? g.b * (1 - share) : g.b);
  }

  template <typename A>
  static FUSEE_HOST_DEVICE A scaled(A v, A H, A rise, A base) {
    const A part = H * rise;
    const A scale = part / (part + base);
    return scale == A(0) ? A(0) : v * scale;
  }
};

// What becomes of a scope.
enum class MetricCourse : int { kSearch, kProject, kKeep, kZero, kBroken };

// What decides of that: sums over all groups of a scope.
struct MetricCounts {
  double broken = 0;   // groups of which a sum is not finite
  double wrong = 0;    // groups with a weight and h <= 0
  double weights = 0;  // groups with a weight

  FUSEE_HOST_DEVICE void add(const FourSums& sums, double weight) {
    broken += sums.first - sums.first == 0 && weight == weight ? 0 : 1;
    wrong += weight > 0 && sums.fourth > 0 ? 1 : 0;
    weights += weight > 0 ? 1 : 0;
  }

  FUSEE_HOST_DEVICE MetricCourse course(Form form, double k, double lam) const {
    const bool infinite = lam > std::numeric_limits<double>::max();
    if (broken > 0 || k != k || lam != lam) return MetricCourse::kBroken;
    if (form == Form::kProjection) return MetricCourse::kProject;
    if (form == Form::kDebiased && (wrong > 0 || (infinite && weights > 0)))
      return MetricCourse::kProject;
    if (lam == 0) return MetricCourse::kKeep;
    return k > 0 && !infinite ? MetricCourse::kSearch : MetricCourse::kZero;
  }
};

// Whether a step of the search leaves the share right to the precision of A. As u f'' / f' lies in [-3, 0], a
// relative step of e leaves an error of about e squared.
template <typename A>
FUSEE_HOST_DEVICE bool is_close(double before, double after, const Tangent& tangent) {
  constexpr double kEps = std::numeric_limits<A>::epsilon();
  constexpr double kClose = sizeof(A) == 4 ? 1.5e-4 : 7e-9;
  const double larger = before > after ? before : after;
  return !(absolute(after - before) > kClose * larger + kEps * tangent.beta);
}

// How many steps a search takes at most.
constexpr int kMetricSteps = 60;

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
