// Operands of matrix products in shared memory, and their fragments: half types for the tensor cores, and float32
// where TF32 will do.
#pragma once

#include "core/cuda/kernel.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

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

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
