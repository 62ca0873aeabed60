// What a warp adds up of two products at once: of 16 kTiles rows of A and 8 kEights rows of B, for centers and radii.
#pragma once

#include "bounds/interval.h"
#include "core/cuda/operands.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// On the tensor cores, as the fragments of m16n8k16 lie.
template <typename E, int kTiles, int kEights, bool kAcrossA, bool kAcrossB>
struct TensorSums {
  using S = stored_t<E>;

  float values[2][kTiles][kEights][4];

  FUSEE_DEVICE void clear() {
    for (int kind = 0; kind < 2; ++kind)
      for (int u = 0; u < kTiles; ++u)
        for (int n = 0; n < kEights; ++n)
          for (int i = 0; i < 4; ++i) values[kind][u][n][i] = 0;
  }

  // The products of the operands' rows from these on. With kOneA the second has the magnitudes of a[0].
  template <bool kOneA>
  FUSEE_DEVICE void add(const Operand<S, kAcrossA> (&a)[2], const Operand<S, kAcrossB> (&b)[2],
                        int row, int column, int depth) {
    constexpr int kDepth = kIsHalf<E> ? 16 : 8;
    constexpr uint32_t kMagnitudes = kIsHalf<E> ? 0x7fff7fff : 0x7fffffff;
    for (int k = 0; k < depth; k += kDepth) {
      uint32_t left[kTiles][4];
      for (int kind = 0; kind < 2; ++kind) {
        for (int u = 0; u < kTiles; ++u) {
          if (kind == 0 || !kOneA) {
            detail::left_fragment(left[u], a[kind], a[kind].at(0, row + 16 * u, k));
          } else {
            for (uint32_t& word : left[u]) word &= kMagnitudes;
          }
        }
        for (int n = 0; n < kEights; n += 2) {
          uint32_t right[4];
          detail::right_fragments(right, b[kind], b[kind].at(0, column + 8 * n, k));
          for (int u = 0; u < kTiles; ++u)
            for (int i = 0; i < 2; ++i)
              detail::multiply_fragments<E>(values[kind][u][n + i], left[u],
                                            {right[2 * i], right[2 * i + 1]});
        }
      }
    }
  }

  // Stores the sums by columns, `pitch` apart.
  FUSEE_DEVICE void put(const Shared<float>& centers, const Shared<float>& radii, int pitch,
                        int row, int column) const {
    const int lane = static_cast<int>(threadIdx.x) & 31, g = lane / 4, t = lane % 4;
    for (int u = 0; u < kTiles; ++u)
      for (int n = 0; n < kEights; ++n)
        for (int i = 0; i < 4; ++i) {
          const int at = (column + 8 * n + 2 * t + i % 2) * pitch + row + 16 * u + g + i / 2 * 8;
          centers.store(at, values[0][u][n][i]);
          radii.store(at, values[1][u][n][i]);
        }
  }
};

// Where the n-th of the kCount rows of an operand is that a thread takes, one of kThreads: in vectors of N.
template <int kThreads, int N>
FUSEE_DEVICE int place_of(int thread, int n) {
  return N * thread + kThreads * N * (n / N) + n % N;
}

// In full precision. What is added at a time has a sum of its own, so that long sums lose less.
template <typename S, int kTiles, int kEights, bool kAcrossA, bool kAcrossB>
struct ScalarSums {
  static constexpr int V = vector_width<S>, kRows = 2 * kTiles, kColumns = 2 * kEights;
  // Neighbouring rows are loaded together where an operand's rows run along the sum. A result's two neighbouring
  // columns keep what a warp stores in different banks.
  static constexpr int kRowsInLine = kAcrossA ? (V < kRows ? V : kRows) : 1;
  static constexpr int kColumnsInLine = kAcrossB && V < kColumns ? V : 2;

  S values[2][kRows][kColumns];

  FUSEE_DEVICE void clear() { clear(values); }

  template <bool kOneA>
  FUSEE_DEVICE void add(const Operand<S, kAcrossA> (&a)[2], const Operand<S, kAcrossB> (&b)[2],
                        int row, int column, int depth) {
    const int lane = static_cast<int>(threadIdx.x) & 31;
    S part[2][kRows][kColumns];
    clear(part);
    for (int k = 0; k < depth; k += V) {
      S left[kRows][V];
      FUSEE_UNROLL
      for (int kind = 0; kind < 2; ++kind) {
        if (kind == 0 || !kOneA) {
          read<8, kRowsInLine>(left, a[kind], row, lane / 4, k);
        } else {
          for (auto& line : left)
            for (S& value : line) value = absolute(value);
        }
        S right[kColumns][V];
        read<4, kColumnsInLine>(right, b[kind], column, lane % 4, k);
        FUSEE_UNROLL
        for (int r = 0; r < kRows; ++r) {
          FUSEE_UNROLL
          for (int c = 0; c < kColumns; ++c)
            for (int v = 0; v < V; ++v) part[kind][r][c] += left[r][v] * right[c][v];
        }
      }
    }
    for (int kind = 0; kind < 2; ++kind)
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kColumns; ++c) values[kind][r][c] += part[kind][r][c];
  }

  FUSEE_DEVICE void put(const Shared<S>& centers, const Shared<S>& radii, int pitch, int row,
                        int column) const {
    constexpr int N = kRowsInLine;
    const int lane = static_cast<int>(threadIdx.x) & 31;
    for (int c = 0; c < kColumns; ++c)
      for (int r = 0; r < kRows; r += N) {
        const int at = (column + place_of<4, kColumnsInLine>(lane % 4, c)) * pitch + row +
                       place_of<8, N>(lane / 4, r);
        Vector<S, N> of_center, of_radius;
        for (int i = 0; i < N; ++i) {
          of_center[i] = values[0][r + i][c];
          of_radius[i] = values[1][r + i][c];
        }
        centers.store(at, of_center);
        radii.store(at, of_radius);
      }
  }

 private:
  static FUSEE_DEVICE void clear(S (&sums)[2][kRows][kColumns]) {
    for (auto& kind : sums)
      for (auto& line : kind)
        for (S& value : line) value = 0;
  }

  template <int kThreads, int N, bool kAcross, int kCount>
  static FUSEE_DEVICE void read(S (&out)[kCount][V], const Operand<S, kAcross>& operand, int first,
                                int thread, int k) {
    if constexpr (kAcross) {
      for (int v = 0; v < V; ++v)
        for (int n = 0; n < kCount; n += N) {
          const int at = operand.at(0, first + place_of<kThreads, N>(thread, n), k + v);
          const Vector<S, N> loaded = operand.tile.template load<N>(at);
          for (int i = 0; i < N; ++i) out[n + i][v] = loaded[i];
        }
    } else {
      for (int n = 0; n < kCount; ++n) {
        const int at = operand.at(0, first + place_of<kThreads, N>(thread, n), k);
        const Vector<S, V> loaded = operand.tile.template load<V>(at);
        for (int v = 0; v < V; ++v) out[n][v] = loaded[v];
      }
    }
  }
};

template <typename E, int kTiles, int kEights, bool kAcrossA, bool kAcrossB>
using BoxSums =
    std::conditional_t<kOnTensorCores<E>, TensorSums<E, kTiles, kEights, kAcrossA, kAcrossB>,
                       ScalarSums<stored_t<E>, kTiles, kEights, kAcrossA, kAcrossB>>;

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
