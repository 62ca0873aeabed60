// Atomic operations on plain pointers, under CUDA's names. One thread runs at a time, so what makes
// them atomic is only that the race check knows them.
#pragma once

#include <type_traits>

#include "vocabulary.h"
#include "warp.h"

namespace emulator {
template <typename T, typename F>
T atomic(T* address, F&& f, const Where& where) {
  if (in_kernel()) access(space_of(address), Kind::atomic, address, sizeof(T), sizeof(T), where);
  const T old = *address;
  *address = f(old);
  return old;
}
// The value's type is not deduced, so that `atomicAdd(counter, 1)` finds its own.
template <typename T>
using same = std::type_identity_t<T>;
}  // namespace emulator

template <typename T>
T atomicAdd(T* address, emulator::same<T> value, FUSEE_WHERE) {
  return emulator::atomic(
      address,
      [&](T old) {
        if constexpr (std::is_integral_v<T>) {
          using U = std::make_unsigned_t<T>;
          return static_cast<T>(static_cast<U>(old) + static_cast<U>(value));
        } else {
          return static_cast<T>(old + value);
        }
      },
      where);
}
template <typename T>
T atomicSub(T* address, emulator::same<T> value, FUSEE_WHERE) {
  return emulator::atomic(address, [&](T old) { return static_cast<T>(old - value); }, where);
}
template <typename T>
T atomicMax(T* address, emulator::same<T> value, FUSEE_WHERE) {
  return emulator::atomic(address, [&](T old) { return old < value ? value : old; }, where);
}
template <typename T>
T atomicMin(T* address, emulator::same<T> value, FUSEE_WHERE) {
  return emulator::atomic(address, [&](T old) { return value < old ? value : old; }, where);
}
template <typename T>
T atomicExch(T* address, emulator::same<T> value, FUSEE_WHERE) {
  return emulator::atomic(address, [&](T) { return value; }, where);
}
template <typename T>
T atomicCAS(T* address, emulator::same<T> expected, emulator::same<T> value, FUSEE_WHERE) {
  return emulator::atomic(address, [&](T old) { return old == expected ? value : old; }, where);
}
template <typename T>
T atomicAnd(T* address, emulator::same<T> value, FUSEE_WHERE) {
  return emulator::atomic(address, [&](T old) { return static_cast<T>(old & value); }, where);
}
template <typename T>
T atomicOr(T* address, emulator::same<T> value, FUSEE_WHERE) {
  return emulator::atomic(address, [&](T old) { return static_cast<T>(old | value); }, where);
}
template <typename T>
T atomicXor(T* address, emulator::same<T> value, FUSEE_WHERE) {
  return emulator::atomic(address, [&](T old) { return static_cast<T>(old ^ value); }, where);
}
inline unsigned atomicInc(unsigned* address, unsigned limit, FUSEE_WHERE) {
  return emulator::atomic(
      address, [&](unsigned old) { return old >= limit ? 0u : old + 1; }, where);
}
