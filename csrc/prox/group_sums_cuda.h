// Sums over the elements of groups in CUDA, and elementwise work with what is known of each group.
//
// A launch sums products over rows (long inner dimensions, or short ones that follow one another in memory) or over
// columns (short ones apart); each block leaves its sums, and whoever needs a group's sum adds them in order.
#pragma once

#include "core/cuda/kernel.h"
#include "core/cuda/torch_stream.h"
#include "prox/group_layout.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

constexpr int kGroupThreads = 256;
constexpr int64_t kShortRow = 64;     // below: several rows share a warp, or columns are summed
constexpr int64_t kMiddleRow = 1024;  // up to: a warp takes a row
constexpr int64_t kTile = 2048;       // elements of short rows that a block takes

// Where the parts of a group's sum lie: parts [p][q], the same for every group.
struct Parts {
  int64_t count_p, step_p;
  int64_t count_q, step_q;
  int64_t step_group, step_problem;

  FUSEE_HOST_DEVICE int64_t count() const { return count_p * count_q; }

  // The sum of every `lanes`-th part from `lane` on.
  FUSEE_DEVICE double share(Global<const double> sums, int64_t problem, int64_t group, int lane,
                            int lanes) const {
    const int64_t first = problem * step_problem + group * step_group;
    double sum = 0;
    for (int64_t i = lane; i < count(); i += lanes)
      sum += load(sums, first + i / count_q * step_p + i % count_q * step_q);
    return sum;
  }
};

// How a call's groups are summed.
struct SumPlan {
  enum class Kind { kSingles, kShortRows, kRows, kColumns } kind;
  int64_t ranges = 1;  // the parts of a row, or of the outer dimension for columns
  int64_t blocks = 0;
  int64_t parts_count = 0;
  Parts parts{};

  // `columns` are how many of them a block takes.
  SumPlan(const Layout& l, int64_t columns) {
    constexpr int64_t kRowPart = 16384, kColumnPart = 128, kEnoughBlocks = 512;
    const int64_t rows = l.batch * l.outer * l.groups;
    if (l.singles()) {
      kind = Kind::kSingles;  // a norm is the size of the element
    } else if (l.group_size() == 0) {
      kind = Kind::kRows;  // without parts
    } else if (l.outer > 1 && l.inner < kShortRow) {
      kind = Kind::kColumns;
      const int64_t width = l.groups * l.inner, tiles = (width + columns - 1) / columns;
      const int64_t wanted = kEnoughBlocks / std::max<int64_t>(1, l.batch * tiles);
      const int64_t most = (l.outer + kColumnPart - 1) / kColumnPart;
      ranges = std::clamp<int64_t>(wanted, 1, most);
      blocks = l.batch * ranges * tiles;
      parts_count = l.batch * ranges * width;
      parts = {ranges, width, l.inner, 1, l.inner, ranges * width};
    } else {
      kind = l.inner < kShortRow ? Kind::kShortRows : Kind::kRows;
      ranges = std::max<int64_t>(1, (l.inner + kRowPart - 1) / kRowPart);
      const int64_t warps = kGroupThreads / 32;
      blocks = kind == Kind::kShortRows ? (rows + rows_of_tile(l.inner) - 1) / rows_of_tile(l.inner)
               : l.inner <= kMiddleRow  ? (rows + warps - 1) / warps
                                        : rows * ranges;
      parts_count = rows * ranges;
      parts = {l.outer, l.groups * ranges, ranges, 1, ranges, l.outer * l.groups * ranges};
    }
  }

  bool singles() const { return kind == Kind::kSingles; }

  // Of a multiple of 8, so that every tile begins at a multiple of 16 bytes.
  static FUSEE_HOST_DEVICE int64_t rows_of_tile(int64_t inner) { return kTile / inner / 8 * 8; }
};

// The products of N neighbours, y being x where kTwo is false.
template <bool kTwo, int N, typename T, typename F>
FUSEE_DEVICE void products(Global<const T> x, Global<const T> y, int64_t at, const F& f) {
  const Vector<T, N> a = load<N>(x, at);
  Vector<T, N> b = a;
  if constexpr (kTwo) b = load<N>(y, at);
  for (int k = 0; k < N; ++k) f(k, static_cast<double>(a[k]) * static_cast<double>(b[k]));
}

template <typename T, bool kTwo>
__global__ void __launch_bounds__(kGroupThreads)
    row_products_kernel(Global<const T> x, Global<const T> y, int64_t rows, int64_t length,
                        int64_t ranges, Global<double> parts) {
  constexpr int N = vector_width<T>;
  FUSEE_SHARED(double, scratch, 32);
  auto sum_of = [&](int64_t begin, int64_t end, int rank, int size) {
    double sum = 0;
    auto add = [&](int, double product) { sum += product; };
    auto one = [&](int64_t at) { products<kTwo, 1>(x, y, at, add); };
    auto vector = [&](int64_t at) { products<kTwo, N>(x, y, at, add); };
    // In double, rows that are equal must have equal sums, wherever they begin.
    if (sizeof(T) < 8 || length % N == 0) {
      for_each_vector<N>(x, begin, end, rank, size, vector, one);
    } else {
      for_each_vector<1>(x, begin, end, rank, size, vector, one);
    }
    return sum;
  };
  const int64_t block = blockIdx.x;
  if (length <= kMiddleRow) {
    const int64_t row = block * (kGroupThreads / 32) + (thread_rank() >> 5);
    if (row >= rows) return;  // whole warps, without barriers
    const int lane = thread_rank() & 31;
    const double sum = warp_sum(sum_of(row * length, (row + 1) * length, lane, 32));
    if (lane == 0) store(parts, row, sum);
    return;
  }
  const int64_t row = block / ranges, range = block % ranges;
  const int64_t share = ((length + ranges - 1) / ranges + 63) / 64 * 64;
  const int64_t begin = range * share < length ? range * share : length;
  const int64_t end = begin + share < length ? begin + share : length;
  const double sum = block_sum(
      sum_of(row * length + begin, row * length + end, thread_rank(), kGroupThreads), scratch);
  if (thread_rank() == 0) store(parts, block, sum);
}

// A tile of whole rows is multiplied as it lies in memory, then a thread sums a row.
template <typename T, bool kTwo>
__global__ void __launch_bounds__(kGroupThreads)
    short_row_products_kernel(Global<const T> x, Global<const T> y, int64_t rows, int64_t length,
                              Global<double> parts) {
  constexpr int N = vector_width<T>;
  constexpr int kApart = 16;  // an empty place after as many, against bank conflicts
  FUSEE_SHARED(double, tile, kTile + kTile / kApart);
  auto place = [](int64_t i) { return i + i / kApart; };
  const int64_t most = SumPlan::rows_of_tile(length), first = blockIdx.x * most;
  const int64_t count = rows - first < most ? rows - first : most;
  const int64_t begin = first * length, elements = count * length, whole = elements / N * N;
  for (int64_t i = thread_rank() * N; i < whole; i += kGroupThreads * N)
    products<kTwo, N>(x, y, begin + i,
                      [&](int k, double product) { tile.store(place(i + k), product); });
  for (int64_t i = whole + thread_rank(); i < elements; i += kGroupThreads)
    products<kTwo, 1>(x, y, begin + i, [&](int, double product) { tile.store(place(i), product); });
  __syncthreads();
  for (int64_t row = thread_rank(); row < count; row += kGroupThreads) {
    double sum = 0;
    for (int64_t i = row * length; i < (row + 1) * length; ++i) sum += tile.load(place(i));
    store(parts, first + row, sum);
  }
}

template <typename T>
inline constexpr int64_t columns_of_block = 32 * vector_width<T>;

// A warp goes along a stretch of the columns, each of the block's warps in rows of its own.
template <typename T, bool kTwo>
__global__ void __launch_bounds__(kGroupThreads)
    column_products_kernel(Global<const T> x, Global<const T> y, int64_t outer, int64_t width,
                           int64_t ranges, Global<double> parts) {
  constexpr int N = vector_width<T>, kWarps = kGroupThreads / 32;
  constexpr int64_t kColumns = columns_of_block<T>;
  FUSEE_SHARED(double, tile, kWarps* kColumns);
  const int64_t tiles = (width + kColumns - 1) / kColumns;
  const int64_t first = blockIdx.x % tiles * kColumns;
  const int64_t range = blockIdx.x / tiles % ranges, problem = blockIdx.x / tiles / ranges;
  const int64_t share = (outer + ranges - 1) / ranges;
  const int64_t end = (range + 1) * share < outer ? (range + 1) * share : outer;
  const bool wide = width % N == 0;  // every row begins at a multiple of 16 bytes
  const int lane = thread_rank() & 31, warp = thread_rank() >> 5;
  double sums[N] = {};
  for (int64_t o = range * share + warp; o < end; o += kWarps) {
    const int64_t row = (problem * outer + o) * width;
    if (wide) {
      const int64_t column = first + lane * N;
      if (column < width)
        products<kTwo, N>(x, y, row + column, [&](int k, double product) { sums[k] += product; });
    } else {
      for (int k = 0; k < N; ++k) {
        const int64_t column = first + k * 32 + lane;
        if (column < width)
          products<kTwo, 1>(x, y, row + column, [&](int, double product) { sums[k] += product; });
      }
    }
  }
  for (int k = 0; k < N; ++k) tile.store(warp * kColumns + k * 32 + lane, sums[k]);
  __syncthreads();
  for (int64_t i = thread_rank(); i < kColumns && first + i < width; i += kGroupThreads) {
    const int64_t place = wide ? i % N * 32 + i / N : i;
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += tile.load(w * kColumns + place);
    store(parts, (problem * ranges + range) * width + first + i, sum);
  }
}

// The parts of the sums of x y over every group; of x x where y is the same tensor.
template <typename T, bool kTwo>
Tensor group_products(const Tensor& x, const Tensor& y, const Layout& l, const SumPlan& plan,
                      const Context& context) {
  Tensor parts = empty(x, {plan.parts_count}, ScalarType::Double);
  if (plan.blocks == 0) return parts;
  const int64_t rows = l.batch * l.outer * l.groups;
  if (plan.kind == SumPlan::Kind::kColumns) {
    launch(&column_products_kernel<T, kTwo>, plan.blocks, kGroupThreads, 0, context.stream,
           input<T>(x), input<T>(y), l.outer, l.groups * l.inner, plan.ranges,
           output<double>(parts));
  } else if (plan.kind == SumPlan::Kind::kShortRows) {
    launch(&short_row_products_kernel<T, kTwo>, plan.blocks, kGroupThreads, 0, context.stream,
           input<T>(x), input<T>(y), rows, l.inner, output<double>(parts));
  } else {
    launch(&row_products_kernel<T, kTwo>, plan.blocks, kGroupThreads, 0, context.stream,
           input<T>(x), input<T>(y), rows, l.inner, plan.ranges, output<double>(parts));
  }
  return parts;
}

// A group of a problem.
struct Place {
  int64_t problem, group;
};

// Calls f(k, what `of` knows of its group, place in a row) for N neighbouring elements from `first` on.
template <int N, typename Of, typename F>
FUSEE_DEVICE void for_neighbours(const Layout& l, int64_t first, const Of& of, const F& f) {
  int64_t row = first / l.inner, i = first - row * l.inner;
  int64_t outer = row / l.groups;
  Place place{outer / l.outer, row - outer * l.groups};
  auto known = of(place);
  for (int k = 0; k < N; ++k) {
    f(k, known, i);
    if (++i == l.inner && k + 1 < N) {
      i = 0;
      if (++place.group == l.groups) {
        place.group = 0;
        place.problem = ++outer / l.outer;
      }
      known = of(place);
    }
  }
}

// out = f(x, y, what `of` knows of its group, place in a row) for every element, y being a second tensor where kTwo.
template <bool kTwo, typename T, typename Of, typename F>
FUSEE_DEVICE void for_each_element(const Layout& l, Global<const T> x, Global<const T> y,
                                   Global<T> out, int64_t count, const Of& of, const F& f) {
  using A = accumulate_t<T>;
  constexpr int N = vector_width<T>;
  auto neighbours = [&](int64_t first, auto width) {
    constexpr int M = decltype(width)::value;
    const Vector<T, M> a = load<M>(x, first);
    Vector<T, M> b = a;
    if constexpr (kTwo) b = load<M>(y, first);
    Vector<T, M> result;
    for_neighbours<M>(l, first, of, [&](int k, const auto& known, int64_t i) {
      result[k] = static_cast<T>(f(static_cast<A>(a[k]), static_cast<A>(b[k]), known, i));
    });
    store(out, first, result);
  };
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kGroupThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kGroupThreads + thread_rank();
  // The tensors are aligned, so that only the end is left for single elements.
  const int64_t whole = count / N * N;
  for (int64_t at = thread * N; at < whole; at += threads * N)
    neighbours(at, std::integral_constant<int, N>{});
  if (thread < count - whole) neighbours(whole + thread, std::integral_constant<int, 1>{});
}

inline int64_t element_blocks(int64_t count, int element_size) {
  const int64_t vectors = (count * element_size + 15) / 16;
  constexpr int64_t kMost = 1 << 16;
  return std::clamp<int64_t>((vectors + kGroupThreads - 1) / kGroupThreads, 1, kMost);
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
