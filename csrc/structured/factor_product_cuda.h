// The product of some rows with a block-diagonal factor, or with a part of its rows: from global memory or the
// middle in shared memory, to either.
#pragma once

#include "structured/staging_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// How a block of threads walks over a factor: `rows` outputs of each of `blocks` blocks, each a sum over `depth`;
// so many blocks, tiles of 16 rows, and places of the sum at a time.
struct Walk {
  int blocks, rows, depth;
  int blocks_at_once, tiles_at_once, length;

  FUSEE_HOST_DEVICE int row_passes() const { return divide_up(rows, 16 * tiles_at_once); }
  FUSEE_HOST_DEVICE int passes() const { return divide_up(blocks, blocks_at_once) * row_passes(); }
  FUSEE_HOST_DEVICE int steps() const { return depth > 0 ? divide_up(depth, length) : 1; }
  FUSEE_DEVICE Pass pass(int i) const {
    const int block = i / row_passes() * blocks_at_once;
    const int row = i % row_passes() * tiles_at_once * 16;
    return {block, row, clamp(blocks - block, blocks_at_once),
            clamp(divide_up(rows - row, 16), tiles_at_once)};
  }
};

// The rows of a factor, (count, out, in) in memory. `row(block, row)` is that of a pass's row, or -1.
template <typename T, typename F>
struct RowsOfFactor {
  static constexpr bool kAcross = false;

  Global<const T> data;
  int depth;
  F row;

  static FUSEE_HOST_DEVICE int elements(const Walk& walk) {
    return walk.blocks_at_once * walk.tiles_at_once * 16 * padded<T>(walk.length);
  }
  FUSEE_DEVICE void copy(const Pass& pass, int first, int length, const Shared<T>& to) const {
    const int rows = 16 * pass.tiles;
    stage_lines(data, to, depth % vector_width<T> == 0, pass.blocks * rows, length,
                clamp(depth - first, length), [&](int i) {
                  const int at = row(pass.block + i / rows, pass.row + i % rows);
                  return Line{at < 0 ? -1 : static_cast<int64_t>(at) * depth + first,
                              i * padded<T>(length)};
                });
  }
  FUSEE_DEVICE Operand<T, kAcross> operand(const Pass& pass, int length,
                                           const Shared<T>& tile) const {
    return {tile, padded<T>(length), 16 * pass.tiles * padded<T>(length)};
  }
};

// The transposed factor: (count, in, out) in memory, of which rows of a pass are the columns from `first` on.
template <typename E>
struct ColumnsOfFactor {
  using T = stored_t<E>;
  static constexpr bool kAcross = true;

  Global<const T> data;
  int depth, columns;
  int first = 0;

  static FUSEE_HOST_DEVICE int elements(const Walk& walk) {
    return walk.blocks_at_once * walk.length * pitch(16 * walk.tiles_at_once);
  }
  FUSEE_DEVICE void copy(const Pass& pass, int from, int length, const Shared<T>& to) const {
    const int wanted = 16 * pass.tiles, column = first + pass.row;
    stage_lines(data, to, columns % vector_width<T> == 0 && first % vector_width<T> == 0,
                pass.blocks * length, wanted, clamp(columns - column, wanted), [&](int i) {
                  const int block = pass.block + i / length, place = from + i % length;
                  const int64_t at = (static_cast<int64_t>(block) * depth + place) * columns;
                  return Line{place < depth ? at + column : -1, i * pitch(wanted)};
                });
  }
  FUSEE_DEVICE Operand<T, kAcross> operand(const Pass& pass, int length,
                                           const Shared<T>& tile) const {
    const int apart = pitch(16 * pass.tiles);
    return {tile, apart, length * apart};
  }

 private:
  static FUSEE_HOST_DEVICE int pitch(int columns) { return columns + kAcrossPadding<E>; }
};

// Rows of a matrix in global memory, from `row` on.
template <int kColumns, typename E, Layout kLayout>
struct GlobalInput {
  using T = stored_t<E>;
  static constexpr bool kAcross = kLayout == Layout::kInterleaved;
  using Tile = Staged<kColumns, T, kLayout, kAcross ? kAcrossPadding<E> : vector_width<T>>;
  // Interleaved columns come through registers, so that nothing is gained by asking for them early.
  static constexpr int kBuffers = kAcross ? 1 : 2;

  Columns<const T, kLayout> from;
  int64_t row;

  static FUSEE_HOST_DEVICE int elements(const Walk& walk) {
    return walk.blocks_at_once * Tile::stride(walk.length);
  }
  FUSEE_DEVICE void copy(const Pass& pass, int first, int length, const Shared<T>& to) const {
    Tile::copy(from, {row, pass.block, pass.blocks, first, length}, to);
  }
  FUSEE_DEVICE Operand<T, kAcross> operand(int length, const Shared<T>& tile) const {
    return {tile, Tile::pitch(length), Tile::stride(length)};
  }
  FUSEE_DEVICE int offset(const Pass&, int) const { return 0; }
};

// The middle in shared memory: element `index` of block `block` is a row, with what is at the rows' own numbers.
template <int kColumns, typename E>
struct Middle {
  using T = stored_t<E>;
  static constexpr bool kAcross = true;
  static constexpr int kBuffers = 2;
  static constexpr int kPitch = kColumns + kAcrossPadding<E>;

  Shared<T> tile;
  int blocks, size;

  // Blocks are so much more apart that rows of eight blocks in line lie in different banks.
  static FUSEE_HOST_DEVICE int stride(int size) {
    return whole_steps(size) * kPitch + kAcrossPadding<E>;
  }
  static int64_t elements(int64_t blocks, int64_t size) {
    return blocks * ((size + kStep - 1) / kStep * kStep * kPitch + kAcrossPadding<E>);
  }
  static FUSEE_HOST_DEVICE int elements(const Walk&) { return 0; }

  FUSEE_DEVICE void copy(const Pass&, int, int, const Shared<T>&) const {}
  FUSEE_DEVICE Operand<T, kAcross> operand(int, const Shared<T>&) const {
    return {tile, kPitch, stride(size)};
  }
  FUSEE_DEVICE int offset(const Pass& pass, int first) const {
    return pass.block * stride(size) + first * kPitch;
  }

  // Zeros behind the last element of every block, up to a whole step.
  FUSEE_DEVICE void clear_padding() const {
    const int rest = whole_steps(size) - size;
    for (int i = static_cast<int>(threadIdx.x); i < blocks * rest * kColumns;
         i += kProductThreads) {
      const int row = i / kColumns, block = row / rest;
      tile.store(block * stride(size) + (size + row % rest) * kPitch + i % kColumns, T{});
    }
  }

  // Every block's elements to its columns of a matrix, of which this is the part from `block` on.
  FUSEE_DEVICE void write(const Columns<T, Layout::kBlocked>& to, int64_t row, int block) const {
    constexpr int V = vector_width<T>;
    const int left = to.rows - row < kColumns ? static_cast<int>(to.rows - row) : kColumns;
    const int elements = blocks * size, first = to.column(block, 0);
    const bool in_vectors = to.width() % V == 0 && first % V == 0 && elements % V == 0;
    const auto element = [&](int at, int column) {
      return tile.load(at / size * stride(size) + at % size * kPitch + column);
    };
    // Two vectors in line are a sector's; further rows follow before further columns.
    const int chunk = in_vectors ? V : 1, chunks = divide_up(elements, 2 * chunk) * 2;
    for (int i = static_cast<int>(threadIdx.x); i < chunks * left; i += kProductThreads) {
      const int column = i / 2 % left, at = (i / (2 * left) * 2 + i % 2) * chunk;
      if (at >= elements) continue;
      const int64_t place = (row + column) * to.width() + first + at;
      if (in_vectors) {
        Vector<T, V> values;
        for (int v = 0; v < V; ++v) values[v] = element(at + v, column);
        store(to.data, place, values);
      } else {
        store(to.data, place, element(at, column));
      }
    }
  }
};

// Sums into the middle: `place(block, row)` is their place in it, or -1.
template <int kColumns, typename E, typename F>
struct ToMiddle {
  using T = stored_t<E>;

  Middle<kColumns, E> middle;
  F place;

  FUSEE_DEVICE void write(const Sums<E, kColumns>& sums, const Pass& pass) const {
    const int lane = static_cast<int>(threadIdx.x) & 31;
    pass.for_each_tile<Sums<E, kColumns>::kOfWarp>([&](int u, int block, int row) {
      for (int half = 0; half < 2; ++half) {
        const int at = place(pass.block + block, pass.row + row + lane / 4 + 8 * half);
        if (at < 0) continue;
        for (int n = 0; n < kColumns / 8; ++n)
          middle.tile.template store<2>(
              at + 8 * n + lane % 4 * 2,
              Vector<T, 2>{{static_cast<T>(sums.values[u][n][2 * half]),
                            static_cast<T>(sums.values[u][n][2 * half + 1])}});
      }
    });
  }
};

// Sums to rows of a matrix in global memory, from `row` on; the walk's blocks are those from `block` on.
template <int kColumns, typename T, Layout kLayout>
struct ToGlobal {
  Columns<T, kLayout> to;
  Global<const T> bias;
  int64_t row;
  int block;
  Shared<T> memory;

  template <typename E>
  FUSEE_DEVICE void write(const Sums<E, kColumns>& sums, const Pass& pass) const {
    write_columns(sums, Pass{pass.block + block, pass.row, pass.blocks, pass.tiles}, to, bias, row,
                  memory);
  }
};

// How many elements of shared memory the staged operands take.
template <typename Weights, typename Input>
FUSEE_HOST_DEVICE int staged_elements(const Walk& walk) {
  return Input::kBuffers * (Weights::elements(walk) + Input::elements(walk));
}

// Passes [begin, end) of a walk. With two buffers the operands of a step are copied during the one before.
template <typename E, int kColumns, typename T, typename Weights, typename Input, typename Output>
FUSEE_DEVICE void multiply_factor(const Walk& walk, int begin, int end, const Weights& weights,
                                  const Input& input, const Output& output,
                                  const Shared<T>& memory) {
  constexpr bool kAhead = Input::kBuffers == 2;
  const int of_weights = Weights::elements(walk), of_buffer = of_weights + Input::elements(walk);
  const int steps = walk.steps(), last = end * steps;
  const auto copy = [&](int step) {
    const Pass pass = walk.pass(step / steps);
    const int first = step % steps * walk.length, at = kAhead ? step % 2 * of_buffer : 0;
    weights.copy(pass, first, walk.length, memory.slice(at, of_weights));
    input.copy(pass, first, walk.length, memory.slice(at + of_weights, of_buffer - of_weights));
  };
  Sums<E, kColumns> sums;
  if (kAhead && begin * steps < last) {
    copy(begin * steps);
    cp_async_commit();
  }
  for (int step = begin * steps; step < last; ++step) {
    if (!kAhead) copy(step);
    if (kAhead && step + 1 < last) copy(step + 1);
    cp_async_commit();
    cp_async_wait_group<kAhead ? 1 : 0>();
    __syncthreads();
    const Pass pass = walk.pass(step / steps);
    const int first = step % steps * walk.length, at = kAhead ? step % 2 * of_buffer : 0;
    if (first == 0) sums.clear();
    const int left = whole_steps(walk.depth - first);
    multiply(sums, pass, weights.operand(pass, walk.length, memory.slice(at, of_weights)),
             input.operand(walk.length, memory.slice(at + of_weights, of_buffer - of_weights)),
             left < walk.length ? left : walk.length, input.offset(pass, first));
    if (step % steps == steps - 1) output.write(sums, pass);
    __syncthreads();
  }
  cp_async_wait_group<0>();
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
