// Global memory: kernel parameters, and loads and stores of single elements and of vectors.
#pragma once

#include "core/cuda/site.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// A kernel parameter for global memory. On the device it is a pointer; emulated, it also knows how
// many elements it may reach.
template <typename T>
struct Global {
  using value_type = std::remove_const_t<T>;

  T* data = nullptr;
#if defined(FUSEE_EMULATED)
  int64_t size = 0;
#endif

  template <typename U>
    requires(!std::is_const_v<T> && std::is_same_v<U, const T>)
  FUSEE_HOST_DEVICE operator Global<U>() const {
#if defined(FUSEE_EMULATED)
    return {data, size};
#else
    return {data};
#endif
  }

  // The same memory from element `offset` on.
  FUSEE_HOST_DEVICE Global operator+(int64_t offset) const {
#if defined(FUSEE_EMULATED)
    return {data + offset, size - offset};
#else
    return {data + offset};
#endif
  }

  FUSEE_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

template <typename T>
Global<T> global(T* data, [[maybe_unused]] int64_t size) {
#if defined(FUSEE_EMULATED)
  return {data, size};
#else
  return {data};
#endif
}

// N neighbouring elements, moved by one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0);
  T data[N];

  FUSEE_HOST_DEVICE T& operator[](int i) { return data[i]; }
  FUSEE_HOST_DEVICE const T& operator[](int i) const { return data[i]; }
};

// How many elements of T one 16-byte access moves.
template <typename T>
inline constexpr int vector_width = 16 / static_cast<int>(sizeof(T));

namespace detail {

// The hardware's own type of each access size. Structures of small elements would not reliably move
// as one access, these do.
template <size_t Bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
template <typename V>
using word_t = typename Word<sizeof(V)>::type;

enum class Hint { none, streaming, read_only, whole };

#if defined(FUSEE_EMULATED)
template <typename T>
inline void check(::emulator::Kind kind, Global<T> memory, int64_t index, int count,
                  const ::emulator::Where& where) {
  if (index < 0 || index > memory.size - count) {
    ::emulator::out_of_bounds(::emulator::Space::global, kind, index, count, memory.size, where);
  }
  ::emulator::access(::emulator::Space::global, kind, memory.data + index,
                     static_cast<uint32_t>(sizeof(T) * count), sizeof(T), where);
}
#endif

template <typename V, Hint hint>
FUSEE_DEVICE V load_word(const void* address) {
#if defined(__CUDA_ARCH__)
  using W = word_t<V>;
  const W* const from = static_cast<const W*>(address);
  W word;
  if constexpr (hint == Hint::streaming) {
    word = __ldcs(from);
  } else if constexpr (hint == Hint::read_only) {
    word = __ldg(from);
  } else {
    word = *from;
  }
  return fusee::bit_cast<V>(word);
#else
  V value;
  memcpy(static_cast<void*>(&value), address, sizeof(V));
  return value;
#endif
}

template <Hint hint, typename V>
FUSEE_DEVICE void store_word(void* address, const V& value) {
#if defined(__CUDA_ARCH__)
  using W = word_t<V>;
  W* const to = static_cast<W*>(address);
  const W word = fusee::bit_cast<W>(value);
  if constexpr (hint == Hint::streaming) {
    __stcs(to, word);
  } else if constexpr (hint == Hint::whole) {
    __stwb(to, word);
  } else {
    *to = word;
  }
#else
  memcpy(address, static_cast<const void*>(&value), sizeof(V));
#endif
}

}  // namespace detail

// load: plain. load_streaming: read once, evict first. load_readonly: nothing in this launch writes
// it. `index` counts elements; the address of a vector must be a multiple of the vector's size.
#if defined(FUSEE_EMULATED)
#define FUSEE_CHECK(kind, memory, index, count) \
  detail::check(::emulator::Kind::kind, memory, index, count, where)
#else
#define FUSEE_CHECK(kind, memory, index, count) static_cast<void>(0)
#endif
#define FUSEE_LOAD(name, hint)                                                                    \
  template <typename T>                                                                           \
  FUSEE_DEVICE std::remove_const_t<T> name(Global<T> memory, int64_t index FUSEE_SITE) {          \
    FUSEE_CHECK(load, memory, index, 1);                                                          \
    return detail::load_word<std::remove_const_t<T>, detail::Hint::hint>(memory.data + index);    \
  }                                                                                               \
  template <int N, typename T>                                                                    \
  FUSEE_DEVICE Vector<std::remove_const_t<T>, N> name(Global<T> memory,                           \
                                                      int64_t index FUSEE_SITE) {                 \
    FUSEE_CHECK(load, memory, index, N);                                                          \
    return detail::load_word<Vector<std::remove_const_t<T>, N>, detail::Hint::hint>(memory.data + \
                                                                                    index);       \
  }
FUSEE_LOAD(load, none)
FUSEE_LOAD(load_streaming, streaming)
FUSEE_LOAD(load_readonly, read_only)
#undef FUSEE_LOAD

#define FUSEE_STORE(name, hint)                                                                   \
  template <typename T>                                                                           \
    requires(!std::is_const_v<T>)                                                                 \
  FUSEE_DEVICE void name(Global<T> memory, int64_t index,                                         \
                         const std::type_identity_t<T>& value FUSEE_SITE) {                       \
    FUSEE_CHECK(store, memory, index, 1);                                                         \
    detail::store_word<detail::Hint::hint>(memory.data + index, value);                           \
  }                                                                                               \
  template <typename T, int N>                                                                    \
    requires(!std::is_const_v<T>)                                                                 \
  FUSEE_DEVICE void name(Global<T> memory, int64_t index, const Vector<T, N>& value FUSEE_SITE) { \
    FUSEE_CHECK(store, memory, index, N);                                                         \
    detail::store_word<detail::Hint::hint>(memory.data + index, value);                           \
  }
FUSEE_STORE(store, none)
FUSEE_STORE(store_streaming, streaming)
// A store that stays one access where the compiler would make several, one for each element once it is known.
FUSEE_STORE(store_whole, whole)
#undef FUSEE_STORE

// Atomics return the old value. CUDA has no 64-bit signed addition, which is the unsigned one.
namespace detail {
template <typename T>
FUSEE_DEVICE T atomic_add(T* address, T value FUSEE_SITE) {
  if constexpr (std::is_integral_v<T> && sizeof(T) == 8) {
    using U = unsigned long long;
    return static_cast<T>(
        atomicAdd(reinterpret_cast<U*>(address), static_cast<U>(value) FUSEE_AT_SITE));
  } else {
    return atomicAdd(address, value FUSEE_AT_SITE);
  }
}
// CUDA's overloads for 64 bits are for `long long`, which int64_t need not be.
template <typename T>
struct Native {
  using type = T;
};
template <typename T>
  requires(std::is_integral_v<T> && sizeof(T) == 8)
struct Native<T> {
  using type = std::conditional_t<std::is_signed_v<T>, long long, unsigned long long>;
};
template <typename T>
using native_t = typename Native<T>::type;
template <typename T>
FUSEE_DEVICE native_t<T>* native(T* address) {
  return reinterpret_cast<native_t<T>*>(address);
}
// Exchange and compare-and-swap exist for 64 unsigned bits only.
template <typename T>
using unsigned_native_t = std::conditional_t<sizeof(T) == 8, unsigned long long, T>;
template <typename T>
FUSEE_DEVICE unsigned_native_t<T>* unsigned_native(T* address) {
  return reinterpret_cast<unsigned_native_t<T>*>(address);
}
#if defined(FUSEE_EMULATED)
template <typename T>
inline T* checked(Global<T> memory, int64_t index, const ::emulator::Where& where) {
  if (index < 0 || index >= memory.size) {
    ::emulator::out_of_bounds(::emulator::Space::global, ::emulator::Kind::atomic, index, 1,
                              memory.size, where);
  }
  return memory.data + index;
}
#define FUSEE_ELEMENT(memory, index) detail::checked(memory, index, where)
#else
#define FUSEE_ELEMENT(memory, index) ((memory).data + (index))
#endif
}  // namespace detail

template <typename T>
FUSEE_DEVICE T atomic_add(Global<T> memory, int64_t index,
                          std::type_identity_t<T> value FUSEE_SITE) {
  return detail::atomic_add(FUSEE_ELEMENT(memory, index), value FUSEE_AT_SITE);
}
template <typename T>
FUSEE_DEVICE T atomic_max(Global<T> memory, int64_t index,
                          std::type_identity_t<T> value FUSEE_SITE) {
  static_assert(std::is_integral_v<T>);
  return atomicMax(detail::native(FUSEE_ELEMENT(memory, index)), value FUSEE_AT_SITE);
}
template <typename T>
FUSEE_DEVICE T atomic_min(Global<T> memory, int64_t index,
                          std::type_identity_t<T> value FUSEE_SITE) {
  static_assert(std::is_integral_v<T>);
  return atomicMin(detail::native(FUSEE_ELEMENT(memory, index)), value FUSEE_AT_SITE);
}
template <typename T>
FUSEE_DEVICE T atomic_exch(Global<T> memory, int64_t index,
                           std::type_identity_t<T> value FUSEE_SITE) {
  static_assert(std::is_integral_v<T>);
  return static_cast<T>(
      atomicExch(detail::unsigned_native(FUSEE_ELEMENT(memory, index)), value FUSEE_AT_SITE));
}
template <typename T>
FUSEE_DEVICE T atomic_cas(Global<T> memory, int64_t index, std::type_identity_t<T> expected,
                          std::type_identity_t<T> value FUSEE_SITE) {
  static_assert(std::is_integral_v<T>);
  using U = detail::unsigned_native_t<T>;
  return static_cast<T>(atomicCAS(detail::unsigned_native(FUSEE_ELEMENT(memory, index)),
                                  static_cast<U>(expected), static_cast<U>(value) FUSEE_AT_SITE));
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
