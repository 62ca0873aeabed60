// The product of a block with a few rows of inputs: dot products with vectors along the inputs, so that
// each weight is read once, as a part of its row.
#pragma once

#include <algorithm>

#include "core/lanes_cpu.h"
#include "structured/monarch.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

constexpr int64_t kAheadBytes = 4096;

// Whether dot products take fewer steps than a tile that is one vector of tokens wide: for each output
// the terms in vectors, and about three steps to add up a vector.
template <typename T>
bool few_rows(const Blocks& shape, int64_t rows) {
  constexpr int64_t n = kLanes<accumulate_t<T>>;
  return rows > 0 && rows * (shape.in + 3 * n) < n * shape.in;
}

// The sums of kFeatures rows of the weight, `stride` apart, times kRows inputs.
template <typename T, int kFeatures, int kRows, typename A = accumulate_t<T>>
FUSEE_HOST_DEVICE void dot_rows(const T* weight, int64_t stride, int64_t depth, const A* inputs,
                                int64_t input_stride, Vector<A> (&sums)[kFeatures][kRows]) {
  constexpr int n = kLanes<A>;
  // The rows that come next; whole pages lie between those of long ones.
  const int64_t ahead = std::max<int64_t>(kFeatures * stride, kAheadBytes / sizeof(T));
  int64_t k = 0;
  for (; k + n <= depth; k += n) {
    Vector<A> x[kRows];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) x[row] = load_vector(inputs + row * input_stride + k);
#pragma GCC unroll 4
    for (int f = 0; f < kFeatures; ++f) {
      const Vector<A> w = load_vector(weight + f * stride + k);
      __builtin_prefetch(weight + f * stride + k + ahead);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) sums[f][row] += w * x[row];
    }
  }
  if (k == depth) return;
#pragma GCC unroll 4
  for (int f = 0; f < kFeatures; ++f) {
    const Vector<A> w = load_part(weight + f * stride + k, depth - k);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row)
      sums[f][row] += w * load_part(inputs + row * input_stride + k, depth - k);
  }
}

// The products of kRows inputs with kLanes / kRows rows of the weight, of which `features` exist:
// values[row * kLanes / kRows + feature].
template <typename T, int kRows, typename A = accumulate_t<T>>
void multiply_rows(const T* weight, int64_t features, int64_t depth, const A* inputs,
                   int64_t input_stride, A* values) {
  constexpr int n = kLanes<A>, kFeatures = n / kRows, kGroup = kFeatures < 4 ? kFeatures : 4;
  Vector<A> all[n] = {};
#pragma GCC unroll 4
  for (int first = 0; first < kFeatures; first += kGroup) {
    Vector<A> sums[kGroup][kRows] = {};
    if (first + kGroup <= features) {
      dot_rows<T, kGroup, kRows>(weight + first * depth, depth, depth, inputs, input_stride, sums);
    } else {
#pragma GCC unroll 4
      for (int f = 0; f < kGroup; ++f) {
        if (first + f >= features) continue;
        Vector<A> one[1][kRows] = {};
        dot_rows<T, 1, kRows>(weight + (first + f) * depth, depth, depth, inputs, input_stride,
                              one);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) sums[f][row] = one[0][row];
      }
    }
#pragma GCC unroll 4
    for (int f = 0; f < kGroup; ++f)
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) all[row * kFeatures + first + f] = sums[f][row];
  }
  store_vector<A>(sum_each<A>(all), values);
}

// emit(row, feature, count, values) is given the results, `count` features of a row at a time.
template <typename T, typename Emit, typename A = accumulate_t<T>>
void multiply_few(const T* weight, int64_t features, int64_t depth, const A* inputs,
                  int64_t input_stride, int64_t rows, const Emit& emit) {
  constexpr int n = kLanes<A>;
  for (int64_t first = 0; first < features; first += n) {
    const int64_t end = std::min(features, first + n);
    const auto some = [&](auto rows_at_once, int64_t row) {
      constexpr int kRows = rows_at_once, kFeatures = n / kRows;
      for (int64_t f = first; f < end; f += kFeatures) {
        A values[n];
        const int64_t count = std::min<int64_t>(kFeatures, end - f);
        multiply_rows<T, kRows>(weight + f * depth, count, depth, inputs + row * input_stride,
                                input_stride, values);
        for (int i = 0; i < kRows; ++i) emit(row + i, f, count, values + i * kFeatures);
      }
    };
    int64_t row = 0;
    if constexpr (n >= 8)
      for (; row + 4 <= rows; row += 4) some(std::integral_constant<int, 4>{}, row);
    for (; row + 2 <= rows; row += 2) some(std::integral_constant<int, 2>{}, row);
    for (; row < rows; ++row) some(std::integral_constant<int, 1>{}, row);
  }
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
