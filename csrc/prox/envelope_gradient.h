// Derivatives of the group envelope's proximal operator, in closed form.
//
// With v and g the input and the gradient sent back, q_j = <v_j, g_j> / n_j, and over the groups in the middle
// D = k - saturated + sum b_j and C = sum lam sqrt(d_j) q_j / h_j, the gradient of a group in the middle is
//
//   s_j g_j + (lam theta sqrt(d_j) q_j / (h_j n_j) - (C / D) sqrt(d_j) H_j / h_j) v_j / n_j,
//
// that of a saturated one s_j g_j, and zero of the others.
#pragma once

#include "prox/envelope.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// What is summed over the groups of a problem for D, C and the gradients in k and lam.
struct GradientSums {
  double saturated = 0, b = 0;
  double c = 0;             // C
  double lam = 0;           // the derivative in lam but for theta's
  double theta_by_lam = 0;  // D times the derivative of theta in lam

  template <typename A>
  FUSEE_HOST_DEVICE void add(const Group<A>& group, A norm, double dot, const Root& root, int64_t j,
                             bool debiased) {
    if (root.projects()) return;
    const State state = root.state(group, norm, j);
    const double d = group.weight, h = group.inner, metric = group.metric;
    if (state == State::kSaturated) {
      if (group.weight == A(0)) return;
      saturated += 1;
      const double sum = h + static_cast<double>(group.lam) * d;
      if (!debiased) lam -= dot * metric * d / (sum * sum);
    } else if (state == State::kMiddle) {
      const Coefficients<A> k = group.coefficients(norm);
      const double root_d = group.root_weight, n = norm, q = dot / n;
      b += k.b;
      c += static_cast<double>(group.lam) * root_d * q / h;
      lam -= q * root.theta * root_d / h;
      theta_by_lam -= root.theta * d / h;
      if (debiased) {
        lam += q * static_cast<double>(root.scale(group, norm, j)) * n * d / h;
        theta_by_lam += (static_cast<double>(k.a) - root.theta * static_cast<double>(k.b)) * d / h;
      }
    }
  }

  FUSEE_HOST_DEVICE GradientSums operator+(const GradientSums& o) const {
    return {saturated + o.saturated, b + o.b, c + o.c, lam + o.lam, theta_by_lam + o.theta_by_lam};
  }

  // C / D
  FUSEE_HOST_DEVICE double share(double k) const { return c == 0 ? 0 : c / (k - saturated + b); }
  FUSEE_HOST_DEVICE double grad_k(double k, const Root& root) const {
    if (root.projects()) return 0;
    return root.theta != root.theta ? root.theta : c == 0 ? 0 : root.theta * share(k);
  }
  FUSEE_HOST_DEVICE double grad_lam(double k, const Root& root) const {
    if (root.projects()) return 0;
    return root.theta != root.theta ? root.theta : lam - share(k) * theta_by_lam;
  }
};

// The gradient of a group's elements is grad g + input v.
template <typename A>
struct GradientScales {
  A grad, input;
};

template <typename A>
FUSEE_HOST_DEVICE GradientScales<A> gradient_scales(const Group<A>& group, A norm, double dot,
                                                    const Root& root, int64_t j, double share) {
  if (root.theta != root.theta) return {static_cast<A>(root.theta), A(0)};
  const State state = root.state(group, norm, j);
  if (state == State::kZero) return {A(0), A(0)};
  const A scale = root.scale(group, norm, j);
  if (state == State::kSaturated || root.projects()) return {scale, A(0)};
  const double n = norm, h = group.inner, root_d = group.root_weight;
  const double q = dot / n;
  const double along = (static_cast<double>(group.lam) * root.theta * q / n -
                        share * static_cast<double>(group.metric)) *
                       root_d / h / n;
  return {scale, static_cast<A>(along)};
}

// The envelope's value from z_j = sqrt(d_j) n_j and their knee:
//   1/2 sum of z^2 above the knee + T^2 / (2 (k - their number)), T being the sum of the others,
// of which the knee is T / (k - number). The debiased value lacks all squares: what is left is
//   1/2 sum of z (knee - z) beneath the knee.
struct EnvelopeSums {
  double squares = 0;           // of those above
  double others = 0, less = 0;  // T, and the sum of z (knee - z), beneath

  FUSEE_HOST_DEVICE void add(double z, double knee) {
    const bool saturated = !(z < knee);
    squares += saturated ? z * z : 0;
    others += saturated ? 0 : z;
    less += saturated || z == 0 ? 0 : z * (knee - z);
  }
  FUSEE_HOST_DEVICE double value(double knee, bool debiased) const {
    if (knee != knee) return knee;
    const double tail = debiased ? less : others == 0 ? 0 : others * knee;
    return (debiased ? tail : squares + tail) / 2;
  }
};

// The derivative of the value in an element of a group, over the element.
template <typename A>
FUSEE_HOST_DEVICE double envelope_slope(const Group<A>& group, A norm, double knee, bool debiased) {
  const double d = group.weight, n = norm, root_d = group.root_weight;
  const double steep = root_d * n < knee ? root_d * knee / n : d;
  const double slope = steep - (debiased ? d : 0);
  return knee != knee ? knee : n == 0 ? 0 : slope;
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
