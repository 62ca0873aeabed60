// Vectors of the engine's width: loads that widen, stores that round, and square transposes.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/half.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <typename A>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vector = typename VectorOf<A>::type;

// The bits of bfloat16 and of float. Written out as vectors: compilers take loops of these conversions
// through memory, one element at a time.
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

template <typename T, typename A = accumulate_t<T>>
FUSEE_HOST_DEVICE Vector<A> load_vector(const T* from) {
  Vector<A> vector;
  if constexpr (std::is_same_v<T, A>) {
    memcpy(&vector, from, sizeof(vector));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    HalfWords bits;
    memcpy(&bits, from, sizeof(bits));
    vector = bit_cast<Vector<A>>(__builtin_convertvector(bits, Words) << 16);
  } else {
    A values[kLanes<A>];
#pragma omp simd
    for (int i = 0; i < kLanes<A>; ++i) values[i] = static_cast<A>(from[i]);
    memcpy(&vector, values, sizeof(vector));
  }
  return vector;
}

template <typename T, typename A = accumulate_t<T>>
FUSEE_HOST_DEVICE void store_vector(const Vector<A>& vector, T* to) {
  if constexpr (std::is_same_v<T, A>) {
    memcpy(to, &vector, sizeof(vector));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const Words words = bit_cast<Words>(vector);
    const Words rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
    const Words kept = vector != vector ? Words{} + 0x7fc0u : rounded;
    const HalfWords bits = __builtin_convertvector(kept, HalfWords);
    memcpy(to, &bits, sizeof(bits));
  } else {
    A values[kLanes<A>];
    memcpy(values, &vector, sizeof(vector));
#pragma omp simd
    for (int i = 0; i < kLanes<A>; ++i) to[i] = static_cast<T>(values[i]);
  }
}

// The first `count` of a vector, zeros after them.
template <typename T, typename A = accumulate_t<T>>
FUSEE_HOST_DEVICE Vector<A> load_part(const T* from, int64_t count) {
  A values[kLanes<A>] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<A>(from[i]);
  return load_vector(values);
}

template <typename Pick, typename V, int... kAt>
FUSEE_HOST_DEVICE V shuffle(const V& a, const V& b, std::integer_sequence<int, kAt...>) {
  return __builtin_shufflevector(a, b, Pick::at(kAt)...);
}

// Within each 16 bytes the elements of two vectors' halves in turn.
template <int kCount, int kGroup, bool kUpper>
struct Interleave {
  static constexpr int at(int i) {
    const int in_group = i % kGroup;
    return i - in_group + (kUpper ? kGroup / 2 : 0) + in_group / 2 + (in_group % 2) * kCount;
  }
};

// Swaps the upper part of each 2 kStep elements of one vector with the lower part of another's.
template <int kCount, int kStep, bool kUpper>
struct Exchange {
  static constexpr int at(int i) {
    if (kUpper) return i & kStep ? kCount + i : i + kStep;
    return i & kStep ? kCount + i - kStep : i;
  }
};

template <typename A, int kStep>
FUSEE_HOST_DEVICE void exchange_rows(Vector<A> (&rows)[kLanes<A>]) {
  constexpr int n = kLanes<A>;
  if constexpr (kStep < n) {
    constexpr std::make_integer_sequence<int, n> all;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i & kStep) continue;
      const Vector<A> lower = shuffle<Exchange<n, kStep, false>>(rows[i], rows[i + kStep], all);
      rows[i + kStep] = shuffle<Exchange<n, kStep, true>>(rows[i], rows[i + kStep], all);
      rows[i] = lower;
    }
    exchange_rows<A, 2 * kStep>(rows);
  }
}

template <typename A>
FUSEE_HOST_DEVICE void transpose(Vector<A> (&rows)[kLanes<A>]) {
  constexpr int n = kLanes<A>, group = 16 / static_cast<int>(sizeof(A));
  constexpr std::make_integer_sequence<int, n> all;
#pragma GCC unroll 2
  for (int round = 1; round < group; round *= 2) {
#pragma GCC unroll 16
    for (int first = 0; first < n; first += group) {
      Vector<A> turned[group];
#pragma GCC unroll 2
      for (int i = 0; i < group / 2; ++i) {
        const Vector<A>&a = rows[first + i], &b = rows[first + i + group / 2];
        turned[2 * i] = shuffle<Interleave<n, group, false>>(a, b, all);
        turned[2 * i + 1] = shuffle<Interleave<n, group, true>>(a, b, all);
      }
#pragma GCC unroll 4
      for (int i = 0; i < group; ++i) rows[first + i] = turned[i];
    }
  }
  exchange_rows<A, group>(rows);
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
