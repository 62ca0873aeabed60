// Boxes in one dimension as center and radius: what the kernels of this room do to an element.
#pragma once

#include <cfloat>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/half.h"
#include "core/macros.h"
#include "core/math.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

template <typename A>
struct Box {
  A center, radius;
};

// What is no radius, negative or infinite, becomes NaN, and its rows with it.
template <typename A>
FUSEE_HOST_DEVICE A checked_radius(A radius) {
  const bool valid = radius >= A(0) && radius < std::numeric_limits<A>::infinity();
  return valid ? radius : std::numeric_limits<A>::quiet_NaN();
}

// The next number above x; infinity and NaN stay.
template <typename A>
FUSEE_HOST_DEVICE A next_above(A x) {
  using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  const Bits bits = bit_cast<Bits>(x + A(0));  // no negative zero
  const A next = bit_cast<A>(x < A(0) ? bits - 1 : bits + 1);
  return x < std::numeric_limits<A>::infinity() ? next : x;
}

// The ends of the box through ReLU: it stays where it is positive, is a point where it is not, and
// [0, u] = u / 2 -+ u / 2 where zero lies inside. The two are then equal to the bit, which tells the
// three cases apart from the result alone.
template <typename A>
FUSEE_HOST_DEVICE Box<A> box_relu(const Box<A>& box, bool sound) {
  const A lower = box.center - box.radius, upper = box.center + box.radius;
  const A half = sound ? next_above(A(0.5) * next_above(upper)) : A(0.5) * upper;
  const A crossing = upper <= A(0) ? A(0) : half;
  const bool active = lower > A(0);
  return {active ? box.center : crossing, active ? box.radius : crossing};
}

// The gradient of box_relu, of its result and the gradient there. NaN lets gradients through.
template <typename A>
FUSEE_HOST_DEVICE Box<A> box_relu_gradient(const Box<A>& result, const Box<A>& grad) {
  const bool active = !(result.center - result.radius <= A(0));
  const bool crossing = result.center + result.radius > A(0);
  const A half = crossing ? A(0.5) * (grad.center + grad.radius) : A(0);
  return {active ? grad.center : half, active ? grad.radius : half};
}

// The factor of a radius has no slope at zero.
template <typename A>
FUSEE_HOST_DEVICE A sign_of(A x) {
  return x > A(0) ? A(1) : x < A(0) ? A(-1) : A(0);
}

// --- outward rounding -------------------------------------------------------------------------------
// A sum of n products in any order is off by at most relative times the sum of their magnitudes, and
// by what the smallest products lose (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
template <typename A>
struct Rounding {
  static constexpr A kUnit = std::numeric_limits<A>::epsilon() / 2;

  A relative, absolute;

  // Of `terms` products, a bias among them, whose factors may be rounded once themselves.
  FUSEE_HOST_DEVICE static Rounding of(int64_t terms) {
    const double n = static_cast<double>(terms) + 3, nu = n * static_cast<double>(kUnit);
    const double relative =
        nu < 0.25 ? nu / (1 - nu) * (1 + 0x1p-20) : std::numeric_limits<double>::infinity();
    return {next_above(static_cast<A>(relative)),
            static_cast<A>(2 * n) * std::numeric_limits<A>::min()};
  }

  // A radius that covers what the center's product will lose: the radius's product has the same weights.
  FUSEE_HOST_DEVICE A before(const Box<A>& box) const {
    return next_above(box.radius + next_above(relative * absolute_value(box.center)));
  }
  // The radius of the product, of the product of such radii.
  FUSEE_HOST_DEVICE A after(A radius, A bias) const {
    const A lost = next_above(relative * absolute_value(bias));
    const A scale = next_above(A(1) + 2 * relative);
    return next_above(next_above(next_above(radius + absolute) * scale) + lost);
  }

  FUSEE_HOST_DEVICE static A absolute_value(A x) { return fusee::absolute(x); }
};

// scale * box + shift; both numbers are taken as exact.
template <typename A>
FUSEE_HOST_DEVICE Box<A> box_affine(const Box<A>& box, A scale, A shift, bool sound) {
  const A product = scale * box.center, center = product + shift;
  const A radius = absolute(scale) * box.radius;
  if (!sound) return {center, radius};
  constexpr A kLoss = std::numeric_limits<A>::epsilon();
  const A lost = kLoss * (absolute(product) + absolute(center)) + 2 * std::numeric_limits<A>::min();
  return {center, next_above(next_above(radius) + next_above(lost))};
}

// Stores a box, in the tensors' dtype: the center rounded to the nearest, and the radius too, or, where
// sound, up and by as much as the center moves.
template <typename T, typename A>
FUSEE_HOST_DEVICE Box<T> box_to(const Box<A>& box, bool sound) {
  Box<T> stored{static_cast<T>(box.center), static_cast<T>(box.radius)};
  if constexpr (!std::is_same_v<T, A>) {
    if (sound) {
      const A moved = absolute(box.center - static_cast<A>(stored.center));
      const A needed = moved > A(0) ? next_above(box.radius + moved) : box.radius;
      stored.radius = static_cast<T>(needed);
      if (static_cast<A>(stored.radius) < needed) ++stored.radius.bits;
    }
  }
  return stored;
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
