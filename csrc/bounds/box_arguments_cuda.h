// The arguments of operators on boxes, as their kernels take them.
#pragma once

#include "core/cuda/torch_stream.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

inline void check_same(const Tensor& tensor, const Tensor& like) {
  FUSEE_REQUIRE(to_shape(tensor.sizes()) == to_shape(like.sizes()),
                "center, radius and their gradients must have one shape");
  FUSEE_REQUIRE(tensor.scalar_type() == like.scalar_type(), "all tensors must have one dtype");
}

// (rows, in) through a weight (out, in).
inline void check_layer(const Tensor& center, const Tensor& radius, const Tensor& weight) {
  FUSEE_REQUIRE(center.dim() == 2 && weight.dim() == 2 && center.size(1) == weight.size(1),
                "expected center and radius (rows, in) and weight (out, in)");
  check_same(radius, center);
  FUSEE_REQUIRE(weight.scalar_type() == center.scalar_type(), "all tensors must have one dtype");
  constexpr int64_t kWidest = int64_t{1} << 30;
  FUSEE_REQUIRE(weight.size(0) < kWidest && weight.size(1) < kWidest,
                "a weight must have fewer than 2^30 rows and columns");
}

inline void check_vector(const std::optional<Tensor>& vector, int64_t size, const Tensor& like) {
  if (!vector.has_value()) return;
  FUSEE_REQUIRE(vector->dim() == 1 && vector->size(0) == size,
                "the bias, scale or shift has the wrong size");
  FUSEE_REQUIRE(vector->scalar_type() == like.scalar_type(), "all tensors must have one dtype");
}

inline std::optional<Tensor> as_aligned(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return as_aligned(*tensor);
}

// A gradient, or an empty tensor where it is not asked for.
inline Tensor gradient_of(const Tensor& tensor, const Shape& shape, bool asked) {
  return empty(tensor, asked ? shape : Shape{0}, tensor.scalar_type());
}

// Its memory, or none.
template <typename T>
Global<T> output_if(bool asked, const Tensor& tensor) {
  return asked ? output<T>(tensor) : Global<T>{};
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
