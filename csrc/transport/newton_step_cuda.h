// Conjugate gradients for a Newton step in CUDA, by a block or by the whole device.
#pragma once

#include "transport/sparse_schur_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// The threads that solve the equations of a problem together: those of a block, or of the grid.
class BlockTeam {
 public:
  FUSEE_DEVICE explicit BlockTeam(const Shared<double>& scratch) : scratch_(scratch) {}

  FUSEE_DEVICE int rank() const { return thread_rank(); }
  FUSEE_DEVICE int size() const { return thread_count(); }
  FUSEE_DEVICE void sync() const { __syncthreads(); }
  // The sum over the team. What was stored before is known to all of it afterwards.
  FUSEE_DEVICE double sum(double value) { return block_sum(value, scratch_); }

 private:
  Shared<double> scratch_;
};

class GridTeam {
 public:
  // `sums` holds two for each block: a block may still read those of the last sum.
  FUSEE_DEVICE GridTeam(const Shared<double>& scratch, Global<double> sums)
      : scratch_(scratch), sums_(sums) {}

  FUSEE_DEVICE int rank() const {
    return static_cast<int>(blockIdx.x) * thread_count() + thread_rank();
  }
  FUSEE_DEVICE int size() const { return static_cast<int>(gridDim.x) * thread_count(); }
  FUSEE_DEVICE void sync() const { grid_sync(); }
  FUSEE_DEVICE double sum(double value) {
    const int blocks = static_cast<int>(gridDim.x);
    value = block_sum(value, scratch_);
    if (thread_rank() == 0) store(sums_, turn_ * blocks + static_cast<int>(blockIdx.x), value);
    grid_sync();
    const double all =
        total(blocks, scratch_, [&](int64_t block) { return load(sums_, turn_ * blocks + block); });
    turn_ = 1 - turn_;
    return all;
  }

 private:
  Shared<double> scratch_;
  Global<double> sums_;
  int turn_ = 0;
};

// D - S^T W S over a problem's columns, where S holds the entries that are kept, W the inverses of what the rows
// weigh, and D what the columns weigh in truth, so that the matrix stays positive.
template <typename Team>
struct Matrix {
  Team& team;
  int64_t n, m, parts;
  Entries by_rows, by_columns;
  Global<double> row_weight, through, diagonal, preconditioner;

  FUSEE_DEVICE Matrix(Team& team_, const Schur& schur, int64_t item)
      : team(team_),
        n(schur.n),
        m(schur.m),
        parts(schur.parts),
        by_rows(schur.rows(item)),
        by_columns(schur.columns(item)),
        row_weight(schur.row_weight + item * n),
        through(schur.through + item * n),
        diagonal(schur.diagonal + item * m),
        preconditioner(schur.preconditioner + item * m) {}

  // f(j) for the team's share of the columns; and their sum.
  template <typename F>
  FUSEE_DEVICE void each_column(const F& f) const {
    for (int64_t j = team.rank(); j < m; j += team.size()) f(j);
  }
  template <typename F>
  FUSEE_DEVICE double sum_columns(const F& f) const {
    double sum = 0;
    each_column([&](int64_t j) { sum += f(j); });
    return team.sum(sum);
  }

  // The diagonals; the columns weigh (1 + ridge) times their mass and a softness times their target. Returns
  // the mass that the entries do not hold.
  FUSEE_DEVICE double prepare(const Item& p, double ridge) const {
    const double share = p.rows.damping(p.reg), softness = p.columns.softness(p.reg);
    for (int64_t i = team.rank(); i < n; i += team.size()) {
      const double mass = load(p.current.row_mass, i);
      store(row_weight, i, mass > 0 ? share / mass : 0);
    }
    team.sync();
    double missing = 0;
    for_warps(m, [&](int64_t j, bool first) {
      const double kept = over_column(j, [](double value, int32_t) { return value; });
      const double square = over_column(
          j, [&](double value, int32_t i) { return value * value * load(row_weight, i); });
      if (!first) return;
      const double mass = load(p.current.column_mass, j);
      double own = mass * (1 + ridge) + softness * load(p.current.target, j);
      if (!(own > 0)) own = 1;
      store(diagonal, j, own);
      store(preconditioner, j, 1 / fmax(own - square, 1e-8 * own));
      missing += mass - kept;
    });
    return team.sum(missing);
  }

  // product = (this) z, of which z is known to the team. Returns z times the product.
  FUSEE_DEVICE double multiply(Global<const double> z, Global<double> product) const {
    for_warps(n, [&](int64_t i, bool first) {
      const double sum = sum_of(by_rows, load(by_rows.starts, i), load(by_rows.starts, i + 1),
                                [&](double value, int32_t j) { return value * load(z, j); });
      if (first) store(through, i, sum * load(row_weight, i));
    });
    team.sync();
    double curvature = 0;
    for_warps(m, [&](int64_t j, bool first) {
      const double sum =
          over_column(j, [&](double value, int32_t i) { return value * load(through, i); });
      if (!first) return;
      const double along = load(z, j), result = load(diagonal, j) * along - sum;
      store(product, j, result);
      curvature += along * result;
    });
    return team.sum(curvature);
  }

 private:
  // f(k, whether this is the first lane) for the share of each warp.
  template <typename F>
  FUSEE_DEVICE void for_warps(int64_t count, const F& f) const {
    for (int64_t k = team.rank() / 32; k < count; k += team.size() / 32)
      f(k, team.rank() % 32 == 0);
  }
  // The sum of f(value, index) over the entries from `first` to `end`; all lanes of the warp take part.
  template <typename F>
  FUSEE_DEVICE double sum_of(const Entries& entries, int64_t first, int64_t end, const F& f) const {
    double sum = 0;
    for (int64_t k = first + team.rank() % 32; k < end; k += 32)
      sum += f(load(entries.values, k), load(entries.indices, k));
    return warp_sum(sum);
  }
  template <typename F>
  FUSEE_DEVICE double over_column(int64_t j, const F& f) const {
    return sum_of(by_columns, load(by_columns.starts, j * parts),
                  load(by_columns.starts, (j + 1) * parts), f);
  }
};

// Solves the equations of a problem and gives it its direction; if the entries hold too little of the mass, it
// asks for more of them.
template <typename Team>
FUSEE_DEVICE void solve(Team& team, const Semidual& s, const Schur& schur, int64_t item) {
  constexpr int64_t kMostIterations = 1000;
  if (!wants_newton(s, item) || !schur.fits(item)) return;
  const int64_t m = s.m;
  const Item p = s.item(item);
  const Matrix<Team> matrix(team, schur, item);
  Annealing& machine = s.machine.data[item];
  const double least = load(schur.least, item), budget = machine.dropped() * machine.mass;
  const double tolerance = machine.residual();
  const double missing = matrix.prepare(p, machine.ridge());
  if (!(missing <= budget || least < 1e-18)) {
    if (team.rank() == 0) store(schur.least, item, least / 16);
    return;
  }
  const Global<double> residual = schur.residual + item * m;
  const Global<double> search = schur.search + item * m, product = schur.product + item * m;
  const Global<double> z = schur.direction + item * m;
  double before = matrix.sum_columns([&](int64_t j) {
    const double r = load(p.current.target, j) - load(p.current.column_mass, j);
    const double step = r * load(matrix.preconditioner, j);
    store(residual, j, r);
    store(search, j, step);
    store(z, j, 0.0);
    return r * step;
  });
  const double enough = tolerance * tolerance * before;
  int64_t iterations = 0;
  for (; iterations < kMostIterations && before > enough; ++iterations) {
    const double curvature = matrix.multiply(search, product);
    if (!(curvature > 0)) break;
    const double step = before / curvature;
    const double after = matrix.sum_columns([&](int64_t j) {
      const double r = load(residual, j) - step * load(product, j);
      store(z, j, load(z, j) + step * load(search, j));
      store(residual, j, r);
      return r * (r * load(matrix.preconditioner, j));
    });
    const double ratio = after / before;
    matrix.each_column([&](int64_t j) {
      const double scaled = load(residual, j) * load(matrix.preconditioner, j);
      store(search, j, scaled + ratio * load(search, j));
    });
    before = after;
    team.sync();
  }
  const double slope = matrix.sum_columns([&](int64_t j) {
    const double along = load(p.b, j) == 0 ? 0 : load(z, j) * p.reg;
    store(z, j, along);
    return along * (load(p.current.target, j) - load(p.current.column_mass, j));
  });
  if (team.rank() != 0) return;
  machine.after_solve(iterations, load(matrix.by_rows.starts, s.n), s.n * s.m);
  store(schur.slope, item, slope);
  store(s.scale, item, Scale{p.reg, machine.step});
  store(s.turn, item, Turn{machine.action, 0, p.turn.slot, 0});
}

// A block for each problem.
static __global__ void __launch_bounds__(kMostThreads, 1) solve_kernel(Semidual s, Schur schur) {
  FUSEE_SHARED(double, scratch, 32);
  BlockTeam team(scratch);
  solve(team, s, schur, blockIdx.x);
}

// One problem, by the whole device.
static __global__ void __launch_bounds__(kMostThreads, 1)
    solve_together_kernel(Semidual s, Schur schur, Global<double> sums, int64_t item) {
  FUSEE_SHARED(double, scratch, 32);
  GridTeam team(scratch, sums);
  solve(team, s, schur, item);
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
