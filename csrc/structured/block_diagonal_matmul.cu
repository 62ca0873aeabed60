// The block-diagonal product and its gradients in CUDA.

#include "structured/arguments_cuda.h"
#include "structured/block_product_cuda.h"
#include "structured/weight_gradient_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

FUSEE_BLOCKED_PRODUCTS()
FUSEE_BLOCKED_GRADIENTS()

}  // namespace cuda
namespace {

using namespace cuda;

Tensor block_diagonal_matmul(const Tensor& input_, const Tensor& weight_,
                             const std::optional<Tensor>& bias_, bool tf32) {
  const Context context(input_);
  const Tensor x = as_aligned(input_), weight = as_aligned(weight_);
  const std::optional<Tensor> bias = as_contiguous(bias_);
  const Blocks shape = blocks_of(weight);
  check_rows(x, shape.width_in(), weight);
  check_bias(bias, shape.width_out(), weight);
  const Tensor y = empty(x, {x.size(0), shape.width_out()}, x.scalar_type());
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    launch_block_product<false>(input_columns<T, Layout::kBlocked>(x, shape.count, shape.in),
                                input<T>(weight), input<T>(bias),
                                output_columns<T, Layout::kBlocked>(y, shape.count, shape.out),
                                tf32, context.stream);
  });
  return y;
}

std::tuple<Tensor, Tensor> block_diagonal_matmul_backward(const Tensor& grad_, const Tensor& input_,
                                                          const Tensor& weight_, int64_t wanted,
                                                          bool tf32) {
  const bool input_grad = wanted & 1, weight_grad = wanted & 2;
  const Context context(grad_);
  const Tensor grad = as_aligned(grad_), x = as_aligned(input_), weight = as_aligned(weight_);
  const Blocks shape = blocks_of(weight);
  check_rows(x, shape.width_in(), weight);
  check_rows(grad, shape.width_out(), weight);
  FUSEE_REQUIRE(grad.size(0) == x.size(0), "grad and input must have as many rows");
  const Tensor grad_input = gradient_of(x, input_grad);
  const Tensor grad_weight = gradient_of(weight, weight_grad);
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    const auto of_grad = input_columns<T, Layout::kBlocked>(grad, shape.count, shape.out);
    if (input_grad)
      launch_block_product<true>(
          of_grad, input<T>(weight), Global<const T>{},
          output_columns<T, Layout::kBlocked>(grad_input, shape.count, shape.in), tf32,
          context.stream);
    if (weight_grad)
      launch_weight_gradient(of_grad, input_columns<T, Layout::kBlocked>(x, shape.count, shape.in),
                             grad_weight, tf32, context.stream);
  });
  return {grad_input, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("block_diagonal_matmul", TORCH_BOX(&block_diagonal_matmul));
  m.impl("block_diagonal_matmul_backward", TORCH_BOX(&block_diagonal_matmul_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
