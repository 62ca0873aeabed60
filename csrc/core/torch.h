// The one door to PyTorch: its stable ABI, under the names that the rest of csrc uses.
//
// No other file includes a torch header. TORCH_TARGET_VERSION (set by the build) turns an accidental
// include of an unstable header into a compile error.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "core/half.h"
#include "core/macros.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

#define FUSEE_REQUIRE(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

// Calls f with a value of the C++ type that stores `type`; every op takes the same four.
template <typename F>
auto dispatch_floating(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      break;
  }
  FUSEE_REQUIRE(false, "expected a float32, float64, float16 or bfloat16 tensor");
  return f(float{});
}

// The type in which sums over a tensor of `type` are kept and per-row results are returned.
inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Asks for large pages under a large new result on the CPU, without which handing out 4 KB at a time
// takes the system several times as long as filling them takes an operator.
inline Tensor with_large_pages(Tensor tensor) {
#if defined(__linux__) && !defined(__CUDACC__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  if (tensor.is_cpu() && static_cast<size_t>(tensor.numel()) * tensor.element_size() >= 4 * kPage) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t end = begin + static_cast<size_t>(tensor.numel()) * tensor.element_size();
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
    // A refusal costs speed alone.
    static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
  }
#endif
  return tensor;
}

inline Tensor empty(const Tensor& like, const Shape& shape, ScalarType type) {
  return with_large_pages(torch::stable::new_empty(like, shape, type));
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// An optional tensor as a pointer, null when absent.
template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return as_contiguous(*tensor);
}

inline Shape to_shape(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return Shape(sizes.begin(), sizes.end());
}

// Of the same shape, dtype and order in memory.
inline Tensor make_like(const Tensor& like) {
  // empty_like would keep odd strides of dimensions of size one, which traced tensors do not.
  if (like.is_contiguous()) return empty(like, to_shape(like.sizes()), like.scalar_type());
  return with_large_pages(torch::stable::empty_like(like));
}

// Whether the elements fill one piece of memory, in whatever order.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// The tensor in the memory order of `like`, which is dense and of the same shape.
inline Tensor in_order_of(const Tensor& like, const Tensor& tensor) {
  if (same_strides(tensor, like)) return tensor;
  Tensor copy = make_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// out = a b, by the dispatcher's own matrix product.
inline void matmul_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  static_cast<void>(torch::stable::detail::to<Tensor>(stack[0]));
}

// One value per row: a contiguous tensor, or one value for all (the expanded gradient of a sum).
struct RowValues {
  Tensor tensor;
  int64_t stride;

  explicit RowValues(const Tensor& values) : tensor(values), stride(0) {
    for (int64_t d = 0; d < values.dim(); ++d)
      if (values.size(d) != 1 && values.stride(d) != 0) stride = 1;
    if (stride != 0) tensor = as_contiguous(values);
  }
};

// Work for one thread: enough elements to outweigh the cost of waking another.
inline int64_t grain(int64_t elements_per_item) {
  constexpr int64_t kElementsPerThread = 32768;
  return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_per_item));
}

using torch::stable::parallel_for;

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
