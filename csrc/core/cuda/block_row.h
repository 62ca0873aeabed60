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
    walk([&](int64_t at, auto count) {
      constexpr int M = decltype(count)::value;
      A x[M], y[M];
      read(at, x, y);
      for (int i = 0; i < M; ++i) f(at - begin_ + i, x[i], y[i]);
      flush();
    });
    cached_ = Data::kCache && fits();
  }

  // output_j = f(j, x_j, y_j).
  template <typename F>
  FUSEE_DEVICE void transform(F&& f) {
    walk([&](int64_t at, auto count) {
      constexpr int M = decltype(count)::value;
      A x[M], y[M];
      read(at, x, y);
      if constexpr (M == 1) {
        store(data_.output, at, static_cast<T>(f(at - begin_, x[0], y[0])));
      } else {
        Vector<T, M> result;
        for (int i = 0; i < M; ++i) result[i] = static_cast<T>(f(at - begin_ + i, x[i], y[i]));
        store(data_.output, at, result);
      }
    });
  }

  FUSEE_DEVICE void finish() {}

  static size_t shared_bytes(const RowShape& shape) {
    if (!Data::kCache) return 0;
    const size_t bytes = cache_bytes<T>(shape) + (Data::kTwo ? cache_bytes<U>(shape) : 0);
    return bytes <= kMaxCachedBytes ? bytes : 0;
  }
  static dim3 grid(const RowShape& shape) { return dim3(static_cast<unsigned>(shape.outer)); }
  static dim3 block(const RowShape& shape) {
    // About four vectors a thread, in whole warps.
    const int64_t wanted = (shape.length / (4 * vector_width<T>)+31) / 32 * 32;
    return dim3(static_cast<unsigned>(wanted < 32 ? 32 : wanted > 512 ? 512 : wanted));
  }

 private:
  template <typename V>
  static FUSEE_HOST_DEVICE size_t cache_bytes(const RowShape& shape) {
    // The row starts anywhere within a vector; whole vectors on both sides keep the copies aligned.
    constexpr int64_t N = vector_width<T>;
    return static_cast<size_t>((shape.length + 2 * N) / N * N) * sizeof(V);
  }
  FUSEE_DEVICE bool fits() const {
    return cache_bytes<T>(data_.shape) + (Data::kTwo ? cache_bytes<U>(data_.shape) : 0) <=
           kMaxCachedBytes;
  }

  template <typename F>
  FUSEE_DEVICE void walk(F&& f) const {
    for_each_vector<vector_width<T>>(
        data_.x, begin_, begin_ + data_.shape.length, static_cast<int>(threadIdx.x),
        static_cast<int>(blockDim.x),
        [&](int64_t at) { f(at, std::integral_constant<int, vector_width<T>>{}); },
        [&](int64_t at) { f(at, std::integral_constant<int, 1>{}); });
  }

  // A thread meets the same elements in every walk, so it reads back only what it cached itself, and
  // no barrier is needed.
  template <int M>
  FUSEE_DEVICE void read(int64_t at, A (&x)[M], A (&y)[M]) {
    for (int i = 0; i < M; ++i) y[i] = 0;
    if constexpr (Data::kCache) {
      const int64_t place = at - begin_ / vector_width<T> * vector_width<T>;
      const size_t x_bytes = cache_bytes<T>(data_.shape);
      if (fits()) {
        FUSEE_DYNAMIC_SHARED(T, x_cache, x_bytes / sizeof(T));
        if (cached_) {
          detail::read_cached(x_cache, place, x);
        } else {
          detail::read_elements(data_.x, at, x);
          detail::write_cache(x_cache, place, x);
        }
        if constexpr (Data::kTwo) {
          FUSEE_DYNAMIC_SHARED_AT(U, y_cache, cache_bytes<U>(data_.shape) / sizeof(U), x_bytes);
          if (cached_) {
            detail::read_cached(y_cache, place, y);
          } else {
            detail::read_elements(data_.y, at, y);
            detail::write_cache(y_cache, place, y);
          }
        }
        return;
      }
    }
    detail::read_elements(data_.x, at, x);
    if constexpr (Data::kTwo) detail::read_elements(data_.y, at, y);
  }

  const Data& data_;
  int64_t begin_;
  bool cached_ = false;
};

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
