// Boxes between memory and kernels: tiles of matrices in shared memory, lines of results, and what is done to boxes
// on their way into a product.
#pragma once

#include "bounds/interval.h"
#include "core/cuda/operands.h"
#include "core/cuda/torch_stream.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

inline constexpr int kBoxThreads = 128, kBoxWarps = kBoxThreads / 32;

// A row-major matrix in memory that begins at a whole vector.
template <typename T>
struct Matrix {
  Global<const T> data;
  int64_t rows, width;
};

// values[0 .. valid) from element `at` of the line on, among others of the same width.
template <typename T, typename A, int V>
FUSEE_DEVICE void load_line(Global<T> from, int64_t line, int64_t width, int64_t at, A (&values)[V],
                            int valid) {
  using U = std::remove_const_t<T>;
  constexpr int N = V < vector_width<U> ? V : vector_width<U>;
  const int64_t first = line * width + at;
  if (width % V == 0) {
    for (int v = 0; v < V; v += N) {
      const Vector<U, N> loaded = load<N>(from, first + v);
      for (int i = 0; i < N; ++i) values[v + i] = static_cast<A>(loaded[i]);
    }
    return;
  }
  for (int v = 0; v < V; ++v) values[v] = v < valid ? static_cast<A>(load(from, first + v)) : A(0);
}
template <typename T, typename A, int V>
FUSEE_DEVICE void store_line(Global<T> to, int64_t line, int64_t width, int64_t at,
                             const A (&values)[V], int valid) {
  constexpr int N = V < vector_width<T> ? V : vector_width<T>;
  const int64_t first = line * width + at;
  if (width % V == 0) {
    for (int v = 0; v < V; v += N) {
      Vector<T, N> stored;
      for (int i = 0; i < N; ++i) stored[i] = static_cast<T>(values[v + i]);
      store_whole(to, first + v, stored);
    }
    return;
  }
  for (int v = 0; v < V; ++v)
    if (v < valid) store(to, first + v, static_cast<T>(values[v]));
}

// Calls f(line, at) for the vectors of a tile, whichever thread copies them.
template <int kLines, int kLength, int V, typename F>
FUSEE_DEVICE void for_each_staged(const F& f) {
  constexpr int kChunks = kLength / V;
  for (int i = static_cast<int>(threadIdx.x); i < kLines * kChunks; i += kBoxThreads)
    f(i / kChunks, i % kChunks * V);
}

// Copies a tile of the matrix, whose element (line, column) is its first, with zeros beyond the matrix.
template <int kLines, int kLength, int kPitch, typename T, typename S>
FUSEE_DEVICE void stage(const Matrix<T>& from, int64_t line, int64_t column, const Shared<S>& to) {
  constexpr int V = vector_width<S>;
  const bool in_vectors = from.width % vector_width<T> == 0;
  for_each_staged<kLines, kLength, V>([&](int row, int at) {
    const int64_t left = line + row < from.rows ? from.width - column - at : 0;
    const int valid = left < V ? (left > 0 ? static_cast<int>(left) : 0) : V;
    const int64_t source = (line + row) * from.width + column + at;
    if constexpr (std::is_same_v<S, T>) {
      if (in_vectors) return cp_async<V>(to, row * kPitch + at, from.data, source, valid);
    }
    Vector<S, V> values;
    if (in_vectors && valid == V) {
      const Vector<T, V> loaded = load<V>(from.data, source);
      for (int v = 0; v < V; ++v) values[v] = static_cast<S>(loaded[v]);
    } else {
      for (int v = 0; v < V; ++v)
        values[v] = v < valid ? static_cast<S>(load(from.data, source + v)) : S{};
    }
    to.store(row * kPitch + at, values);
  });
}

template <typename A>
FUSEE_DEVICE bool is_radius(A radius) {
  return checked_radius(radius) == radius;
}

// Boxes as they go into a product: no radius below zero, and where sound with what the center will lose.
template <typename A>
struct Outward {
  bool sound;
  Rounding<A> rounding;

  static FUSEE_DEVICE Box<A> checked(const Box<A>& box) {
    const A radius = checked_radius(box.radius);
    return {is_radius(box.radius) ? box.center : radius, radius};
  }
  FUSEE_DEVICE Box<A> operator()(const Box<A>& box) const {
    const Box<A> good = checked(box);
    return {good.center, sound ? rounding.before(good) : good.radius};
  }
};

// The same for what the thread itself has copied.
template <int kLines, int kLength, int kPitch, typename A, typename S>
FUSEE_DEVICE void check_staged(const Outward<A>& outward, const Shared<S>& centers,
                               const Shared<S>& radii) {
  constexpr int V = vector_width<S>;
  for_each_staged<kLines, kLength, V>([&](int row, int at) {
    Vector<S, V> radius = radii.template load<V>(row * kPitch + at);
    bool good = !outward.sound;
    for (int v = 0; v < V; ++v) good = good && is_radius(static_cast<A>(radius[v]));
    if (good) return;
    Vector<S, V> center = centers.template load<V>(row * kPitch + at);
    for (int v = 0; v < V; ++v) {
      const Box<A> box = outward({static_cast<A>(center[v]), static_cast<A>(radius[v])});
      center[v] = static_cast<S>(box.center);
      radius[v] = static_cast<S>(box.radius);
    }
    centers.store(row * kPitch + at, center);
    radii.store(row * kPitch + at, radius);
  });
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
