// PerpGrad: a gradient without its component along the weights.
//
//   alpha = <w, g> / <w, w>,   p = g - alpha w,   g' = p |g| / |p|
//
// over a unit: a tensor, or a row of it. Three dot products decide all of it, so a kernel sums them,
// and then rewrites the gradient element by element.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/half.h"
#include "core/macros.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// What is summed over a unit. The difference that gives |p|^2 cancels, hence double in every engine.
struct Dots {
  double ww = 0, wg = 0, gg = 0;

  FUSEE_HOST_DEVICE Dots operator+(const Dots& other) const {
    return {ww + other.ww, wg + other.wg, gg + other.gg};
  }
};

// The square of the sine between g and w below which p is noise. Rounding g to its type moves each
// element by at most half a unit in the last place, so a multiple of w leaves at most this of itself;
// `least` is the caller's bound, which covers the rounding of the sums as well.
template <typename T>
FUSEE_HOST_DEVICE double degenerate_ratio(double least);
template <>
FUSEE_HOST_DEVICE double degenerate_ratio<float>(double least) {
  return least > 0x1p-48 ? least : 0x1p-48;
}
template <>
FUSEE_HOST_DEVICE double degenerate_ratio<double>(double least) {
  return least > 0x1p-106 ? least : 0x1p-106;
}
template <>
FUSEE_HOST_DEVICE double degenerate_ratio<Half>(double least) {
  return least > 0x1p-22 ? least : 0x1p-22;
}
template <>
FUSEE_HOST_DEVICE double degenerate_ratio<BFloat16>(double least) {
  return least > 0x1p-16 ? least : 0x1p-16;
}

// What becomes of a unit's gradient.
struct Projection {
  enum Action { kKeep, kZero, kProject };

  Action action;
  double alpha, scale;  // g <- scale (g - alpha w)

  static FUSEE_HOST_DEVICE Projection from(const Dots& dots, bool rescale, double ratio) {
    // Without weights there is no direction to remove.
    if (dots.ww == 0) return {kKeep, 0, 1};
    const double sum = dots.ww + dots.wg + dots.gg;
    // A unit with a NaN or an infinity becomes NaN as a whole: no part of it may pass for a gradient.
    if (!(sum - sum == 0)) {
      const double nan = std::numeric_limits<double>::quiet_NaN();
      return {kProject, nan, nan};
    }
    if (dots.gg == 0) return {kKeep, 0, 1};
    const double alpha = dots.wg / dots.ww;
    const double rest = dots.gg - alpha * dots.wg;
    if (!(rest > ratio * dots.gg)) return {kZero, 0, 0};
    return {kProject, alpha, rescale ? sqrt(dots.gg / rest) : 1.0};
  }
};

// The last step for one element, computed in A. In float, alpha is kept as a sum of two floats: the
// rounding of one would leave a component along w, which the scale of a nearly parallel gradient blows
// up. The fused operations round what is left of g, not g itself.
template <typename A>
struct Projector;

template <>
struct Projector<double> {
  double alpha, scale;

  explicit FUSEE_HOST_DEVICE Projector(const Projection& p) : alpha(p.alpha), scale(p.scale) {}

  FUSEE_HOST_DEVICE double operator()(double w, double g) const { return scale * (g - alpha * w); }
};

template <>
struct Projector<float> {
  float alpha, alpha_low, scale;

  explicit FUSEE_HOST_DEVICE Projector(const Projection& p)
      : alpha(static_cast<float>(p.alpha)),
        alpha_low(static_cast<float>(p.alpha - static_cast<double>(alpha))),
        scale(static_cast<float>(p.scale)) {}

  FUSEE_HOST_DEVICE float operator()(float w, float g) const {
    return scale * fmaf(-alpha_low, w, fmaf(-alpha, w, g));
  }

  // Whether float has the range for it; NaN has.
  static FUSEE_HOST_DEVICE bool suits(const Projection& p) {
    const double size = fabs(p.alpha);
    return !(size > 0x1p100) && !(size < 0x1p-100 && size != 0);
  }
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
