// The tensors of a compander call, checked and brought to flat memory whose elements pair up.
#pragma once

#include "core/torch.h"
#include "reparam/curves.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// Calls f with the kind as a constant.
template <typename F>
void dispatch_kind(int64_t kind, F&& f) {
  switch (static_cast<Kind>(kind)) {
    case Kind::kArctan:
      return f(std::integral_constant<Kind, Kind::kArctan>{});
    case Kind::kTanh:
      return f(std::integral_constant<Kind, Kind::kTanh>{});
    case Kind::kSoftsign:
      return f(std::integral_constant<Kind, Kind::kSoftsign>{});
    case Kind::kAsinh:
      return f(std::integral_constant<Kind, Kind::kAsinh>{});
    case Kind::kSymlog:
      return f(std::integral_constant<Kind, Kind::kSymlog>{});
    case Kind::kMuLaw:
      return f(std::integral_constant<Kind, Kind::kMuLaw>{});
    case Kind::kPowerprop:
      return f(std::integral_constant<Kind, Kind::kPowerprop>{});
  }
  FUSEE_REQUIRE(false, "kind must be from 0 to 6, got ", kind);
}

// One tensor as `rows` channels of `length` elements, one after the other in memory. Every row has its
// own a and b.
struct Weight {
  Tensor input, a, b;
  std::optional<Tensor> grad;
  Tensor output;  // in the memory order of input: the result, or the gradient of input
  std::optional<Tensor> target;  // where the output must go in the end, if its order is another
  Tensor grad_a, grad_b;
  ScalarType type;
  int64_t rows, length;

  Weight(const Tensor& input_, const Tensor& a_, const Tensor& b_,
         const std::optional<Tensor>& grad_ = std::nullopt)
      : input(input_),
        a(as_contiguous(a_)),
        b(as_contiguous(b_)),
        grad(grad_),
        output(input_),
        grad_a(a_),
        grad_b(b_),
        type(input_.scalar_type()) {
    dispatch_floating(type, [](auto) {});
    for (const Tensor* parameter : {&a_, &b_}) {
      FUSEE_REQUIRE(parameter->scalar_type() == accumulate_type(type) &&
                        parameter->device() == input.device(),
                    "a and b must be on the device of the input, in its accumulation dtype");
    }
    rows = a.numel();
    FUSEE_REQUIRE(rows == b.numel() && (rows == 1 || (input.dim() != 0 && rows == input.size(0))),
                  "a and b must both have one element, or one for each channel of the input");
    length = rows == 0 ? 0 : input.numel() / rows;

    const bool rows_whole = rows == 1 || input.stride(0) == length;
    if (is_dense(input) && rows_whole) {
      output = make_like(input);
    } else if (rows == 1) {
      output = make_like(input);
      input = in_order_of(output, input);
    } else {
      target = make_like(input);
      input = as_contiguous(input);
      output = empty(input, to_shape(input.sizes()), type);
    }
    if (grad.has_value()) {
      FUSEE_REQUIRE(to_shape(grad->sizes()) == to_shape(input.sizes()) &&
                        grad->scalar_type() == type && grad->device() == input.device(),
                    "grad must have the shape, dtype and device of the input");
      grad = in_order_of(output, *grad);
      grad_a = empty(a, to_shape(a_.sizes()), accumulate_type(type));
      grad_b = empty(b, to_shape(b_.sizes()), accumulate_type(type));
    }
  }

  // The output as the caller gets it.
  Tensor finish() {
    if (!target.has_value()) return output;
    torch::stable::copy_(*target, output);
    return *target;
  }
};

// The operators over one tensor and over lists, made of two functions that compute a list of weights.
template <auto kForward, auto kBackward>
struct CompandOperators {
  using Tensors = std::vector<Tensor>;

  static Tensor one(const Tensor& input, const Tensor& a, const Tensor& b, int64_t kind) {
    std::vector<Weight> weights{Weight(input, a, b)};
    kForward(weights, kind);
    return weights[0].finish();
  }

  static std::tuple<Tensor, Tensor, Tensor> backward_of_one(const Tensor& grad, const Tensor& input,
                                                            const Tensor& a, const Tensor& b,
                                                            int64_t kind) {
    std::vector<Weight> weights{Weight(input, a, b, grad)};
    kBackward(weights, kind);
    return {weights[0].finish(), weights[0].grad_a, weights[0].grad_b};
  }

  static Tensors foreach (Tensors inputs, Tensors a, Tensors b, int64_t kind) {
    const size_t count = inputs.size();
    FUSEE_REQUIRE(a.size() == count && b.size() == count, "a and b must be as many as the inputs");
    std::vector<Weight> weights;
    weights.reserve(count);
    for (size_t i = 0; i < count; ++i) weights.emplace_back(inputs[i], a[i], b[i]);
    kForward(weights, kind);
    Tensors results;
    results.reserve(count);
    for (Weight& weight : weights) results.push_back(weight.finish());
    return results;
  }

  // The gradients of all inputs, of all a, of all b.
  static Tensors backward_of_foreach(Tensors grads, Tensors inputs, Tensors a, Tensors b,
                                     int64_t kind) {
    const size_t count = inputs.size();
    FUSEE_REQUIRE(a.size() == count && b.size() == count && grads.size() == count,
                  "grads, a and b must be as many as the inputs");
    std::vector<Weight> weights;
    weights.reserve(count);
    for (size_t i = 0; i < count; ++i) weights.emplace_back(inputs[i], a[i], b[i], grads[i]);
    kBackward(weights, kind);
    Tensors results;
    results.reserve(3 * count);
    for (Weight& weight : weights) results.push_back(weight.finish());
    for (Weight& weight : weights) results.push_back(weight.grad_a);
    for (Weight& weight : weights) results.push_back(weight.grad_b);
    return results;
  }
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
