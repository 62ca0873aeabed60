// The matrix products of a linear layer whose logits exist a block of classes at a time, through
// torch's own matrix product on the tensors' device.
#pragma once

#include "core/torch.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

struct LinearBlocks {
  Tensor input;                // (rows, features)
  Tensor weight;               // (classes, features)
  std::optional<Tensor> bias;  // (classes)
  int64_t rows, features, classes;
  int64_t block_classes;

  LinearBlocks(const Tensor& input_, const Tensor& weight_, const std::optional<Tensor>& bias_,
               int64_t block_elements)
      : input(as_contiguous(input_)), weight(as_contiguous(weight_)), bias(as_contiguous(bias_)) {
    FUSEE_REQUIRE(input.dim() == 2 && weight.dim() == 2 && input.size(1) == weight.size(1),
                  "input must be (rows, features) and linear_weight (classes, features)");
    FUSEE_REQUIRE(input.scalar_type() == weight.scalar_type() &&
                      (!bias.has_value() || bias->scalar_type() == input.scalar_type()),
                  "input, linear_weight and linear_bias must have one dtype");
    FUSEE_REQUIRE(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == weight.size(0)),
                  "linear_bias must have one entry per class");
    rows = input.size(0);
    features = input.size(1);
    classes = weight.size(0);
    // Blocks of whole vectors, wide enough for the matrix product to be efficient. Logits that fit into
    // one block are one.
    constexpr int64_t kLeast = 64;
    const int64_t wanted = block_elements / std::max<int64_t>(1, rows);
    block_classes = std::max(kLeast, wanted / kLeast * kLeast);
  }

  // An uninitialised block of n classes.
  Tensor block(int64_t n) const { return empty(input, {rows, n}, input.scalar_type()); }

  // logits = input times the weights of n classes from `first` on.
  void logits(int64_t first, int64_t n, const Tensor& logits) const {
    matmul_out(input, torch::stable::transpose(classes_of(weight, first, n), 0, 1), logits);
  }

  static Tensor classes_of(const Tensor& tensor, int64_t first, int64_t n) {
    Tensor whole = tensor;
    return torch::stable::narrow(whole, 0, first, n);
  }

  // Calls f(first, n, buffer) for every block, with one buffer for the logits of all.
  template <typename F>
  void for_each(const F& f) const {
    Tensor buffer = block(std::min(block_classes, classes));
    for (int64_t first = 0; first < classes; first += block_classes) {
      const int64_t n = std::min(block_classes, classes - first);
      if (n != buffer.size(1)) buffer = block(n);
      f(first, n, buffer);
    }
  }
};

// The gradients of the layer, gathered over the blocks. One that is not wanted is an empty tensor.
struct LinearGradients {
  const LinearBlocks& blocks;
  Tensor input_total;  // in the accumulation type, as it is a sum over blocks
  Tensor weight, bias;
  bool input_grad, weight_grad, bias_grad;

  LinearGradients(const LinearBlocks& blocks_, bool input_grad_, bool weight_grad_, bool bias_grad_)
      : blocks(blocks_), input_grad(input_grad_), weight_grad(weight_grad_), bias_grad(bias_grad_) {
    const Tensor& like = blocks.input;
    const ScalarType type = like.scalar_type();
    input_total = empty(like, input_grad ? Shape{blocks.rows, blocks.features} : Shape{0},
                        accumulate_type(type));
    weight = empty(like, weight_grad ? Shape{blocks.classes, blocks.features} : Shape{0}, type);
    bias = empty(like, bias_grad ? Shape{blocks.classes} : Shape{0}, type);
  }

  // Takes the gradient of a block of logits; add_to(part, total) adds a product to input_total.
  template <typename AddTo>
  void add(int64_t first, int64_t n, const Tensor& grad, const AddTo& add_to) {
    if (input_grad) {
      const Tensor part = empty(blocks.input, {blocks.rows, blocks.features}, grad.scalar_type());
      matmul_out(grad, LinearBlocks::classes_of(blocks.weight, first, n), part);
      add_to(part, input_total);
    }
    if (weight_grad)
      matmul_out(torch::stable::transpose(grad, 0, 1), blocks.input,
                 LinearBlocks::classes_of(weight, first, n));
    if (bias_grad) {
      Tensor out = LinearBlocks::classes_of(bias, first, n);
      const int64_t dim = 0;
      torch::stable::sum_out(out, grad, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1));
    }
  }

  std::tuple<Tensor, Tensor, Tensor> finish() const {
    return {torch::stable::to(input_total, blocks.input.scalar_type()), weight, bias};
  }
};

inline void check_linear_target(const LinearBlocks& blocks, const Tensor& target,
                                const std::optional<Tensor>& weight) {
  FUSEE_REQUIRE(target.scalar_type() == ScalarType::Long && target.dim() == 1 &&
                    target.size(0) == blocks.rows,
                "target must hold one class index per row");
  FUSEE_REQUIRE(!weight.has_value() ||
                    (weight->dim() == 1 && weight->size(0) == blocks.classes &&
                     weight->scalar_type() == accumulate_type(blocks.input.scalar_type())),
                "weight must have one entry per class, in the accumulation dtype");
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
