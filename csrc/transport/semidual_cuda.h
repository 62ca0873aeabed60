// The semi-dual of a batch in CUDA: what is known of each problem, and the passes over its costs.
//
// Each problem has two points, the current one and the one that is tried; taking a trial changes them about.
#pragma once

#include <vector>

#include "transport/annealing.h"
#include "transport/exponentials_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// What holds for the next evaluation of a problem.
enum Flag : int32_t {
  kFresh = 1,        // the current point again, with another regularisation
  kAsItStands = 2,   // the trial as it stands
  kUnevaluated = 4,  // nothing was evaluated yet
  kUnsolvable = 8,   // the problem has no solution
};

struct alignas(16) Turn {
  Action action;
  int32_t flags, slot, unused;
};
struct alignas(16) Scale {
  double reg, step;
};

// What is known at one g.
struct Point {
  Global<double> g, log_sum, row_mass, column_mass, target;
};

// One problem, as its machine stands.
struct Item {
  int64_t n, m;
  Global<const double> a, b;
  Side rows, columns;
  double last_reg, reg, step;
  Turn turn;
  Point current, trial;

  FUSEE_DEVICE double f(const Point& at, int64_t i) const {
    return -reg * rows.damping(reg) * load(at.log_sum, i);
  }
};

// The arrays of all problems, one after another.
struct Semidual {
  int64_t batch, n, m;
  Global<const double> a, b, last_reg, penalty;
  Global<Annealing> machine;  // of which only the blocks that have a problem to themselves know
  Global<Turn> turn;
  Global<Scale> scale;
  Global<double> g, log_sum, row_mass, column_mass, target;  // (batch, 2, n or m)
  Global<double> weight;                                     // g / reg + log b
  // The largest term of each row's sum, and what a term is multiplied by for its part of the plan.
  Global<double> largest, share;
  Global<double> row_largest, row_sums, column_sums;  // of parts of rows and columns
  Cut row_cut, column_cut;

  FUSEE_DEVICE Point point(int64_t item, int slot) const {
    const int64_t of_rows = (2 * item + slot) * n, of_columns = (2 * item + slot) * m;
    return {g + of_columns, log_sum + of_rows, row_mass + of_rows, column_mass + of_columns,
            target + of_columns};
  }
  FUSEE_DEVICE Item item(int64_t i) const {
    const Turn now = load(turn, i);
    const Scale numbers = load(scale, i);
    return {n,
            m,
            a + i * n,
            b + i * m,
            {load(penalty, 2 * i)},
            {load(penalty, 2 * i + 1)},
            load(last_reg, i),
            numbers.reg,
            numbers.step,
            now,
            point(i, now.slot),
            point(i, 1 - now.slot)};
  }
  FUSEE_DEVICE bool evaluates(int64_t i) const {
    const Turn now = load(turn, i);
    return now.action == Action::kSinkhorn || now.action == Action::kTrial;
  }
};

constexpr int kMostThreads = 512;

// A block for each problem, as large as its sides ask for.
inline int threads_of_item(int64_t n, int64_t m) {
  int threads = 128;
  while (threads < kMostThreads && threads < std::max(n, m)) threads *= 2;
  return threads;
}

// f(k) for the block's share of [0, count).
template <typename F>
FUSEE_DEVICE void each(int64_t count, const F& f) {
  for (int64_t k = thread_rank(); k < count; k += thread_count()) f(k);
}

// The block's sum, or largest, of f(k).
template <typename F>
FUSEE_DEVICE double total(int64_t count, const Shared<double>& scratch, const F& f) {
  double sum = 0;
  each(count, [&](int64_t k) { sum += f(k); });
  return block_sum(sum, scratch);
}
template <typename F>
FUSEE_DEVICE double greatest(int64_t count, const Shared<double>& scratch, const F& f) {
  double most = -kInfinity;
  each(count, [&](int64_t k) { most = Maximum{}(most, f(k)); });
  return block_reduce(most, Maximum{}, -kInfinity, scratch);
}

template <Metric kMetric, typename T>
FUSEE_DEVICE double cost_of_pair(const Exponentials<kMetric, T>& own, int64_t i, int64_t j) {
  if constexpr (kMetric == Metric::kCost) return static_cast<double>(load(own.x, i * own.m + j));
  double sum = 0;
  for (int64_t k = 0; k < own.d; ++k)
    sum = add_coordinate<kMetric>(sum, static_cast<double>(load(own.x, i * own.d + k)),
                                  static_cast<double>(load(own.y, j * own.d + k)));
  return kMetric == Metric::kEuclidean ? sqrt(sum) : sum;
}

// log sum_i a_i exp((f_i - C_ij) / reg) at the current point, for a column of any mass.
template <Metric kMetric, typename T>
FUSEE_DEVICE double log_sum_of_column(const Exponentials<kMetric, T>& own, const Item& p,
                                      const Point& at, int64_t j) {
  constexpr double kLeast = 1e-280;
  const double mass = load(at.column_mass, j);
  if (mass > kLeast) return log(mass) - log(load(p.b, j)) - load(at.g, j) / p.reg;
  const auto exponent = [&](int64_t i) {
    const double a = load(p.a, i);
    return a == 0 ? -kInfinity : log(a) + (p.f(at, i) - cost_of_pair(own, i, j)) / p.reg;
  };
  double largest = -kInfinity, sum = 0;
  for (int64_t i = 0; i < p.n; ++i) largest = fmax(largest, exponent(i));
  if (largest == -kInfinity) return largest;
  for (int64_t i = 0; i < p.n; ++i) sum += exp(exponent(i) - largest);
  return largest + log(sum);
}

// The g of the trial: that of a step of Sinkhorn's, one along the direction, or the current one.
template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kTileThreads)
    propose_kernel(Exponentials<kMetric, T> all, Semidual s, int64_t blocks,
                   Global<const double> direction) {
  const int64_t item = blockIdx.x / blocks;
  const int64_t j = blockIdx.x % blocks * kTileThreads + threadIdx.x;
  if (j >= s.m || !s.evaluates(item)) return;
  const Item p = s.item(item);
  const double b = load(p.b, j);
  double g = load(p.current.g, j);
  if ((p.turn.flags & kAsItStands) != 0) {
    g = load(p.trial.g, j);
  } else if ((p.turn.flags & kFresh) == 0 && b != 0) {
    g = p.turn.action == Action::kTrial
            ? g + p.step * load(direction, item * s.m + j)
            : -p.reg * p.columns.damping(p.reg) * log_sum_of_column(all.of(item), p, p.current, j);
  }
  store(p.trial.g, j, g);
  store(s.weight, item * s.m + j, g / p.reg + log(b));
}

// Each row's largest exponent, and the sum of all relative to it, by parts of the columns.
template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kTileThreads)
    rows_kernel(Exponentials<kMetric, T> all, Semidual s, int64_t lines) {
  const int64_t parts = s.row_cut.parts, part = blockIdx.x % parts, line = blockIdx.x / parts;
  const int64_t item = line / lines, row = line % lines * kTileRows;
  if (!s.evaluates(item)) return;
  const Exponentials<kMetric, T> own = all.of(item);
  const double inverse = 1 / load(s.scale, item).reg;
  double largest[kThreadRows], sums[kThreadRows];
  for (int r = 0; r < kThreadRows; ++r) {
    largest[r] = -kInfinity;
    sums[r] = 0;
  }
  for (int64_t tile = s.row_cut.begin(part); tile < s.row_cut.end(part); ++tile) {
    const int64_t column = tile * kTileColumns;
    TileElements e;
    own.costs(row, column, e);
    double weight[kThreadColumns];
    for (int c = 0; c < kThreadColumns; ++c) {
      const int64_t j = column + tile_column(c);
      weight[c] = j < s.m ? load(s.weight, item * s.m + j) : -kInfinity;
    }
    for (int r = 0; r < kThreadRows; ++r) {
      double most = largest[r];
      for (int c = 0; c < kThreadColumns; ++c) {
        e[r][c] = weight[c] - e[r][c] * inverse;
        most = e[r][c] > most ? e[r][c] : most;
      }
      if (most > largest[r]) {
        sums[r] *= exp_in_range(largest[r] - most);
        largest[r] = most;
      }
      if (most > -kInfinity)
        for (int c = 0; c < kThreadColumns; ++c) sums[r] += exp_in_range(e[r][c] - most);
    }
  }
  for (int r = 0; r < kThreadRows; ++r) {
    const double most = warp_reduce(largest[r], Maximum{});
    const double sum =
        warp_sum(largest[r] > -kInfinity ? sums[r] * exp_in_range(largest[r] - most) : 0.0);
    const int64_t i = row + tile_row(r);
    if (threadIdx.x != 0 || i >= s.n) continue;
    store(s.row_largest, (item * parts + part) * s.n + i, most);
    store(s.row_sums, (item * parts + part) * s.n + i, sum);
  }
}

// The parts of a row together: its log_sum and its mass.
static __global__ void __launch_bounds__(kTileThreads)
    fold_rows_kernel(Semidual s, int64_t blocks) {
  const int64_t item = blockIdx.x / blocks;
  const int64_t i = blockIdx.x % blocks * kTileThreads + threadIdx.x;
  if (i >= s.n || !s.evaluates(item)) return;
  const Item p = s.item(item);
  const int64_t parts = s.row_cut.parts, first = item * parts * s.n + i;
  double largest = -kInfinity, sum = 0;
  for (int64_t part = 0; part < parts; ++part)
    largest = fmax(largest, load(s.row_largest, first + part * s.n));
  for (int64_t part = 0; part < parts; ++part) {
    const double of_part = load(s.row_largest, first + part * s.n);
    if (of_part > -kInfinity)
      sum += load(s.row_sums, first + part * s.n) * exp_in_range(of_part - largest);
  }
  const double log_sum = largest > -kInfinity ? largest + log(sum) : -kInfinity;
  const double a = load(p.a, i);
  const double mass =
      a == 0 ? 0 : a * exp(p.rows.softness(p.reg) * p.rows.damping(p.reg) * log_sum);
  store(p.trial.log_sum, i, log_sum);
  store(p.trial.row_mass, i, mass);
  store(s.largest, item * s.n + i, largest);
  store(s.share, item * s.n + i, mass == 0 ? 0 : mass / sum);
}

// The columns' sums of the plan, by parts of the rows.
template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kTileThreads)
    columns_kernel(Exponentials<kMetric, T> all, Semidual s, int64_t lines) {
  const int64_t parts = s.column_cut.parts, part = blockIdx.x % parts, line = blockIdx.x / parts;
  const int64_t item = line / lines, column = line % lines * kTileColumns;
  if (!s.evaluates(item)) return;
  const Exponentials<kMetric, T> own = all.of(item);
  const double inverse = 1 / load(s.scale, item).reg;
  double weight[kThreadColumns], sums[kThreadColumns] = {};
  for (int c = 0; c < kThreadColumns; ++c) {
    const int64_t j = column + tile_column(c);
    weight[c] = j < s.m ? load(s.weight, item * s.m + j) : -kInfinity;
  }
  for (int64_t tile = s.column_cut.begin(part); tile < s.column_cut.end(part); ++tile) {
    const int64_t row = tile * kTileRows;
    TileElements e;
    own.costs(row, column, e);
    for (int r = 0; r < kThreadRows; ++r) {
      const int64_t i = row + tile_row(r);
      const double share = i < s.n ? load(s.share, item * s.n + i) : 0;
      if (share == 0) continue;  // whole warps
      const double largest = load(s.largest, item * s.n + i);
      for (int c = 0; c < kThreadColumns; ++c)
        sums[c] += share * exp_in_range((weight[c] - e[r][c] * inverse) - largest);
    }
  }
  sum_columns(sums, [&](int c, double sum) {
    const int64_t j = column + c;
    if (j < s.m) store(s.column_sums, (item * parts + part) * s.m + j, sum);
  });
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
