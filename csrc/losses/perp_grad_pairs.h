// The tensors of a PerpGrad call, checked and brought to flat memory whose elements pair up.
#pragma once

#include <utility>

#include "core/torch.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// A weight and its gradient as `rows` units of `length` elements, one after the other in memory.
struct Pair {
  Tensor weight, grad;
  ScalarType type;
  int64_t rows, length;
  int64_t first_unit;  // among all units of the call
  bool keep;           // units of one element, which are left alone

  int64_t elements() const { return rows * length; }
};

class Pairs {
 public:
  std::vector<Pair> all;
  int64_t units = 0;

  Pairs(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, bool per_row,
        bool skip_single) {
    FUSEE_REQUIRE(!grads.empty() && weights.size() == grads.size(),
                  "expected as many weights as grads, and one at least, got ", weights.size(),
                  " and ", grads.size());
    for (size_t i = 0; i < grads.size(); ++i) check(weights[i], grads[i], grads[0], i);
    all.reserve(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      const Tensor &weight = weights[i], &grad = grads[i];
      // The rows of a vector are single numbers, so a vector is one unit in either mode.
      const int64_t rows = per_row && grad.dim() > 1 ? grad.size(0) : 1;
      const int64_t length = rows == 0 ? 0 : grad.numel() / rows;
      add(weight, grad, rows, length, length == 1 && skip_single);
      units += rows;
    }
  }

  // Brings the gradients that were worked on in copies back.
  void finish() {
    for (auto& [target, copy] : copies_) torch::stable::copy_(target, copy);
  }

 private:
  static void check(const Tensor& weight, const Tensor& grad, const Tensor& first, size_t i) {
    FUSEE_REQUIRE(to_shape(weight.sizes()) == to_shape(grad.sizes()),
                  "weights and grads must have the same shapes, which those at ", i, " have not");
    FUSEE_REQUIRE(weight.scalar_type() == grad.scalar_type(),
                  "weights and grads must have the same dtypes, which those at ", i, " have not");
    FUSEE_REQUIRE(weight.device() == first.device() && grad.device() == first.device(),
                  "weights and grads must all be on one device, which those at ", i, " are not");
    for (int64_t d = 0; d < grad.dim(); ++d)
      FUSEE_REQUIRE(grad.stride(d) != 0 || grad.size(d) <= 1 || grad.numel() == 0,
                    "grads must not be expanded, they are written to, which that at ", i, " is");
    dispatch_floating(grad.scalar_type(), [](auto) {});
  }

  void add(const Tensor& weight, const Tensor& grad, int64_t rows, int64_t length, bool keep) {
    // Any order of the elements will do where both tensors have it and rows lie in one piece, so a
    // copy is made only of a weight whose strides differ, or for a gradient with gaps.
    const bool rows_whole = rows == 1 || grad.stride(0) == length;
    Tensor w = weight, g = grad;
    if (!keep && grad.numel() != 0) {
      if (is_dense(grad) && rows_whole) {
        w = in_order_of(grad, weight);
      } else {
        w = as_contiguous(weight);
        g = empty(grad, to_shape(grad.sizes()), grad.scalar_type());
        torch::stable::copy_(g, grad);
        copies_.emplace_back(grad, g);
      }
    }
    all.push_back({w, g, grad.scalar_type(), rows, length, units, keep});
  }

  std::vector<std::pair<Tensor, Tensor>> copies_;
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
