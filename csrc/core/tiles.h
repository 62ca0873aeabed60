// Walking the rows of a contiguous (outer, length, inner) tensor on the CPU.
//
// Rows are taken in tiles, so that what is done once a row can be done for several at once. Long contiguous
// rows (inner == 1) are walked along, with consecutive elements in the vector lanes. In every other layout
// the rows of a tile are walked across, element by element, with one row in each lane: rows that lie side
// by side (inner > 1), and rows too short to fill a vector.
//
// Kernels give per-element functions; `make(lane, begin)` returns the function of one row for the
// elements from `begin` on, called as f(k, offset) for element begin + k at `offset` in memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/macros.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

constexpr int kLanes = 64;
constexpr int64_t kShortRow = 32;
// Sums in the accumulation type are moved to double after this many elements, so that the error of a
// float32 row does not grow with its length.
constexpr int64_t kChunk = 1024;

struct Tile {
  int64_t row;    // the first row, counting outer * inner
  int64_t first;  // where it starts in memory
  int lanes;      // how many rows
  int64_t step;   // from one element of a row to the next
  int64_t lane_step;
  bool across;
};

struct Rows {
  int64_t outer, length, inner;

  int64_t count() const { return outer * inner; }
  bool across() const { return inner > 1 || length <= kShortRow; }

  // Long rows are few in a tile: enough of them to fill it with as many elements as a chunk has.
  int64_t rows_per_tile() const {
    constexpr int64_t kElements = 8192;
    return across() ? kLanes : std::clamp<int64_t>(kElements / length, 1, kLanes);
  }
  int64_t tiles() const {
    const int64_t n = rows_per_tile();
    return inner == 1 ? (outer + n - 1) / n : outer * ((inner + n - 1) / n);
  }
  int64_t elements_per_tile() const { return length * rows_per_tile(); }

  Tile tile(int64_t index) const {
    const int64_t n = rows_per_tile();
    if (inner == 1) {
      const int64_t row = index * n;
      return {row, row * length, static_cast<int>(std::min(n, outer - row)), 1, length, across()};
    }
    const int64_t per_outer = (inner + n - 1) / n;
    const int64_t o = index / per_outer, i = index % per_outer * n;
    return {
        o * inner + i, o * length * inner + i, static_cast<int>(std::min(n, inner - i)), inner, 1,
        true};
  }
};

// Calls f for every element of the tile's rows.
template <typename Make>
void for_each_element(const Tile& t, int64_t length, const Make& make) {
  if (!t.across) {
    for (int i = 0; i < t.lanes; ++i) {
      const auto f = make(i, int64_t{0});
      const int64_t first = t.first + i * t.lane_step;
#pragma omp simd
      for (int64_t k = 0; k < length; ++k) f(k, first + k);
    }
    return;
  }
  for (int64_t k = 0; k < length; ++k) {
    const int64_t first = t.first + k * t.step;
    if (t.lane_step == 1) {
#pragma omp simd
      for (int i = 0; i < t.lanes; ++i) make(i, int64_t{0})(k, first + i);
    } else {
#pragma omp simd
      for (int i = 0; i < t.lanes; ++i) make(i, int64_t{0})(k, first + i * t.lane_step);
    }
  }
}

// Two quantities to be summed.
template <typename A>
struct Terms {
  A first = 0, second = 0;
};

// Sums over every row of the tile what f returns, a Terms<A>, into sums[0][lane] and sums[1][lane].
template <typename A, typename Make>
void sum_elements(const Tile& t, int64_t length, const Make& make, double (*sums)[kLanes]) {
  std::fill_n(sums[0], t.lanes, 0.0);
  std::fill_n(sums[1], t.lanes, 0.0);
  for (int i = 0; !t.across && i < t.lanes; ++i) {
    for (int64_t begin = 0; begin < length; begin += kChunk) {
      const int32_t count = static_cast<int32_t>(std::min(kChunk, length - begin));
      const int64_t start = t.first + i * t.lane_step + begin;
      const auto f = make(i, begin);
      A first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
      for (int32_t k = 0; k < count; ++k) {
        const Terms<A> terms = f(k, start + k);
        first += terms.first;
        second += terms.second;
      }
      sums[0][i] += first;
      sums[1][i] += second;
    }
  }
  for (int64_t begin = 0; t.across && begin < length; begin += kChunk) {
    const int32_t count = static_cast<int32_t>(std::min(kChunk, length - begin));
    const int64_t start = t.first + begin * t.step;
    A first[kLanes], second[kLanes];
    std::fill_n(first, t.lanes, A(0));
    std::fill_n(second, t.lanes, A(0));
    for (int32_t k = 0; k < count; ++k) {
      const int64_t at = start + k * t.step;
      auto add = [&](int i, int64_t offset) {
        const Terms<A> terms = make(i, begin)(k, offset);
        first[i] += terms.first;
        second[i] += terms.second;
      };
      if (t.lane_step == 1) {
#pragma omp simd
        for (int i = 0; i < t.lanes; ++i) add(i, at + i);
      } else {
#pragma omp simd
        for (int i = 0; i < t.lanes; ++i) add(i, at + i * t.lane_step);
      }
    }
    for (int i = 0; i < t.lanes; ++i) {
      sums[0][i] += first[i];
      sums[1][i] += second[i];
    }
  }
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
