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

// The conversions of half.h, written out as vectors: compilers take loops of them through memory, one
// element at a time.
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

FUSEE_HOST_DEVICE Vector<float> to_floats(const HalfWords& bits, BFloat16) {
  return bit_cast<Vector<float>>(__builtin_convertvector(bits, Words) << 16);
}

FUSEE_HOST_DEVICE Vector<float> to_floats(const HalfWords& bits, Half) {
  const Words words = __builtin_convertvector(bits, Words);
  const Words sign = (words & 0x8000u) << 16, magnitude = (words & 0x7fffu) << 13;
  const Words finite = bit_cast<Words>(bit_cast<Vector<float>>(magnitude) * 0x1p112f);
  return bit_cast<Vector<float>>(sign |
                                 (magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000u : finite));
}

FUSEE_HOST_DEVICE HalfWords from_floats(const Vector<float>& vector, BFloat16) {
  const Words words = bit_cast<Words>(vector);
  const Words rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
  const Words kept = vector != vector ? Words{} + 0x7fc0u : rounded;
  return __builtin_convertvector(kept, HalfWords);
}

FUSEE_HOST_DEVICE HalfWords from_floats(const Vector<float>& vector, Half) {
  const Words words = bit_cast<Words>(vector);
  const Words sign = (words >> 16) & 0x8000u, magnitude = words & 0x7fffffffu;
  const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Words subnormal = bit_cast<Words>(bit_cast<Vector<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const Words finite = magnitude < (113u << 23) ? subnormal : normal;
  const Words overflow = magnitude > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
  const Words kept = sign | (magnitude >= 0x477ff000u ? overflow : finite);
  return __builtin_convertvector(kept, HalfWords);
}

template <typename T, typename A = accumulate_t<T>>
FUSEE_HOST_DEVICE Vector<A> load_vector(const T* from) {
  if constexpr (std::is_same_v<T, A>) {
    Vector<A> vector;
    memcpy(&vector, from, sizeof(vector));
    return vector;
  } else {
    HalfWords bits;
    memcpy(&bits, from, sizeof(bits));
    return to_floats(bits, T{});
  }
}

template <typename T, typename A = accumulate_t<T>>
FUSEE_HOST_DEVICE void store_vector(const Vector<A>& vector, T* to) {
  if constexpr (std::is_same_v<T, A>) {
    memcpy(to, &vector, sizeof(vector));
  } else {
    const HalfWords bits = from_floats(vector, T{});
    memcpy(to, &bits, sizeof(bits));
  }
}

// The first `count` of a vector, zeros after them.
template <typename T, typename A = accumulate_t<T>>
FUSEE_HOST_DEVICE Vector<A> load_part(const T* from, int64_t count) {
  A values[kLanes<A>] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<A>(from[i]);
  return load_vector(values);
}

template <typename T, typename A = accumulate_t<T>>
FUSEE_HOST_DEVICE void store_part(const Vector<A>& vector, T* to, int64_t count) {
  A values[kLanes<A>];
  memcpy(values, &vector, sizeof(vector));
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(values[i]);
}

template <typename A>
FUSEE_HOST_DEVICE Vector<A> magnitude(const Vector<A>& vector) {
  using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  typedef Bits VectorBits __attribute__((vector_size(kVectorBytes)));
  return bit_cast<Vector<A>>(bit_cast<VectorBits>(vector) & (~Bits{0} >> 1));
}

template <typename T, typename A>
void widen(const T* from, int64_t count, A* to) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store_vector<A>(load_vector(from + i), to + i);
  for (; i < count; ++i) to[i] = static_cast<A>(from[i]);
}

template <typename A, typename T>
void narrow(const A* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store_vector<T>(load_vector(from + i), to + i);
  for (; i < count; ++i) to[i] = static_cast<T>(from[i]);
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

// Lane i of the result is the sum of vector i.
template <typename A, int kStep = kLanes<A> / 2>
FUSEE_HOST_DEVICE Vector<A> sum_each(Vector<A> (&sums)[kLanes<A>]) {
  if constexpr (kStep > 0) {
    constexpr int n = kLanes<A>;
    constexpr std::make_integer_sequence<int, n> all;
#pragma GCC unroll 8
    for (int i = 0; i < kStep; ++i)
      sums[i] = shuffle<Exchange<n, kStep, false>>(sums[i], sums[i + kStep], all) +
                shuffle<Exchange<n, kStep, true>>(sums[i], sums[i + kStep], all);
    return sum_each<A, kStep / 2>(sums);
  } else {
    return sums[0];
  }
}

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
