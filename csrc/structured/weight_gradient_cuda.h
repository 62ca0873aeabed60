// The gradient of a block-diagonal factor: of every block, the sum over rows of the products of two blocks of
// columns. Parts of the rows have sums of their own, which are added in order.
#pragma once

#include "structured/walk_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

#if defined(FUSEE_EMULATED)
// Small enough that small tests have several parts.
constexpr int64_t kLeastRowsOfPart = 64;
#else
constexpr int64_t kLeastRowsOfPart = 256;
#endif

// Rows of both matrices at a time.
inline constexpr int kRowsAtOnce = 16;

// The passes over a factor's elements, and how the rows are cut. It depends on the sizes alone.
struct GradientWalk {
  Walk walk;  // its depth is not used
  int column_passes;
  int64_t parts, rows_of_part;

  FUSEE_HOST_DEVICE int64_t passes() const {
    return static_cast<int64_t>(walk.passes()) * column_passes;
  }
};

// Four neighbours of each lane of every four, of two eights of columns: 32 bytes in line for the half types.
template <typename T>
FUSEE_DEVICE Vector<T, 4> gather_four(const float (&low)[2], const float (&high)[2]) {
  const auto word = [](const float (&pair)[2]) {
    return fusee::bit_cast<unsigned>(
        Vector<T, 2>{{static_cast<T>(pair[0]), static_cast<T>(pair[1])}});
  };
  const unsigned of_low = word(low), of_high = word(high);
  const int lane = static_cast<int>(threadIdx.x) & 31, t = lane % 4;
  unsigned words[2];
  for (int i = 0; i < 2; ++i) {
    const int source = lane / 4 * 4 + (2 * t + i) % 4;
    const unsigned from_low = __shfl_sync(full_mask, of_low, source);
    const unsigned from_high = __shfl_sync(full_mask, of_high, source);
    words[i] = t < 2 ? from_low : from_high;
  }
  return fusee::bit_cast<Vector<T, 4>>(make_uint2(words[0], words[1]));
}

// Sums to rows of the factor (count, size, width), from `first` on of each.
template <typename Out, typename E, int kColumns>
FUSEE_DEVICE void write_factor(const Sums<E, kColumns>& sums, const Pass& pass, int size, int width,
                               int first, Global<Out> to) {
  const int lane = static_cast<int>(threadIdx.x) & 31, g = lane / 4, t = lane % 4;
  pass.for_each_tile<Sums<E, kColumns>::kOfWarp>([&](int u, int block, int tile_row) {
    for (int half = 0; half < 2; ++half) {
      const int row = pass.row + tile_row + g + 8 * half;
      const int64_t line = (static_cast<int64_t>(pass.block + block) * size + row) * width;
      const auto& values = sums.values[u];
      if constexpr (kIsHalf<Out>) {
        if (width % 4 == 0) {
          for (int n = 0; n < kColumns / 8; n += 2) {
            const float low[2] = {values[n][2 * half], values[n][2 * half + 1]};
            const float high[2] = {values[n + 1][2 * half], values[n + 1][2 * half + 1]};
            const Vector<Out, 4> four = gather_four<Out>(low, high);
            const int column = first + 8 * n + 4 * t;
            if (row < size && column < width) store(to, line + column, four);
          }
          continue;
        }
      }
      for (int n = 0; n < kColumns / 8; ++n) {
        const int column = first + 8 * n + 2 * t;
        const Vector<Out, 2> two{
            {static_cast<Out>(values[n][2 * half]), static_cast<Out>(values[n][2 * half + 1])}};
        if (row >= size || column >= width) continue;
        if (width % 2 == 0) {
          store(to, line + column, two);
        } else {
          store(to, line + column, two[0]);
          if (column + 1 < width) store(to, line + column + 1, two[1]);
        }
      }
    }
  });
}

template <typename E, Layout kLayout>
using StagedRows =
    Staged<kRowsAtOnce, stored_t<E>, kLayout,
           kLayout == Layout::kInterleaved ? vector_width<stored_t<E>> : kAcrossPadding<E>>;

// How many elements of shared memory the staged columns take.
template <typename E, int kColumns, Layout kLayout>
FUSEE_HOST_DEVICE int gradient_elements(const Walk& walk) {
  using Tile = StagedRows<E, kLayout>;
  constexpr int kBuffers = kLayout == Layout::kInterleaved ? 1 : 2;
  return kBuffers * walk.blocks_at_once *
         (Tile::stride(16 * walk.tiles_at_once) + Tile::stride(kColumns));
}

// `to` holds the parts one after another.
template <typename E, typename Out, int kColumns, Layout kLayout, typename T = stored_t<E>>
__global__ void __launch_bounds__(kProductThreads, kOnTensorCores<E> ? 2 : 1)
    weight_gradient(Columns<const T, kLayout> left, Columns<const T, kLayout> right,
                    GradientWalk cut, Global<Out> to) {
  constexpr bool kAhead = kLayout != Layout::kInterleaved;
  using Tile = StagedRows<E, kLayout>;
  const int64_t passes = cut.passes(), part = blockIdx.x / passes;
  const int place = static_cast<int>(blockIdx.x % passes);
  const Pass pass = cut.walk.pass(place / cut.column_passes);
  const int first = place % cut.column_passes * kColumns;
  const int64_t begin = part * cut.rows_of_part, end_ = begin + cut.rows_of_part;
  const int64_t end = end_ < left.rows ? end_ : left.rows;
  left.rows = right.rows = end;

  const int length = 16 * pass.tiles;
  const int of_left = cut.walk.blocks_at_once * Tile::stride(16 * cut.walk.tiles_at_once);
  const int of_right = cut.walk.blocks_at_once * Tile::stride(kColumns);
  const int all = gradient_elements<E, kColumns, kLayout>(cut.walk);
  FUSEE_DYNAMIC_SHARED(T, memory, all);
  const auto tile = [&](int step, bool is_left) {
    const int at = kAhead ? step % 2 * (of_left + of_right) : 0;
    return is_left ? memory.slice(at, of_left) : memory.slice(at + of_left, of_right);
  };
  const auto copy = [&](int step) {
    const int64_t row = begin + static_cast<int64_t>(step) * kRowsAtOnce;
    Tile::copy(left, {row, pass.block, pass.blocks, pass.row, length}, tile(step, true));
    Tile::copy(right, {row, pass.block, pass.blocks, first, kColumns}, tile(step, false));
  };
  Sums<E, kColumns> sums;
  sums.clear();
  const int steps =
      end > begin ? static_cast<int>(divide_up<int64_t>(end - begin, kRowsAtOnce)) : 0;
  if (kAhead && steps > 0) {
    copy(0);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    if (!kAhead) copy(step);
    if (kAhead && step + 1 < steps) copy(step + 1);
    cp_async_commit();
    cp_async_wait_group<kAhead ? 1 : 0>();
    __syncthreads();
    multiply(sums, pass,
             Operand<T, kAhead>{tile(step, true), Tile::pitch(length), Tile::stride(length)},
             Operand<T, kAhead>{tile(step, false), Tile::pitch(kColumns), Tile::stride(kColumns)},
             kRowsAtOnce, 0);
    __syncthreads();
  }
  cp_async_wait_group<0>();
  const int64_t elements = static_cast<int64_t>(left.count) * left.size * right.size;
  write_factor(sums, pass, left.size, right.size, first, to + part * elements);
}

template <typename T>
__global__ void __launch_bounds__(256)
    add_parts(Global<const accumulate_t<T>> parts, int64_t count, int64_t elements, Global<T> sum) {
  using A = accumulate_t<T>;
  constexpr int V = vector_width<A>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (elements % V == 0) {
    const int64_t at = thread * V;
    if (at >= elements) return;
    Vector<A, V> total = load<V>(parts, at);
    for (int64_t part = 1; part < count; ++part) {
      const Vector<A, V> next = load<V>(parts, part * elements + at);
      for (int v = 0; v < V; ++v) total[v] += next[v];
    }
    Vector<T, V> result;
    for (int v = 0; v < V; ++v) result[v] = static_cast<T>(total[v]);
    store(sum, at, result);
    return;
  }
  for (int64_t at = thread * V; at < thread * V + V && at < elements; ++at) {
    A total = load(parts, at);
    for (int64_t part = 1; part < count; ++part) total += load(parts, part * elements + at);
    store(sum, at, static_cast<T>(total));
  }
}

template <typename E, int kColumns, typename T, Layout kLayout>
void launch_weight_gradient_of(const Columns<const T, kLayout>& left,
                               const Columns<const T, kLayout>& right, const Tensor& gradient,
                               Stream stream) {
  using A = accumulate_t<T>;
  constexpr bool kInterleaved = kLayout == Layout::kInterleaved;
  constexpr int kTiles = TileSize<T, kColumns>::kTiles;
  constexpr int64_t kBlocks = 256;
  const int tiles = divide_up(left.size, 16);
  Walk walk{left.count, left.size, 0, 1, 1, kStep};
  if (kInterleaved) {
    walk.blocks_at_once =
        left.count <= kTiles && left.count % 16 != 0 ? left.count : std::min(left.count, 16);
    walk.tiles_at_once = std::min(tiles, kTiles / walk.blocks_at_once);
  } else {
    walk.tiles_at_once = std::min(tiles, kTiles);
    walk.blocks_at_once = std::min(left.count, kTiles / walk.tiles_at_once);
  }
  const auto bytes = [&] {
    return static_cast<size_t>(gradient_elements<E, kColumns, kLayout>(walk)) * sizeof(T);
  };
  while (bytes() > static_cast<size_t>(most_shared_bytes()) && walk.blocks_at_once > 1)
    walk.blocks_at_once = divide_up(walk.blocks_at_once, 2);
  GradientWalk cut{walk, divide_up(right.size, kColumns), 1, 0};
  cut.parts = std::clamp<int64_t>(
      std::min(kBlocks / cut.passes(), divide_up(left.rows, kLeastRowsOfPart)), 1, 64);
  cut.rows_of_part = divide_up(divide_up(left.rows, cut.parts), int64_t{kRowsAtOnce}) * kRowsAtOnce;
  const auto run = [&](auto zero, const Tensor& to) {
    using Out = decltype(zero);
    launch(weight_gradient<E, Out, kColumns, kLayout>, grid_of(cut.parts, cut.passes()),
           kProductThreads, bytes(), stream, left, right, cut, output<Out>(to));
  };
  if (cut.parts == 1) return run(T{}, gradient);
  const Tensor parts =
      empty(gradient, {cut.parts, gradient.numel()}, accumulate_type(gradient.scalar_type()));
  run(A{}, parts);
  launch(add_parts<T>, grid_of(divide_up<int64_t>(gradient.numel(), 256 * vector_width<A>), 1), 256,
         0, stream, input<A>(parts), cut.parts, gradient.numel(), output<T>(gradient));
}

// gradient (count, left.size, right.size) = of every block, left's columns times right's.
template <typename T, Layout kLayout>
void launch_weight_gradient(const Columns<const T, kLayout>& left,
                            const Columns<const T, kLayout>& right, const Tensor& gradient,
                            bool tf32, Stream stream) {
  if (gradient.numel() == 0) return;
  if constexpr (kIsHalf<T>) {
    if (right.size > 32) return launch_weight_gradient_of<T, 64>(left, right, gradient, stream);
  }
  as_multiplied<T>(tf32, [&]<typename E>() {
    launch_weight_gradient_of<E, sizeof(T) == 8 ? 16 : 32>(left, right, gradient, stream);
  });
}

// Without interleaved columns it is compiled once, in block_diagonal_matmul.cu.
#define FUSEE_BLOCKED_GRADIENT(prefix, T)                                                \
  prefix template void launch_weight_gradient(const Columns<const T, Layout::kBlocked>&, \
                                              const Columns<const T, Layout::kBlocked>&, \
                                              const Tensor&, bool, Stream);
#define FUSEE_BLOCKED_GRADIENTS(prefix)  \
  FUSEE_BLOCKED_GRADIENT(prefix, float)  \
  FUSEE_BLOCKED_GRADIENT(prefix, double) \
  FUSEE_BLOCKED_GRADIENT(prefix, Half)   \
  FUSEE_BLOCKED_GRADIENT(prefix, BFloat16)
FUSEE_BLOCKED_GRADIENTS(extern)

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
