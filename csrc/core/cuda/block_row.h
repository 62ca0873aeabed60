// The view of a long contiguous row: one block, 16-byte accesses along the row (see row_views.h).
#pragma once

#include "core/cuda/row_data.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

template <typename Data>
class BlockRow {
 public:
  using T = typename Data::T;
  using U = typename Data::U;
  using A = typename Data::A;
  static constexpr bool kSeveralRows = false;

  FUSEE_DEVICE explicit BlockRow(const Data& data)
      : data_(data), begin_(static_cast<int64_t>(blockIdx.x) * data.shape.length) {}

  FUSEE_DEVICE int64_t row() const { return blockIdx.x; }
  FUSEE_DEVICE bool active() const { return true; }
  FUSEE_DEVICE bool leader() const { return threadIdx.x == 0; }

  template <typename V, typename Op>
  FUSEE_DEVICE V reduce(const V& value, Op op, const V& identity) const {
    FUSEE_SHARED(V, scratch, 32);
    return block_reduce(value, op, identity, scratch);
  }
  // x_j for any j, for all threads of the row.
  FUSEE_DEVICE A element(int64_t j) const { return static_cast<A>(load(data_.x, begin_ + j)); }
  // The sum over the block's rows of what their leaders hold, in the block's first thread. All threads
  // of a leader's warp must take part.
  FUSEE_DEVICE double block_total(double of_leader) const { return of_leader; }

  // f(j, x_j, y_j) for the thread's elements; flush() after every few of them.
  template <typename F, typename Flush>
  FUSEE_DEVICE void visit(F&& f, Flush&& flush) {
    walk<Data::kTwo ? 1 : 2>([&]<int M>(int64_t at, const A(&x)[M], const A(&y)[M]) {
      for (int i = 0; i < M; ++i) f(Place(at - begin_, i), x[i], y[i]);
      flush();
    });
    cached_ = Data::kCache;
  }

  // output_j = f(j, x_j, y_j).
  template <typename F>
  FUSEE_DEVICE void transform(F&& f) {
    walk<1>([&]<int M>(int64_t at, const A(&x)[M], const A(&y)[M]) {
      if constexpr (M == 1) {
        store(data_.output, at, static_cast<T>(f(Place(at - begin_), x[0], y[0])));
      } else {
        Vector<T, M> result;
        for (int i = 0; i < M; ++i)
          result[i] = static_cast<T>(f(Place(at - begin_, i), x[i], y[i]));
        store(data_.output, at, result);
      }
    });
  }

  FUSEE_DEVICE void finish() {}

  static size_t shared_bytes(const RowShape& shape) {
    return static_cast<size_t>(cached_elements(shape)) * kElementBytes;
  }
  static dim3 grid(const RowShape& shape) { return dim3(static_cast<unsigned>(shape.outer)); }
  static dim3 block(const RowShape& shape) {
    // About four vectors a thread, in whole warps.
    const int64_t wanted = (shape.length / (4 * vector_width<T>)+31) / 32 * 32;
    return dim3(static_cast<unsigned>(wanted < 32 ? 32 : wanted > 512 ? 512 : wanted));
  }

 private:
  static constexpr int kElementBytes = sizeof(T) + (Data::kTwo ? sizeof(U) : 0);

  // How many elements of the row the cache holds, from its first vector on: the last ones of a long row
  // are read again, soon enough to find them in the L2 cache.
  static FUSEE_HOST_DEVICE int64_t cached_elements(const RowShape& shape) {
    if (!Data::kCache) return 0;
    // The row starts anywhere within a vector; whole vectors on both sides keep the copies aligned.
    constexpr int64_t N = vector_width<T>, kMost = kMaxCachedBytes / kElementBytes / N * N;
    const int64_t all = (shape.length + 2 * N) / N * N;
    return all < kMost ? all : kMost;
  }

  // Calls f(at, x, y) with arrays of one or more elements of the row from index `at` on.
  template <int kUnroll, typename F>
  FUSEE_DEVICE void walk(F&& f) {
    if (Data::kCache && cached_) {
      walk<kUnroll, true>(f);
    } else {
      walk<kUnroll, false>(f);
    }
  }
  template <int kUnroll, bool kCached, typename F>
  FUSEE_DEVICE void walk(F& f) {
    constexpr int N = vector_width<T>;
    auto run = [&]<int M>(int64_t at, std::integral_constant<int, M>) {
      A x[M], y[M];
      read<kCached>(at, x, y);
      f(at, x, y);
    };
    for_each_vector<N, kUnroll>(
        data_.x, begin_, begin_ + data_.shape.length, static_cast<int>(threadIdx.x),
        static_cast<int>(blockDim.x),
        [&](int64_t at) { run(at, std::integral_constant<int, N>{}); },
        [&](int64_t at) { run(at, std::integral_constant<int, 1>{}); });
  }

  // A thread meets the same elements in every walk, so it reads back only what it cached itself, and
  // no barrier is needed.
  template <bool kCached, int M>
  FUSEE_DEVICE void read(int64_t at, A (&x)[M], A (&y)[M]) const {
    for (int i = 0; i < M; ++i) y[i] = 0;
    const int64_t count = cached_elements(data_.shape);
    const int64_t place = at - begin_ / vector_width<T> * vector_width<T>;
    const bool in_cache = place < count;
    if (!kCached || !in_cache) {
      detail::read_elements(data_.x, at, x);
      if constexpr (Data::kTwo) detail::read_elements(data_.y, at, y);
    }
    if constexpr (Data::kCache) {
      if (!in_cache) return;
      FUSEE_DYNAMIC_SHARED(T, x_cache, count);
      through_cache<kCached>(x_cache, place, x);
      if constexpr (Data::kTwo) {
        FUSEE_DYNAMIC_SHARED_AT(U, y_cache, count, static_cast<size_t>(count) * sizeof(T));
        through_cache<kCached>(y_cache, place, y);
      }
    }
  }
  template <bool kCached, int M, typename V>
  FUSEE_DEVICE void through_cache(const Shared<V>& cache, int64_t place, A (&values)[M]) const {
    if constexpr (kCached) {
      detail::read_cached(cache, place, values);
    } else {
      detail::write_cache(cache, place, values);
    }
  }

  const Data& data_;
  int64_t begin_;
  bool cached_ = false;
};

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
