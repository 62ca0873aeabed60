// The gradient of a weight over few boxes: both sums of a tile stay in registers over all of them, and
// meet there.
#pragma once

#include "bounds/dual_tile_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// The register tile: what two sums, the vectors of a line and a broadcast scalar fit in.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kSignedFeatures = 6;
#elif defined(__AVX__)
inline constexpr int kSignedFeatures = 3;
#else
inline constexpr int kSignedFeatures = 2;
#endif

// Of more boxes what it takes to bring sums to memory no longer counts.
inline constexpr int64_t kSignedDepth = 128;

// center + sign(weight) radius.
template <typename A>
Vector<A> signed_sum(const Vector<A>& center, const Vector<A>& radius, const Vector<A>& weight) {
  const Vector<A> zero{}, one = zero + A(1);
  return center + (weight > zero ? one : (weight < zero ? -one : zero)) * radius;
}

template <typename T, typename A>
void add_signed(const A* center, const A* radius, const T* weight, int64_t count, T* to) {
  constexpr int64_t n = kLanes<A>;
  const auto sum = [&](int64_t c, const Vector<A>& w) {
    return signed_sum<A>(load_vector(center + c), load_vector(radius + c), w);
  };
  int64_t c = 0;
  for (; c + n <= count; c += n) store_vector<T>(sum(c, load_vector(weight + c)), to + c);
  if (c < count) store_part<T>(sum(c, load_part(weight + c, count - c)), to + c, count - c);
}

// A tile of a weight and of its gradient. What lies outside is computed, not stored.
template <typename T>
struct SignedTile {
  const T* weight;
  T* to;
  int64_t stride, features, columns;
};

// For each depth the scalars of kSignedFeatures features, or a line, of centers, then of radii.
template <typename T, typename A>
void signed_product(const A* scalars, const A* lines, int64_t depth, const SignedTile<T>& tile) {
  constexpr int n = kLanes<A>;
  Vector<A> sums[2][kSignedFeatures][kTileVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 2
    for (int which = 0; which < 2; ++which) {
      Vector<A> line[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) line[v] = load_vector(lines + v * n);
#pragma GCC unroll 16
      for (int f = 0; f < kSignedFeatures; ++f)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) sums[which][f][v] += scalars[f] * line[v];
      scalars += kSignedFeatures;
      lines += kTileLanes<A>;
    }
  }
  if (tile.features >= kSignedFeatures && tile.columns >= kTileLanes<A>) {
#pragma GCC unroll 16
    for (int f = 0; f < kSignedFeatures; ++f)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t at = f * tile.stride + v * n;
        store_vector<T>(signed_sum<A>(sums[0][f][v], sums[1][f][v], load_vector(tile.weight + at)),
                        tile.to + at);
      }
    return;
  }
  A parts[2][kSignedFeatures][kTileLanes<A>];
#pragma GCC unroll 2
  for (int which = 0; which < 2; ++which)
#pragma GCC unroll 16
    for (int f = 0; f < kSignedFeatures; ++f)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v)
        store_vector<A>(sums[which][f][v], parts[which][f] + v * n);
  for (int64_t f = 0; f < std::min<int64_t>(kSignedFeatures, tile.features); ++f)
    add_signed(parts[0][f], parts[1][f], tile.weight + f * tile.stride,
               std::min(tile.columns, kTileLanes<A>), tile.to + f * tile.stride);
}

// Along the result's rows, so that the processor foresees them, in strips whose lines the second-level
// cache holds. `tile` is all of the weight, boxes are its centers and radii.
template <typename T, typename A>
void signed_products(const PaddedRows<A, 2>& grads, const T* const (&boxes)[2], int64_t depth,
                     const SignedTile<T>& tile) {
  constexpr int64_t n = kTileLanes<A>, kStripBytes = 512 * 1024;
  constexpr int64_t kFeatures = kSignedFeatures, kTask = 16 * kFeatures;
  const int64_t most = kStripBytes / (2 * n * std::max<int64_t>(1, depth) * sizeof(A));
  const int64_t width = std::max<int64_t>(1, std::min(most, (tile.columns + n - 1) / n)) * n;
  const int64_t across = (tile.columns + width - 1) / width;
  const int64_t down = (tile.features + kTask - 1) / kTask;
  parallel_for(
      0, across * down, grain(kTask * width * depth / 8), [&](int64_t first, int64_t last) {
        const Scratch<A> space(2 * depth * (width + kFeatures));
        A *const lines = space.get(), *const scalars = lines + 2 * depth * width;
        for (int64_t task = first; task < last; ++task) {
          const int64_t column = task / down * width,
                        columns = std::min(width, tile.columns - column);
          const auto for_each_line = [&](const auto& f) {
            for (int64_t k = 0; k < depth; ++k)
              for (int which = 0; which < 2; ++which) f(k, which, 2 * k + which);
          };
          if (task == first || task % down == 0)
            for_each_line([&](int64_t k, int which, int64_t line) {
              const T* const from = boxes[which] + k * tile.stride + column;
              for (int64_t c = 0; c < columns; c += n) {
                A* const to = lines + 2 * depth * c + line * n;
                const int64_t count = std::min(n, columns - c);
                widen(from + c, count, to);
                std::fill(to + count, to + n, A(0));
              }
            });
          const int64_t end = std::min(tile.features, (task % down + 1) * kTask);
          for (int64_t f = task % down * kTask; f < end; f += kFeatures) {
            for_each_line([&](int64_t k, int which, int64_t line) {
              for (int64_t i = 0; i < kFeatures; ++i)
                scalars[line * kFeatures + i] = f + i < end ? grads.row(which, k)[f + i] : A(0);
            });
            for (int64_t c = 0; c < columns; c += n) {
              const int64_t at = f * tile.stride + column + c;
              signed_product<T>(
                  scalars, lines + 2 * depth * c, depth,
                  {tile.weight + at, tile.to + at, tile.stride, end - f, columns - c});
            }
          }
        }
      });
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
