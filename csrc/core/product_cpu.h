// The product of a factor, read as broadcast scalars, with lines of vectors: a tile of features by
// vectors stays in registers over the sum.
#pragma once

#include <algorithm>
#include <array>

#include "core/lanes_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// The register tile: what the sums, a line and a broadcast scalar fit in.
inline constexpr int kTileVectors = 2;
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kTileFeatures = 8;
#elif defined(__AVX__)
inline constexpr int kTileFeatures = 6;
#else
inline constexpr int kTileFeatures = 4;
#endif

// The sum is added up over so many terms before it goes to memory.
inline constexpr int64_t kTileDepth = 256;

template <typename A>
inline constexpr int64_t kTileLanes = kTileVectors * kLanes<A>;

// Element (feature, depth) of a matrix, which may lie in segments along the depth.
template <typename A>
struct Factor {
  static constexpr int64_t kWhole = int64_t{1} << 62;

  const A* data;
  int64_t feature_stride, depth_stride;
  int64_t segment = kWhole, segment_stride = 0;

  const A* at(int64_t feature, int64_t depth) const {
    return data + feature * feature_stride + depth / segment * segment_stride +
           depth % segment * depth_stride;
  }
};

// Line `depth` of tile t begins at data + t * tile_stride + depth * line_stride.
template <typename A>
struct Lines {
  const A* data;
  int64_t line_stride, tile_stride;
};

// kMagnitudes takes the lines' magnitudes.
template <typename A, int kFeatures, int kVectors, bool kMagnitudes>
void multiply_tile(const Factor<A>& factor, const A* lines, int64_t line_stride, int64_t depth,
                   A* const* out, int64_t offset, bool add) {
  constexpr int n = kLanes<A>;
  Vector<A> sums[kFeatures][kVectors] = {};
  const A* segment = factor.data;
  for (int64_t begin = 0; begin < depth; begin += factor.segment) {
    const A* scalars = segment;
    for (int64_t k = begin; k < std::min(depth, begin + factor.segment); ++k) {
      Vector<A> line[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        line[v] = load_vector(lines + v * n);
        if constexpr (kMagnitudes) line[v] = magnitude<A>(line[v]);
      }
#pragma GCC unroll 16
      for (int f = 0; f < kFeatures; ++f) {
        const A scalar = scalars[f * factor.feature_stride];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[f][v] += scalar * line[v];
      }
      scalars += factor.depth_stride;
      lines += line_stride;
    }
    segment += factor.segment_stride;
  }
#pragma GCC unroll 16
  for (int f = 0; f < kFeatures; ++f) {
    A* to = out[f] + offset;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      store_vector<A>(add ? load_vector(to + v * n) + sums[f][v] : sums[f][v], to + v * n);
  }
}

template <typename A>
using TileFunction = void (*)(const Factor<A>&, const A*, int64_t, int64_t, A* const*, int64_t,
                              bool);

template <typename A, int kVectors, bool kMagnitudes, int... kFeatures>
constexpr auto tile_functions(std::integer_sequence<int, kFeatures...>) {
  return std::array<TileFunction<A>, sizeof...(kFeatures)>{
      &multiply_tile<A, kFeatures + 1, kVectors, kMagnitudes>...};
}

// How many tiles a product goes through.
template <typename A>
int64_t tiles_of(int64_t features, int64_t depth, int64_t vectors) {
  return (features + kTileFeatures - 1) / kTileFeatures *
         ((vectors + kTileVectors - 1) / kTileVectors) *
         std::max<int64_t>(1, (depth + kTileDepth - 1) / kTileDepth);
}

struct Nothing {
  void operator()() const {}
};

// out(feature) is where a feature's line begins in the first tile. The lines have `vectors` vectors in
// all, a tile kTileVectors of them. The result is set, or added to what is there. before() is called
// before each tile.
template <bool kMagnitudes = false, typename A, typename Out, typename Before = Nothing>
void multiply(const Factor<A>& factor, int64_t features, int64_t depth, const Lines<A>& lines,
              int64_t vectors, const Out& out, int64_t out_tile_stride, bool add,
              Before&& before = {}) {
  constexpr std::make_integer_sequence<int, kTileFeatures> counts;
  static constexpr auto kWhole = tile_functions<A, kTileVectors, kMagnitudes>(counts);
  static constexpr auto kSingle = tile_functions<A, 1, kMagnitudes>(counts);
  const int64_t panels = (features + kTileFeatures - 1) / kTileFeatures;
  for (int64_t begin = 0; begin < depth || begin == 0; begin += kTileDepth) {
    const int64_t length = std::min(kTileDepth, depth - begin);
    int64_t first = 0;
    for (int64_t panel = 0; panel < panels; ++panel) {
      // Panels of nearly equal size.
      const int64_t count = (features - first + panels - panel - 1) / (panels - panel);
      A* to[kTileFeatures];
      for (int64_t f = 0; f < count; ++f) to[f] = out(first + f);
      Factor<A> part = factor;
      part.data = factor.at(first, begin);
      for (int64_t done = 0, tile = 0; done < vectors; done += kTileVectors, ++tile) {
        before();
        const auto& functions = vectors - done >= kTileVectors ? kWhole : kSingle;
        functions[count - 1](part,
                             lines.data + tile * lines.tile_stride + begin * lines.line_stride,
                             lines.line_stride, length, to, tile * out_tile_stride, add || begin);
      }
      first += count;
    }
  }
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
