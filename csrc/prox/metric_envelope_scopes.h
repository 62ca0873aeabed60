// The tensors of the operator in a metric of elements, each with its metric, checked.
#pragma once

#include "prox/scopes.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// Calls f(T{}, U{}) with the types of a tensor and of its metric, which is the same or float.
template <typename F>
auto dispatch_metric(const Tensor& tensor, const Tensor& metric, const F& f) {
  return dispatch_floating(tensor.scalar_type(), [&]<typename T>(T value) {
    if constexpr (sizeof(T) == 2) {
      if (metric.scalar_type() == ScalarType::Float) return f(value, float{});
    }
    return f(value, value);
  });
}

class MetricScopes : public Scopes {
 public:
  std::vector<Tensor> metric;  // in the order of the tensors' memory

  MetricScopes(const std::vector<Tensor>& given, const std::vector<Tensor>& metric_,
               const std::vector<int64_t>& layout, const std::optional<Tensor>& weights,
               const Tensor& k, const Tensor& lam, int64_t form)
      : Scopes(given, layout, weights, k, lam, form) {
    FUSEE_REQUIRE(metric_.size() == given.size(), "metric must have a tensor for each of ",
                  given.size(), ", got ", metric_.size());
    metric.reserve(given.size());
    for (size_t i = 0; i < given.size(); ++i) {
      FUSEE_REQUIRE(to_shape(metric_[i].sizes()) == to_shape(given[i].sizes()) &&
                        metric_[i].device() == given[i].device(),
                    "metric must have the shapes and the device of the tensors");
      metric.push_back(in_order(given[i], metric_[i]));
    }
  }

 private:
  static Tensor in_order(const Tensor& tensor, const Tensor& metric) {
    const ScalarType type = tensor.scalar_type(), given = metric.scalar_type();
    const bool narrow = given == ScalarType::Float && type != ScalarType::Double;
    if ((given == type || narrow) && same_strides(metric, tensor)) return metric;
    Tensor copy = make_like(tensor);
    if (accumulate_type(type) != type) copy = torch::stable::to(copy, ScalarType::Float);
    torch::stable::copy_(copy, metric);
    return copy;
  }
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
