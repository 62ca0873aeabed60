// Two matrix products in one kernel: that of the centers of boxes, and that of their radii, which has the magnitudes
// of the same weights. All three products of a layer and its gradients are one: Y = B A^T for tiles of A's rows, whose
// outputs are neighbours, and of B's, which are lines of Y.
#pragma once

#include "bounds/box_sums_cuda.h"
#include "bounds/box_tiles_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// What the sums run along: both operands' rows, or of one, or both, the columns.
enum class Form { kLayer, kInputGradient, kWeightGradient };

template <typename E_, typename T_, int kColumns_, Form kForm>
struct BoxProduct {
  using E = E_;
  using T = T_;
  using S = stored_t<E>;
  using A = accumulate_t<T>;
  static constexpr bool kAcrossA = kForm != Form::kLayer;
  static constexpr bool kAcrossB = kForm == Form::kWeightGradient;
  // Whether the second product has the magnitudes of the first one's A.
  static constexpr bool kOneA = kForm != Form::kWeightGradient;
  static constexpr bool kChecked = kForm == Form::kLayer;

  static constexpr int kColumns = kColumns_;
  static constexpr int kMostEights = sizeof(S) == 8 ? 2 : 4;
  static constexpr int kEights = kColumns / 8 < kMostEights ? kColumns / 8 : kMostEights;
  static constexpr int kWarpsAcross = kColumns / (8 * kEights);
  static constexpr int kTiles = sizeof(S) == 8 ? 1 : kWarpsAcross;
  static constexpr int kRows = 16 * kTiles * (kBoxWarps / kWarpsAcross);
  static constexpr int kLength = 128 / static_cast<int>(sizeof(S));
  // What depths are padded to.
  static constexpr int kUnit = kOnTensorCores<E> ? kStep : vector_width<S>;

  static constexpr int pitch(bool across, int places) {
    return across ? places + kAcrossPadding<E> : kLength + vector_width<S>;
  }
  static constexpr int elements(bool across, int places) {
    return (across ? kLength : places) * pitch(across, places);
  }
  static constexpr int kPitchA = pitch(kAcrossA, kRows), kPitchB = pitch(kAcrossB, kColumns);
  static constexpr int kElementsA = elements(kAcrossA, kRows);
  static constexpr int kElementsB = elements(kAcrossB, kColumns);
  // Tiles in shared memory, of which all but one are on their way.
  static constexpr int kStages = kOneA ? 3 : 2;
  static constexpr int kStage = (kOneA ? 1 : 2) * kElementsA + 2 * kElementsB;
  static constexpr int kResultPitch = kRows + vector_width<A>;
  static constexpr int kResult = kColumns * kResultPitch;
  static constexpr size_t kStagedBytes = size_t{kStages} * kStage * sizeof(S);
  static constexpr size_t kResultBytes = size_t{2} * kResult * sizeof(A);
  static constexpr size_t kSharedBytes = kStagedBytes > kResultBytes ? kStagedBytes : kResultBytes;
  static_assert(kSharedBytes <= 99 * 1024, "what every device has");

  Matrix<T> a[2], b[2];
  int64_t rows, columns, depth;

  FUSEE_HOST_DEVICE int64_t row_tiles() const { return divide_up<int64_t>(rows, kRows); }
  FUSEE_HOST_DEVICE int64_t column_tiles() const { return divide_up<int64_t>(columns, kColumns); }
  FUSEE_HOST_DEVICE int steps() const {
    return static_cast<int>(divide_up<int64_t>(depth, kLength));
  }
};

// How the sums are cut, where there are too few tiles to go round: into parts of so many steps, which are kept and
// added in order. It depends on the sizes alone.
template <typename A>
struct Cut {
  int parts, steps;
  Global<A> centers, radii;  // (parts, columns, rows), if several
};

template <typename P, typename Finish, typename A = typename P::A>
__global__ void __launch_bounds__(kBoxThreads, 2)
    box_product(P product, Outward<A> outward, Cut<A> cut, Finish finish) {
  using S = typename P::S;
  constexpr int kLength = P::kLength, kRows = P::kRows, kColumns = P::kColumns;
  constexpr int kStages = P::kStages;
  const int64_t column_tiles = product.column_tiles(), tiles = product.row_tiles() * column_tiles;
  const int part = static_cast<int>(blockIdx.x / tiles);
  const int64_t row = blockIdx.x % tiles / column_tiles * kRows;
  const int64_t column = blockIdx.x % column_tiles * kColumns;

  FUSEE_DYNAMIC_SHARED(S, memory, kStages * P::kStage);
  const auto a = [&](int step, int kind) {
    const int at = step % kStages * P::kStage + (P::kOneA ? 0 : kind) * P::kElementsA;
    return Operand<S, P::kAcrossA>{memory.slice(at, P::kElementsA), P::kPitchA, 0};
  };
  const auto b = [&](int step, int kind) {
    const int at = (step % kStages + 1) * P::kStage - (2 - kind) * P::kElementsB;
    return Operand<S, P::kAcrossB>{memory.slice(at, P::kElementsB), P::kPitchB, 0};
  };
  const auto copy = [&](int step) {
    const int64_t place = static_cast<int64_t>(step) * kLength;
    FUSEE_UNROLL
    for (int kind = 0; kind < 2; ++kind) {
      if (kind == 0 || !P::kOneA) {
        if constexpr (P::kAcrossA)
          stage<kLength, kRows, P::kPitchA>(product.a[kind], place, row, a(step, kind).tile);
        else
          stage<kRows, kLength, P::kPitchA>(product.a[kind], row, place, a(step, kind).tile);
      }
      if constexpr (P::kAcrossB)
        stage<kLength, kColumns, P::kPitchB>(product.b[kind], place, column, b(step, kind).tile);
      else
        stage<kColumns, kLength, P::kPitchB>(product.b[kind], column, place, b(step, kind).tile);
    }
  };

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp / P::kWarpsAcross * 16 * P::kTiles;
  const int warp_column = warp % P::kWarpsAcross * 8 * P::kEights;
  BoxSums<typename P::E, P::kTiles, P::kEights, P::kAcrossA, P::kAcrossB> sums;
  sums.clear();
  const int first = part * cut.steps, all = product.steps();
  const int last = first + cut.steps < all ? first + cut.steps : all;
  for (int step = first; step < first + kStages - 1; ++step) {
    if (step < last) copy(step);
    cp_async_commit();
  }
  for (int step = first; step < last; ++step) {
    cp_async_wait_group<kStages - 2>();
    if constexpr (P::kChecked)
      check_staged<kColumns, kLength, P::kPitchB>(outward, b(step, 0).tile, b(step, 1).tile);
    __syncthreads();
    if (step + kStages - 1 < last) copy(step + kStages - 1);
    cp_async_commit();
    const int64_t left = product.depth - static_cast<int64_t>(step) * kLength;
    const int depth =
        left < kLength ? divide_up(static_cast<int>(left), P::kUnit) * P::kUnit : kLength;
    const Operand<S, P::kAcrossA> of_a[2] = {a(step, 0), a(step, 1)};
    const Operand<S, P::kAcrossB> of_b[2] = {b(step, 0), b(step, 1)};
    sums.template add<P::kOneA>(of_a, of_b, warp_row, warp_column, depth);
  }
  cp_async_wait_group<0>();
  __syncthreads();

  FUSEE_DYNAMIC_SHARED(A, results, 2 * P::kResult);
  const Shared<A> centers = results.slice(0, P::kResult);
  const Shared<A> radii = results.slice(P::kResult, P::kResult);
  sums.put(centers, radii, P::kResultPitch, warp_row, warp_column);
  __syncthreads();
  constexpr int V = vector_width<typename P::T>, kPart = vector_width<A>, kChunks = kRows / V;
  const int thread = static_cast<int>(threadIdx.x), at = thread % kChunks * V;
  const int64_t left = product.rows - row - at;
  if (left <= 0) return;
  const int valid = left < V ? static_cast<int>(left) : V;
  const auto of_column = finish.template of_column<V>(row + at, valid);
  for (int line = thread / kChunks; line < kColumns; line += kBoxThreads / kChunks) {
    if (column + line >= product.columns) return;
    A of_center[V], of_radius[V];
    for (int v = 0; v < V; v += kPart) {
      const int place = line * P::kResultPitch + at + v;
      const Vector<A, kPart> m = centers.template load<kPart>(place);
      const Vector<A, kPart> r = radii.template load<kPart>(place);
      for (int i = 0; i < kPart; ++i) {
        of_center[v + i] = m[i];
        of_radius[v + i] = r[i];
      }
    }
    if (cut.parts == 1) {
      finish(column + line, row + at, of_column, of_center, of_radius, valid);
    } else {
      const int64_t part_line = part * product.columns + column + line;
      store_line(cut.centers, part_line, product.rows, row + at, of_center, valid);
      store_line(cut.radii, part_line, product.rows, row + at, of_radius, valid);
    }
  }
}

// V results of a thread, from their parts.
template <int V, typename A, typename Finish>
__global__ void __launch_bounds__(kBoxThreads)
    add_box_parts(Cut<A> cut, int64_t rows, int64_t columns, Finish finish) {
  const int64_t chunks = divide_up<int64_t>(rows, V);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kBoxThreads + threadIdx.x;
  const int64_t line = thread / chunks, at = thread % chunks * V;
  if (line >= columns) return;
  const int valid = rows - at < V ? static_cast<int>(rows - at) : V;
  A of_center[V] = {}, of_radius[V] = {};
  for (int part = 0; part < cut.parts; ++part) {
    A center[V], radius[V];
    load_line(cut.centers, part * columns + line, rows, at, center, valid);
    load_line(cut.radii, part * columns + line, rows, at, radius, valid);
    for (int v = 0; v < V; ++v) {
      of_center[v] += center[v];
      of_radius[v] += radius[v];
    }
  }
  finish(line, at, finish.template of_column<V>(at, valid), of_center, of_radius, valid);
}

#if defined(FUSEE_EMULATED)
// Small enough that small tests have several parts.
constexpr int64_t kLeastSteps = 4;
#else
constexpr int64_t kLeastSteps = 8;
#endif
// More blocks than there are processors.
constexpr int64_t kBlocksWanted = 256;

template <typename P>
int parts_of(const P& product) {
  const int64_t tiles = product.row_tiles() * product.column_tiles();
  const int64_t parts =
      std::min(kBlocksWanted / std::max<int64_t>(1, tiles), product.steps() / kLeastSteps);
  const int64_t steps = divide_up<int64_t>(product.steps(), std::max<int64_t>(1, parts));
  return static_cast<int>(steps > 0 ? divide_up<int64_t>(product.steps(), steps) : 1);
}

// `like` is any of the tensors.
template <typename P, typename Finish>
void launch_box_product(const P& product, const Outward<typename P::A>& outward,
                        const Finish& finish, const Tensor& like, Stream stream) {
  using A = typename P::A;
  constexpr int V = vector_width<typename P::T>;
  if (product.rows == 0 || product.columns == 0) return;
  const int parts = parts_of(product);
  Cut<A> cut{parts, divide_up(product.steps(), parts), {}, {}};
  std::optional<Tensor> sums[2];
  if (parts > 1) {
    for (auto& tensor : sums)
      tensor =
          empty(like, {parts, product.columns, product.rows}, accumulate_type(like.scalar_type()));
    cut.centers = output<A>(*sums[0]);
    cut.radii = output<A>(*sums[1]);
  }
  launch(box_product<P, Finish>, grid_of(product.row_tiles() * product.column_tiles(), parts),
         kBoxThreads, P::kSharedBytes, stream, product, outward, cut, finish);
  if (parts > 1)
    launch(add_box_parts<V, A, Finish>,
           grid_of(divide_up<int64_t>(divide_up<int64_t>(product.rows, V) * product.columns,
                                      kBoxThreads),
                   1),
           kBoxThreads, 0, stream, cut, product.rows, product.columns, finish);
}

// Calls f.operator()<kColumns>() with how many columns a tile should have, kFew at least.
template <typename E, int kFew, typename F>
void as_wide_as(int64_t columns, const F& f) {
  constexpr int kMost = sizeof(stored_t<E>) == 8 ? 32 : 64;
  if constexpr (kFew < 32) {
    if (columns <= kFew) return f.template operator()<kFew>();
  }
  if (kMost == 32 || columns <= 32) return f.template operator()<32>();
  if constexpr (kMost == 64) f.template operator()<64>();
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
