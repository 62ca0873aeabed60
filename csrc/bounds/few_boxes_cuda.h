// A layer of a few boxes, whose time is that of reading the weights: once, by warps that take a few rows each.
#pragma once

#include "bounds/box_tiles_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

inline constexpr int kMostFewBoxes = 8;
inline constexpr int kWeightRows = 4;

template <typename T, int kBoxes, typename Finish, typename A = accumulate_t<T>>
__global__ void __launch_bounds__(kBoxThreads)
    few_boxes(Matrix<T> centers, Matrix<T> radii, Matrix<T> weight, Outward<A> outward,
              Finish finish) {
  constexpr int kValues = kBoxes * kWeightRows;
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kBoxWarps + warp) * kWeightRows;
  const int boxes = static_cast<int>(centers.rows);
  const int64_t width = weight.width;
  if (row >= weight.rows) return;
  A of_center[kValues] = {}, of_radius[kValues] = {};
  // Beyond the last weights and boxes these are taken again: a loop without branches overlaps its loads.
  const auto add = [&]<bool kSound, int V>(int64_t at) {
    A weights[kWeightRows][V];
    FUSEE_UNROLL
    for (int n = 0; n < kWeightRows; ++n) {
      const int64_t line = row + n < weight.rows ? row + n : weight.rows - 1;
      const Vector<T, V> loaded = load_readonly<V>(weight.data, line * width + at);
      for (int v = 0; v < V; ++v) weights[n][v] = static_cast<A>(loaded[v]);
    }
    FUSEE_UNROLL
    for (int b = 0; b < kBoxes; ++b) {
      const int64_t place = (b < boxes ? b : boxes - 1) * width + at;
      const Vector<T, V> center = load_readonly<V>(centers.data, place);
      const Vector<T, V> radius = load_readonly<V>(radii.data, place);
      FUSEE_UNROLL
      for (int v = 0; v < V; ++v) {
        const Box<A> given{static_cast<A>(center[v]), static_cast<A>(radius[v])};
        const Box<A> box = kSound ? outward(given) : outward.checked(given);
        FUSEE_UNROLL
        for (int n = 0; n < kWeightRows; ++n) {
          of_center[b * kWeightRows + n] += box.center * weights[n][v];
          of_radius[b * kWeightRows + n] += box.radius * absolute(weights[n][v]);
        }
      }
    }
  };
  constexpr int V = vector_width<T>, kStride = 32 * V;
  // As many vectors of each row at a time as there are registers for.
  constexpr int kTogether = kBoxes == 1 ? 4 : kBoxes == 4 ? 2 : 1;
  if (width % V != 0) {
    for (int64_t at = lane; at < width; at += 32) add.template operator()<true, 1>(at);
  } else if (outward.sound) {
    for (int64_t at = lane * V; at < width; at += kStride) add.template operator()<true, V>(at);
  } else {
    int64_t at = lane * V;
    for (; at + (kTogether - 1) * kStride < width; at += kTogether * kStride) {
      FUSEE_UNROLL
      for (int i = 0; i < kTogether; ++i) add.template operator()<false, V>(at + i * kStride);
    }
    for (; at < width; at += kStride) add.template operator()<false, V>(at);
  }
  const A center = sums_over_lanes(of_center), radius = sums_over_lanes(of_radius);
  constexpr int kLanes = 32 / kValues;
  const int b = lane / kLanes / kWeightRows, n = lane / kLanes % kWeightRows;
  if (lane % kLanes == 0 && b < boxes && row + n < weight.rows) finish(b, row + n, center, radius);
}

// How many additions a product goes through.
template <typename T>
int64_t few_boxes_terms(int64_t in) {
  constexpr int64_t V = vector_width<T>;
  return divide_up(in, 32 * V) * V + 5;
}

template <typename T, typename Finish>
void launch_few_boxes(const Matrix<T>& centers, const Matrix<T>& radii, const Matrix<T>& weight,
                      const Outward<accumulate_t<T>>& outward, const Finish& finish,
                      Stream stream) {
  if (centers.rows == 0 || weight.rows == 0) return;
  const auto run = [&]<int kBoxes>(std::integral_constant<int, kBoxes>) {
    launch(few_boxes<T, kBoxes, Finish>,
           grid_of(divide_up<int64_t>(weight.rows, kBoxWarps * kWeightRows), 1), kBoxThreads, 0,
           stream, centers, radii, weight, outward, finish);
  };
  if (centers.rows == 1) return run(std::integral_constant<int, 1>{});
  if (centers.rows <= 4) return run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, kMostFewBoxes>{});
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
