// The matrix of a Newton step with the small entries of the plan left out, and conjugate gradients for it.
#pragma once

#include "transport/semidual.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// D - S^T W S over the columns, where S holds the entries of the plan that are kept, W the inverses of what
// the rows weigh, and D what the columns weigh in truth, so that the matrix stays positive.
class SparseSchur {
 public:
  SparseSchur(int64_t n, int64_t m)
      : n_(n), m_(m), row_weight_(n), diagonal_(m), preconditioner_(m), starts_(n + 1) {}

  int64_t kept() const { return starts_.back(); }
  const std::vector<double>& kept_of_columns() const { return kept_of_columns_; }

  // Keeps in each column what is more than `dropped` of its mass; with it at most m times that is left out.
  // The columns weigh (1 + ridge) times their mass and `softness` times their target.
  template <typename T>
  void collect(Semidual<T>& semidual, const Point& at, double dropped, double ridge) {
    const Problem<T>& p = semidual.problem();
    const int64_t n = p.n, m = p.m;
    columns_.resize(row_blocks(n));
    values_.resize(row_blocks(n));
    const bool kept = semidual.prepare(at);
    // What an entry must be more than; or minus its logarithm.
    std::vector<double> least(m);
    for (int64_t j = 0; j < m; ++j) {
      const double bound = at.column_mass[j] * dropped;
      least[j] = kept ? bound > 0 ? bound / semidual.factor()[j] : kInfinity
                      : -std::log(bound > 0 ? bound : kInfinity);
    }
    for_each_row_block(n, m, [&](int64_t first, int64_t end, int64_t block) {
      std::vector<double> costs(kept ? 0 : m), e(kept ? 0 : m);
      std::vector<int32_t>& columns = columns_[block];
      std::vector<double>& values = values_[block];
      columns.clear();
      values.clear();
      for (int64_t i = first; i < end; ++i) {
        const size_t before = columns.size();
        if (at.row_mass[i] != 0 && kept) {
          const double scale = semidual.scale(at, i);
          const double* const row = semidual.row(i);
          for_each_kept([&](int64_t j) { return scale * row[j] - least[j]; },
                        [&](int64_t j) {
                          columns.push_back(static_cast<int32_t>(j));
                          values.push_back(scale * row[j] * semidual.factor()[j]);
                        });
        } else if (at.row_mass[i] != 0) {
          semidual.exponents(i, costs.data(), e.data());
          const double scale = std::log(at.row_mass[i]) - at.log_sum[i];
          for_each_kept([&](int64_t j) { return e[j] + scale + least[j]; },
                        [&](int64_t j) {
                          columns.push_back(static_cast<int32_t>(j));
                          values.push_back(std::exp(e[j] + scale));
                        });
        }
        starts_[i + 1] = static_cast<int64_t>(columns.size() - before);
      }
    });
    starts_[0] = 0;
    for (int64_t i = 0; i < n; ++i) starts_[i + 1] += starts_[i];
    finish(p, at, semidual.reg(), ridge);
  }

  // The solution of (this) z = r to a relative residual; returns the number of iterations.
  int64_t solve(const std::vector<double>& r, double tolerance, int64_t limit,
                std::vector<double>& z) const {
    std::vector<double> residual(r), direction(m_), product(m_), scaled(m_);
    std::fill(z.begin(), z.end(), 0.0);
    double before = 0, first = 0;
    for (int64_t j = 0; j < m_; ++j) {
      scaled[j] = residual[j] * preconditioner_[j];
      direction[j] = scaled[j];
      before += residual[j] * scaled[j];
    }
    first = before;
    int64_t iteration = 0;
    while (iteration < limit && before > tolerance * tolerance * first) {
      multiply(direction, product);
      double curvature = 0;
      for (int64_t j = 0; j < m_; ++j) curvature += direction[j] * product[j];
      if (!(curvature > 0)) break;
      const double step = before / curvature;
      double after = 0;
      for (int64_t j = 0; j < m_; ++j) {
        z[j] += step * direction[j];
        residual[j] -= step * product[j];
        scaled[j] = residual[j] * preconditioner_[j];
        after += residual[j] * scaled[j];
      }
      for (int64_t j = 0; j < m_; ++j) direction[j] = scaled[j] + after / before * direction[j];
      before = after;
      ++iteration;
    }
    return iteration;
  }

  void multiply(const std::vector<double>& z, std::vector<double>& product) const {
    for (int64_t j = 0; j < m_; ++j) product[j] = diagonal_[j] * z[j];
    int64_t row = 0;
    for (size_t block = 0; block < columns_.size(); ++block) {
      const int32_t* const columns = columns_[block].data();
      const double* const values = values_[block].data();
      const int64_t end = std::min(row + rows_of_block(n_), n_);
      const int64_t begin = starts_[row];
      for (; row < end; ++row) {
        const int64_t from = starts_[row] - begin, to = starts_[row + 1] - begin;
        double sum = 0;
        for (int64_t k = from; k < to; ++k) sum += values[k] * z[columns[k]];
        sum *= row_weight_[row];
        for (int64_t k = from; k < to; ++k) product[columns[k]] -= values[k] * sum;
      }
    }
  }

 private:
  // Calls take(j) where excess(j) > 0, which is rare: by strides at first.
  template <typename F, typename G>
  void for_each_kept(const F& excess, const G& take) const {
    constexpr int64_t kStride = 32;
    for (int64_t begin = 0; begin < m_; begin += kStride) {
      const int64_t end = std::min(m_, begin + kStride);
      double largest = -kInfinity;
#pragma omp simd reduction(max : largest)
      for (int64_t j = begin; j < end; ++j) {
        const double value = excess(j);
        largest = value > largest ? value : largest;
      }
      if (!(largest > 0)) continue;
      for (int64_t j = begin; j < end; ++j)
        if (excess(j) > 0) take(j);
    }
  }

  template <typename T>
  void finish(const Problem<T>& p, const Point& at, double reg, double ridge) {
    const double softness = p.columns.softness(reg);
    const double share = p.rows.damping(reg);
    std::vector<double> squares(m_);
    kept_of_columns_.assign(m_, 0.0);
    int64_t row = 0;
    for (size_t block = 0; block < columns_.size(); ++block) {
      size_t k = 0;
      const int64_t end = std::min(row + rows_of_block(n_), n_);
      for (; row < end; ++row) {
        row_weight_[row] = at.row_mass[row] > 0 ? share / at.row_mass[row] : 0;
        const size_t last = k + static_cast<size_t>(starts_[row + 1] - starts_[row]);
        for (; k < last; ++k) {
          const double value = values_[block][k];
          kept_of_columns_[columns_[block][k]] += value;
          squares[columns_[block][k]] += row_weight_[row] * value * value;
        }
      }
    }
    for (int64_t j = 0; j < m_; ++j) {
      const double mass = at.column_mass[j];
      diagonal_[j] = mass * (1 + ridge) + softness * at.target[j];
      if (!(diagonal_[j] > 0)) diagonal_[j] = 1;
      preconditioner_[j] = 1 / std::max(diagonal_[j] - squares[j], 1e-8 * diagonal_[j]);
    }
  }

  int64_t n_, m_;
  std::vector<double> row_weight_, diagonal_, preconditioner_, kept_of_columns_;
  std::vector<int64_t> starts_;
  std::vector<std::vector<int32_t>> columns_;  // of each block of rows
  std::vector<std::vector<double>> values_;
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
