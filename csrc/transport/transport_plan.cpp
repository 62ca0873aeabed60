// The plan of given potentials on the CPU, and what gradients need of it, in passes over its rows.

#include <cmath>

#include "transport/binding.h"
#include "transport/semidual.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

struct Potentials {
  const double *f, *g;
};

// Fills e with exp((f_i + g_j - C_ij) / reg).
template <typename T>
void exponentials(const Problem<T>& p, const Potentials& at, int64_t i, double* costs,
                  double* FUSEE_RESTRICT e) {
  const double inverse = 1 / p.reg;
  p.with_costs(i, costs, [&](const auto* FUSEE_RESTRICT c) {
    const double* FUSEE_RESTRICT g = at.g;
    const double f = at.f[i];
#pragma omp simd
    for (int64_t j = 0; j < p.m; ++j)
      e[j] = exp_in_range(((f - static_cast<double>(c[j])) + g[j]) * inverse);
  });
}

template <typename T>
void fill_plan(const Problem<T>& p, const Potentials& at, T* plan) {
  for_each_row_block(p.n, p.m, [&](int64_t first, int64_t end, int64_t) {
    std::vector<double> costs(p.m), e(p.m);
    for (int64_t i = first; i < end; ++i) {
      T* FUSEE_RESTRICT out = plan + i * p.m;
      exponentials(p, at, i, costs.data(), e.data());
      for (int64_t j = 0; j < p.m; ++j) {
        const double mass = p.a[i] * p.b[j];
        out[j] = static_cast<T>(mass == 0 ? 0 : mass * e[j]);
      }
    }
  });
}

// Costs: all in one pass; the columns' sums of the blocks of rows are added in order.
template <typename T>
void gradient_of_costs(const Problem<T>& p, const Potentials& at, const double* left,
                       const double* right, T* grad, double* row_sums, double* column_sums) {
  const int64_t n = p.n, m = p.m;
  std::vector<double> blocks(static_cast<size_t>(row_blocks(n)) * m);
  for_each_row_block(n, m, [&](int64_t first, int64_t end, int64_t block) {
    std::vector<double> e(m);
    double* FUSEE_RESTRICT total = blocks.data() + block * m;
    for (int64_t i = first; i < end; ++i) {
      exponentials(p, at, i, nullptr, e.data());
      T* FUSEE_RESTRICT out = grad + i * m;
      const double* FUSEE_RESTRICT b = p.b;
      const double a = p.a[i], l = left[i];
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < m; ++j) {
        const double of_row = b[j] == 0 ? 0.0 : b[j] * e[j];
        const double of_column = a == 0 ? 0.0 : a * e[j];
        out[j] = static_cast<T>(a == 0 ? 0.0 : a * of_row * (l + right[j]));
        sum += of_row * right[j];
        total[j] += of_column * l;
      }
      row_sums[i] = sum;
    }
  });
  for (int64_t j = 0; j < m; ++j) {
    column_sums[j] = 0;
    for (int64_t block = 0; block < row_blocks(n); ++block) column_sums[j] += blocks[block * m + j];
  }
}

// Points: the gradients and sums of one side, its points as rows.
template <typename T>
void gradient_of_points(const Problem<T>& p, const Potentials& at, const double* left,
                        const double* right, T* grad, double* sums) {
  for_each_row_block(p.n, p.m * (1 + p.d), [&](int64_t first, int64_t end, int64_t) {
    std::vector<double> costs(p.m), e(p.m);
    for (int64_t i = first; i < end; ++i) {
      exponentials(p, at, i, costs.data(), e.data());
      double sum = 0;
      for (int64_t j = 0; j < p.m; ++j) {
        const double of_row = p.b[j] == 0 ? 0.0 : p.b[j] * e[j];
        sum += of_row * right[j];
        e[j] = p.a[i] == 0 ? 0 : p.a[i] * of_row * (left[i] + right[j]);
        if (p.metric == Metric::kEuclidean) e[j] = costs[j] > 0 ? e[j] / costs[j] : 0;
      }
      sums[i] = sum;
      for (int64_t k = 0; k < p.d; ++k) {
        const double from = static_cast<double>(p.x[i * p.d + k]);
        const double* FUSEE_RESTRICT to = p.coordinates.data() + k * p.m;
        double total = 0;
        if (p.metric == Metric::kDot) {
          for (int64_t j = 0; j < p.m; ++j) total -= e[j] * to[j];
        } else if (p.metric == Metric::kCityblock) {
          for (int64_t j = 0; j < p.m; ++j)
            total += from > to[j] ? e[j] : from < to[j] ? -e[j] : 0.0;
        } else {
          for (int64_t j = 0; j < p.m; ++j) total += e[j] * (from - to[j]);
        }
        grad[i * p.d + k] = static_cast<T>(p.metric == Metric::kSqEuclidean ? 2 * total : total);
      }
    }
  });
}

Tensor transport_plan(const Tensor& x, const std::optional<Tensor>& y, int64_t metric,
                      const Tensor& a, const Tensor& b, const Tensor& reg, const Tensor& f_,
                      const Tensor& g_) {
  const TransportTensors given(x, y, metric, a, b, reg, std::nullopt);
  const Tensor f = as_contiguous(f_), g = as_contiguous(g_);
  Tensor plan = empty(given.x, {given.batch, given.n, given.m}, given.x.scalar_type());
  given.for_each_problem([&](const auto& problem, int64_t i) {
    using T = typename std::decay_t<decltype(problem)>::Stored;
    fill_plan(problem, Potentials{data<double>(f) + i * given.n, data<double>(g) + i * given.m},
              mutable_data<T>(plan) + i * given.n * given.m);
  });
  return plan;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> transport_plan_gradient(
    const Tensor& x, const std::optional<Tensor>& y, int64_t metric, const Tensor& a,
    const Tensor& b, const Tensor& reg, const Tensor& f_, const Tensor& g_, const Tensor& left_,
    const Tensor& right_) {
  const TransportTensors given(x, y, metric, a, b, reg, std::nullopt);
  const Tensor f = as_contiguous(f_), g = as_contiguous(g_);
  const Tensor left = as_contiguous(left_), right = as_contiguous(right_);
  const int64_t n = given.n, m = given.m, d = given.d;
  auto [grad_x, grad_y, row_sums, column_sums] = empty_gradient(given);
  given.for_each_problem([&](const auto& problem, int64_t i) {
    using T = typename std::decay_t<decltype(problem)>::Stored;
    const Potentials at{data<double>(f) + i * n, data<double>(g) + i * m};
    const double* const of_left = data<double>(left) + i * n;
    const double* const of_right = data<double>(right) + i * m;
    T* const of_x = mutable_data<T>(grad_x) + i * n * d;
    double* const of_rows = mutable_data<double>(row_sums) + i * n;
    double* const of_columns = mutable_data<double>(column_sums) + i * m;
    if (problem.metric == Metric::kCost)
      return gradient_of_costs(problem, at, of_left, of_right, of_x, of_rows, of_columns);
    gradient_of_points(problem, at, of_left, of_right, of_x, of_rows);
    gradient_of_points(problem.transposed(), Potentials{at.g, at.f}, of_right, of_left,
                       mutable_data<T>(grad_y) + i * m * d, of_columns);
  });
  return {grad_x, grad_y, row_sums, column_sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) {
  m.impl("transport_plan", TORCH_BOX(&transport_plan));
  m.impl("transport_plan_gradient", TORCH_BOX(&transport_plan_gradient));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
