// The semi-dual of entropic transport: everything as a function of the potentials g of the columns.
//
// Row i has L_i = log sum_j b_j exp((g_j - C_ij) / reg), from which follow its potential
// f_i = -reg L_i / (1 + reg / weight), its mass and its part of the plan; the objective is concave in g and
// never overflows.
//
// Where there is memory for it, the rows' conditional probabilities at one g are kept: at a g that is not
// far from it a pass reads them instead of computing exponentials.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "core/precise.h"
#include "core/torch.h"
#include "transport/problem.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// Rows are taken by blocks, and the columns' sums of the blocks are added in order, so that the number of
// threads does not show in the result. There are few blocks, so that their sums take little memory.
inline int64_t rows_of_block(int64_t n) {
  constexpr int64_t kLeast = 64, kMostBlocks = 64;
  return std::max(kLeast, (n + kMostBlocks - 1) / kMostBlocks);
}

inline int64_t row_blocks(int64_t n) { return (n + rows_of_block(n) - 1) / rows_of_block(n); }

// f(first, end, block) for all blocks of n rows of m elements.
template <typename F>
void for_each_row_block(int64_t n, int64_t m, const F& f) {
  const int64_t rows = rows_of_block(n);
  parallel_for(0, row_blocks(n), grain(rows * m * 8), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      f(block * rows, std::min(n, (block + 1) * rows), block);
  });
}

inline double sum(const std::vector<double>& values) {
  double total = 0;
  for (const double value : values) total += value;
  return total;
}

// What is known at one g.
struct Point {
  std::vector<double> g, log_sum, row_mass, column_mass, target;
  double objective = -kInfinity, error = kInfinity;

  Point(int64_t n, int64_t m) : g(m), log_sum(n), row_mass(n), column_mass(m), target(m) {}
};

template <typename T>
class Semidual {
 public:
  explicit Semidual(const Problem<T>& problem)
      : p_(problem),
        log_b_(problem.m),
        weight_(problem.m),
        factor_(problem.m),
        blocks_(static_cast<size_t>(row_blocks(problem.n)) * problem.m) {
    for (int64_t j = 0; j < p_.m; ++j) log_b_[j] = std::log(p_.b[j]);
    // As much as the costs take, or little.
    constexpr int64_t kLittle = int64_t{1} << 20;
    if (p_.metric == Metric::kCost || p_.n * p_.m <= kLittle) {
      kept_ = std::make_unique_for_overwrite<double[]>(static_cast<size_t>(p_.n * p_.m));
      kept_g_.resize(p_.m);
      kept_log_sum_.resize(p_.n);
    }
  }

  const Problem<T>& problem() const { return p_; }
  double reg() const { return reg_; }
  void set_reg(double reg) {
    reg_ = reg;
    near_ = false;
  }

  // All of a point from its g, in one pass.
  void evaluate(Point& at) {
    if (prepare(at)) {
      evaluate_near(at);
    } else {
      evaluate_anywhere(at);
    }
    std::fill(at.column_mass.begin(), at.column_mass.end(), 0.0);
    for (int64_t block = 0; block < row_blocks(p_.n); ++block) {
      const double* FUSEE_RESTRICT total = blocks_.data() + block * p_.m;
      for (int64_t j = 0; j < p_.m; ++j) at.column_mass[j] += total[j];
    }
    finish(at);
  }

  // Before row(): whether the kept probabilities serve this point.
  bool prepare(const Point& at) {
    if (near_ && is_near(at)) {
      for (int64_t j = 0; j < p_.m; ++j) factor_[j] = std::exp((at.g[j] - kept_g_[j]) / reg_);
      return true;
    }
    for (int64_t j = 0; j < p_.m; ++j) weight_[j] = at.g[j] / reg_ + log_b_[j];
    return false;
  }

  bool keeps() const { return kept_ != nullptr; }

  // After prepare() gave true: the entries of row i are scale * row[j] * factor()[j].
  const double* row(int64_t i) const { return kept_.get() + i * p_.m; }
  const std::vector<double>& factor() const { return factor_; }
  double scale(const Point& at, int64_t i) const {
    return at.row_mass[i] * std::exp(kept_log_sum_[i] - at.log_sum[i]);
  }

  // Where marginals may differ, the best constant to add to g is known.
  void translate(Point& at) {
    const double slope = (p_.columns.balanced() ? 0 : 1 / p_.columns.weight) +
                         (p_.rows.balanced() ? 0 : 1 / (p_.rows.weight + reg_));
    if (slope == 0) return;
    const double wanted = log_mass(p_.b, p_.m, [&](int64_t j) {
      return p_.columns.balanced() ? 0 : -at.g[j] / p_.columns.weight;
    });
    const double mass = log_mass(p_.a, p_.n, [&](int64_t i) { return softness() * at.log_sum[i]; });
    const double shift = (wanted - mass) / slope;
    if (!(absolute(shift) < kInfinity)) return;
    for (double& g : at.g) g += shift;
    const double power = p_.rows.balanced() ? 0 : shift / (p_.rows.weight + reg_);
    if (absolute(power) > 100) return evaluate(at);  // masses were lost or beyond bounds
    const double factor = std::exp(power);
    for (double& value : at.log_sum) value += shift / reg_;
    for (double& mass_of_row : at.row_mass) mass_of_row *= factor;
    for (double& mass_of_column : at.column_mass) mass_of_column *= factor;
    finish(at);
  }

  // Where marginals hold, a constant in g means nothing, but digits. Before the pass that evaluates.
  void center(Point& at) const {
    if (!p_.rows.balanced() || !p_.columns.balanced()) return;
    double mass = 0, of_g = 0;
    for (int64_t j = 0; j < p_.m; ++j) {
      mass += p_.b[j];
      of_g += p_.b[j] * at.g[j];
    }
    if (!(mass > 0)) return;
    for (double& g : at.g) g -= of_g / mass;
  }

  // A step of Sinkhorn's iteration, without the pass that follows it.
  void sinkhorn(Point& at) const {
    const double damping = p_.columns.damping(reg_);
    for (int64_t j = 0; j < p_.m; ++j) {
      if (p_.b[j] == 0) continue;
      at.g[j] = -reg_ * damping * log_sum_of_column(at, j);
    }
  }

  // log sum_i a_i exp((f_i - C_ij) / reg), for a column of any mass.
  double log_sum_of_column(const Point& at, int64_t j) const {
    constexpr double kLeast = 1e-280;
    if (at.column_mass[j] > kLeast) return std::log(at.column_mass[j]) - log_b_[j] - at.g[j] / reg_;
    double largest = -kInfinity;
    for (int64_t i = 0; i < p_.n; ++i) largest = std::max(largest, exponent_in_column(at, i, j));
    if (largest == -kInfinity) return largest;
    double sum = 0;
    for (int64_t i = 0; i < p_.n; ++i) sum += std::exp(exponent_in_column(at, i, j) - largest);
    return largest + std::log(sum);
  }

  double f(const Point& at, int64_t i) const {
    return -reg_ * p_.rows.damping(reg_) * at.log_sum[i];
  }

  // After prepare() gave false: fills e with g_j / reg + log b_j - C_ij / reg, and returns the largest.
  double exponents(int64_t i, double* buffer, double* FUSEE_RESTRICT e) const {
    const double inverse = 1 / reg_;
    return p_.with_costs(i, buffer, [&](const auto* FUSEE_RESTRICT costs) {
      const double* FUSEE_RESTRICT weight = weight_.data();
      double largest = -kInfinity;
#pragma omp simd reduction(max : largest)
      for (int64_t j = 0; j < p_.m; ++j) {
        e[j] = weight[j] - static_cast<double>(costs[j]) * inverse;
        largest = e[j] > largest ? e[j] : largest;
      }
      return largest;
    });
  }

 private:
  // Exponentials of what is far below the rest are kept as zeros, which they must not come back from.
  bool is_near(const Point& at) const {
    double furthest = 0;
    for (int64_t j = 0; j < p_.m; ++j)
      if (p_.b[j] != 0) furthest = std::max(furthest, absolute(at.g[j] - kept_g_[j]));
    return furthest <= 40 * reg_;
  }

  double softness() const { return p_.rows.softness(reg_) * p_.rows.damping(reg_); }

  void set_row(Point& at, int64_t i, double log_sum) const {
    at.log_sum[i] = log_sum;
    at.row_mass[i] = p_.a[i] == 0 ? 0 : p_.a[i] * std::exp(softness() * log_sum);
  }

  void evaluate_near(Point& at) {
    const int64_t m = p_.m;
    for_each_row_block(p_.n, m, [&](int64_t first, int64_t end, int64_t block) {
      double* FUSEE_RESTRICT total = blocks_.data() + block * m;
      const double* FUSEE_RESTRICT factor = factor_.data();
      std::fill_n(total, m, 0.0);
      for (int64_t i = first; i < end; ++i) {
        const double* FUSEE_RESTRICT kept = row(i);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < m; ++j) sum += kept[j] * factor[j];
        set_row(at, i, kept_log_sum_[i] + std::log(sum));
        if (at.row_mass[i] == 0) continue;
        const double share = at.row_mass[i] / sum;
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) total[j] += share * kept[j];
      }
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) total[j] *= factor[j];
    });
  }

  void evaluate_anywhere(Point& at) {
    const int64_t m = p_.m;
    const bool keep = kept_ != nullptr;
    for_each_row_block(p_.n, m, [&](int64_t first, int64_t end, int64_t block) {
      std::vector<double> costs(m), terms(keep ? 0 : m);
      double* FUSEE_RESTRICT total = blocks_.data() + block * m;
      std::fill_n(total, m, 0.0);
      for (int64_t i = first; i < end; ++i) {
        double* FUSEE_RESTRICT e = keep ? kept_.get() + i * m : terms.data();
        const double largest = exponents(i, costs.data(), e);
        const bool some = largest > -kInfinity;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < m; ++j) {
          e[j] = some ? exp_in_range(e[j] - largest) : e[j] == e[j] ? 0.0 : e[j];
          sum += e[j];
        }
        set_row(at, i, largest + std::log(sum));
        const double mass = at.row_mass[i], inverse = some ? 1 / sum : 0;
        if (keep) kept_log_sum_[i] = at.log_sum[i];
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) {
          e[j] *= inverse;
          total[j] += mass * e[j];
        }
      }
    });
    if (!keep) return;
    kept_g_ = at.g;
    near_ = true;
  }

  // log of the sum of masses times exp(exponent(k)).
  template <typename F>
  static double log_mass(const double* masses, int64_t count, const F& exponent) {
    double largest = -kInfinity, sum = 0;
    for (int64_t k = 0; k < count; ++k)
      if (masses[k] > 0) largest = std::max(largest, exponent(k));
    if (!(absolute(largest) < kInfinity)) return largest;
    for (int64_t k = 0; k < count; ++k)
      if (masses[k] > 0) sum += masses[k] * std::exp(exponent(k) - largest);
    return largest + std::log(sum);
  }

  double exponent_in_column(const Point& at, int64_t i, int64_t j) const {
    if (p_.a[i] == 0) return -kInfinity;
    return std::log(p_.a[i]) + (f(at, i) - p_.cost(i, j)) / reg_;
  }

  void finish(Point& at) const {
    double objective = 0, error = 0;
    for (int64_t j = 0; j < p_.m; ++j) {
      at.target[j] = p_.b[j] * p_.columns.factor(at.g[j]);
      error += absolute(at.target[j] - at.column_mass[j]);
      if (p_.b[j] != 0) objective += p_.b[j] * p_.columns.charge(at.g[j]);
    }
    const Side softened = p_.rows.softened(reg_);
    for (int64_t i = 0; i < p_.n; ++i)
      if (p_.a[i] != 0) objective += p_.a[i] * softened.charge(-reg_ * at.log_sum[i]);
    at.objective = objective;
    at.error = error;
  }

  const Problem<T>& p_;
  double reg_ = 1;
  std::vector<double> log_b_, weight_, factor_, blocks_;
  std::unique_ptr<double[]> kept_;
  std::vector<double> kept_g_, kept_log_sum_;
  bool near_ = false;
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
