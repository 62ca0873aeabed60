// Between global memory and the tiles in shared memory: the columns of blocks, which are neighbours or lie
// interleaved with those of the other blocks.
#pragma once

#include "structured/tile_product_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

enum class Layout {
  kBlocked,      // element i of block b is column b size + i
  kInterleaved,  // and here i count + b
};

// A matrix whose columns are the elements of `count` blocks of `size` each. It begins at a whole vector.
template <typename T, Layout kLayout>
struct Columns {
  using V = std::remove_const_t<T>;
  static constexpr bool kInterleaved = kLayout == Layout::kInterleaved;

  Global<T> data;
  int64_t rows;
  int count, size;

  FUSEE_HOST_DEVICE int width() const { return count * size; }
  FUSEE_HOST_DEVICE int column(int block, int index) const {
    return kInterleaved ? index * count + block : block * size + index;
  }
  // Whether what lies together, a block's elements or the blocks' elements of one index, is whole vectors.
  FUSEE_HOST_DEVICE bool in_vectors() const {
    return (kInterleaved ? count : size) % vector_width<V> == 0;
  }
};

FUSEE_DEVICE int clamp(int n, int most) { return n < 0 ? 0 : n < most ? n : most; }

// A line of a tile: where it begins in global memory, or less than 0 for zeros, and in the tile.
struct Line {
  int64_t from;
  int to;
};

// Copies `valid` elements of each line and zeros up to `length`. Lines that lie one after another in memory
// should have neighbouring numbers. The copies are asynchronous where whole vectors can be copied.
template <typename T, typename F>
FUSEE_DEVICE void stage_lines(Global<const T> from, const Shared<T>& to, bool in_vectors, int lines,
                              int length, int valid, const F& line) {
  constexpr int V = vector_width<T>;
  const int thread = static_cast<int>(threadIdx.x);
  if (in_vectors) {
    const int chunks = length / V;
    for (int i = thread; i < lines * chunks; i += kProductThreads) {
      const int at = i % chunks * V;
      const Line place = line(i / chunks);
      const int count = place.from < 0 ? 0 : clamp(valid - at, V);
      cp_async<V>(to, place.to + at, from, place.from + at, count);
    }
    return;
  }
  for (int i = thread; i < lines * valid; i += kProductThreads) {
    const int at = i % valid;
    const Line place = line(i / valid);
    T value{};
    if (place.from >= 0) value = load(from, place.from + at);
    to.store(place.to + at, value);
  }
  const int rest = length - valid;
  for (int i = thread; i < lines * rest; i += kProductThreads)
    to.store(line(i / rest).to + valid + i % rest, T{});
}

// Rows and elements of blocks: elements from `index` on, padded with zeros to `length`.
struct Piece {
  int64_t row;
  int block, blocks, index, length;
};

// kRows rows of a piece as an operand: with blocks that lie one after another its rows are the matrix's,
// interleaved they are elements. They are kPadding apart from whole ones.
template <int kRows, typename T, Layout kLayout, int kPadding>
struct Staged {
  static constexpr bool kInterleaved = kLayout == Layout::kInterleaved;

  static FUSEE_HOST_DEVICE int pitch(int length) {
    return (kInterleaved ? kRows : length) + kPadding;
  }
  // Rows of two blocks that a warp stores at once lie in different banks.
  static FUSEE_HOST_DEVICE int stride(int length) {
    return kInterleaved ? length * pitch(length) + 4 * vector_width<T>
                        : kRows * pitch(length) + length;
  }

  static FUSEE_DEVICE void copy(const Columns<const T, kLayout>& from, const Piece& piece,
                                const Shared<T>& to) {
    const int valid = clamp(from.size - piece.index, piece.length);
    if constexpr (kInterleaved) {
      copy_interleaved(from, piece, valid, to);
    } else {
      const int step = pitch(piece.length);
      stage_lines(
          from.data, to, from.in_vectors(), kRows * piece.blocks, piece.length, valid, [&](int i) {
            const int row = i / piece.blocks, block = i % piece.blocks;
            const int64_t at = piece.row + row;
            return Line{at < from.rows
                            ? at * from.width() + from.column(piece.block + block, piece.index)
                            : -1,
                        block * stride(piece.length) + row * step};
          });
    }
  }

 private:
  // Through registers: vectors of several rows, of which so many are asked for before the first is stored.
  static constexpr int V = vector_width<T>, kTogether = kIsHalf<T> ? 2 : 1;
  static constexpr int kAsked = 4 / kTogether;

  struct Part {
    int row, index, block;
    Vector<T, V> values[kTogether];
  };

  static FUSEE_DEVICE void copy_interleaved(const Columns<const T, kLayout>& from,
                                            const Piece& piece, int valid, const Shared<T>& to) {
    // Two vectors in line are a sector's, and further rows follow before further columns, so that what a warp
    // stores lies next to each other.
    constexpr int kLine = 2, kOfRows = kRows / kTogether;
    const int step = pitch(piece.length), apart = stride(piece.length);
    const bool whole = piece.blocks == from.count;
    const int first = from.column(piece.block, piece.index);
    const int thread = static_cast<int>(threadIdx.x);
    const int elements = piece.length * piece.blocks, valid_elements = valid * piece.blocks;
    const bool in_vectors = from.in_vectors() && piece.block % V == 0 && piece.blocks % V == 0;
    if (!in_vectors && !(whole && from.width() % V == 0)) {
      for (int i = thread; i < elements * kRows; i += kProductThreads) {
        const int row = i / elements, e = i % elements;
        const int index = e / piece.blocks, block = e % piece.blocks;
        const int64_t at = piece.row + row;
        T value{};
        if (at < from.rows && e < valid_elements)
          value = load(from.data, at * from.width() + first + index * from.count + block);
        to.store(block * apart + index * step + row, value);
      }
      return;
    }
    const int all = divide_up(elements, kLine * V) * kLine * kOfRows;
    for (int i = thread; i < all; i += kAsked * kProductThreads) {
      Part parts[kAsked];
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int a = 0; a < kAsked; ++a) {
        const int n = i + a * kProductThreads;
        const int e = (n / (kLine * kOfRows) * kLine + n % kLine) * V;
        Part& part = parts[a];
        part = {n < all && e < elements ? n / kLine % kOfRows * kTogether : -1,
                e / piece.blocks,
                e % piece.blocks,
                {}};
        for (int k = 0; k < kTogether; ++k) {
          const int64_t at = piece.row + part.row + k;
          if (part.row >= 0 && at < from.rows && e < valid_elements)
            part.values[k] = load<V>(
                from.data, at * from.width() + first + part.index * from.count + part.block);
        }
      }
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int a = 0; a < kAsked; ++a) {
        if (parts[a].row < 0) continue;
        if (in_vectors)
          put_in_turns(parts[a], i % kLine != 0, step, apart, to);
        else
          put_across_blocks(parts[a], piece.blocks, step, apart, to);
      }
    }
  }

  static FUSEE_DEVICE void put(const Part& part, int v, int at, const Shared<T>& to) {
    Vector<T, kTogether> together;
    for (int k = 0; k < kTogether; ++k) together[k] = part.values[k][v];
    to.store(at + part.row, together);
  }
  // Elements of one index. Neighbours begin at one and at the other of two, so as not to store to the same banks.
  static FUSEE_DEVICE void put_in_turns(const Part& given, bool odd, int step, int apart,
                                        const Shared<T>& to) {
    Part part = given;
    const int at = part.block * apart + part.index * step;
    for (int v = 0; v < V; v += 2) {
      for (int k = 0; k < kTogether; ++k) {
        const T one = part.values[k][v], other = part.values[k][v + 1];
        part.values[k][v] = odd ? other : one;
        part.values[k][v + 1] = odd ? one : other;
      }
      put(part, v, at + (v + (odd ? 1 : 0)) * apart, to);
      put(part, v + 1, at + (v + (odd ? 0 : 1)) * apart, to);
    }
  }
  static FUSEE_DEVICE void put_across_blocks(const Part& part, int blocks, int step, int apart,
                                             const Shared<T>& to) {
    int block = part.block, index = part.index;
    for (int v = 0; v < V; ++v) {
      put(part, v, block * apart + index * step, to);
      if (++block == blocks) {
        block = 0;
        ++index;
      }
    }
  }
};

// What a pass gives of every row of the output: runs of neighbouring columns, as which it lies in shared memory.
template <typename T, Layout kLayout>
struct Runs {
  const Columns<T, kLayout>& out;
  const Pass& pass;
  int inner, outer, apart, first;

  FUSEE_DEVICE Runs(const Columns<T, kLayout>& out_, const Pass& pass_) : out(out_), pass(pass_) {
    const int rows = clamp(out.size - pass.row, 16 * pass.tiles);
    inner = Columns<T, kLayout>::kInterleaved ? pass.blocks : rows;
    outer = Columns<T, kLayout>::kInterleaved ? rows : pass.blocks;
    apart = Columns<T, kLayout>::kInterleaved ? out.count : out.size;
    first = out.column(pass.block, pass.row);
  }
  FUSEE_DEVICE int columns() const { return inner * outer; }
  // Where element `row` of a block is among them, or -1.
  FUSEE_DEVICE int at(int block, int row) const {
    if constexpr (Columns<T, kLayout>::kInterleaved)
      return row < outer ? row * inner + block : -1;
    else
      return row < inner ? block * inner + row : -1;
  }
  FUSEE_DEVICE int column(int at) const { return first + at / inner * apart + at % inner; }
  FUSEE_DEVICE bool in_vectors() const {
    constexpr int V = vector_width<T>;
    if (out.width() % V != 0 || first % V != 0) return false;
    return inner == apart ? columns() % V == 0 : inner % V == 0 && apart % V == 0;
  }
};

// Rows of output in shared memory. Elements of interleaved blocks are exchanged within 64 bytes, so that what a
// warp stores, a fragment's rows and columns, lies in different banks.
template <typename T, int kColumns, bool kExchange>
struct OutputTile {
  static constexpr int V = vector_width<T>;
  static constexpr int kPitch = TileSize<T, kColumns>::kRows + (kExchange ? 0 : V);

  Shared<T> tile;

  static FUSEE_DEVICE int exchange_vectors(int at) { return at ^ at / (8 * V) % 4 * V; }
  static FUSEE_DEVICE int place(int row, int at) {
    if constexpr (!kExchange) return row * kPitch + at;
    return row * kPitch + (exchange_vectors(at) ^ row / 2 % 4 * (V / 4));
  }
  FUSEE_DEVICE void store(int row, int at, T value) const { tile.store(place(row, at), value); }
  FUSEE_DEVICE T load(int row, int at) const { return tile.load(place(row, at)); }
  FUSEE_DEVICE Vector<T, V> load_vector(int row, int at) const {
    if constexpr (!kExchange) return tile.template load<V>(row * kPitch + at);
    const uint4 words =
        fusee::bit_cast<uint4>(tile.template load<V>(row * kPitch + exchange_vectors(at)));
    const bool one = row / 2 % 2 != 0, two = row / 4 % 2 != 0;
    const uint4 by_one = one ? make_uint4(words.y, words.x, words.w, words.z) : words;
    const uint4 by_two = two ? make_uint4(by_one.z, by_one.w, by_one.x, by_one.y) : by_one;
    return fusee::bit_cast<Vector<T, V>>(by_two);
  }
};

// How many elements of shared memory `write_columns` takes.
template <typename T, int kColumns>
inline constexpr int kOutputElements =
    TileSize<T, kColumns>::kRows + kColumns * (TileSize<T, kColumns>::kRows + vector_width<T>);

// The sums of a pass, with the bias added, to its columns of the rows from `first_row` on.
template <int kColumns, typename E, typename T, Layout kLayout>
FUSEE_DEVICE void write_columns(const Sums<E, kColumns>& sums, const Pass& pass,
                                const Columns<T, kLayout>& out, Global<const T> bias,
                                int64_t first_row, const Shared<T>& memory) {
  using A = accumulate_t<T>;
  using Tile = OutputTile<T, kColumns, kLayout == Layout::kInterleaved && sizeof(T) <= 4>;
  constexpr int V = vector_width<T>, kRows = TileSize<T, kColumns>::kRows;
  const Runs<T, kLayout> runs(out, pass);
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, columns = runs.columns();
  const Shared<T> biases = memory.slice(0, kRows);
  const Tile tile{memory.slice(kRows, kColumns * Tile::kPitch)};
  if (bias) {
    for (int i = thread; i < columns; i += kProductThreads)
      biases.store(i, load(bias, runs.column(i)));
    __syncthreads();
  }
  pass.for_each_tile<Sums<E, kColumns>::kOfWarp>([&](int u, int block, int row) {
    for (int half = 0; half < 2; ++half) {
      const int at = runs.at(block, row + lane / 4 + 8 * half);
      if (at < 0) continue;
      const A added = bias ? static_cast<A>(biases.load(at)) : A(0);
      for (int n = 0; n < kColumns / 8; ++n)
        for (int i = 0; i < 2; ++i)
          tile.store(8 * n + lane % 4 * 2 + i, at,
                     static_cast<T>(sums.values[u][n][2 * half + i] + added));
    }
  });
  __syncthreads();
  const int rows =
      out.rows - first_row < kColumns ? static_cast<int>(out.rows - first_row) : kColumns;
  if (runs.in_vectors()) {
    const int chunks = columns / V;
    for (int i = thread; i < chunks * rows; i += kProductThreads) {
      const int at = i % chunks * V, row = i / chunks;
      store(out.data, (first_row + row) * out.width() + runs.column(at), tile.load_vector(row, at));
    }
  } else {
    for (int i = thread; i < columns * rows; i += kProductThreads) {
      const int at = i % columns, row = i / columns;
      store(out.data, (first_row + row) * out.width() + runs.column(at), tile.load(row, at));
    }
  }
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
