// Numbers of the accumulation type: memory for them, and tensors as such.
#pragma once

#include <memory>
#include <new>

#include "core/torch.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// Memory for numbers of the accumulation type, a whole line aligned to what vectors need.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<A*>(::operator new(sizeof(A) * count, std::align_val_t(64)))) {}
  A* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(A* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<A, Free> data_;
};

// A tensor in the accumulation type.
template <typename T>
struct Widened {
  using A = accumulate_t<T>;

  std::optional<Tensor> tensor;

  explicit Widened(const std::optional<Tensor>& given) {
    if (!given.has_value()) return;
    const ScalarType type = given->scalar_type();
    tensor = as_contiguous(
        type == accumulate_type(type) ? *given : torch::stable::to(*given, accumulate_type(type)));
  }
  const A* get() const { return data_or_null<A>(tensor); }
  // From an element on; null for what is absent.
  const A* from(int64_t element) const { return tensor.has_value() ? get() + element : nullptr; }
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
