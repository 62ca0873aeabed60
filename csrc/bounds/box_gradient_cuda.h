// The gradient of boxes through ReLU and a factor for each channel.
#pragma once

#include "bounds/channels_cuda.h"
#include "bounds/interval.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// Sum 0 is the scale's gradient, and 1 the shift's. What is absent is not read or written.
template <typename T_>
struct BoxGradient {
  using T = T_;
  using A = accumulate_t<T>;
  template <int N>
  struct Factors {
    A scale[N];
  };
  static constexpr bool kSums = true;

  Global<const T> grad_center, grad_radius;
  Global<const T> out_center, out_radius;  // of ReLU
  Global<const T> center, radius;          // for the scale's gradient
  Global<const A> scale;
  Global<T> to_center, to_radius;

  FUSEE_DEVICE Global<const T> memory() const { return grad_center; }
  template <int N>
  FUSEE_DEVICE void load_factors(int64_t column, int64_t inner, Factors<N>& factors) const {
    load_channels(scale, column, inner, A(1), factors.scale);
  }

  template <int M, int N, int K>
  FUSEE_DEVICE void apply(int64_t at, const Factors<N>& factors, A (&sums)[2][K]) const {
    A of_center[M], of_radius[M] = {};
    read(grad_center, at, of_center);
    if (out_center || center || to_radius) read(grad_radius, at, of_radius);
    if (out_center) {
      A result[M], result_radius[M];
      read(out_center, at, result);
      read(out_radius, at, result_radius);
      for (int i = 0; i < M; ++i) {
        const Box<A> grad = box_relu_gradient(Box<A>{result[i], result_radius[i]},
                                              Box<A>{of_center[i], of_radius[i]});
        of_center[i] = grad.center;
        of_radius[i] = grad.radius;
      }
    }
    for (int i = 0; i < M; ++i) sums[1][i] += of_center[i];
    if (center) {
      A m[M], r[M];
      read(center, at, m);
      read(radius, at, r);
      for (int i = 0; i < M; ++i)
        sums[0][i] += of_center[i] * m[i] + sign_of(factors.scale[i % N]) * (of_radius[i] * r[i]);
    }
    for (int i = 0; i < M; ++i) {
      of_center[i] *= factors.scale[i % N];
      of_radius[i] *= absolute(factors.scale[i % N]);
    }
    write(to_center, at, of_center);
    write(to_radius, at, of_radius);
  }

 private:
  template <int M>
  static FUSEE_DEVICE void read(Global<const T> from, int64_t at, A (&values)[M]) {
    const Vector<T, M> loaded = load<M>(from, at);
    for (int i = 0; i < M; ++i) values[i] = static_cast<A>(loaded[i]);
  }
  template <int M>
  static FUSEE_DEVICE void write(Global<T> to, int64_t at, const A (&values)[M]) {
    if (!to) return;
    Vector<T, M> stored;
    for (int i = 0; i < M; ++i) stored[i] = static_cast<T>(values[i]);
    store(to, at, stored);
  }
};

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
