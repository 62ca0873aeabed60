// A block's matrix products: tiles of 16 rows, dealt out to the warps, times operands in shared memory.
#pragma once

#include "core/cuda/operands.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

inline constexpr int kProductWarps = 8, kProductThreads = 32 * kProductWarps;
// The tiles of a block of threads, kColumns wide.
template <typename T, int kColumns>
struct TileSize {
  static constexpr int kOfWarp = sizeof(T) == 2 ? 128 / kColumns : 2;
  static constexpr int kTiles = kProductWarps * kOfWarp;
  static constexpr int kRows = 16 * kTiles;
};

// What a thread holds of its warp's tiles, as the fragments of m16n8k16 lie: rows g, g, g + 8, g + 8 and columns
// 2 t, 2 t + 1, 2 t, 2 t + 1 of every eight, with g = lane / 4 and t = lane % 4.
template <typename E, int kColumns>
struct Sums {
  static constexpr int kOfWarp = TileSize<E, kColumns>::kOfWarp;
  static constexpr int kEights = kColumns / 8;

  accumulate_t<stored_t<E>> values[kOfWarp][kEights][4];

  FUSEE_DEVICE void clear() {
    for (int u = 0; u < kOfWarp; ++u)
      for (int n = 0; n < kEights; ++n)
        for (int i = 0; i < 4; ++i) values[u][n][i] = 0;
  }
};

// Some tiles of some blocks of a factor: those of `blocks` from block `block` on, each from its row `row` on.
struct Pass {
  int block, row, blocks, tiles;

  FUSEE_DEVICE int first_of_warp() const { return warp() * each(); }
  FUSEE_DEVICE int count_of_warp() const {
    const int left = blocks * tiles - first_of_warp();
    return left < each() ? (left > 0 ? left : 0) : each();
  }
  // Calls f(u, block, row) for tile u of the warp, counted from the pass's first block and row.
  template <int kOfWarp, typename F>
  FUSEE_DEVICE void for_each_tile(const F& f) const {
    const int first = first_of_warp(), count = count_of_warp();
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int u = 0; u < kOfWarp; ++u)
      if (u < count) f(u, (first + u) / tiles, (first + u) % tiles * 16);
  }

 private:
  FUSEE_DEVICE int warp() const { return static_cast<int>(threadIdx.x) / 32; }
  FUSEE_DEVICE int each() const { return divide_up(blocks * tiles, kProductWarps); }
};

// sums += a b over `depth` places, a whole number of steps; b begins at `b_first` of its operand.
template <typename E, typename T, int kColumns, bool kAcrossA, bool kAcrossB>
FUSEE_DEVICE void multiply(Sums<E, kColumns>& sums, const Pass& pass, const Operand<T, kAcrossA>& a,
                           const Operand<T, kAcrossB>& b, int depth, int b_first) {
  constexpr int kOfWarp = Sums<E, kColumns>::kOfWarp, kEights = Sums<E, kColumns>::kEights;
  int a_at[kOfWarp] = {}, b_at[kOfWarp] = {};
  pass.for_each_tile<kOfWarp>([&](int u, int block, int row) {
    a_at[u] = a.at(block, row, 0);
    b_at[u] = b.at(block, 0, 0) + b_first;
  });
  const int count = pass.count_of_warp();
  const int a_step = kAcrossA ? a.pitch : 1, b_step = kAcrossB ? b.pitch : 1;
  if constexpr (kOnTensorCores<E>) {
    constexpr int kDepth = kIsHalf<E> ? 16 : 8;
    for (int k = 0; k < depth; k += kDepth) {
      uint32_t of_b[kEights / 2][4];
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int u = 0; u < kOfWarp; ++u) {
        if (u >= count) break;
        if (u == 0 || b_at[u] != b_at[u - 1]) {
          for (int n = 0; n < kEights / 2; ++n)
            detail::right_fragments(of_b[n], b,
                                    b_at[u] + k * b_step + 16 * n * (kAcrossB ? 1 : b.pitch));
        }
        uint32_t of_a[4];
        detail::left_fragment(of_a, a, a_at[u] + k * a_step);
        for (int n = 0; n < kEights; ++n) {
          const uint32_t right[2] = {of_b[n / 2][n % 2 * 2], of_b[n / 2][n % 2 * 2 + 1]};
          detail::multiply_fragments<E>(sums.values[u][n], of_a, right);
        }
      }
    }
  } else {
    // Long sums are added up from short ones.
    constexpr int V = vector_width<T>;
    const int lane = static_cast<int>(threadIdx.x) & 31, g = lane / 4, t = lane % 4;
    Sums<E, kColumns> part;
    part.clear();
    for (int k = 0; k < depth; k += V) {
      T of_b[kEights][2][V];
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int u = 0; u < kOfWarp; ++u) {
        if (u >= count) break;
        if (u == 0 || b_at[u] != b_at[u - 1]) {
          for (int n = 0; n < kEights; ++n)
            for (int i = 0; i < 2; ++i)
              detail::along(of_b[n][i], b,
                            b_at[u] + k * b_step + (8 * n + 2 * t + i) * (kAcrossB ? 1 : b.pitch));
        }
        T of_a[2][V];
        for (int i = 0; i < 2; ++i)
          detail::along(of_a[i], a, a_at[u] + k * a_step + (g + 8 * i) * (kAcrossA ? 1 : a.pitch));
        for (int n = 0; n < kEights; ++n)
          for (int i = 0; i < 4; ++i)
            for (int v = 0; v < V; ++v) part.values[u][n][i] += of_a[i / 2][v] * of_b[n][i % 2][v];
      }
    }
    for (int u = 0; u < kOfWarp; ++u)
      for (int n = 0; n < kEights; ++n)
        for (int i = 0; i < 4; ++i) sums.values[u][n][i] += part.values[u][n][i];
  }
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
