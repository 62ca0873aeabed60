// The linear system behind implicit derivatives as CUDA sees it, and the passes over its plan.
//
// With E the exponentials, row i of the plan is a_i b_j E_ij and has the mass a_i S_i, S = E b. The unknowns of
// the rows are eliminated, and what is left for the columns is multiplied by two passes over the tiles of E:
// sums along the rows, and sums along the columns.
#pragma once

#include "transport/exponentials_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// Numbers of a problem that last.
enum Number : int {
  kActive,
  kUnsolvable,  // a row with mass has no pair
  kMass,
  kShift,  // added to rows and taken from columns, so that a singular system has a solution
  kWeight,
  kFirstRho,
  kRho,
  kBest,
  kSince,
  kIterations,
  kNumbers
};

constexpr int kColumnSums = 3;

template <Metric kMetric, typename T>
struct System {
  Exponentials<kMetric, T> all;
  int64_t batch;
  Cut row_cut,
      column_cut;  // of the columns that a row's sum takes, and of the rows that a column's takes
  Global<const double> a, b, penalty, p, q;
  Global<double> u, v;
  // Of rows: their parts (batch, parts, n); S; what they ask for, each for a unit of its mass.
  Global<double> row_parts, row_sum, asked;
  // Of columns: their parts (batch, parts, 3, m), and E^T a.
  Global<double> column_parts, column_sum;
  Global<double> diagonal, preconditioner, residual, direction, product, solution, best;
  Global<double> numbers;
  Global<int32_t> active;  // how many problems are not solved yet

  FUSEE_DEVICE double number(int64_t item, Number which) const {
    return load(numbers, item * kNumbers + which);
  }
  FUSEE_DEVICE void set(int64_t item, Number which, double value) const {
    store(numbers, item * kNumbers + which, value);
  }
  FUSEE_DEVICE Side rows(int64_t item) const { return {load(penalty, 2 * item)}; }
  FUSEE_DEVICE Side columns(int64_t item) const { return {load(penalty, 2 * item + 1)}; }
  FUSEE_DEVICE double reg(int64_t item) const { return load(all.reg, item); }
  FUSEE_DEVICE double share(int64_t item) const { return rows(item).damping(reg(item)); }
  FUSEE_DEVICE bool singular(int64_t item) const {
    return rows(item).balanced() && columns(item).balanced();
  }

  // What the passes left of row i and of column j.
  FUSEE_DEVICE double row_total(int64_t item, int64_t i) const {
    double sum = 0;
    for (int64_t part = 0; part < row_cut.parts; ++part)
      sum += load(row_parts, (item * row_cut.parts + part) * all.n + i);
    return sum;
  }
  FUSEE_DEVICE double column_total(int64_t item, int64_t j, int which) const {
    double sum = 0;
    for (int64_t part = 0; part < column_cut.parts; ++part) {
      const int64_t line = (item * column_cut.parts + part) * kColumnSums + which;
      sum += load(column_parts, line * all.m + j);
    }
    return sum;
  }
};

// f(i) for the block's share of [0, count).
template <typename F>
FUSEE_DEVICE void for_block(int64_t count, const F& f) {
  for (int64_t i = thread_rank(); i < count; i += kTileThreads) f(i);
}

// The block's sum of f(i) over [0, count).
template <typename V, typename F>
FUSEE_DEVICE V block_total(int64_t count, const F& f) {
  FUSEE_SHARED(V, scratch, 32);
  V total{};
  for_block(count, [&](int64_t i) { total = total + f(i); });
  return block_sum(total, scratch);
}

// f(item) for the items of the block, and a barrier of all blocks.
template <typename F>
FUSEE_DEVICE void for_each_item(int64_t batch, const F& f) {
  for (int64_t item = blockIdx.x; item < batch; item += gridDim.x) f(item);
  grid_sync();
}

struct Two {
  double first, second;

  Two() = default;
  FUSEE_HOST_DEVICE Two(double both) : first(both), second(both) {}
  FUSEE_HOST_DEVICE Two(double first_, double second_) : first(first_), second(second_) {}
  FUSEE_HOST_DEVICE Two operator+(const Two& other) const {
    return {first + other.first, second + other.second};
  }
};

// Sums along the rows, of factor(item, j) E_ij.
template <Metric kMetric, typename T, typename Factor>
FUSEE_DEVICE void pass_along_rows(const System<kMetric, T>& system, bool all_items,
                                  const Factor& factor) {
  const int64_t n = system.all.n, m = system.all.m, parts = system.row_cut.parts;
  const int64_t lines = (n + kTileRows - 1) / kTileRows;
  for (int64_t work = blockIdx.x; work < system.batch * lines * parts; work += gridDim.x) {
    const int64_t part = work % parts, line = work / parts;
    const int64_t item = line / lines, row = line % lines * kTileRows;
    if (!all_items && system.number(item, kActive) == 0) continue;
    const Exponentials<kMetric, T> own = system.all.of(item);
    double sums[kThreadRows] = {};
    for (int64_t tile = system.row_cut.begin(part); tile < system.row_cut.end(part); ++tile) {
      const int64_t column = tile * kTileColumns;
      TileElements e;
      own.tile(row, column, e);
      for (int c = 0; c < kThreadColumns; ++c) {
        const int64_t j = column + tile_column(c);
        const double weight = j < m ? factor(item, j) : 0;
        for (int r = 0; r < kThreadRows; ++r) sums[r] += weighted(weight, e[r][c]);
      }
    }
    for (int r = 0; r < kThreadRows; ++r) {
      const double sum = warp_sum(sums[r]);
      const int64_t i = row + tile_row(r);
      if (threadIdx.x == 0 && i < n) store(system.row_parts, (item * parts + part) * n + i, sum);
    }
  }
}

struct Identity {
  FUSEE_DEVICE double operator()(int64_t, int64_t, double e) const { return e; }
};

// Sums along the columns, of term(item, j, E_ij) times weigh(item, i).
template <Metric kMetric, typename T, typename Weigh, typename Term>
FUSEE_DEVICE void pass_along_columns(const System<kMetric, T>& system, bool all_items, int which,
                                     const Weigh& weigh, const Term& term) {
  FUSEE_SHARED(double, weights, kTileRows);
  const int64_t n = system.all.n, m = system.all.m, parts = system.column_cut.parts;
  const int64_t lines = (m + kTileColumns - 1) / kTileColumns;
  for (int64_t work = blockIdx.x; work < system.batch * lines * parts; work += gridDim.x) {
    const int64_t part = work % parts, line = work / parts;
    const int64_t item = line / lines, column = line % lines * kTileColumns;
    if (!all_items && system.number(item, kActive) == 0) continue;
    const Exponentials<kMetric, T> own = system.all.of(item);
    double sums[kThreadColumns] = {};
    for (int64_t tile = system.column_cut.begin(part); tile < system.column_cut.end(part); ++tile) {
      const int64_t row = tile * kTileRows;
      __syncthreads();
      if (thread_rank() < kTileRows) {
        const int64_t i = row + thread_rank();
        weights.store(thread_rank(), i < n ? weigh(item, i) : 0);
      }
      __syncthreads();
      TileElements e;
      own.tile(row, column, e);
      for (int r = 0; r < kThreadRows; ++r) {
        const double weight = weights.load(tile_row(r));
        for (int c = 0; c < kThreadColumns; ++c) {
          const int64_t j = column + tile_column(c);
          if (j < m) sums[c] += weighted(weight, term(item, j, e[r][c]));
        }
      }
    }
    sum_columns(sums, [&](int at, double sum) {
      const int64_t j = column + at;
      if (j < m)
        store(system.column_parts, ((item * parts + part) * kColumnSums + which) * m + j, sum);
    });
  }
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
