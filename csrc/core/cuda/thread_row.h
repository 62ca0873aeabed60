// The view of a short contiguous row: one thread, staged through shared memory (see row_views.h).
#pragma once

#include "core/cuda/row_data.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

template <typename Data>
class ThreadRow {
 public:
  using T = typename Data::T;
  using U = typename Data::U;
  using A = typename Data::A;
  static constexpr int kRows = 128;
  static constexpr bool kSeveralRows = true;

  FUSEE_DEVICE explicit ThreadRow(const Data& data)
      : data_(data), first_(static_cast<int64_t>(blockIdx.x) * kRows) {
    stage(data.x, x_tile());
    if constexpr (Data::kTwo) stage(data.y, y_tile());
    __syncthreads();
  }

  FUSEE_DEVICE int64_t row() const { return first_ + threadIdx.x; }
  FUSEE_DEVICE bool active() const { return row() < data_.shape.outer; }
  FUSEE_DEVICE bool leader() const { return active(); }

  template <typename V, typename Op>
  FUSEE_DEVICE V reduce(const V& value, Op, const V&) const {
    return value;
  }
  FUSEE_DEVICE A element(int64_t j) const { return static_cast<A>(x_tile().load(place(j))); }
  FUSEE_DEVICE double block_total(double of_leader) const {
    FUSEE_SHARED(double, scratch, 32);
    return block_sum(of_leader, scratch);
  }

  template <typename F, typename Flush>
  FUSEE_DEVICE void visit(F&& f, Flush&& flush) {
    if (!active()) return;
    for (int64_t j = 0; j < data_.shape.length; ++j) {
      const A y = Data::kTwo ? static_cast<A>(y_tile().load(place(j))) : A(0);
      f(j, static_cast<A>(x_tile().load(place(j))), y);
      if ((j & 7) == 7) flush();
    }
    flush();
  }

  // The results take the place of x until finish() writes them out.
  template <typename F>
  FUSEE_DEVICE void transform(F&& f) {
    if (!active()) return;
    for (int64_t j = 0; j < data_.shape.length; ++j) {
      const A y = Data::kTwo ? static_cast<A>(y_tile().load(place(j))) : A(0);
      const A x = static_cast<A>(x_tile().load(place(j)));
      x_tile().store(place(j), static_cast<T>(f(j, x, y)));
    }
  }

  FUSEE_DEVICE void finish() {
    if (!data_.output) return;
    __syncthreads();
    const Shared<T> tile = x_tile();
    const int64_t begin = first_ * data_.shape.length;
    for_each_vector<vector_width<T>>(
        data_.output, begin, begin + elements(), static_cast<int>(threadIdx.x), kRows,
        [&](int64_t at) {
          Vector<T, vector_width<T>> result;
          for (int i = 0; i < vector_width<T>; ++i)
            result[i] = tile.load(tile_index(at - begin + i));
          store(data_.output, at, result);
        },
        [&](int64_t at) { store(data_.output, at, tile.load(tile_index(at - begin))); });
  }

  static size_t shared_bytes(const RowShape& shape) {
    return static_cast<size_t>(kRows) * pitch(shape) * (sizeof(T) + (Data::kTwo ? sizeof(U) : 0));
  }
  static dim3 grid(const RowShape& shape) {
    return dim3(static_cast<unsigned>((shape.outer + kRows - 1) / kRows));
  }
  static dim3 block(const RowShape&) { return dim3(kRows); }

 private:
  // An odd distance between rows spreads the elements that the threads read together over the banks.
  static FUSEE_HOST_DEVICE int64_t pitch(const RowShape& shape) { return shape.length | 1; }
  FUSEE_DEVICE int64_t place(int64_t j) const { return threadIdx.x * pitch(data_.shape) + j; }
  FUSEE_DEVICE int64_t tile_index(int64_t element) const {
    const int length = static_cast<int>(data_.shape.length), e = static_cast<int>(element);
    return static_cast<int64_t>(e / length) * pitch(data_.shape) + e % length;
  }
  FUSEE_DEVICE int64_t elements() const {
    const int64_t rows = data_.shape.outer - first_;
    return (rows < kRows ? rows : kRows) * data_.shape.length;
  }
  // Declared at every use: the declaration costs nothing, and keeps the view free of pointers.
  FUSEE_DEVICE Shared<T> x_tile() const {
    FUSEE_DYNAMIC_SHARED(T, tile, kRows * pitch(data_.shape));
    return tile;
  }
  FUSEE_DEVICE Shared<U> y_tile() const {
    FUSEE_DYNAMIC_SHARED_AT(U, tile, kRows * pitch(data_.shape),
                            kRows * pitch(data_.shape) * sizeof(T));
    return tile;
  }

  template <typename V>
  FUSEE_DEVICE void stage(Global<const V> memory, const Shared<V>& tile) const {
    const int64_t begin = first_ * data_.shape.length;
    for_each_vector<vector_width<V>>(
        memory, begin, begin + elements(), static_cast<int>(threadIdx.x), kRows,
        [&](int64_t at) {
          const Vector<V, vector_width<V>> values = load<vector_width<V>>(memory, at);
          for (int i = 0; i < vector_width<V>; ++i)
            tile.store(tile_index(at - begin + i), values[i]);
        },
        [&](int64_t at) { tile.store(tile_index(at - begin), load(memory, at)); });
  }

  const Data& data_;
  int64_t first_;
};

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
