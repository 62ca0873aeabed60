// Checks of the loss operators' tensors, for callers who reach past the Python functions.
#pragma once

#include "core/torch.h"
#include "losses/stablemax_cross_entropy.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

inline void check_rows(const Tensor& input) {
  FUSEE_REQUIRE(input.dim() == 3, "input must be (outer, n, inner), got ", input.dim(),
                " dimensions");
}

inline void check_stablemax_backward(const Tensor& grad, const Tensor& input, const Tensor& sum) {
  FUSEE_REQUIRE(grad.scalar_type() == input.scalar_type(), "grad must have the input's dtype");
  FUSEE_REQUIRE(to_shape(grad.sizes()) == to_shape(input.sizes()),
                "grad must have the input's shape");
  FUSEE_REQUIRE(sum.scalar_type() == ScalarType::Double && sum.dim() == 2 &&
                    sum.size(0) == input.size(0) && sum.size(1) == input.size(2),
                "sum must be (outer, inner) in float64");
}

inline void check_cross_entropy(const Tensor& input, const Tensor& target,
                                const std::optional<Tensor>& weight) {
  check_rows(input);
  const ScalarType type = accumulate_type(input.scalar_type());
  if (target.scalar_type() == ScalarType::Long) {
    FUSEE_REQUIRE(
        target.dim() == 2 && target.size(0) == input.size(0) && target.size(1) == input.size(2),
        "target must be (outer, inner) class indices");
  } else {
    FUSEE_REQUIRE(target.scalar_type() == type, "probabilities must have the accumulation dtype");
    FUSEE_REQUIRE(target.dim() == 3 && target.size(0) == input.size(0) &&
                      target.size(1) == input.size(1) && target.size(2) == input.size(2),
                  "probabilities must have the input's shape");
  }
  if (weight.has_value()) {
    FUSEE_REQUIRE(weight->scalar_type() == type, "weight must have the accumulation dtype");
    FUSEE_REQUIRE(weight->dim() == 1 && weight->size(0) == input.size(1),
                  "weight must have one entry per class");
  }
}

inline void check_cross_entropy_backward(const Tensor& grad, const Tensor& input,
                                         const Tensor& stats) {
  const ScalarType type = accumulate_type(input.scalar_type());
  FUSEE_REQUIRE(grad.scalar_type() == type && stats.scalar_type() == type,
                "grad and stats must have the accumulation dtype");
  FUSEE_REQUIRE(grad.dim() == 2 && grad.size(0) == input.size(0) && grad.size(1) == input.size(2),
                "grad must be (outer, inner)");
  FUSEE_REQUIRE(stats.dim() == 3 && stats.size(0) == input.size(0) &&
                    stats.size(1) == input.size(2) && stats.size(2) == 2,
                "stats must be (outer, inner, 2)");
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
