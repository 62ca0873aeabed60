// A block's matrix products: tiles of 16 rows, dealt out to the warps, times operands in shared memory. Half
// types go through the tensor cores, and float32 where TF32 will do; otherwise it keeps its precision, as
// float64 does.
#pragma once

#include "core/cuda/kernel.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

inline constexpr int kProductWarps = 8, kProductThreads = 32 * kProductWarps;
// The depth of a step on the tensor cores; what is staged is padded to whole ones.
inline constexpr int kStep = 16;

template <typename T>
inline constexpr bool kIsHalf = sizeof(T) == 2;

// Elements are multiplied as they are stored, or float32 as this, rounded to it.
struct Tf32 {
  float value;
};
template <typename E>
inline constexpr bool kIsTf32 = std::is_same_v<E, Tf32>;
template <typename E>
using stored_t = std::conditional_t<kIsTf32<E>, float, E>;
template <typename E>
inline constexpr bool kOnTensorCores = kIsHalf<E> || kIsTf32<E>;

// Calls f<E>() with what elements stored as T are multiplied as.
template <typename T, typename F>
auto as_multiplied(bool tf32, const F& f) {
  if constexpr (std::is_same_v<T, float>) {
    if (tf32) return f.template operator()<Tf32>();
  }
  return f.template operator()<T>();
}

FUSEE_HOST_DEVICE int whole_steps(int n) { return (n + kStep - 1) / kStep * kStep; }
template <typename I>
FUSEE_HOST_DEVICE I divide_up(I n, I by) {
  return (n + by - 1) / by;
}

// Rows in shared memory are a vector apart from whole ones, so that eight in line lie in different banks.
template <typename T>
FUSEE_HOST_DEVICE int padded(int n) {
  return n + vector_width<T>;
}
// So are rows along the sum, but for TF32, of which a warp reads eight neighbours of each of four rows.
template <typename E>
inline constexpr int kAcrossPadding = kIsTf32<E> ? 8 : vector_width<stored_t<E>>;

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

// An operand of every block. With kAcross its rows run along the sum, otherwise across it.
template <typename T, bool kAcross_>
struct Operand {
  static constexpr bool kAcross = kAcross_;

  Shared<T> tile;
  int pitch;   // from one row to the next
  int stride;  // from one block to the next

  FUSEE_DEVICE int at(int block, int place, int depth) const {
    return block * stride + (kAcross ? depth * pitch + place : place * pitch + depth);
  }
};

namespace detail {

// The fragment of a tile's rows, and those of 16 columns: of m16n8k16, or of m16n8k8 where elements are float32.
template <typename T, bool kAcross>
FUSEE_DEVICE void left_fragment(uint32_t (&out)[4], const Operand<T, kAcross>& a, int at) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if constexpr (kAcross) {
    ldmatrix_trans(out, a.tile, at + (lane / 16 * 8 + lane % 8) * a.pitch + lane / 8 % 2 * 8);
  } else {
    ldmatrix(out, a.tile, at + lane % 16 * a.pitch + lane / 16 * 8);
  }
}
template <typename T, bool kAcross>
FUSEE_DEVICE void right_fragments(uint32_t (&out)[4], const Operand<T, kAcross>& b, int at) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if constexpr (kAcross) {
    ldmatrix_trans(out, b.tile, at + lane % 16 * b.pitch + lane / 16 * 8);
  } else {
    ldmatrix(out, b.tile, at + (lane / 16 * 8 + lane % 8) * b.pitch + lane / 8 % 2 * 8);
  }
}

// A row of an 8x8 matrix of 2-byte elements is four floats.
FUSEE_DEVICE void four_of_tf32(uint32_t (&out)[4], const Shared<float>& tile, int at) {
  auto* const row = reinterpret_cast<uint16_t*>(tile.address<4>(at));
#if defined(FUSEE_EMULATED)
  ldmatrix(out, Shared<uint16_t>(row, 8), 0);
#else
  ldmatrix(out, Shared<uint16_t>(row), 0);
#endif
  for (uint32_t& word : out) word = to_tf32(fusee::bit_cast<float>(word));
}
template <bool kAcross>
FUSEE_DEVICE void left_fragment(uint32_t (&out)[4], const Operand<float, kAcross>& a, int at) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if constexpr (kAcross) {
    for (int i = 0; i < 4; ++i)
      out[i] = to_tf32(a.tile.load(at + (lane % 4 + i / 2 * 4) * a.pitch + lane / 4 + i % 2 * 8));
  } else {
    four_of_tf32(out, a.tile, at + lane % 16 * a.pitch + lane / 16 * 4);
  }
}
template <bool kAcross>
FUSEE_DEVICE void right_fragments(uint32_t (&out)[4], const Operand<float, kAcross>& b, int at) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if constexpr (kAcross) {
    for (int i = 0; i < 4; ++i)
      out[i] = to_tf32(b.tile.load(at + (lane % 4 + i % 2 * 4) * b.pitch + lane / 4 + i / 2 * 8));
  } else {
    four_of_tf32(out, b.tile, at + (lane / 16 * 8 + lane % 8) * b.pitch + lane / 8 % 2 * 4);
  }
}

template <typename E>
FUSEE_DEVICE void multiply_fragments(float (&sums)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  if constexpr (kIsTf32<E>)
    mma_m16n8k8_tf32(sums, a, b);
  else
    mma_m16n8k16<E>(sums, a, b);
}

// V neighbours along the sum.
template <int V, typename T, bool kAcross>
FUSEE_DEVICE void along(T (&out)[V], const Operand<T, kAcross>& operand, int at) {
  if constexpr (kAcross) {
    for (int i = 0; i < V; ++i) out[i] = operand.tile.load(at + i * operand.pitch);
  } else {
    const Vector<T, V> values = operand.tile.template load<V>(at);
    for (int i = 0; i < V; ++i) out[i] = values[i];
  }
}

}  // namespace detail

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
