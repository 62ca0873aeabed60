// The gradients of a layer on boxes in CUDA.

#include "bounds/box_gradient_cuda.h"
#include "bounds/box_product_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

struct Nothing {};

// Sums as they are, to what is asked for of both.
template <typename T, typename A = accumulate_t<T>>
struct ToGradients {
  Global<T> center, radius;
  int64_t width;

  template <int V>
  FUSEE_DEVICE Nothing of_column(int64_t, int) const {
    return {};
  }
  template <int V>
  FUSEE_DEVICE void operator()(int64_t line, int64_t column, Nothing, const A (&of_center)[V],
                               const A (&of_radius)[V], int valid) const {
    if (center) store_line(center, line, width, column, of_center, valid);
    if (radius) store_line(radius, line, width, column, of_radius, valid);
  }
};

template <typename T, typename A = accumulate_t<T>>
struct ToWeight {
  Global<const T> weight;
  Global<T> gradient;
  int64_t width;

  template <int V>
  FUSEE_DEVICE Nothing of_column(int64_t, int) const {
    return {};
  }
  template <int V>
  FUSEE_DEVICE void operator()(int64_t line, int64_t column, Nothing, const A (&of_center)[V],
                               const A (&of_radius)[V], int valid) const {
    A values[V];
    load_line(weight, line, width, column, values, valid);
    for (int v = 0; v < V; ++v) values[v] = of_center[v] + sign_of(values[v]) * of_radius[v];
    store_line(gradient, line, width, column, values, valid);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> interval_linear_backward(
    const Tensor& grad_center_, const Tensor& grad_radius_, const Tensor& center_,
    const Tensor& radius_, const Tensor& weight_, const std::optional<Tensor>& out_center_,
    const std::optional<Tensor>& out_radius_, int64_t wanted, bool tf32) {
  const Context context(grad_center_);
  const Tensor center = as_aligned(center_), radius = as_aligned(radius_);
  const Tensor weight = as_aligned(weight_);
  const Tensor grad_center = as_aligned(grad_center_), grad_radius = as_aligned(grad_radius_);
  const std::optional<Tensor> out_center = as_aligned(out_center_);
  const std::optional<Tensor> out_radius = as_aligned(out_radius_);
  check_layer(center, radius, weight);
  const int64_t rows = center.size(0), in = weight.size(1), out = weight.size(0);
  FUSEE_REQUIRE(grad_center.dim() == 2 && grad_center.size(0) == rows &&
                    grad_center.size(1) == out && grad_center.scalar_type() == center.scalar_type(),
                "the gradients do not fit the output");
  check_same(grad_radius, grad_center);
  FUSEE_REQUIRE(out_center.has_value() == out_radius.has_value(),
                "out_center and out_radius go together");
  if (out_center.has_value()) {
    check_same(*out_center, grad_center);
    check_same(*out_radius, grad_center);
  }
  const bool input_grad = wanted & 3, weight_grad = wanted & 4, bias_grad = wanted & 8;
  const Tensor to_center = gradient_of(center, {rows, in}, wanted & 1);
  const Tensor to_radius = gradient_of(center, {rows, in}, wanted & 2);
  const Tensor to_weight = gradient_of(weight, {out, in}, weight_grad);
  const Tensor to_bias = gradient_of(weight, {out}, bias_grad);
  // The gradients before ReLU, once for both products.
  const bool gated = out_center.has_value() && (input_grad || weight_grad);
  const Tensor gated_center = gated ? make_like(grad_center) : grad_center;
  const Tensor gated_radius = gated ? make_like(grad_radius) : grad_radius;
  dispatch_floating(center.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    if (gated || bias_grad) {
      BoxGradient<T> body{};
      body.grad_center = input<T>(grad_center);
      body.grad_radius = input<T>(grad_radius);
      body.out_center = input<T>(out_center);
      body.out_radius = input<T>(out_radius);
      if (gated) {
        body.to_center = output<T>(gated_center);
        body.to_radius = output<T>(gated_radius);
      }
      ChannelSums<T> sums;
      sums.results[1] = output_if<T>(bias_grad, to_bias);
      launch_channels(body, {rows, out, 1}, sums, center, context.stream);
    }
    const Matrix<T> weights{input<T>(weight), out, in};
    const Matrix<T> grads[2] = {{input<T>(gated_center), rows, out},
                                {input<T>(gated_radius), rows, out}};
    as_multiplied<T>(tf32, [&]<typename E>() {
      if (input_grad) {
        const ToGradients<T> finish{output_if<T>(wanted & 1, to_center),
                                    output_if<T>(wanted & 2, to_radius), in};
        as_wide_as<E, kOnTensorCores<E> ? 16 : 8>(rows, [&]<int kColumns>() {
          using Product = BoxProduct<E, T, kColumns, Form::kInputGradient>;
          launch_box_product(Product{{weights, weights}, {grads[0], grads[1]}, in, rows, out},
                             Outward<A>{}, finish, center, context.stream);
        });
      }
      if (weight_grad) {
        using Product = BoxProduct<E, T, sizeof(T) == 8 ? 32 : 64, Form::kWeightGradient>;
        const Matrix<T> centers{input<T>(center), rows, in}, radii{input<T>(radius), rows, in};
        launch_box_product(Product{{centers, radii}, {grads[0], grads[1]}, in, out, rows},
                           Outward<A>{}, ToWeight<T>{input<T>(weight), output<T>(to_weight), in},
                           center, context.stream);
      }
    });
  });
  return {to_center, to_radius, to_weight, to_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("interval_linear_backward", TORCH_BOX(&interval_linear_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
