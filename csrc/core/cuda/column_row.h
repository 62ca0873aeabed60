// The view of rows that lie side by side: 32 of them in the lanes of a block (see row_views.h).
#pragma once

#include "core/cuda/row_data.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

template <typename Data>
class ColumnRow {
 public:
  using T = typename Data::T;
  using U = typename Data::U;
  using A = typename Data::A;
  static constexpr int kMaxWarps = 16;
  static constexpr bool kSeveralRows = true;

  FUSEE_DEVICE explicit ColumnRow(const Data& data) : data_(data) {
    const int64_t tiles = (data.shape.inner + 31) / 32;
    const int64_t outer = blockIdx.x / tiles;
    inner_ = blockIdx.x % tiles * 32 + threadIdx.x;
    row_ = outer * data.shape.inner + inner_;
    begin_ = outer * data.shape.length * data.shape.inner + inner_;
  }

  FUSEE_DEVICE int64_t row() const { return row_; }
  FUSEE_DEVICE bool active() const { return inner_ < data_.shape.inner; }
  FUSEE_DEVICE bool leader() const { return active() && threadIdx.y == 0; }

  // Across the warps, lane by lane, in the order of the warps.
  template <typename V, typename Op>
  FUSEE_DEVICE V reduce(const V& value, Op op, const V&) const {
    FUSEE_SHARED(V, scratch, 32 * kMaxWarps);
    __syncthreads();
    scratch.store(threadIdx.y * 32 + threadIdx.x, value);
    __syncthreads();
    V result = scratch.load(threadIdx.x);
    for (unsigned warp = 1; warp < blockDim.y; ++warp)
      result = op(result, scratch.load(warp * 32 + threadIdx.x));
    return result;
  }
  FUSEE_DEVICE A element(int64_t j) const {
    return static_cast<A>(load(data_.x, begin_ + j * data_.shape.inner));
  }
  FUSEE_DEVICE double block_total(double of_leader) const { return warp_sum(of_leader); }

  template <typename F, typename Flush>
  FUSEE_DEVICE void visit(F&& f, Flush&& flush) {
    if (!active()) return;
    int steps = 0;
    walk([&](int64_t j, A x, A y) {
      f(j, x, y);
      if ((++steps & 7) == 0) flush();
    });
    flush();
    cached_ = Data::kCache && fits(data_.shape);
  }

  template <typename F>
  FUSEE_DEVICE void transform(F&& f) {
    if (!active()) return;
    walk([&](int64_t j, A x, A y) {
      store(data_.output, begin_ + j * data_.shape.inner, static_cast<T>(f(j, x, y)));
    });
  }

  FUSEE_DEVICE void finish() {}

  static size_t shared_bytes(const RowShape& shape) { return fits(shape) ? bytes(shape) : 0; }
  static dim3 grid(const RowShape& shape) {
    return dim3(static_cast<unsigned>(shape.outer * ((shape.inner + 31) / 32)));
  }
  static dim3 block(const RowShape& shape) {
    const int64_t warps = (shape.length + 7) / 8;
    return dim3(32, static_cast<unsigned>(warps < 1 ? 1 : warps > kMaxWarps ? kMaxWarps : warps));
  }

 private:
  static FUSEE_HOST_DEVICE size_t bytes(const RowShape& shape) {
    return static_cast<size_t>(shape.length) * 32 * (sizeof(T) + (Data::kTwo ? sizeof(U) : 0));
  }
  static FUSEE_HOST_DEVICE bool fits(const RowShape& shape) {
    return Data::kCache && bytes(shape) <= kMaxCachedBytes;
  }

  // Calls f(j, x_j, y_j). A thread meets the same elements in every walk, so it reads back only what it
  // cached itself.
  template <typename F>
  FUSEE_DEVICE void walk(F&& f) const {
    for (int64_t j = threadIdx.y; j < data_.shape.length; j += blockDim.y) {
      const int64_t at = begin_ + j * data_.shape.inner, place = j * 32 + threadIdx.x;
      if constexpr (Data::kCache) {
        if (fits(data_.shape)) {
          FUSEE_DYNAMIC_SHARED(T, x_cache, data_.shape.length * 32);
          if (!cached_) x_cache.store(place, load(data_.x, at));
          A y = 0;
          if constexpr (Data::kTwo) {
            FUSEE_DYNAMIC_SHARED_AT(U, y_cache, data_.shape.length * 32,
                                    data_.shape.length * 32 * sizeof(T));
            if (!cached_) y_cache.store(place, load(data_.y, at));
            y = static_cast<A>(y_cache.load(place));
          }
          f(j, static_cast<A>(x_cache.load(place)), y);
          continue;
        }
      }
      A y = 0;
      if constexpr (Data::kTwo) y = static_cast<A>(load(data_.y, at));
      f(j, static_cast<A>(load(data_.x, at)), y);
    }
  }

  const Data& data_;
  int64_t inner_, row_, begin_;
  bool cached_ = false;
};

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
