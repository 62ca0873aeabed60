// The group envelope: the formulas, compiled by every engine.
//
// Groups j have norms n_j, weights d_j and, in a metric, a positive number H_j (one without). The proximal
// operator scales group j by
//
//   s_j = max(0, min(H_j / (h_j + lam d_j), (H_j - lam theta sqrt(d_j) / n_j) / h_j))
//
// with h_j = H_j - lam d_j in the debiased form and h_j = H_j otherwise. The scalar theta >= 0 solves
//
//   sum_j clip(a_j / theta - b_j, 0, 1) = k,   a_j = sqrt(d_j) n_j H_j / h_j,   b_j = lam d_j / h_j,
//
// and is zero where at most k groups are not. The envelope's value needs the same root for b = 0.
// A group of weight zero is not penalised: it stays as it is, and does not count.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/math.h"
#include "core/precise.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// In the order of the numbers in Python. The projection onto at most k groups is what the debiased form
// becomes for lam d = H, and takes its place beyond.
enum class Form : int64_t { kEnvelope, kDebiased, kProjection };

// What the root search needs to know of a group.
template <typename A>
struct Coefficients {
  A a, b;
};

enum class State : int { kZero, kMiddle, kSaturated };

// A group but for its norm.
template <typename A>
struct Group {
  A weight, root_weight;  // d and sqrt(d)
  A metric, inner;        // H and h
  A lam;

  FUSEE_HOST_DEVICE Group(A weight_, A metric_, A lam_, bool debiased)
      : weight(weight_),
        root_weight(square_root(weight_)),
        metric(metric_),
        inner(debiased && weight_ != A(0) ? metric_ - lam_ * weight_ : metric_),
        lam(lam_) {}

  FUSEE_HOST_DEVICE Coefficients<A> coefficients(A norm) const {
    return {root_weight * norm * (metric / inner), lam * weight / inner};
  }

  // What the projection keeps the largest of.
  FUSEE_HOST_DEVICE A key(A norm) const { return root_weight * norm * square_root(metric); }

  // theta is a double, as it may leave the range of A where what it is multiplied with does not.
  FUSEE_HOST_DEVICE State state(A norm, double theta) const {
    const Coefficients<A> c = coefficients(norm);
    const double a = c.a, b = c.b;
    // Without a penalty the operator is the identity, also where nothing is.
    const bool identity = weight == A(0) || (lam == A(0) && norm == A(0));
    const bool saturated = !(a < (1 + b) * theta) || identity;
    return saturated ? State::kSaturated : a > b * theta ? State::kMiddle : State::kZero;
  }

  // The scale of a saturated group; the debiased form keeps it bit for bit.
  FUSEE_HOST_DEVICE A most() const {
    return weight == A(0) || inner != metric ? A(1) : metric / (metric + lam * weight);
  }
};

// The scale of a group at theta, of which only the norm is left to know.
template <typename A>
struct Scaler {
  A metric, inner, most, threshold, at_ends;

  FUSEE_HOST_DEVICE Scaler(const Group<A>& group, double theta)
      : metric(group.metric), inner(group.inner), most(group.most()) {
    const double of_lam = static_cast<double>(group.lam) * theta;
    // A group without weight has no threshold, but NaN in theta reaches every group.
    const bool free = group.weight == A(0) && theta == theta;
    threshold = free ? A(0) : static_cast<A>(of_lam) * group.root_weight;
    at_ends = threshold == threshold ? most : threshold;
  }

  FUSEE_HOST_DEVICE A operator()(A norm) const {
    const A middle = (metric - threshold / norm) / inner;
    const A least = middle > most ? most : middle;
    const A inside = least < A(0) ? A(0) : least;
    return norm == A(0) || norm > std::numeric_limits<A>::max() ? at_ends : inside;
  }
};

// What the search, or the selection of the projection, found for a problem: three doubles in memory.
struct Root {
  double theta;       // or the least key that is kept
  double last;        // the last group that is kept of those with that key
  double projection;  // one or zero

  static constexpr int kNumbers = 3;

  // What a search found. Without a penalty an infinite group is no threshold for others.
  static FUSEE_HOST_DEVICE Root of_theta(double theta, double lam) {
    return {lam == 0 && theta > std::numeric_limits<double>::max() ? 0 : theta, 0, 0};
  }

  FUSEE_HOST_DEVICE bool projects() const { return projection != 0; }

  template <typename A>
  FUSEE_HOST_DEVICE bool keeps(const Group<A>& group, A norm, int64_t j) const {
    const double key = static_cast<double>(group.key(norm));
    return key > theta || (key == theta && static_cast<double>(j) <= last) || group.weight == A(0);
  }

  template <typename A>
  FUSEE_HOST_DEVICE A scale(const Group<A>& group, A norm, int64_t j) const {
    if (!projects()) return Scaler<A>(group, theta)(norm);
    return theta != theta ? static_cast<A>(theta) : keeps(group, norm, j) ? A(1) : A(0);
  }

  template <typename A>
  FUSEE_HOST_DEVICE State state(const Group<A>& group, A norm, int64_t j) const {
    if (!projects()) return group.state(norm, theta);
    return keeps(group, norm, j) ? State::kSaturated : State::kZero;
  }
};

// By which numbers are multiplied whose sum would leave the range of double.
constexpr double kDownScale = 0x1p-64;

// The search for theta: Newton on the partition of the groups, kept in a bracket. The function of theta
// falls, and is neither convex nor concave, so that Newton alone would not be safe; a step that leaves the
// bracket becomes the geometric mean of its ends, theta being a scale.
class RootSearch {
 public:
  // What a first pass sums over the groups that are neither zero nor without weight.
  struct Totals {
    double count = 0, infinite = 0;
    double a = 0, b = 0;  // over the finite
  };
  struct Start : Totals {
    double least = 0;  // min a / (1 + b), infinity if there are none
  };
  // What one pass sums at theta.
  struct Sums {
    double saturated = 0, middle = 0;  // how many
    double a = 0, b = 0;               // over the middle
  };

  FUSEE_HOST_DEVICE RootSearch(double k, const Start& start) : k_(k) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    if (!(start.a - start.a == 0) || k != k || start.b != start.b) {
      finish(std::numeric_limits<double>::quiet_NaN());
    } else if (start.count <= k) {
      finish(0);
    } else if (k <= start.infinite) {
      finish(kInfinity);
    } else {
      // Zero, where a quotient has underflown, would not be a scale.
      low_ = start.least > 0 ? start.least : std::numeric_limits<double>::denorm_min();
      high_ = start.a / (k - start.infinite);
      theta_ = start.a / (k - start.infinite + start.b);
      if (!(theta_ > low_)) theta_ = low_;
      if (theta_ == 0) finish(0);  // the sums have underflown
    }
  }

  FUSEE_HOST_DEVICE bool done() const { return done_; }
  FUSEE_HOST_DEVICE double theta() const { return theta_; }
  FUSEE_HOST_DEVICE int passes() const { return passes_; }

  FUSEE_HOST_DEVICE void step(const Sums& sums) {
    const double rest = k_ - sums.saturated + sums.b;
    const double value = sums.a - rest * theta_;  // has the sign of the function's less k
    ++passes_;
    if (sums.middle == 0 && sums.saturated == k_) return finish(theta_);
    const double next = rest > 0 ? sums.a / rest : std::numeric_limits<double>::infinity();
    constexpr double kClose = 4 * std::numeric_limits<double>::epsilon();
    if (sums.middle != 0 && absolute(next - theta_) <= kClose * theta_) return finish(next);
    if (value > 0) {
      low_ = theta_;
    } else {
      high_ = theta_;
    }
    const bool inside = sums.middle != 0 && next > low_ && next < high_;
    const double mean = square_root(low_) * square_root(high_);
    // The ends meet where the function jumps over k within the rounding of theta.
    const bool closed = !(mean > low_ && mean < high_) || passes_ >= kMostPasses;
    theta_ = inside ? next : closed ? high_ : mean;
    if (!inside && closed) finish(theta_);
  }

 private:
  static constexpr int kMostPasses = 200;

  FUSEE_HOST_DEVICE void finish(double theta) {
    theta_ = theta;
    done_ = true;
  }

  double k_, theta_ = 0;
  double low_ = 0, high_ = 0;
  int passes_ = 0;
  bool done_ = false;
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
