// Entropic transport on the CPU: annealing, Sinkhorn's iteration and Newton's method on the semi-dual.

#include <cmath>

#include "transport/annealing.h"
#include "transport/binding.h"
#include "transport/sparse_schur.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

// What is returned of a problem.
struct Solution {
  double *value, *f, *g, *error;
  int64_t* iterations;
  double* stages;
};

// The range of the finite costs; NaN if there is a cost that is none.
template <typename T>
double range_of_costs(const Problem<T>& p) {
  std::vector<double> lows(p.n, kInfinity), highs(p.n, -kInfinity);
  for_each_row_block(p.n, p.m, [&](int64_t first, int64_t end, int64_t) {
    std::vector<double> buffer(p.m);
    for (int64_t i = first; i < end; ++i) {
      p.with_costs(i, buffer.data(), [&](const auto* FUSEE_RESTRICT costs) {
        double low = kInfinity, high = -kInfinity, bad = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : bad)
        for (int64_t j = 0; j < p.m; ++j) {
          const double c = static_cast<double>(costs[j]);
          bad += c > -kInfinity ? 0.0 : 1.0;
          low = c < low ? c : low;
          const double finite = c < kInfinity ? c : -kInfinity;
          high = finite > high ? finite : high;
        }
        lows[i] = bad > 0 ? kNaN : low;
        highs[i] = high;
      });
    }
  });
  double low = kInfinity, high = -kInfinity;
  for (int64_t i = 0; i < p.n; ++i) {
    if (lows[i] != lows[i]) return kNaN;
    low = std::min(low, lows[i]);
    high = std::max(high, highs[i]);
  }
  return std::max(high - low, 0.0);
}

template <typename T>
class Solver {
 public:
  Solver(const Problem<T>& problem, const double* g, double tolerance, int64_t max_iterations)
      : p_(problem),
        semidual_(problem),
        schur_(problem.n, problem.m),
        point_(problem.n, problem.m),
        trial_(problem.n, problem.m),
        gradient_(problem.m),
        direction_(problem.m),
        tolerance_(tolerance),
        max_iterations_(max_iterations),
        given_(g != nullptr) {
    if (given_) std::copy_n(g, p_.m, point_.g.begin());
  }

  void run(const Solution& out) {
    double of_a = 0, of_b = 0;
    for (int64_t i = 0; i < p_.n; ++i) of_a += p_.a[i];
    for (int64_t j = 0; j < p_.m; ++j) of_b += p_.b[j];
    const double range = range_of_costs(p_), mass = of_a < of_b ? of_b : of_a;
    const bool numbers = range < kInfinity && of_a < kInfinity && of_b < kInfinity;
    if (!(numbers && p_.reg > 0 && p_.reg < kInfinity)) return give_nothing(out);
    Annealing state(p_.reg, range, tolerance_, mass > 0 ? mass : 1, max_iterations_, given_);
    do {
      semidual_.set_reg(state.reg);
      semidual_.center(point_);
      evaluate(point_);
      if (!feasible()) return give_nothing(out);
      state.begin(point_.objective, point_.error);
      while (state.action != Action::kDone && state.reg == semidual_.reg()) go_on(state);
    } while (state.action != Action::kDone);
    give(state, out);
  }

 private:
  void evaluate(Point& at) {
    semidual_.evaluate(at);
    semidual_.translate(at);
  }

  void go_on(Annealing& state) {
    if (state.action == Action::kSinkhorn) {
      semidual_.sinkhorn(point_);
      evaluate(point_);
      state.after_sinkhorn(point_.objective, point_.error);
    } else if (state.action == Action::kNewton) {
      solve(state);
    } else {
      try_step(state);
    }
  }

  // Whether every point with mass can go to or come from another.
  bool feasible() const {
    for (int64_t i = 0; i < p_.n; ++i)
      if (p_.a[i] > 0 && point_.log_sum[i] == -kInfinity) return false;
    for (int64_t j = 0; j < p_.m; ++j)
      if (p_.b[j] > 0 && semidual_.log_sum_of_column(point_, j) == -kInfinity) return false;
    return true;
  }

  void solve(Annealing& state) {
    // The least entries are far more than make a column's dropped mass, mostly.
    const double budget = state.dropped();
    for (double least = budget / 16;; least /= 16) {
      schur_.collect(semidual_, point_, least, state.ridge());
      double dropped = 0;
      for (int64_t j = 0; j < p_.m; ++j)
        dropped += point_.column_mass[j] - schur_.kept_of_columns()[j];
      if (dropped <= budget * state.mass || least < 1e-18) break;
    }
    slope_ = 0;
    for (int64_t j = 0; j < p_.m; ++j) gradient_[j] = point_.target[j] - point_.column_mass[j];
    const int64_t iterations = schur_.solve(gradient_, state.residual(), 1000, direction_);
    for (int64_t j = 0; j < p_.m; ++j) {
      direction_[j] = p_.b[j] == 0 ? 0 : direction_[j] * semidual_.reg();
      slope_ += direction_[j] * gradient_[j];
    }
    state.after_solve(iterations, schur_.kept(), p_.n * p_.m);
  }

  void try_step(Annealing& state) {
    for (int64_t j = 0; j < p_.m; ++j) trial_.g[j] = point_.g[j] + state.step * direction_[j];
    evaluate(trial_);
    if (state.after_trial(trial_.objective, trial_.error, slope_)) std::swap(point_, trial_);
  }

  void give_nothing(const Solution& out) const {
    *out.value = *out.error = kNaN;
    *out.iterations = 0;
    std::fill_n(out.f, p_.n, kNaN);
    std::fill_n(out.g, p_.m, kNaN);
    std::fill_n(out.stages, kStages * kStageNumbers, 0.0);
  }

  void give(const Annealing& state, const Solution& out) {
    for (int64_t i = 0; i < p_.n; ++i) {
      const double f = semidual_.f(point_, i);
      out.f[i] = f < kInfinity ? f : 0;
    }
    for (int64_t j = 0; j < p_.m; ++j) {
      double g = point_.g[j];
      if (p_.b[j] == 0) {
        g = -p_.reg * p_.columns.damping(p_.reg) * semidual_.log_sum_of_column(point_, j);
        if (!(g < kInfinity)) g = 0;
      }
      out.g[j] = g;
    }
    if (p_.rows.balanced() && p_.columns.balanced()) center(out.f, out.g);
    *out.iterations = state.iterations;
    std::copy_n(&state.reports[0][0], kStages * kStageNumbers, out.stages);
    certify(out);
  }

  // A constant goes from one side to the other, so that both have the same mean over their masses.
  void center(double* f, double* g) const {
    double mass = 0, of_f = 0, of_g = 0;
    for (int64_t i = 0; i < p_.n; ++i) {
      mass += p_.a[i];
      of_f += p_.a[i] * f[i];
    }
    for (int64_t j = 0; j < p_.m; ++j) of_g += p_.b[j] * g[j];
    if (!(mass > 0)) return;
    const double shift = (of_f - of_g) / (2 * mass);
    for (int64_t i = 0; i < p_.n; ++i) f[i] -= shift;
    for (int64_t j = 0; j < p_.m; ++j) g[j] += shift;
  }

  // Whether rounding moves the plan of these potentials by far less than the error that is asked for, so that
  // the sums of the last point are its sums. What an entry that matters costs is about f + g.
  bool are_those_of_the_point(const Solution& out) const {
    double f = 0, g = 0;
    for (int64_t i = 0; i < p_.n; ++i) f = std::max(f, p_.a[i] == 0 ? 0 : absolute(out.f[i]));
    for (int64_t j = 0; j < p_.m; ++j) g = std::max(g, p_.b[j] == 0 ? 0 : absolute(out.g[j]));
    constexpr double kRounding = 1e-15, kLeast = 50;
    return ((f + g) / p_.reg + kLeast) * kRounding <= 1e-3 * tolerance_;
  }

  // The sums of the plan of the potentials as they are returned.
  void add_up(const Solution& out, std::vector<double>& row_mass,
              std::vector<double>& column_mass) const {
    const int64_t n = p_.n, m = p_.m;
    const double inverse = 1 / p_.reg;
    std::vector<double> blocks(static_cast<size_t>(row_blocks(n)) * m);
    for_each_row_block(n, m, [&](int64_t first, int64_t end, int64_t block) {
      std::vector<double> buffer(m);
      double* FUSEE_RESTRICT total = blocks.data() + block * m;
      for (int64_t i = first; i < end; ++i) {
        if (p_.a[i] == 0) continue;
        row_mass[i] = p_.with_costs(i, buffer.data(), [&](const auto* FUSEE_RESTRICT costs) {
          const double* FUSEE_RESTRICT g = out.g;
          const double* FUSEE_RESTRICT b = p_.b;
          const double f = out.f[i], a = p_.a[i];
          double sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t j = 0; j < m; ++j) {
            const double exponent = ((f - static_cast<double>(costs[j])) + g[j]) * inverse;
            const double entry = b[j] == 0 ? 0.0 : a * b[j] * exp_in_range(exponent);
            total[j] += entry;
            sum += entry;
          }
          return sum;
        });
      }
    });
    for (int64_t j = 0; j < m; ++j) {
      column_mass[j] = 0;
      for (int64_t block = 0; block < row_blocks(n); ++block)
        column_mass[j] += blocks[block * m + j];
    }
  }

  // The value and the error of the potentials as they are returned.
  void certify(const Solution& out) const {
    const int64_t n = p_.n, m = p_.m;
    std::vector<double> row_mass = point_.row_mass, column_mass = point_.column_mass;
    if (!are_those_of_the_point(out)) add_up(out, row_mass, column_mass);
    double error = 0, mass = 0, value = 0, mass_of_a = 0, mass_of_b = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double target = p_.a[i] == 0 ? 0 : p_.a[i] * p_.rows.factor(out.f[i]);
      error += absolute(row_mass[i] - target);
      mass += row_mass[i];
      mass_of_a += p_.a[i];
      if (p_.a[i] != 0) value += p_.a[i] * p_.rows.charge(out.f[i]);
    }
    for (int64_t j = 0; j < m; ++j) {
      const double target = p_.b[j] == 0 ? 0 : p_.b[j] * p_.columns.factor(out.g[j]);
      error += absolute(column_mass[j] - target);
      mass_of_b += p_.b[j];
      if (p_.b[j] != 0) value += p_.b[j] * p_.columns.charge(out.g[j]);
    }
    *out.value = value - p_.reg * (mass - mass_of_a * mass_of_b);
    *out.error = error;
  }

  const Problem<T>& p_;
  Semidual<T> semidual_;
  SparseSchur schur_;
  Point point_, trial_;
  std::vector<double> gradient_, direction_;
  double slope_ = 0, tolerance_;
  int64_t max_iterations_;
  bool given_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_newton(
    const Tensor& x, const std::optional<Tensor>& y, int64_t metric, const Tensor& a,
    const Tensor& b, const Tensor& reg, const Tensor& penalty, const std::optional<Tensor>& g_init,
    double tol, int64_t max_iter) {
  const TransportTensors given(x, y, metric, a, b, reg, penalty);
  const int64_t n = given.n, m = given.m;
  const std::optional<Tensor> first = as_contiguous(g_init);
  auto [value, f, g, error, n_iter, stages] = empty_solution(given);
  const double* const of_first = data_or_null<double>(first);
  given.for_each_problem([&](const auto& problem, int64_t i) {
    using T = typename std::decay_t<decltype(problem)>::Stored;
    const Solution out{mutable_data<double>(value) + i,
                       mutable_data<double>(f) + i * n,
                       mutable_data<double>(g) + i * m,
                       mutable_data<double>(error) + i,
                       mutable_data<int64_t>(n_iter) + i,
                       mutable_data<double>(stages) + i * kStages * kStageNumbers};
    Solver<T>(problem, of_first == nullptr ? nullptr : of_first + i * m, tol, max_iter).run(out);
  });
  return {value, f, g, error, n_iter, stages};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) { m.impl("sinkhorn_newton", TORCH_BOX(&sinkhorn_newton)); }

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
