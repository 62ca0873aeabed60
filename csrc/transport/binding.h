// The arguments that all operators of transport take, as tensors and as problems.
#pragma once

#include <tuple>

#include "core/torch.h"
#include "transport/annealing.h"
#include "transport/problem.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

struct TransportTensors {
  Tensor x, a, b, reg;
  std::optional<Tensor> y, penalty;
  Metric metric;
  int64_t batch, n, m, d;

  TransportTensors(const Tensor& x_, const std::optional<Tensor>& y_, int64_t metric_,
                   const Tensor& a_, const Tensor& b_, const Tensor& reg_,
                   const std::optional<Tensor>& penalty_)
      : x(as_contiguous(x_)),
        a(as_contiguous(a_)),
        b(as_contiguous(b_)),
        reg(as_contiguous(reg_)),
        y(as_contiguous(y_)),
        penalty(as_contiguous(penalty_)),
        metric(static_cast<Metric>(metric_)) {
    FUSEE_REQUIRE(x.dim() == 3 && (metric == Metric::kCost) != y.has_value(),
                  "expected costs, or points of both sides");
    batch = x.size(0);
    n = x.size(1);
    d = x.size(2);
    m = y.has_value() ? y->size(1) : x.size(2);
    for (const Tensor* tensor : {&a, &b, &reg})
      FUSEE_REQUIRE(tensor->scalar_type() == ScalarType::Double, "expected masses in float64");
    FUSEE_REQUIRE(a.numel() == batch * n && b.numel() == batch * m && reg.numel() == batch,
                  "the masses do not fit the costs");
  }

  // Calls f(problem, index) for every problem of the batch.
  template <typename F>
  void for_each_problem(const F& f) const {
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) f(problem<T>(i), i);
      });
    };
    if (x.scalar_type() == ScalarType::Float) return run(float{});
    FUSEE_REQUIRE(x.scalar_type() == ScalarType::Double, "expected float32 or float64 costs");
    run(double{});
  }

 private:
  template <typename T>
  Problem<T> problem(int64_t i) const {
    const double* const weights = data_or_null<double>(penalty);
    Problem<T> p{n,
                 m,
                 d,
                 metric,
                 data<T>(x) + i * n * d,
                 y.has_value() ? data<T>(*y) + i * m * d : nullptr,
                 data<double>(a) + i * n,
                 data<double>(b) + i * m,
                 data<double>(reg)[i],
                 {weights == nullptr ? kInfinity : weights[2 * i]},
                 {weights == nullptr ? kInfinity : weights[2 * i + 1]},
                 {}};
    p.lay_out_points();
    return p;
  }
};

// What the solver returns, to be filled: value, f, g, error, n_iter, stages.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> empty_solution(
    const TransportTensors& given) {
  const auto doubles = [&](const Shape& shape) {
    return empty(given.a, shape, ScalarType::Double);
  };
  const int64_t batch = given.batch;
  return {doubles({batch}),
          doubles({batch, given.n}),
          doubles({batch, given.m}),
          doubles({batch}),
          empty(given.a, {batch}, ScalarType::Long),
          doubles({batch, kStages, kStageNumbers})};
}

// What transport_plan_gradient returns, to be filled: grad_x, grad_y, row_sums, column_sums.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> empty_gradient(const TransportTensors& given) {
  const ScalarType type = given.x.scalar_type();
  return {empty(given.x, to_shape(given.x.sizes()), type),
          empty(given.x, given.y.has_value() ? to_shape(given.y->sizes()) : Shape{0}, type),
          empty(given.a, {given.batch, given.n}, ScalarType::Double),
          empty(given.a, {given.batch, given.m}, ScalarType::Double)};
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
