// What the views of a row work on (see row_views.h), and the sums they keep.
#pragma once

#include "core/cuda/kernel.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

struct RowShape {
  int64_t outer, length, inner;
};

// What a view works on. U is the type of the second input; with kTwo false there is none. With kCache
// a row that is visited more than once is read from global memory once.
template <typename T_, typename U_, bool kTwo_, bool kCache_>
struct RowData {
  using T = T_;
  using U = U_;
  using A = accumulate_t<T>;
  static constexpr bool kTwo = kTwo_;
  static constexpr bool kCache = kCache_;

  Global<const T> x;
  Global<const U> y;
  Global<T> output;
  RowShape shape;
};

// Where an element stands in its row: at a number known where the loop is unrolled beyond another, so
// that the comparison is one instruction for each element.
struct Place {
  int64_t first;
  int offset;

  FUSEE_DEVICE Place(int64_t first_, int offset_ = 0) : first(first_), offset(offset_) {}
  FUSEE_DEVICE operator int64_t() const { return first + offset; }
  FUSEE_DEVICE bool is(int64_t place) const {
    const int64_t from_first = place - first;
    return static_cast<int>(from_first) == offset && from_first >> 32 == 0;
  }
};

// Passed to visit where sums need no intermediate step.
struct NoFlush {
  FUSEE_DEVICE void operator()() const {}
};

// Sums in the accumulation type within a few elements, and in double beyond.
template <typename A>
struct Accumulator {
  A part = 0;
  double total = 0;

  FUSEE_DEVICE void add(A value) { part += value; }
  FUSEE_DEVICE void flush() {
    total += static_cast<double>(part);
    part = 0;
  }
};

inline constexpr int kMaxCachedBytes = 96 * 1024;
inline constexpr int64_t kShortRow = 32;

namespace detail {

// M consecutive elements as values of A, in accesses of at most 16 bytes.
template <int M, typename A, typename T>
FUSEE_DEVICE void read_elements(Global<const T> memory, int64_t index, A (&values)[M] FUSEE_SITE) {
  if constexpr (M == 1) {
    values[0] = static_cast<A>(load(memory, index FUSEE_AT_SITE));
  } else {
    constexpr int N = M < vector_width<T> ? M : vector_width<T>;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int k = 0; k < M; k += N) {
      const Vector<T, N> part = load<N>(memory, index + k FUSEE_AT_SITE);
      for (int i = 0; i < N; ++i) values[k + i] = static_cast<A>(part[i]);
    }
  }
}

template <int M, typename A, typename T>
FUSEE_DEVICE void read_cached(const Shared<T>& cache, int64_t index, A (&values)[M] FUSEE_SITE) {
  if constexpr (M == 1) {
    values[0] = static_cast<A>(cache.load(index FUSEE_AT_SITE));
  } else {
    constexpr int N = M < vector_width<T> ? M : vector_width<T>;
    for (int k = 0; k < M; k += N) {
      const Vector<T, N> part = cache.template load<N>(index + k FUSEE_AT_SITE);
      for (int i = 0; i < N; ++i) values[k + i] = static_cast<A>(part[i]);
    }
  }
}

template <int M, typename A, typename T>
FUSEE_DEVICE void write_cache(const Shared<T>& cache, int64_t index,
                              const A (&values)[M] FUSEE_SITE) {
  if constexpr (M == 1) {
    cache.store(index, static_cast<T>(values[0]) FUSEE_AT_SITE);
  } else {
    constexpr int N = M < vector_width<T> ? M : vector_width<T>;
    for (int k = 0; k < M; k += N) {
      Vector<T, N> part;
      for (int i = 0; i < N; ++i) part[i] = static_cast<T>(values[k + i]);
      cache.template store<N>(index + k, part FUSEE_AT_SITE);
    }
  }
}

}  // namespace detail

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
