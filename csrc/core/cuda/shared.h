// Shared memory: tiles that the threads of a block see together.
//
//   FUSEE_SHARED(float, tile, 256);                  // static, 256 floats
//   FUSEE_DYNAMIC_SHARED(Half, rows, count);         // the launch's dynamic bytes, from their
//   start FUSEE_DYNAMIC_SHARED_AT(float, sums, n, bytes);  // the same, from a byte offset on
//
// Each declares a `Shared<T>`. On the device that is a pointer and the accesses are plain ones.
#pragma once

#include "core/cuda/memory.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

template <typename T>
class Shared {
 public:
  using value_type = T;

#if defined(FUSEE_EMULATED)
  Shared(T* data, int64_t size) : data_(data), size_(size) {}
#else
  FUSEE_DEVICE explicit Shared(T* data) : data_(data) {}
#endif

  FUSEE_DEVICE T load(int64_t index FUSEE_SITE) const {
    return detail::load_word<T, detail::Hint::none>(at<1>(index, Load {} FUSEE_AT_SITE));
  }
  template <int N>
  FUSEE_DEVICE Vector<T, N> load(int64_t index FUSEE_SITE) const {
    return detail::load_word<Vector<T, N>, detail::Hint::none>(at<N>(index, Load {} FUSEE_AT_SITE));
  }
  FUSEE_DEVICE void store(int64_t index, const T& value FUSEE_SITE) const {
    detail::store_word<detail::Hint::none>(at<1>(index, Store {} FUSEE_AT_SITE), value);
  }
  template <int N>
  FUSEE_DEVICE void store(int64_t index, const Vector<T, N>& value FUSEE_SITE) const {
    detail::store_word<detail::Hint::none>(at<N>(index, Store {} FUSEE_AT_SITE), value);
  }
  FUSEE_DEVICE T atomic_add(int64_t index, T value FUSEE_SITE) const {
    return detail::atomic_add(at<1>(index, Nothing {} FUSEE_AT_SITE), value FUSEE_AT_SITE);
  }

  // The tile from element `offset` on; `count` elements of it.
  FUSEE_DEVICE Shared slice(int64_t offset, [[maybe_unused]] int64_t count FUSEE_SITE) const {
#if defined(FUSEE_EMULATED)
    if (offset < 0 || count < 0 || offset > size_ - count) {
      ::emulator::out_of_bounds(::emulator::Space::shared, ::emulator::Kind::load, offset, count,
                                size_, where);
    }
    return Shared(data_ + offset, count);
#else
    return Shared(data_ + offset);
#endif
  }

  // The bare pointer: nothing checks or counts what goes through it.
  FUSEE_DEVICE T* data() const { return data_; }

  // The checked address of N elements, for the operations that take addresses (ldmatrix, cp.async).
  // The caller makes the access known.
  template <int N>
  FUSEE_DEVICE T* address(int64_t index FUSEE_SITE) const {
    return at<N>(index, Nothing {} FUSEE_AT_SITE);
  }

 private:
  struct Nothing {};
  struct Load {};
  struct Store {};

  template <int N, typename Use>
  FUSEE_DEVICE T* at(int64_t index, Use FUSEE_SITE) const {
#if defined(FUSEE_EMULATED)
    constexpr auto kind =
        std::is_same_v<Use, Store> ? ::emulator::Kind::store : ::emulator::Kind::load;
    if (index < 0 || index > size_ - N) {
      ::emulator::out_of_bounds(::emulator::Space::shared, kind, index, N, size_, where);
    }
    if constexpr (!std::is_same_v<Use, Nothing>) {
      ::emulator::access(::emulator::Space::shared, kind, data_ + index,
                         static_cast<uint32_t>(sizeof(T) * N), sizeof(T), where);
    }
#endif
    return data_ + index;
  }

  T* data_;
#if defined(FUSEE_EMULATED)
  int64_t size_;
#endif
};

#if defined(FUSEE_EMULATED)
#define FUSEE_SHARED(T, name, N)                                                                  \
  static const char name##_key = 0;                                                               \
  const ::fusee::cuda::Shared<T> name(                                                            \
      static_cast<T*>(                                                                            \
          ::emulator::static_shared(&name##_key, sizeof(T) * (N), ::emulator::Where::current())), \
      (N))
#define FUSEE_DYNAMIC_SHARED_AT(T, name, count, byte_offset)                                     \
  const ::fusee::cuda::Shared<T> name(                                                           \
      static_cast<T*>(::emulator::dynamic_shared((byte_offset), sizeof(T) * (count), alignof(T), \
                                                 ::emulator::Where::current())),                 \
      (count))
#else
#define FUSEE_SHARED(T, name, N)              \
  __shared__ alignas(16) T name##_storage[N]; \
  const ::fusee::cuda::Shared<T> name(name##_storage)
#define FUSEE_DYNAMIC_SHARED_AT(T, name, count, byte_offset)            \
  extern __shared__ __align__(16) unsigned char fusee_dynamic_shared[]; \
  static_cast<void>(count);                                             \
  const ::fusee::cuda::Shared<T> name(reinterpret_cast<T*>(fusee_dynamic_shared + (byte_offset)))
#endif
#define FUSEE_DYNAMIC_SHARED(T, name, count) FUSEE_DYNAMIC_SHARED_AT(T, name, count, 0)

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
