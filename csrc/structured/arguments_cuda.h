// The arguments of products with block-diagonal factors, as their kernels take them.
#pragma once

#include "core/cuda/torch_stream.h"
#include "structured/monarch.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// Kernels count columns in 32 bits.
inline Blocks blocks_of(const Tensor& weight) {
  constexpr int64_t kWidest = int64_t{1} << 30;
  FUSEE_REQUIRE(weight.dim() == 3, "a weight must be (blocks, out, in)");
  const Blocks blocks{weight.size(0), weight.size(1), weight.size(2)};
  FUSEE_REQUIRE(blocks.count < kWidest && blocks.in < kWidest && blocks.out < kWidest &&
                    blocks.width_in() < kWidest && blocks.width_out() < kWidest,
                "a weight must have fewer than 2^30 columns");
  return blocks;
}

inline void check_rows(const Tensor& rows, int64_t width, const Tensor& weight) {
  FUSEE_REQUIRE(rows.dim() == 2 && rows.size(1) == width,
                "the input or its gradient does not fit the weight");
  FUSEE_REQUIRE(rows.scalar_type() == weight.scalar_type(), "all tensors must have one dtype");
}

inline void check_bias(const std::optional<Tensor>& bias, int64_t width, const Tensor& weight) {
  if (!bias.has_value()) return;
  FUSEE_REQUIRE(bias->dim() == 1 && bias->size(0) == width, "the bias does not fit the output");
  FUSEE_REQUIRE(bias->scalar_type() == weight.scalar_type(), "all tensors must have one dtype");
}

// A gradient, or an empty tensor where it is not asked for.
inline Tensor gradient_of(const Tensor& tensor, bool asked) {
  return empty(tensor, asked ? to_shape(tensor.sizes()) : Shape{0}, tensor.scalar_type());
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
