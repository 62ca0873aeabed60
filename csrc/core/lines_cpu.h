// Between rows of tokens in memory and lines of features, whose lanes are tokens.
#pragma once

#include "core/product_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// Tokens that go through a computation together, in tiles of kTileLanes; the last may hold fewer.
struct Chunk {
  int64_t first, count;

  template <typename A>
  int64_t tiles() const {
    return (count + kTileLanes<A> - 1) / kTileLanes<A>;
  }
  template <typename A>
  int64_t vectors() const {
    return (count + kLanes<A> - 1) / kLanes<A>;
  }
};

// Calls f(column) for the vectors that cover `columns`, the last of which may overlap the one before.
template <typename A, typename F>
FUSEE_HOST_DEVICE void for_each_vector(int64_t columns, const F& f) {
  int64_t column = 0;
  for (; column + kLanes<A> <= columns; column += kLanes<A>) f(column);
  if (column < columns) f(columns - kLanes<A>);
}

// line(c) is where column c's line begins within a tile. Lanes without a token become zero.
template <typename T, typename A, typename Line>
void load_lines(const T* input, int64_t row_stride, int64_t columns, const Chunk& chunk, A* lines,
                int64_t tile_stride, const Line& line) {
  constexpr int n = kLanes<A>;
  const T* rows = input + chunk.first * row_stride;
  for (int64_t token = 0; token < chunk.count; token += n) {
    const int64_t count = std::min<int64_t>(n, chunk.count - token);
    A* to = lines + token / kTileLanes<A> * tile_stride + token % kTileLanes<A>;
    const T* from = rows + token * row_stride;
    if (columns < n) {
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t i = 0; i < n; ++i)
          to[line(c) + i] = i < count ? static_cast<A>(from[i * row_stride + c]) : A(0);
      continue;
    }
    for_each_vector<A>(columns, [&](int64_t c) {
      Vector<A> square[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i)
        square[i] = i < count ? load_vector(from + i * row_stride + c) : Vector<A>{};
      transpose<A>(square);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) store_vector<A>(square[i], to + line(c + i));
    });
  }
}

// The lines of consecutive columns to rows, with the bias of the columns where there is one.
template <typename T, typename A>
void store_lines(const A* lines, int64_t tile_stride, int64_t columns, const Chunk& chunk,
                 const A* bias, T* output, int64_t row_stride) {
  constexpr int n = kLanes<A>;
  T* rows = output + chunk.first * row_stride;
  for (int64_t token = 0; token < chunk.count; token += n) {
    const int64_t count = std::min<int64_t>(n, chunk.count - token);
    const A* from = lines + token / kTileLanes<A> * tile_stride + token % kTileLanes<A>;
    T* to = rows + token * row_stride;
    if (columns < n) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < columns; ++c)
          to[i * row_stride + c] =
              static_cast<T>(from[c * kTileLanes<A> + i] + (bias ? bias[c] : A(0)));
      continue;
    }
    for_each_vector<A>(columns, [&](int64_t c) {
      Vector<A> square[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) square[i] = load_vector(from + (c + i) * kTileLanes<A>);
      transpose<A>(square);
      const Vector<A> shift = bias ? load_vector(bias + c) : Vector<A>{};
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i)
        if (i < count) store_vector<T>(square[i] + shift, to + i * row_stride + c);
    });
  }
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
