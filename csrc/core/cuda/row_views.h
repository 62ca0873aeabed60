// How the threads of a block share the rows of a contiguous (outer, length, inner) tensor.
//
// A kernel is written once, against a view of "its" row, and compiled for three:
//
//   BlockRow    one block per row (inner == 1, long rows), 16-byte accesses along the row
//   ThreadRow   one thread per row (inner == 1, short rows), staged through shared memory so that the
//               block's accesses to global memory still are neighbouring ones
//   ColumnRow   32 neighbouring rows per block (inner > 1), one in each lane, their elements dealt
//               out to the warps
//
// A view binds one or two inputs of the same shape, x and y, and an output. `visit` reads the row,
// `transform` reads it and writes the output, `reduce` combines what the threads of a row hold.
// Inputs and output must be aligned to 16 bytes, which the host sees to.
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

// Launches Kernel::run<View> for the view that suits the shape. Kernel is a callable structure of
// parameters with a member `data`, a RowData.
template <typename View, typename Kernel>
__global__ void __launch_bounds__(512, sizeof(typename View::A) == 8 ? 1 : 2)
    run_rows(const Kernel kernel) {
  View view(kernel.data);
  kernel(view);
  view.finish();
}

// Calls f.template operator()<View>() for the view that suits the shape.
template <typename Data, typename F>
void with_view(const RowShape& shape, const F& f) {
  if (shape.inner > 1) {
    f.template operator()<ColumnRow<Data>>();
  } else if (shape.length <= kShortRow) {
    f.template operator()<ThreadRow<Data>>();
  } else {
    f.template operator()<BlockRow<Data>>();
  }
}

// How many blocks share the rows, where each has several; zero where every row has its own.
template <typename Data>
int64_t blocks_of_rows(const RowShape& shape) {
  int64_t blocks = 0;
  with_view<Data>(shape, [&]<typename View>() {
    if (View::kSeveralRows) blocks = View::grid(shape).x;
  });
  return blocks;
}

template <typename Kernel>
void launch_rows(const Kernel& kernel, Stream stream) {
  using Data = std::decay_t<decltype(kernel.data)>;
  const RowShape& shape = kernel.data.shape;
  if (shape.outer == 0 || shape.inner == 0) return;
  with_view<Data>(shape, [&]<typename View>() {
    launch(run_rows<View, Kernel>, View::grid(shape), View::block(shape), View::shared_bytes(shape),
           stream, kernel);
  });
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
