// The linear system behind implicit derivatives on the CPU: conjugate gradients with the whole plan,
// preconditioned by the equations of its large entries.

#include <cmath>

#include "transport/binding.h"
#include "transport/sparse_schur.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

// The plan of given potentials as its rows' conditional probabilities.
template <typename T>
class Plan {
 public:
  Plan(const Problem<T>& problem, const double* f, const double* g)
      : p_(problem), semidual_(problem), at_(problem.n, problem.m) {
    std::copy_n(g, p_.m, at_.g.begin());
    semidual_.set_reg(p_.reg);
    semidual_.evaluate(at_);
    // From the potentials of the rows as they are given.
    for (int64_t i = 0; i < p_.n; ++i) {
      const double scale = f[i] / p_.reg + at_.log_sum[i];
      at_.row_mass[i] = p_.a[i] == 0 ? 0 : p_.a[i] * std::exp(scale);
      empty_ = empty_ || (p_.a[i] > 0 && !(absolute(at_.log_sum[i]) < kInfinity));
    }
    // The masses of the columns follow from those of the rows.
    columns_from_rows([&](int64_t i, double) { return at_.row_mass[i]; }, nullptr,
                      at_.column_mass.data());
    for (int64_t j = 0; j < p_.m; ++j) at_.target[j] = at_.column_mass[j];
  }

  Semidual<T>& semidual() { return semidual_; }
  const Point& at() const { return at_; }
  // Whether a row with mass has no pair at all.
  bool empty() const { return empty_; }

  // out_j = sum_i share(i, mean_i) times the probability of j in row i, where mean_i is that of v in the row.
  template <typename F>
  void columns_from_rows(const F& share, const double* v, double* out) {
    const int64_t n = p_.n, m = p_.m;
    blocks_.resize(static_cast<size_t>(row_blocks(n)) * m);
    for_each_row_block(n, m, [&](int64_t first, int64_t end, int64_t block) {
      std::vector<double> costs, computed;
      double* FUSEE_RESTRICT total = blocks_.data() + block * m;
      std::fill_n(total, m, 0.0);
      for (int64_t i = first; i < end; ++i) {
        const double* FUSEE_RESTRICT row = this->row(i, costs, computed);
        const double factor = share(i, v == nullptr ? 0 : dot(row, v));
        if (factor == 0) continue;
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) total[j] += factor * row[j];
      }
    });
    for (int64_t j = 0; j < m; ++j) {
      out[j] = 0;
      for (int64_t block = 0; block < row_blocks(n); ++block) out[j] += blocks_[block * m + j];
    }
  }

  // out_i, the mean of v in row i.
  void means(const double* v, double* out) {
    for_each_row_block(p_.n, p_.m, [&](int64_t first, int64_t end, int64_t) {
      std::vector<double> costs, computed;
      for (int64_t i = first; i < end; ++i) out[i] = dot(row(i, costs, computed), v);
    });
  }

 private:
  double dot(const double* FUSEE_RESTRICT row, const double* FUSEE_RESTRICT v) const {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < p_.m; ++j) sum += row[j] * v[j];
    return sum;
  }

  const double* row(int64_t i, std::vector<double>& costs, std::vector<double>& computed) const {
    if (semidual_.keeps()) return semidual_.row(i);
    costs.resize(p_.m);
    computed.resize(p_.m);
    double* FUSEE_RESTRICT out = computed.data();
    semidual_.exponents(i, costs.data(), out);
    const double log_sum = at_.log_sum[i];
    if (log_sum == -kInfinity)
      computed.assign(p_.m, 0.0);
    else {
#pragma omp simd
      for (int64_t j = 0; j < p_.m; ++j) out[j] = exp_in_range(out[j] - log_sum);
    }
    return out;
  }

  const Problem<T>& p_;
  Semidual<T> semidual_;
  Point at_;
  std::vector<double> blocks_;
  bool empty_ = false;
};

template <typename T>
class ImplicitSystem {
 public:
  ImplicitSystem(const Problem<T>& problem, const double* f, const double* g)
      : p_(problem),
        plan_(problem, f, g),
        share_(problem.rows.damping(problem.reg)),
        diagonal_(problem.m),
        singular_(problem.rows.balanced() && problem.columns.balanced()) {
    const double factor = 1 + kRidge + p_.columns.softness(p_.reg);
    for (int64_t j = 0; j < p_.m; ++j) diagonal_[j] = factor * plan_.at().column_mass[j];
  }

  void solve(const double* p, const double* q, double* u, double* v) {
    const int64_t n = p_.n, m = p_.m;
    const double mass = sum(plan_.at().row_mass);
    double shift = 0;
    if (singular_ && mass > 0) {
      for (int64_t i = 0; i < n; ++i) shift += p[i];
      for (int64_t j = 0; j < m; ++j) shift -= q[j];
      shift /= 2 * mass;
    }
    // What the rows ask for, each for a unit of its mass.
    std::vector<double> asked(n), residual(m), solution(m);
    for (int64_t i = 0; i < n; ++i)
      asked[i] = plan_.at().row_mass[i] > 0 ? p[i] / plan_.at().row_mass[i] - shift : 0;
    plan_.columns_from_rows(
        [&](int64_t i, double) { return share_ * asked[i] * plan_.at().row_mass[i]; }, nullptr,
        residual.data());
    for (int64_t j = 0; j < m; ++j) {
      const double column = plan_.at().column_mass[j];
      residual[j] = column > 0 ? q[j] + shift * column - residual[j] : 0;
    }
    if (plan_.empty() || mass != mass) {
      std::fill_n(u, n, kNaN);
      std::fill_n(v, m, kNaN);
      return;
    }
    iterate(residual, solution);
    std::vector<double> means(n);
    plan_.means(solution.data(), means.data());
    for (int64_t i = 0; i < n; ++i) {
      u[i] = share_ * (asked[i] - means[i]);
      if (p_.a[i] == 0 && p[i] != 0) u[i] = kNaN;
    }
    const std::vector<double> f = f_of();
    for (int64_t j = 0; j < m; ++j) v[j] = p_.b[j] > 0 ? solution[j] : massless(j, f, u, q[j]);
    if (singular_ && mass > 0) center(u, v, mass);
  }

 private:
  std::vector<double> f_of() const {
    std::vector<double> f(p_.n);
    for (int64_t i = 0; i < p_.n; ++i)
      f[i] = p_.a[i] > 0
                 ? p_.reg * (std::log(plan_.at().row_mass[i] / p_.a[i]) - plan_.at().log_sum[i])
                 : 0;
    return f;
  }

  // Minus the mean of u in a column that has no mass itself.
  double massless(int64_t j, const std::vector<double>& f, const double* u, double q) const {
    if (q != 0) return kNaN;
    double largest = -kInfinity, total = 0, mean = 0;
    for (int64_t i = 0; i < p_.n; ++i)
      if (p_.a[i] > 0) largest = std::max(largest, (f[i] - p_.cost(i, j)) / p_.reg);
    if (largest == -kInfinity) return 0;
    for (int64_t i = 0; i < p_.n; ++i) {
      if (p_.a[i] == 0) continue;
      const double weight = p_.a[i] * std::exp((f[i] - p_.cost(i, j)) / p_.reg - largest);
      total += weight;
      mean += weight * u[i];
    }
    return -p_.columns.damping(p_.reg) * mean / total;
  }

  void multiply(const std::vector<double>& z, std::vector<double>& out) {
    plan_.columns_from_rows(
        [&](int64_t i, double mean) { return share_ * plan_.at().row_mass[i] * mean; }, z.data(),
        out.data());
    for (int64_t j = 0; j < p_.m; ++j) out[j] = diagonal_[j] * z[j] - out[j];
  }

  // Rounding leaves the range of a singular matrix.
  void into_range(std::vector<double>& r) const {
    if (!singular_) return;
    const double excess = sum(r) / sum(diagonal_);
    for (int64_t j = 0; j < p_.m; ++j) r[j] -= excess * diagonal_[j];
  }

  // Conjugate gradients whose preconditioner is itself an iteration.
  void iterate(std::vector<double>& residual, std::vector<double>& solution) {
    constexpr double kDropped = 1e-4 / 16, kInner = 1e-3, kTolerance = 1e-14;
    constexpr int kMost = 200, kPatience = 6;
    const int64_t m = p_.m;
    SparseSchur sparse(p_.n, m);
    sparse.collect(plan_.semidual(), plan_.at(), kDropped, kRidge);
    std::vector<double> z(m), direction(m), product(m), before(m);
    into_range(residual);
    double rho = 0, first = 0, best = kInfinity;
    std::vector<double> best_solution(m);
    for (int k = 0, since = 0; k < kMost && since < kPatience; ++k) {
      sparse.solve(residual, kInner, 500, z);
      double now = 0, change = 0;
      for (int64_t j = 0; j < m; ++j) {
        now += residual[j] * z[j];
        change += (residual[j] - before[j]) * z[j];
      }
      if (k == 0) first = now;
      if (!(now > kTolerance * kTolerance * first)) break;
      const double beta = k == 0 ? 0 : change / rho;
      for (int64_t j = 0; j < m; ++j) direction[j] = z[j] + beta * direction[j];
      rho = now;
      multiply(direction, product);
      double curvature = 0, along = 0;
      for (int64_t j = 0; j < m; ++j) {
        curvature += direction[j] * product[j];
        along += direction[j] * residual[j];
      }
      if (!(curvature > 0)) break;
      before = residual;
      for (int64_t j = 0; j < m; ++j) {
        solution[j] += along / curvature * direction[j];
        residual[j] -= along / curvature * product[j];
      }
      into_range(residual);
      double size = 0;
      for (int64_t j = 0; j < m; ++j) size += absolute(residual[j]);
      ++since;
      if (size < 0.5 * best) since = 0;
      if (size < best) {
        best = size;
        best_solution = solution;
      }
    }
    if (best < kInfinity) solution = best_solution;
  }

  void center(double* u, double* v, double mass) const {
    double of_u = 0, of_v = 0;
    for (int64_t i = 0; i < p_.n; ++i)
      if (p_.a[i] > 0) of_u += plan_.at().row_mass[i] * u[i];
    for (int64_t j = 0; j < p_.m; ++j)
      if (p_.b[j] > 0) of_v += plan_.at().column_mass[j] * v[j];
    const double shift = (of_u - of_v) / (2 * mass);
    for (int64_t i = 0; i < p_.n; ++i) u[i] -= shift;
    for (int64_t j = 0; j < p_.m; ++j) v[j] += shift;
  }

  const Problem<T>& p_;
  Plan<T> plan_;
  double share_;
  std::vector<double> diagonal_;
  bool singular_;
};

std::tuple<Tensor, Tensor> transport_solve(const Tensor& x, const std::optional<Tensor>& y,
                                           int64_t metric, const Tensor& a, const Tensor& b,
                                           const Tensor& reg, const Tensor& penalty,
                                           const Tensor& f_, const Tensor& g_, const Tensor& p_,
                                           const Tensor& q_) {
  const TransportTensors given(x, y, metric, a, b, reg, penalty);
  const Tensor f = as_contiguous(f_), g = as_contiguous(g_);
  const Tensor p = as_contiguous(p_), q = as_contiguous(q_);
  const int64_t n = given.n, m = given.m;
  Tensor u = empty(given.a, {given.batch, n}, ScalarType::Double);
  Tensor v = empty(given.a, {given.batch, m}, ScalarType::Double);
  given.for_each_problem([&](const auto& problem, int64_t i) {
    using T = typename std::decay_t<decltype(problem)>::Stored;
    ImplicitSystem<T> system(problem, data<double>(f) + i * n, data<double>(g) + i * m);
    system.solve(data<double>(p) + i * n, data<double>(q) + i * m, mutable_data<double>(u) + i * n,
                 mutable_data<double>(v) + i * m);
  });
  return {u, v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) { m.impl("transport_solve", TORCH_BOX(&transport_solve)); }

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
