// The arguments that the operators of the group envelope share, checked.
#pragma once

#include "core/torch.h"
#include "prox/envelope_gradient.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// A batch of independent problems, the groups of each along the third of four dimensions.
struct Layout {
  int64_t batch, outer, groups, inner;

  FUSEE_HOST_DEVICE Layout(int64_t batch_, int64_t outer_, int64_t groups_, int64_t inner_)
      : batch(batch_), outer(outer_), groups(groups_), inner(inner_) {}

  explicit Layout(const Tensor& input) {
    FUSEE_REQUIRE(input.dim() == 4, "expected input of shape (batch, outer, groups, inner), got ",
                  input.dim(), " dimensions");
    batch = input.size(0);
    outer = input.size(1);
    groups = input.size(2);
    inner = input.size(3);
  }

  FUSEE_HOST_DEVICE int64_t group_size() const { return outer * inner; }
  FUSEE_HOST_DEVICE bool singles() const { return group_size() == 1; }
  // All of a problem as one group, for what knows single elements by their place in it.
  FUSEE_HOST_DEVICE Layout whole() const {
    Layout result = *this;
    result.inner = group_size() * groups;
    result.outer = result.groups = 1;
    return result;
  }
};

// What is given for groups or problems: contiguous, of the accumulation dtype or double.
struct Given {
  std::optional<Tensor> weights, metric;  // (groups) and (batch, groups)
  Tensor k, lam;                          // (batch), double

  Given(const Tensor& input, const std::optional<Tensor>& weights_,
        const std::optional<Tensor>& metric_, const Tensor& k_, const Tensor& lam_)
      : weights(as_contiguous(weights_)),
        metric(as_contiguous(metric_)),
        k(as_contiguous(k_)),
        lam(as_contiguous(lam_)) {
    const Layout layout(input);
    const ScalarType type = accumulate_type(input.scalar_type());
    FUSEE_REQUIRE(k.numel() == layout.batch && lam.numel() == layout.batch &&
                      k.scalar_type() == ScalarType::Double &&
                      lam.scalar_type() == ScalarType::Double,
                  "k and lam must be float64 tensors with one element for each problem");
    if (weights.has_value())
      FUSEE_REQUIRE(weights->numel() == layout.groups && weights->scalar_type() == type,
                    "weights must have one element for each group, of the accumulation dtype");
    if (metric.has_value())
      FUSEE_REQUIRE(
          metric->numel() == layout.batch * layout.groups && metric->scalar_type() == type,
          "metric must have one element for each group of each problem, of the "
          "accumulation dtype");
  }

  bool uniform() const { return !weights.has_value() && !metric.has_value(); }
};

inline void check_backward(const Tensor& grad, const Tensor& input, const Tensor& norms,
                           const Tensor& roots) {
  const Layout layout(input);
  FUSEE_REQUIRE(to_shape(grad.sizes()) == to_shape(input.sizes()) &&
                    grad.scalar_type() == input.scalar_type(),
                "grad must have the shape and dtype of the input");
  FUSEE_REQUIRE(norms.numel() == layout.batch * layout.groups &&
                    norms.scalar_type() == accumulate_type(input.scalar_type()) &&
                    roots.numel() == layout.batch * Root::kNumbers &&
                    roots.scalar_type() == ScalarType::Double,
                "norms and roots must be those that the forward operator returned");
}

inline void check_value_backward(const Tensor& grad, const Tensor& input, const Tensor& norms,
                                 const Tensor& knee) {
  const Layout layout(input);
  FUSEE_REQUIRE(grad.numel() == layout.batch && grad.scalar_type() == ScalarType::Double,
                "grad must be a float64 tensor with one element for each problem");
  FUSEE_REQUIRE(norms.numel() == layout.batch * layout.groups &&
                    norms.scalar_type() == accumulate_type(input.scalar_type()) &&
                    knee.numel() == layout.batch && knee.scalar_type() == ScalarType::Double,
                "norms and knee must be those that the forward operator returned");
}

// The numbers of the groups of one problem.
template <typename A>
struct Groups {
  const A* weights;  // null: ones
  const A* metric;   // null: ones
  A lam;
  bool debiased;

  FUSEE_HOST_DEVICE Group<A> operator[](int64_t j) const {
    return Group<A>(weights == nullptr ? A(1) : weights[j], metric == nullptr ? A(1) : metric[j],
                    lam, debiased);
  }
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
