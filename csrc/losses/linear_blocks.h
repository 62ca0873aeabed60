// A linear layer whose logits exist in parts: the matrix products, through torch's own on the tensors'
// device, and the walk over the parts.
#pragma once

#include "core/torch.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

inline Tensor rows_of(const Tensor& tensor, int64_t first, int64_t n) {
  Tensor whole = tensor;
  return torch::stable::narrow(whole, 0, first, n);
}

inline Tensor columns_of(const Tensor& tensor, int64_t first, int64_t n) {
  Tensor whole = tensor;
  return torch::stable::narrow(whole, 1, first, n);
}

// Which gradients are asked for.
struct Wanted {
  bool input, weight, bias;

  bool any() const { return input || weight || bias; }
};

struct Linear {
  Tensor input;                // (rows, features)
  Tensor weight;               // (classes, features)
  std::optional<Tensor> bias;  // (classes)
  int64_t rows, features, classes;
  int64_t part_classes;  // how many classes one product over a chunk of rows takes

  Linear(const Tensor& input_, const Tensor& weight_, const std::optional<Tensor>& bias_,
         int64_t part_classes_)
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
    part_classes = std::min(part_classes_, classes);
  }

  // f(first, n) for the parts of the classes.
  template <typename F>
  void for_each_part(const F& f) const {
    for (int64_t first = 0; first < classes; first += part_classes)
      f(first, std::min(part_classes, classes - first));
  }

  Tensor buffer(int64_t n_rows, int64_t n_classes) const {
    return empty(input, {n_rows, n_classes}, input.scalar_type());
  }

  // f(first, n, buffer, logits) for blocks of n classes of all rows. The products, without the bias, are
  // in `logits`; blocks are whole vectors wide, and one block where all logits fit into it.
  template <typename F>
  void for_each_class_block(int64_t block_elements, const F& f) const {
    constexpr int64_t kLeast = 64;
    const int64_t wanted = block_elements / std::max<int64_t>(1, rows) / kLeast * kLeast;
    const int64_t step = std::min(classes, std::max(kLeast, wanted));
    Tensor logits = buffer(rows, step);
    for (int64_t first = 0; first < classes; first += step) {
      const int64_t n = std::min(step, classes - first);
      if (n != step) logits = buffer(rows, n);
      matmul_out(input, torch::stable::transpose(rows_of(weight, first, n), 0, 1), logits);
      f(first, n, logits);
    }
  }

  // f(first, n, logits) for chunks of n rows with all classes: an eleventh of the rows, at least 64 so
  // that the products are efficient, at most 256.
  template <typename F>
  void for_each_row_chunk(const F& f) const {
    const int64_t wanted = std::clamp<int64_t>(rows / 11 / 8 * 8, 64, 256);
    const int64_t step = std::min(rows, wanted);
    Tensor logits = buffer(step, classes);
    for (int64_t first = 0; first < rows; first += step) {
      const int64_t n = std::min(step, rows - first);
      if (n != step) logits = buffer(n, classes);
      const Tensor x = rows_of(input, first, n);
      for_each_part([&](int64_t c, int64_t m) {
        matmul_out(x, torch::stable::transpose(rows_of(weight, c, m), 0, 1),
                   columns_of(logits, c, m));
      });
      f(first, n, logits);
    }
  }
};

// The gradients of the layer, gathered over the parts of the logits' gradient. One that is not wanted is
// an empty tensor. `add(part, total)` adds a tensor to one in the accumulation type.
template <typename Add>
struct LinearGradients {
  const Linear& layer;
  Wanted wanted;
  Add add;
  Tensor input, weight, bias;

  // Sums over parts are kept in the accumulation type: that of the input over blocks of classes, those
  // of weight and bias over chunks of rows. For the latter the caller has chosen a dtype that is one.
  LinearGradients(const Linear& layer_, const Wanted& wanted_, const Add& add_)
      : layer(layer_), wanted(wanted_), add(add_) {
    const ScalarType type = layer.input.scalar_type();
    auto gradient = [&](bool asked, const Shape& shape) {
      return empty(layer.input, asked ? shape : Shape{0}, type);
    };
    input = gradient(wanted.input, {layer.rows, layer.features});
    weight = gradient(wanted.weight, {layer.classes, layer.features});
    bias = gradient(wanted.bias, {layer.classes});
  }

  void add_class_block(int64_t first, int64_t n, const Tensor& grad) {
    if (wanted.input) {
      Tensor part = layer.buffer(layer.rows, layer.features);
      matmul_out(grad, rows_of(layer.weight, first, n), part);
      if (first == 0) {
        input = torch::stable::to(part, accumulate_type(part.scalar_type()));
      } else {
        add(part, input);
      }
    }
    if (wanted.weight)
      matmul_out(torch::stable::transpose(grad, 0, 1), layer.input, rows_of(weight, first, n));
    if (wanted.bias) sum_rows(grad, rows_of(bias, first, n));
  }

  void add_row_chunk(int64_t first, int64_t n, const Tensor& grad) {
    const Tensor x = rows_of(layer.input, first, n);
    if (wanted.input) matmul_out(grad, layer.weight, rows_of(input, first, n));
    if (wanted.weight) {
      // After the first chunk through a part that stays in cache, for want of a product that adds.
      Tensor part = layer.buffer(layer.part_classes, layer.features);
      layer.for_each_part([&](int64_t c, int64_t m) {
        if (m != part.size(0)) part = layer.buffer(m, layer.features);
        const Tensor total = rows_of(weight, c, m);
        matmul_out(torch::stable::transpose(columns_of(grad, c, m), 0, 1), x,
                   first == 0 ? total : part);
        if (first != 0) add(part, total);
      });
    }
    if (wanted.bias && first == 0) sum_rows(grad, bias);
    if (wanted.bias && first != 0) {
      const Tensor part = empty(bias, {layer.classes}, bias.scalar_type());
      sum_rows(grad, part);
      add(part, bias);
    }
  }

  std::tuple<Tensor, Tensor, Tensor> finish() {
    if (layer.rows == 0) {
      torch::stable::zero_(weight);
      torch::stable::zero_(bias);
    }
    return {torch::stable::to(input, layer.input.scalar_type()), weight, bias};
  }

 private:
  static void sum_rows(const Tensor& grad, const Tensor& out_) {
    Tensor out = out_;
    const int64_t dim = 0;
    torch::stable::sum_out(out, grad, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1));
  }
};

inline void check_linear_target(const Linear& layer, const Tensor& target,
                                const std::optional<Tensor>& weight) {
  FUSEE_REQUIRE(
      target.scalar_type() == ScalarType::Long && target.dim() == 1 && target.size(0) == layer.rows,
      "target must hold one class index per row");
  FUSEE_REQUIRE(
      !weight.has_value() || (weight->dim() == 1 && weight->size(0) == layer.classes &&
                              weight->scalar_type() == accumulate_type(layer.input.scalar_type())),
      "weight must have one entry per class, in the accumulation dtype");
}

// Gradients formed in the forward pass sum over chunks of rows, and are those of a reduced loss.
inline void check_forward_gradients(const Linear& layer, const Wanted& wanted, bool reduced) {
  const ScalarType type = layer.input.scalar_type();
  FUSEE_REQUIRE(
      !wanted.any() || (reduced && accumulate_type(type) == type),
      "the forward operator forms gradients of a reduced loss in float32 and float64 only");
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
