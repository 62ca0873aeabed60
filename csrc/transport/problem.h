// One problem of entropic transport, as pointers, and its rows of costs.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/macros.h"
#include "core/math.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// What the equations behind implicit derivatives have on their diagonal, relatively: between parts of the plan
// that exchange less mass than rounding does, float64 does not know the potentials.
constexpr double kRidge = 1e-15;

enum class Metric : int64_t { kCost = 0, kSqEuclidean, kEuclidean, kCityblock, kDot };

// How a marginal may differ from what is given: not at all, or at the price of weight * KL.
struct Side {
  double weight;

  FUSEE_HOST_DEVICE bool balanced() const { return weight == kInfinity; }
  FUSEE_HOST_DEVICE double softness(double reg) const { return balanced() ? 0.0 : reg / weight; }
  // What a step of Sinkhorn's iteration is shortened by.
  FUSEE_HOST_DEVICE double damping(double reg) const { return 1.0 / (1.0 + softness(reg)); }
  // What a potential makes of the marginal.
  FUSEE_HOST_DEVICE double factor(double potential) const {
    return balanced() ? 1.0 : std::exp(-potential / weight);
  }
  // As the semi-dual has it, as a function of -reg times the logarithm of a row's sum.
  FUSEE_HOST_DEVICE Side softened(double reg) const { return {weight + reg}; }
  // What the dual objective has of a potential for a unit of mass.
  FUSEE_HOST_DEVICE double charge(double potential) const {
    return balanced() ? potential : -weight * std::expm1(-potential / weight);
  }
};

// T stores the costs or the points; all arithmetic is in double.
template <typename T>
struct Problem {
  using Stored = T;

  int64_t n, m, d;
  Metric metric;
  const T *x, *y;
  const double *a, *b;
  double reg;
  Side rows, columns;
  // The points of the columns, one coordinate after another: columns in the lanes of vectors.
  std::vector<double> coordinates;

  void lay_out_points() {
    if (metric == Metric::kCost) return;
    coordinates.resize(static_cast<size_t>(d * m));
    for (int64_t j = 0; j < m; ++j)
      for (int64_t k = 0; k < d; ++k) coordinates[k * m + j] = static_cast<double>(y[j * d + k]);
  }

  // The same between points with rows and columns changed about.
  Problem transposed() const {
    Problem other{m, n, d, metric, y, x, b, a, reg, columns, rows, {}};
    other.lay_out_points();
    return other;
  }

  // Calls f with a pointer to the costs of row i: where they lie, or computed into the buffer.
  template <typename F>
  auto with_costs(int64_t i, double* buffer, const F& f) const {
    if (metric == Metric::kCost) return f(x + i * m);
    compute_costs(i, buffer);
    return f(static_cast<const double*>(buffer));
  }

  // The cost of one pair.
  double cost(int64_t i, int64_t j) const {
    if (metric == Metric::kCost) return static_cast<double>(x[i * m + j]);
    double sum = 0;
    for (int64_t k = 0; k < d; ++k) {
      const double from = static_cast<double>(x[i * d + k]);
      const double to = static_cast<double>(y[j * d + k]), difference = from - to;
      if (metric == Metric::kDot) {
        sum -= from * to;
      } else {
        sum += metric == Metric::kCityblock ? absolute(difference) : difference * difference;
      }
    }
    return metric == Metric::kEuclidean ? std::sqrt(sum) : sum;
  }

 private:
  template <typename F>
  void add_coordinates(int64_t i, double* FUSEE_RESTRICT out, const F& add) const {
    for (int64_t j = 0; j < m; ++j) out[j] = 0;
    for (int64_t k = 0; k < d; ++k) {
      const double from = static_cast<double>(x[i * d + k]);
      const double* FUSEE_RESTRICT to = coordinates.data() + k * m;
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) out[j] = add(out[j], from, to[j]);
    }
  }

  void compute_costs(int64_t i, double* FUSEE_RESTRICT out) const {
    if (metric == Metric::kDot) {
      add_coordinates(i, out, [](double sum, double from, double to) { return sum - from * to; });
    } else if (metric == Metric::kCityblock) {
      add_coordinates(i, out,
                      [](double sum, double from, double to) { return sum + absolute(from - to); });
    } else {
      add_coordinates(i, out, [](double sum, double from, double to) {
        return sum + (from - to) * (from - to);
      });
    }
    if (metric == Metric::kEuclidean) {
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) out[j] = std::sqrt(out[j]);
    }
  }
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
