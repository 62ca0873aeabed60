// What the emulator's test programs share: named cases, expectations, and buffers that kernels
// reach (plain memory here, managed memory where a real device runs the same program).
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cuda/kernel.h"

using Case = std::function<void()>;
inline std::map<std::string, Case>& cases() {
  static std::map<std::string, Case> all;
  return all;
}
struct Register {
  Register(const char* name, Case run) { cases()[name] = std::move(run); }
};
#define CASE(name)                                           \
  static void case_##name();                                 \
  static const Register register_##name(#name, case_##name); \
  static void case_##name()

#define EXPECT(condition)                                                   \
  do {                                                                      \
    if (!(condition)) {                                                     \
      throw std::logic_error(std::string(#condition " is false at line ") + \
                             std::to_string(__LINE__));                     \
    }                                                                       \
  } while (0)
#define EXPECT_EQUAL(a, b)                                                                     \
  do {                                                                                         \
    const auto left = (a);                                                                     \
    const auto right = (b);                                                                    \
    if (!(left == right)) {                                                                    \
      throw std::logic_error(std::string(#a " is ") + std::to_string(left) + ", not " +        \
                             std::to_string(right) + ", at line " + std::to_string(__LINE__)); \
    }                                                                                          \
  } while (0)

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size, T value = T()) : size_(size) {
    const size_t bytes = (static_cast<size_t>(size) * sizeof(T) + 511) / 256 * 256;
#if defined(FUSEE_EMULATED)
    data_ = static_cast<T*>(std::aligned_alloc(256, bytes));
#else
    if (cudaMallocManaged(&data_, bytes) != cudaSuccess) throw std::bad_alloc();
#endif
    for (int64_t i = 0; i < size; ++i) data_[i] = value;
  }
  ~Buffer() {
#if defined(FUSEE_EMULATED)
    std::free(data_);
#else
    cudaFree(data_);
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }
  fusee::cuda::Global<T> global() { return fusee::cuda::global(data_, size_); }
  fusee::cuda::Global<const T> input() { return fusee::cuda::global<const T>(data_, size_); }

 private:
  T* data_ = nullptr;
  int64_t size_;
};

inline void synchronize() {
  if (cudaDeviceSynchronize() != cudaSuccess) throw std::runtime_error("the kernel failed");
}

// Runs the case that the first argument names; without one, lists them.
inline int run_cases(int argc, char** argv) {
  if (argc < 2) {
    for (const auto& each : cases()) std::printf("%s\n", each.first.c_str());
    return 0;
  }
  int failures = 0;
  for (int i = 1; i < argc; ++i) {
    const auto found = cases().find(argv[i]);
    if (found == cases().end()) {
      std::printf("no case %s\n", argv[i]);
      return 2;
    }
    try {
      found->second();
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", argv[i], error.what());
      ++failures;
    }
  }
  return failures == 0 ? 0 : 1;
}
