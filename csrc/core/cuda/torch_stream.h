// Where an operator's CUDA kernels run: the tensor's device, on PyTorch's current stream.
#pragma once

#include "core/cuda/kernel.h"
#include "core/torch.h"

#if !defined(FUSEE_EMULATED)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

#if defined(FUSEE_EMULATED)

// Emulated kernels run where they are called.
struct Context {
  Stream stream = nullptr;
  explicit Context(const Tensor&) {}
};

#else

// PyTorch's current stream. The function lives in libtorch_cuda, which a CPU build of torch does not
// have, so it is looked up when a CUDA tensor first needs it, not when this library is loaded.
inline Stream current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, kName);
    if (symbol == nullptr) {
      if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD))
        symbol = dlsym(library, kName);
    }
    return reinterpret_cast<Getter>(symbol);
  }();
  FUSEE_REQUIRE(getter != nullptr, "this build of torch has no CUDA stream to run on");
  void* stream = nullptr;
  FUSEE_REQUIRE(getter(device, &stream) == AOTI_TORCH_SUCCESS, "torch has no current CUDA stream");
  return static_cast<Stream>(stream);
}

// Makes the tensor's device current for the life of the object.
struct Context {
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream;

  explicit Context(const Tensor& tensor)
      : guard(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}
};

#endif

// The tensor's elements as a kernel sees them.
template <typename T>
Global<const T> input(const Tensor& tensor) {
  return global(data<T>(tensor), tensor.numel());
}
template <typename T>
Global<const T> input(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? input<T>(*tensor) : Global<const T>{};
}
template <typename T>
Global<T> output(const Tensor& tensor) {
  return global(mutable_data<T>(tensor), tensor.numel());
}

// Contiguous, and aligned for 16-byte accesses: only a view that starts within a vector is copied.
inline Tensor as_aligned(const Tensor& tensor) {
  const Tensor result = as_contiguous(tensor);
  const bool aligned = reinterpret_cast<uintptr_t>(result.const_data_ptr()) % 16 == 0;
  return aligned ? result : torch::stable::clone(result);
}

// A launch needs as many blocks of threads as fit into 31 bits.
inline unsigned grid_of(int64_t row_tiles, int64_t of_each) {
  FUSEE_REQUIRE(row_tiles * of_each <= INT32_MAX, "too much for one launch");
  return static_cast<unsigned>(row_tiles * of_each);
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
