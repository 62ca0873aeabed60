// The product of a few boxes with a weight: dot products with vectors along the inputs, so that the weight
// is read once, in its own layout, for centers and radii.
#pragma once

#include <algorithm>

#include "bounds/dual_tile_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// The register tile: sums of centers and radii, what they multiply and an element of the weight. Up to
// kFewBoxes, dot products take less time than packing the weight for a product in tiles.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kDotFeatures = 4, kDotBoxes = 3;
inline constexpr int64_t kFewBoxes = 64;
#else
inline constexpr int kDotFeatures = 2, kDotBoxes = 2;
inline constexpr int64_t kFewBoxes = 32;
#endif

// So many bytes of a vector's row go through a tile before its sums go to memory: the rows stay in the
// nearest cache.
inline constexpr int64_t kDotBytes = 4096;

template <typename A>
inline constexpr int64_t kDotDepth = kDotBytes / static_cast<int64_t>(sizeof(A));

// Rows with zeros after the last number, up to a whole vector.
template <typename A>
struct BoxRows {
  const A *center, *radius;
  int64_t stride;
};

template <typename A>
BoxRows<A> rows_of(const PaddedRows<A, 2>& boxes, int64_t from = 0) {
  return {boxes.row(0, from), boxes.row(1, from), boxes.stride()};
}

// A weight, minus one row where that is given.
template <typename T>
struct DotWeight {
  const T* data;
  const T* less;
  int64_t depth;  // and from one row to the next
};

// How many roundings a term goes through in a dot product, its own and the bias's included.
template <typename A>
int64_t dot_roundings(int64_t depth) {
  return std::min(depth, kDotDepth<A>) / kLanes<A> + depth / kDotDepth<A> + 8;
}

template <typename T, int kFeatures, int kBoxes, bool kLess, typename A = accumulate_t<T>>
FUSEE_HOST_DEVICE void dot_tile(const T* weight, int64_t stride, const T* less, int64_t depth,
                                const BoxRows<A>& boxes, int64_t ahead,
                                Vector<A> (&sums)[2][kFeatures][kBoxes]) {
  const auto step = [&](int64_t k, const auto& load) {
    Vector<A> center[kBoxes], radius[kBoxes];
#pragma GCC unroll 4
    for (int b = 0; b < kBoxes; ++b) {
      center[b] = load_vector(boxes.center + b * boxes.stride + k);
      radius[b] = load_vector(boxes.radius + b * boxes.stride + k);
    }
    Vector<A> subtrahend{};
    if constexpr (kLess) subtrahend = load(less + k);
#pragma GCC unroll 4
    for (int f = 0; f < kFeatures; ++f) {
      Vector<A> w = load(weight + f * stride + k);
      if (ahead != 0) __builtin_prefetch(weight + f * stride + k + ahead, 0, 2);
      if constexpr (kLess) w -= subtrahend;
      const Vector<A> size = magnitude<A>(w);
#pragma GCC unroll 4
      for (int b = 0; b < kBoxes; ++b) {
        sums[0][f][b] += w * center[b];
        sums[1][f][b] += size * radius[b];
      }
    }
  };
  int64_t k = 0;
  for (; k + kLanes<A> <= depth; k += kLanes<A>)
    step(k, [](const T* from) { return load_vector(from); });
  if (k < depth) step(k, [&](const T* from) { return load_part(from, depth - k); });
}

// out[c][row * out_stride + feature] for centers (0) and radii (1), set or added to.
template <typename T, int kFeatures, int kBoxes, bool kLess, typename A = accumulate_t<T>>
void dot_rows(const DotWeight<T>& weight, int64_t feature, int64_t begin, int64_t length,
              const BoxRows<A>& boxes, int64_t row, int64_t ahead, A* const* out,
              int64_t out_stride) {
  constexpr int n = kLanes<A>, kSums = 2 * kFeatures * kBoxes;
  Vector<A> sums[2][kFeatures][kBoxes] = {};
  const int64_t first = row * boxes.stride + begin;
  dot_tile<T, kFeatures, kBoxes, kLess>(weight.data + feature * weight.depth + begin, weight.depth,
                                        kLess ? weight.less + begin : nullptr, length,
                                        {boxes.center + first, boxes.radius + first, boxes.stride},
                                        ahead, sums);
  A values[(kSums + n - 1) / n * n];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; i += n) {
    Vector<A> group[n];
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) {
      const int at = i + j;
      group[j] = at < kSums
                     ? sums[at / (kFeatures * kBoxes)][at % kFeatures][at / kFeatures % kBoxes]
                     : Vector<A>{};
    }
    store_vector<A>(sum_each<A>(group), values + i);
  }
  for (int c = 0; c < 2; ++c)
    for (int b = 0; b < kBoxes; ++b) {
      A* to = out[c] + (row + b) * out_stride + feature;
      const A* from = values + (c * kBoxes + b) * kFeatures;
      for (int f = 0; f < kFeatures; ++f) to[f] = begin == 0 ? from[f] : to[f] + from[f];
    }
}

template <typename T, bool kLess, typename A = accumulate_t<T>>
void multiply_boxes(const DotWeight<T>& weight, int64_t features, const BoxRows<A>& boxes,
                    int64_t rows, A* const* out, int64_t out_stride) {
  const int64_t groups = (rows + kDotBoxes - 1) / kDotBoxes;
  const auto block = [&](auto features_at_once, int64_t feature, int64_t begin) {
    constexpr int kFeatures = features_at_once;
    const int64_t length = std::min(kDotDepth<A>, weight.depth - begin);
    // While the first boxes go through, the rows that come next are asked for, or what comes later in these.
    constexpr int64_t kNear = 4096 / sizeof(T), kFar = 65536 / sizeof(T);
    int64_t ahead = std::clamp(kFeatures * weight.depth, kNear, kFar);
    for (int64_t group = 0, row = 0; group < groups; ++group, ahead = 0) {
      const auto some = [&]<int kBoxes>(std::integral_constant<int, kBoxes>) {
        dot_rows<T, kFeatures, kBoxes, kLess>(weight, feature, begin, length, boxes, row, ahead,
                                              out, out_stride);
        row += kBoxes;
      };
      const int64_t count = (rows - row + groups - group - 1) / (groups - group);
      if (count == 1) some(std::integral_constant<int, 1>{});
      if (count == 2) some(std::integral_constant<int, 2>{});
      if constexpr (kDotBoxes > 2)
        if (count == 3) some(std::integral_constant<int, 3>{});
    }
  };
  for (int64_t f = 0; f < features;) {
    const bool whole = f + kDotFeatures <= features;
    for (int64_t begin = 0; begin == 0 || begin < weight.depth; begin += kDotDepth<A>)
      if (whole)
        block(std::integral_constant<int, kDotFeatures>{}, f, begin);
      else
        block(std::integral_constant<int, 1>{}, f, begin);
    f += whole ? kDotFeatures : 1;
  }
}

// A task: some features for all of a few boxes.
inline constexpr int64_t kDotTask = 64;

template <typename A>
class DotTask {
 public:
  explicit DotTask(int64_t rows) : rows_(rows), space_(2 * rows * kDotTask) {}

  // From a feature on, of `features`.
  template <typename T, bool kLess>
  DualTile<A> compute(DotWeight<T> weight, int64_t first, int64_t features,
                      const BoxRows<A>& boxes) {
    A* const sums[2] = {space_.get(), space_.get() + rows_ * kDotTask};
    const int64_t count = std::min(kDotTask, features - first);
    weight.data += first * weight.depth;
    multiply_boxes<T, kLess>(weight, count, boxes, rows_, sums, kDotTask);
    return {0, rows_, first, count, {sums[0], sums[1]}, kDotTask};
  }

 private:
  int64_t rows_;
  Scratch<A> space_;
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
