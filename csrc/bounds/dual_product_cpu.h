// Pairs of products for centers and for radii, whose operands are packed together: of a factor read as
// broadcast scalars with lines of vectors.
#pragma once

#include "bounds/dual_tile_cpu.h"
#include "core/lines_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// A task computes a tile of the results whose operands and sums lie in the second-level cache.
inline constexpr int64_t kTaskRows = 256;
template <typename A>
inline constexpr int64_t kTaskColumns = 2 * kTileLanes<A>;

// How many roundings a term goes through, its own and a bias's included.
inline int64_t product_roundings(int64_t depth) {
  return std::min(depth, kTileDepth) + depth / kTileDepth + 3;
}

// Lines of columns from rows that lie along the depth, minus one row where that is given, with zeros
// after the last column.
template <typename T, typename A>
void copy_lines(const T* from, int64_t row_stride, int64_t depth, int64_t columns, A* lines,
                const T* less = nullptr) {
  constexpr int64_t n = kLanes<A>, kAhead = 8;
  for (int64_t d = 0; d < depth; ++d, from += row_stride)
    for (int64_t c = 0; c < columns; c += n) {
      const auto load = [&](const T* row) {
        return c + n <= columns ? load_vector(row + c) : load_part(row + c, columns - c);
      };
      __builtin_prefetch(from + kAhead * row_stride + c);
      const Vector<A> subtrahend = less != nullptr ? load(less) : Vector<A>{};
      store_vector<A>(load(from) - subtrahend,
                      lines + c / kTileLanes<A> * (kTileDepth * kTileLanes<A>)+d * kTileLanes<A> +
                          c % kTileLanes<A>);
    }
}

struct NothingAhead {
  template <typename Tile>
  Nothing operator()(const Tile&, int64_t, int64_t) const {
    return {};
  }
};

// For every tile of a result (rows, columns): pack(begin, depth, column, columns, lines) writes the lines
// of centers and of radii, the tiles kTileDepth lines apart; then emit(tile). With kMagnitudes the lines of
// radii are the magnitudes of those of centers. What ahead(tile, begin, calls) returns is called so many
// times while the product over a part of the depth goes on.
template <typename A, bool kMagnitudes, typename Pack, typename Emit,
          typename Foresee = NothingAhead>
void dual_product(const Factor<A> (&factors)[2], int64_t rows, int64_t depth, int64_t columns,
                  const Pack& pack, const Emit& emit, const Foresee& ahead = {}) {
  constexpr int64_t kColumns = kTaskColumns<A>, kLinesSize = kColumns * kTileDepth;
  const int64_t across = (columns + kColumns - 1) / kColumns;
  const int64_t down = (rows + kTaskRows - 1) / kTaskRows;
  const int64_t most_rows = (rows + down - 1) / std::max<int64_t>(1, down);
  const int64_t work = most_rows * std::min(columns, kColumns) * depth / 8;
  parallel_for(0, across * down, grain(work), [&](int64_t first, int64_t last) {
    const Scratch<A> space(2 * kLinesSize + 2 * most_rows * kColumns);
    A* const lines[2] = {space.get(), space.get() + kLinesSize};
    A* const sums[2] = {lines[1] + kLinesSize, lines[1] + kLinesSize + most_rows * kColumns};
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task % down * most_rows, column = task / down * kColumns;
      const int64_t tile_rows = std::min(most_rows, rows - row);
      const int64_t tile_columns = std::min(kColumns, columns - column);
      const int64_t vectors = (tile_columns + kLanes<A> - 1) / kLanes<A>;
      const DualTile<A> tile{row, tile_rows, column, tile_columns, {sums[0], sums[1]}, kColumns};
      for (int64_t begin = 0; begin == 0 || begin < depth; begin += kTileDepth) {
        const int64_t length = std::min(kTileDepth, depth - begin);
        pack(begin, length, column, tile_columns, lines);
        auto before = ahead(tile, begin, 2 * tiles_of<A>(tile_rows, length, vectors));
        const auto product = [&]<bool kOfMagnitudes>(int which, const A* of) {
          Factor<A> factor = factors[which];
          factor.data = factor.at(row, begin);
          multiply<kOfMagnitudes>(
              factor, tile_rows, length, Lines<A>{of, kTileLanes<A>, kTileDepth * kTileLanes<A>},
              vectors, [&](int64_t r) { return sums[which] + r * kColumns; }, kTileLanes<A>,
              begin != 0, before);
        };
        product.template operator()<false>(0, lines[0]);
        product.template operator()<kMagnitudes>(1, lines[kMagnitudes ? 0 : 1]);
      }
      emit(tile);
    }
  });
}

// Rows as a factor whose features are their columns: turned into lines, a tile of rows after another.
template <typename A>
class Turned {
 public:
  Turned(const A* from, int64_t row_stride, int64_t rows, int64_t columns)
      : columns_(columns),
        space_((rows + kTileLanes<A> - 1) / kTileLanes<A> * kTileLanes<A> * columns) {
    constexpr int64_t n = kTileLanes<A>, kColumns = 256;
    const int64_t parts = (columns + kColumns - 1) / kColumns;
    parallel_for(0, (rows + n - 1) / n * parts, grain(n * kColumns),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t row = i / parts * n, column = i % parts * kColumns;
                     load_lines(from + column, row_stride, std::min(kColumns, columns - column),
                                Chunk{row, std::min(n, rows - row)},
                                space_.get() + row * columns + column * n, 0,
                                [&](int64_t c) { return c * n; });
                   }
                 });
  }

  Factor<A> factor() const {
    return {space_.get(), kTileLanes<A>, 1, kTileLanes<A>, columns_ * kTileLanes<A>};
  }

 private:
  int64_t columns_;
  Scratch<A> space_;
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
