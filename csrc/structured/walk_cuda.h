// How blocks of threads share out a factor, by its sizes and the shared memory there is.
#pragma once

#include <algorithm>

#include "core/cuda/torch_stream.h"
#include "structured/factor_product_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// The most shared memory of a block, which a kernel must ask for, and the device's processors. The emulator counts
// bytes, not time, so there it is one processor, for which nothing is read twice that need not be.
#if defined(FUSEE_EMULATED)
inline int most_shared_bytes() { return 227 * 1024; }
inline int processors() { return 1; }
#else
inline int most_shared_bytes() {
  int device = 0, bytes = 48 * 1024;
  static_cast<void>(cudaGetDevice(&device));
  static_cast<void>(
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}
inline int processors() { return multiprocessor_count(); }
#endif

// A walk whose staged operands have at most `elements`. Blocks that are interleaved, on either side, are taken
// by whole sectors of 32 bytes, or all at once. One with length 0 if there is none.
template <typename T, int kColumns, typename Weights, typename Input>
Walk plan_walk(int blocks, int rows, int depth, bool interleaved, int64_t elements) {
  constexpr int kTiles = TileSize<T, kColumns>::kTiles;
  constexpr int kLongest = 128 / static_cast<int>(sizeof(T)), kShort = std::min(32, kLongest);
  const int all_tiles = std::max(1, divide_up(rows, 16));
  const int most = std::max(kStep, std::min(kLongest, whole_steps(depth)));
  Walk walk{blocks, rows, depth, 0, 0, most};
  if (interleaved) {
    walk.blocks_at_once = blocks <= kTiles && blocks % 16 != 0 ? blocks : std::min(blocks, 16);
    walk.tiles_at_once = kTiles / std::max(1, walk.blocks_at_once);
  } else {
    walk.tiles_at_once = kTiles;
  }
  const int passes = divide_up(all_tiles, walk.tiles_at_once);
  walk.tiles_at_once = divide_up(all_tiles, passes);
  if (!interleaved) walk.blocks_at_once = std::min(blocks, kTiles / walk.tiles_at_once);
  walk.blocks_at_once = std::max(1, walk.blocks_at_once);
  const auto fits = [&] { return staged_elements<Weights, Input>(walk) <= elements; };
  const auto shorten = [&](int least) {
    while (!fits() && walk.length > least) walk.length = whole_steps(walk.length / 2);
  };
  const auto share = [&](int fewest) {
    while (!fits() && walk.blocks_at_once > fewest)
      walk.blocks_at_once = std::max(fewest, divide_up(walk.blocks_at_once, 2));
  };
  const int sector = std::min(blocks, 32 / static_cast<int>(sizeof(T)));
  shorten(std::min(most, kShort));
  if (!interleaved) share(divide_up(kProductWarps, walk.tiles_at_once));
  shorten(kStep);
  if (!interleaved) share(1);
  while (!fits() && walk.tiles_at_once > 1) walk.tiles_at_once = divide_up(walk.tiles_at_once, 2);
  if (interleaved) share(sector);
  if (!fits()) walk.length = 0;
  return walk;
}

// The columns of `blocks` blocks of `size`, of a tensor of rows.
template <typename T, Layout kLayout>
Columns<const T, kLayout> input_columns(const Tensor& tensor, int64_t blocks, int64_t size) {
  return {input<T>(tensor), tensor.size(0), static_cast<int>(blocks), static_cast<int>(size)};
}
template <typename T, Layout kLayout>
Columns<T, kLayout> output_columns(const Tensor& tensor, int64_t blocks, int64_t size) {
  return {output<T>(tensor), tensor.size(0), static_cast<int>(blocks), static_cast<int>(size)};
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
