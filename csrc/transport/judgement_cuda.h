// Where each problem of a batch starts, and what its machine makes of a trial, in CUDA.
#pragma once

#include <new>

#include "transport/newton_step_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// The least and the largest finite cost of each block's tiles; NaN for the least if there is a cost that is none.
template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kTileThreads)
    range_kernel(Exponentials<kMetric, T> all, int64_t lines, Cut cut, Global<double> lows,
                 Global<double> highs) {
  FUSEE_SHARED(double, scratch, 32);
  const int64_t part = blockIdx.x % cut.parts, line = blockIdx.x / cut.parts;
  const int64_t row = line % lines * kTileRows;
  const Exponentials<kMetric, T> own = all.of(line / lines);
  double low = kInfinity, high = -kInfinity;
  for (int64_t tile = cut.begin(part); tile < cut.end(part); ++tile) {
    TileElements costs;
    own.costs(row, tile * kTileColumns, costs);
    for (int r = 0; r < kThreadRows; ++r) {
      for (int c = 0; c < kThreadColumns; ++c) {
        const double cost = costs[r][c];
        low = cost > -kInfinity ? Minimum{}(low, cost) : kNaN;
        if (cost < kInfinity && cost > high) high = cost;
      }
    }
  }
  low = block_reduce(low, Minimum{}, double(kInfinity), scratch);
  high = block_reduce(high, Maximum{}, -kInfinity, scratch);
  if (thread_rank() != 0) return;
  store(lows, blockIdx.x, low);
  store(highs, blockIdx.x, high);
}

// Where marginals hold, a constant in g means nothing, but digits. By the block, before an evaluation.
FUSEE_DEVICE void center(const Side& rows, const Side& columns, int64_t m,
                         const Global<const double>& b, const Global<double>& g,
                         const Shared<double>& scratch) {
  if (!rows.balanced() || !columns.balanced()) return;
  const double mass = total(m, scratch, [&](int64_t j) { return load(b, j); });
  const double of_g = total(m, scratch, [&](int64_t j) { return load(b, j) * load(g, j); });
  if (!(mass > 0)) return;
  each(m, [&](int64_t j) { store(g, j, load(g, j) - of_g / mass); });
}

// Sets up each problem's machine and its first point.
static __global__ void __launch_bounds__(kMostThreads, 1)
    start_kernel(Semidual s, Global<const double> first, double tolerance, int64_t max_iterations,
                 int64_t blocks, Global<const double> lows, Global<const double> highs) {
  FUSEE_SHARED(double, scratch, 32);
  const int64_t item = blockIdx.x;
  const Global<const double> a = s.a + item * s.n, b = s.b + item * s.m;
  double low = kInfinity;
  each(blocks, [&](int64_t k) { low = Minimum{}(low, load(lows, item * blocks + k)); });
  low = block_reduce(low, Minimum{}, double(kInfinity), scratch);
  const double high =
      greatest(blocks, scratch, [&](int64_t k) { return load(highs, item * blocks + k); });
  const double of_a = total(s.n, scratch, [&](int64_t i) { return load(a, i); });
  const double of_b = total(s.m, scratch, [&](int64_t j) { return load(b, j); });
  const Point at = s.point(item, 0);
  each(s.m, [&](int64_t j) {
    store(at.g, j, first ? load(first, item * s.m + j) : 0.0);
    store(at.column_mass, j, 0.0);
  });
  center({load(s.penalty, 2 * item)}, {load(s.penalty, 2 * item + 1)}, s.m, b, at.g, scratch);
  each(s.n, [&](int64_t i) { store(at.log_sum, i, 0.0); });
  if (thread_rank() != 0) return;
  const double range = low != low || high - low > 0 ? high - low : 0;
  const double reg = load(s.last_reg, item), mass = of_a < of_b ? of_b : of_a;
  const bool possible =
      range < kInfinity && of_a < kInfinity && of_b < kInfinity && reg > 0 && reg < kInfinity;
  Annealing& machine = *new (s.machine.data + item) Annealing(
      reg, range, tolerance, mass > 0 ? mass : 1, max_iterations, static_cast<bool>(first));
  if (!possible) machine.action = Action::kDone;
  store(s.scale, item, Scale{machine.reg, 1});
  store(s.turn, item, Turn{machine.action, possible ? kFresh | kUnevaluated : kUnsolvable, 0, 0});
}

// log of the sum of masses times exp(exponent(k)).
template <typename F>
FUSEE_DEVICE double log_mass(const Global<const double>& masses, int64_t count,
                             const Shared<double>& scratch, const F& exponent) {
  const double largest = greatest(
      count, scratch, [&](int64_t k) { return load(masses, k) > 0 ? exponent(k) : -kInfinity; });
  if (!(absolute(largest) < kInfinity)) return largest;
  return largest + log(total(count, scratch, [&](int64_t k) {
           const double mass = load(masses, k);
           return mass > 0 ? mass * exp(exponent(k) - largest) : 0.0;
         }));
}

// Where marginals may differ, the best constant to add to g is known. Returns whether the trial must be evaluated
// again: masses were lost or beyond bounds.
FUSEE_DEVICE bool translate(const Semidual& s, int64_t item, const Item& p,
                            const Shared<double>& scratch) {
  const double slope = (p.columns.balanced() ? 0 : 1 / p.columns.weight) +
                       (p.rows.balanced() ? 0 : 1 / (p.rows.weight + p.reg));
  if (slope == 0) return false;
  const Point& at = p.trial;
  const double softness = p.rows.softness(p.reg) * p.rows.damping(p.reg);
  const double wanted = log_mass(p.b, p.m, scratch, [&](int64_t j) {
    return p.columns.balanced() ? 0 : -load(at.g, j) / p.columns.weight;
  });
  const double mass =
      log_mass(p.a, p.n, scratch, [&](int64_t i) { return softness * load(at.log_sum, i); });
  const double shift = (wanted - mass) / slope;
  if (!(absolute(shift) < kInfinity)) return false;
  const double power = p.rows.balanced() ? 0 : shift / (p.rows.weight + p.reg);
  const bool again = absolute(power) > 100;
  const double factor = again ? 1 : exp(power), more = shift / p.reg;
  each(p.m, [&](int64_t j) {
    store(at.g, j, load(at.g, j) + shift);
    store(at.column_mass, j, load(at.column_mass, j) * factor);
    store(s.weight, item * s.m + j, load(s.weight, item * s.m + j) + more);
  });
  each(p.n, [&](int64_t i) {
    store(at.log_sum, i, load(at.log_sum, i) + more);
    store(at.row_mass, i, load(at.row_mass, i) * factor);
  });
  return again;
}

// What the machine makes of a trial, by one thread. Returns whether another regularisation comes next.
FUSEE_DEVICE bool judge(const Semidual& s, const Schur& schur, int64_t item, const Item& p,
                        double objective, double error) {
  Annealing& machine = s.machine.data[item];
  bool accepted = true;
  if ((p.turn.flags & kFresh) != 0) {
    machine.begin(objective, error);
  } else if (p.turn.action == Action::kSinkhorn) {
    machine.after_sinkhorn(objective, error);
  } else {
    accepted = machine.after_trial(objective, error, load(schur.slope, item));
  }
  const bool fresh = machine.action != Action::kDone && machine.reg != p.reg;
  // What is done with keeps the regularisation of its last point.
  store(s.scale, item, Scale{machine.action == Action::kDone ? p.reg : machine.reg, machine.step});
  store(s.turn, item,
        Turn{machine.action, fresh ? kFresh : 0, accepted ? 1 - p.turn.slot : p.turn.slot, 0});
  store(schur.least, item, machine.dropped() / 16);
  return fresh;
}

// The rest of the trial's point, and what the machine makes of it.
template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kMostThreads, 1)
    judge_kernel(Exponentials<kMetric, T> all, Semidual s, Schur schur) {
  FUSEE_SHARED(double, scratch, 32);
  const int64_t item = blockIdx.x, n = s.n, m = s.m;
  if (!s.evaluates(item)) return;
  const Item p = s.item(item);
  const Point& at = p.trial;
  each(m, [&](int64_t j) {
    double mass = 0;
    for (int64_t part = 0; part < s.column_cut.parts; ++part)
      mass += load(s.column_sums, (item * s.column_cut.parts + part) * m + j);
    store(at.column_mass, j, mass);
  });
  int32_t flags = p.turn.flags;
  if ((flags & kAsItStands) == 0 && translate(s, item, p, scratch)) {
    if (thread_rank() == 0)
      store(s.turn, item, Turn{p.turn.action, flags | kAsItStands, p.turn.slot, 0});
    return;
  }
  const double error = total(m, scratch, [&](int64_t j) {
    const double target = load(p.b, j) * p.columns.factor(load(at.g, j));
    store(at.target, j, target);
    return absolute(target - load(at.column_mass, j));
  });
  const double of_columns = total(m, scratch, [&](int64_t j) {
    const double b = load(p.b, j);
    if (b == 0) return 0.0;
    return b * p.columns.charge(load(at.g, j));
  });
  const Side softened = p.rows.softened(p.reg);
  const double of_rows = total(n, scratch, [&](int64_t i) {
    const double a = load(p.a, i);
    if (a == 0) return 0.0;
    return a * softened.charge(-p.reg * load(at.log_sum, i));
  });
  const double objective = of_columns + of_rows;
  double stranded = 0;  // points with mass that can go to or come from no other
  if ((flags & kUnevaluated) != 0) {
    const Exponentials<kMetric, T> own = all.of(item);
    stranded = total(n, scratch, [&](int64_t i) {
      return load(p.a, i) > 0 && load(at.log_sum, i) == -kInfinity ? 1.0 : 0.0;
    });
    stranded += total(m, scratch, [&](int64_t j) {
      return load(p.b, j) > 0 && log_sum_of_column(own, p, at, j) == -kInfinity ? 1.0 : 0.0;
    });
  }
  if (stranded > 0) {
    if (thread_rank() == 0) store(s.turn, item, Turn{Action::kDone, kUnsolvable, p.turn.slot, 0});
    return;
  }
  FUSEE_SHARED(double, fresh, 1);
  if (thread_rank() == 0) fresh.store(0, judge(s, schur, item, p, objective, error) ? 1.0 : 0.0);
  __syncthreads();
  if (fresh.load(0) != 0)
    center(p.rows, p.columns, m, p.b, s.point(item, load(s.turn, item).slot).g, scratch);
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
