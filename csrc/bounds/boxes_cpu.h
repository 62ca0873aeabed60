// Rows of boxes, and of their gradients, between memory and the accumulation type.
#pragma once

#include "bounds/interval.h"
#include "core/lanes_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// A row of boxes for a product: all NaN where a radius is none, and widened where sound.
template <typename T, typename A>
void load_boxes(const T* FUSEE_RESTRICT center, const T* FUSEE_RESTRICT radius, int64_t count,
                const Rounding<A>* rounding, A* const* to) {
  A *FUSEE_RESTRICT to_center = to[0], *FUSEE_RESTRICT to_radius = to[1];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A r = checked_radius(static_cast<A>(radius[i]));
    to_center[i] = r == r ? static_cast<A>(center[i]) : r;
    to_radius[i] = r;
  }
  if (rounding == nullptr) return;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    to_radius[i] = rounding->before(Box<A>{to_center[i], to_radius[i]});
}

// To be called from a function that a loop calls: compilers keep the loop's own structs in memory.
template <typename T, typename A>
FUSEE_HOST_DEVICE void store_box(const Box<A>& box, bool sound, T* center, T* radius) {
  const Box<T> stored = box_to<T>(box, sound);
  if constexpr (std::is_floating_point_v<T>) {
    *center = stored.center;
    *radius = stored.radius;
  } else {
    center->bits = stored.center.bits;
    radius->bits = stored.radius.bits;
  }
}

// What a gradient is taken through: the boxes' own gradient and, after a ReLU, its results.
template <typename T>
struct Upstream {
  const T *center, *radius;
  const T *out_center, *out_radius;  // or null

  // The gradients before the ReLU, from an element on.
  template <typename A>
  void load(int64_t first, int64_t count, A* FUSEE_RESTRICT to_center,
            A* FUSEE_RESTRICT to_radius) const {
    const T *FUSEE_RESTRICT c = center + first, *FUSEE_RESTRICT r = radius + first;
    if (out_center == nullptr) {
      widen(c, count, to_center);
      widen(r, count, to_radius);
      return;
    }
    const T *FUSEE_RESTRICT of_c = out_center + first, *FUSEE_RESTRICT of_r = out_radius + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const Box<A> grad =
          box_relu_gradient(Box<A>{static_cast<A>(of_c[i]), static_cast<A>(of_r[i])},
                            Box<A>{static_cast<A>(c[i]), static_cast<A>(r[i])});
      to_center[i] = grad.center;
      to_radius[i] = grad.radius;
    }
  }
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
