// The exponentials exp((f_i + g_j - C_ij) / reg) of a plan, in tiles that are a block's each.
//
// A thread holds kTileRows / kTileWarps rows of a tile and two of its columns, so that a warp reads costs
// along their rows; coordinates of points go through shared memory.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/cuda/kernel.h"
#include "core/cuda/torch_stream.h"
#include "core/precise.h"
#include "transport/binding.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

constexpr int kTileWarps = 8, kTileThreads = 32 * kTileWarps;
constexpr int kThreadRows = 4, kThreadColumns = 2;
constexpr int kTileRows = kTileWarps * kThreadRows, kTileColumns = 32 * kThreadColumns;
// How many coordinates of points are in shared memory at once, and the distance between those of one
// coordinate, which keeps the threads that write them in different banks.
constexpr int kDepth = 16, kRowPitch = kTileRows + 1, kColumnPitch = kTileColumns + 1;

inline const dim3 kTileBlock(32, kTileWarps);

inline Grid grid_of_blocks(int64_t blocks) {
  FUSEE_REQUIRE(blocks < INT32_MAX, "too many elements for one launch");
  return Grid(static_cast<unsigned>(blocks));
}

inline int64_t row_tiles(int64_t n) { return (n + kTileRows - 1) / kTileRows; }
inline int64_t column_tiles(int64_t m) { return (m + kTileColumns - 1) / kTileColumns; }

// Tiles in a line that are folded into one, cut into parts which different blocks take. It depends on the
// sizes alone.
struct Cut {
  int64_t tiles, parts, tiles_of_part;

  // `tiles` in a line, of `lines` lines.
  static Cut of(int64_t tiles, int64_t lines) {
    constexpr int64_t kBlocks = 512, kMost = 32;
    const int64_t wanted = std::min(kMost, kBlocks / std::max<int64_t>(lines, 1));
    const int64_t each = std::max<int64_t>(
        1, (tiles + std::max<int64_t>(wanted, 1) - 1) / std::max<int64_t>(wanted, 1));
    return {tiles, (tiles + each - 1) / each, each};
  }
  FUSEE_HOST_DEVICE int64_t begin(int64_t part) const { return part * tiles_of_part; }
  FUSEE_HOST_DEVICE int64_t end(int64_t part) const {
    return (part + 1) * tiles_of_part < tiles ? (part + 1) * tiles_of_part : tiles;
  }
};

// Where the tile of a block lies, of those of all problems.
struct TilePlace {
  int64_t item, row_tile, column_tile, row, column;

  FUSEE_DEVICE TilePlace(int64_t row_tiles, int64_t column_tiles) {
    const int64_t line = blockIdx.x / column_tiles;
    column_tile = blockIdx.x % column_tiles;
    item = line / row_tiles;
    row_tile = line % row_tiles;
    row = row_tile * kTileRows;
    column = column_tile * kTileColumns;
  }
};

// A thread's elements of a tile that begins at a row and a column.
using TileElements = double[kThreadRows][kThreadColumns];
FUSEE_DEVICE int tile_row(int r) { return static_cast<int>(threadIdx.y) + r * kTileWarps; }
FUSEE_DEVICE int tile_column(int c) { return static_cast<int>(threadIdx.x) + c * 32; }

template <Metric kMetric>
FUSEE_DEVICE double add_coordinate(double sum, double from, double to) {
  if constexpr (kMetric == Metric::kDot) {
    return sum - from * to;
  } else if constexpr (kMetric == Metric::kCityblock) {
    return sum + absolute(from - to);
  } else {
    return sum + (from - to) * (from - to);
  }
}

// Up to kDepth coordinates of the points from `first` on, into a tile of kPitch for each; 0 beyond the last.
template <int kPoints, typename T>
FUSEE_DEVICE void stage_points(Global<const T> points, int64_t count, int64_t d, int64_t first,
                               int64_t coordinate, int depth, const Shared<double>& tile) {
  for (int e = thread_rank(); e < kPoints * depth; e += kTileThreads) {
    const int point = e / depth, k = e % depth;
    const double value =
        first + point < count
            ? static_cast<double>(load(points, (first + point) * d + coordinate + k))
            : 0.0;
    tile.store(k * (kPoints + 1) + point, value);
  }
}

// T stores the costs or the points. The members are those of the whole batch, or of one item.
template <Metric kMetric, typename T>
struct Exponentials {
  int64_t n, m, d;
  Global<const T> x, y;
  Global<const double> f, g, reg;
  bool kept = false;  // x holds the exponentials themselves, of a matrix of costs

  FUSEE_DEVICE Exponentials of(int64_t item) const {
    return {n,
            m,
            d,
            x + item * n * d,
            kMetric == Metric::kCost ? y : y + item * m * d,
            f + item * n,
            g + item * m,
            reg + item,
            kept};
  }

  // The same between points with rows and columns changed about.
  Exponentials transposed() const { return {m, n, d, y, x, g, f, reg}; }

  // The costs of a tile, infinite beyond the last row and column. All threads of the block take part.
  FUSEE_DEVICE void costs(int64_t row, int64_t column, TileElements& out) const {
    if constexpr (kMetric == Metric::kCost) {
      for (int r = 0; r < kThreadRows; ++r) {
        for (int c = 0; c < kThreadColumns; ++c) {
          const int64_t i = row + tile_row(r), j = column + tile_column(c);
          out[r][c] = i < n && j < m ? static_cast<double>(load(x, i * m + j)) : kInfinity;
        }
      }
    } else {
      costs_of_points(row, column, out);
    }
  }

  // Costs to exponentials.
  FUSEE_DEVICE void exponentiate(int64_t row, int64_t column, TileElements& e) const {
    const double inverse = 1 / load(reg, 0);
    double to[kThreadColumns];
    for (int c = 0; c < kThreadColumns; ++c) {
      const int64_t j = column + tile_column(c);
      to[c] = j < m ? load(g, j) : 0;
    }
    for (int r = 0; r < kThreadRows; ++r) {
      const int64_t i = row + tile_row(r);
      const double from = i < n ? load(f, i) : 0;
      for (int c = 0; c < kThreadColumns; ++c)
        e[r][c] = exp_in_range(((from - e[r][c]) + to[c]) * inverse);
    }
  }

  FUSEE_DEVICE void tile(int64_t row, int64_t column, TileElements& e) const {
    costs(row, column, e);
    if (kMetric != Metric::kCost || !kept) exponentiate(row, column, e);
  }

 private:
  FUSEE_DEVICE void costs_of_points(int64_t row, int64_t column, TileElements& out) const {
    FUSEE_SHARED(double, from, kDepth* kRowPitch);
    FUSEE_SHARED(double, to, kDepth* kColumnPitch);
    for (int r = 0; r < kThreadRows; ++r)
      for (int c = 0; c < kThreadColumns; ++c) out[r][c] = 0;
    for (int64_t first = 0; first < d; first += kDepth) {
      const int depth = d - first < kDepth ? static_cast<int>(d - first) : kDepth;
      __syncthreads();
      stage_points<kTileRows>(x, n, d, row, first, depth, from);
      stage_points<kTileColumns>(y, m, d, column, first, depth, to);
      __syncthreads();
      for (int k = 0; k < depth; ++k) {
        double other[kThreadColumns];
        for (int c = 0; c < kThreadColumns; ++c)
          other[c] = to.load(k * kColumnPitch + tile_column(c));
        for (int r = 0; r < kThreadRows; ++r) {
          const double own = from.load(k * kRowPitch + tile_row(r));
          for (int c = 0; c < kThreadColumns; ++c)
            out[r][c] = add_coordinate<kMetric>(out[r][c], own, other[c]);
        }
      }
    }
    for (int r = 0; r < kThreadRows; ++r) {
      for (int c = 0; c < kThreadColumns; ++c) {
        if constexpr (kMetric == Metric::kEuclidean) out[r][c] = sqrt(out[r][c]);
        if (row + tile_row(r) >= n || column + tile_column(c) >= m) out[r][c] = kInfinity;
      }
    }
  }
};

// A term of a sum: masses that are zero take part in none, whatever the exponential.
FUSEE_DEVICE double weighted(double weight, double e) { return weight == 0 ? 0.0 : weight * e; }

// The block's sum of each column of a tile, of which the threads hold parts, for f(column, sum).
template <typename F>
FUSEE_DEVICE void sum_columns(const double (&parts)[kThreadColumns], const F& f) {
  FUSEE_SHARED(double, scratch, kTileWarps* kTileColumns);
  __syncthreads();
  for (int c = 0; c < kThreadColumns; ++c)
    scratch.store(threadIdx.y * kTileColumns + tile_column(c), parts[c]);
  __syncthreads();
  for (int column = thread_rank(); column < kTileColumns; column += kTileThreads) {
    double sum = scratch.load(column);
    for (int warp = 1; warp < kTileWarps; ++warp) sum += scratch.load(warp * kTileColumns + column);
    f(column, sum);
  }
}

// f(metric, zero) with the metric as a constant and a zero of the type that stores costs or points.
template <typename F>
void dispatch_costs(const TransportTensors& given, const F& f) {
  const auto of_type = [&](auto zero) {
    switch (given.metric) {
      case Metric::kCost:
        return f(std::integral_constant<Metric, Metric::kCost>{}, zero);
      case Metric::kSqEuclidean:
        return f(std::integral_constant<Metric, Metric::kSqEuclidean>{}, zero);
      case Metric::kEuclidean:
        return f(std::integral_constant<Metric, Metric::kEuclidean>{}, zero);
      case Metric::kCityblock:
        return f(std::integral_constant<Metric, Metric::kCityblock>{}, zero);
      case Metric::kDot:
        return f(std::integral_constant<Metric, Metric::kDot>{}, zero);
    }
  };
  if (given.x.scalar_type() == ScalarType::Float) return of_type(float{});
  FUSEE_REQUIRE(given.x.scalar_type() == ScalarType::Double, "expected float32 or float64 costs");
  of_type(double{});
}

template <Metric kMetric, typename T>
Exponentials<kMetric, T> exponentials_of(const TransportTensors& given, const Tensor& f,
                                         const Tensor& g) {
  return {given.n,           given.m,          given.d,          input<T>(given.x),
          input<T>(given.y), input<double>(f), input<double>(g), input<double>(given.reg)};
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
