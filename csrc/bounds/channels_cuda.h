// Element by element over tensors (outer, channels, inner), with sums over all but the channels. These take two steps:
// blocks give parts, which are added in order.
#pragma once

#include "bounds/box_arguments_cuda.h"
#include "core/cuda/operands.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

struct Channels {
  int64_t outer, channels, inner;

  FUSEE_HOST_DEVICE int64_t width() const { return channels * inner; }
};

inline constexpr int kChannelThreads = 256;
// From so many inner elements on blocks take those of a channel, and so many vectors for each thread; below, they
// take columns of so many rows for each thread.
inline constexpr int64_t kLongInner = 512;
inline constexpr int kVectorsOfThread = 8, kRowsOfThread = 16;

// Two sums for each channel, where they are asked for: the results, or parts of them in order, as
// (sums, outer parts, channels, inner parts).
template <typename R>
struct ChannelSums {
  Global<R> results[2];
  Global<double> parts;
  int64_t outer = 1, channels = 0, inner = 1;

  FUSEE_DEVICE Global<R> result(int sum) const { return sum == 0 ? results[0] : results[1]; }
  FUSEE_DEVICE bool wanted(int sum) const { return static_cast<bool>(result(sum)); }
  FUSEE_DEVICE void put(int sum, int64_t place, double value) const {
    if (parts)
      store(parts, sum * outer * channels * inner + place, value);
    else
      store(result(sum), place, static_cast<R>(value));
  }
};

// The values of a tensor of channels for M columns of (channels, inner), or `absent`.
template <int M, typename A>
FUSEE_DEVICE void load_channels(Global<const A> from, int64_t column, int64_t inner, A absent,
                                A (&values)[M]) {
  if (!from) {
    for (int i = 0; i < M; ++i) values[i] = absent;
  } else if (inner == 1) {
    constexpr int N = M < vector_width<A> ? M : vector_width<A>;
    FUSEE_UNROLL
    for (int i = 0; i < M; i += N) {
      const Vector<A, N> loaded = load<N>(from, column + i);
      for (int j = 0; j < N; ++j) values[i + j] = loaded[j];
    }
  } else {
    for (int i = 0; i < M; ++i) values[i] = load(from, (column + i) / inner);
  }
}

// A body is called as body.template apply<M>(at, factors, sums) for M elements from `at` on, with its factors for
// each, or one for all, and adds to sums[0][i] and sums[1][i]. Without kSums it has none.
template <typename Body, typename R>
__global__ void __launch_bounds__(kChannelThreads)
    by_channel(Body body, Channels shape, int64_t pieces, ChannelSums<R> to) {
  using T = typename Body::T;
  constexpr int V = vector_width<T>;
  constexpr int64_t kPiece = int64_t{kChannelThreads} * V * kVectorsOfThread;
  const int64_t row = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  const int64_t begin = row * shape.inner + piece * kPiece, end = (row + 1) * shape.inner;
  typename Body::template Factors<1> of_channel;
  body.load_factors(row % shape.channels, 1, of_channel);
  accumulate_t<T> sums[2][V] = {};
  const auto apply = [&]<int M>(int64_t at, std::integral_constant<int, M>) {
    body.template apply<M>(at, of_channel, sums);
  };
  for_each_vector<V, 2>(
      body.memory(), begin, begin + kPiece < end ? begin + kPiece : end,
      static_cast<int>(threadIdx.x), kChannelThreads,
      [&](int64_t at) { apply(at, std::integral_constant<int, V>{}); },
      [&](int64_t at) { apply(at, std::integral_constant<int, 1>{}); });
  if constexpr (Body::kSums) {
    FUSEE_SHARED(double, scratch, 32);
    FUSEE_UNROLL
    for (int sum = 0; sum < 2; ++sum) {
      if (!to.wanted(sum)) continue;
      double own = 0;
      for (int v = 0; v < V; ++v) own += static_cast<double>(sums[sum][v]);
      const double total = block_sum(own, scratch);
      if (threadIdx.x == 0) to.put(sum, row * pieces + piece, total);
    }
  }
}

// M neighbouring columns for each thread, `across` threads beside each other.
template <int M, typename Body, typename R>
__global__ void __launch_bounds__(kChannelThreads)
    by_column(Body body, Channels shape, int across, int64_t column_blocks, ChannelSums<R> to) {
  using T = typename Body::T;
  const int thread = static_cast<int>(threadIdx.x), x = thread % across, y = thread / across;
  const int down = kChannelThreads / across;
  const int64_t width = shape.width(), part = blockIdx.x / column_blocks;
  const int64_t column = (blockIdx.x % column_blocks * across + x) * M;
  const int64_t first = part * down * kRowsOfThread;
  const int64_t last = first + down * kRowsOfThread;
  accumulate_t<T> sums[2][M] = {};
  if (column < width) {
    typename Body::template Factors<M> factors;
    body.load_factors(column, shape.inner, factors);
    for (int64_t row = first + y; row < (last < shape.outer ? last : shape.outer); row += down)
      body.template apply<M>(row * width + column, factors, sums);
  }
  if constexpr (Body::kSums) {
    // What a warp stores and loads lies in different banks.
    constexpr int kApart = kChannelThreads + 16 / M, kScratch = kApart * M;
    FUSEE_SHARED(double, scratch, kScratch);
    FUSEE_UNROLL
    for (int sum = 0; sum < 2; ++sum) {
      if (!to.wanted(sum)) continue;
      __syncthreads();
      for (int i = 0; i < M; ++i)
        scratch.store(i * kApart + thread, static_cast<double>(sums[sum][i]));
      __syncthreads();
      for (int i = thread; i < across * M; i += kChannelThreads) {
        const int64_t place = (blockIdx.x % column_blocks * across + i / M) * M + i % M;
        if (place >= width) continue;
        double total = 0;
        for (int n = 0; n < down; ++n) total += scratch.load(i % M * kApart + n * across + i / M);
        to.put(sum, part * width + place, total);
      }
    }
  }
}

// A warp adds up the parts of one sum of one channel.
template <typename R>
__global__ void __launch_bounds__(kChannelThreads) add_channel_parts(ChannelSums<R> sums) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kChannelThreads + threadIdx.x) / 32;
  const int sum = warp < sums.channels ? 0 : 1;
  const int64_t channel = warp - sum * sums.channels;
  if (channel >= sums.channels || !sums.wanted(sum)) return;
  double total = 0;
  for (int64_t i = lane; i < sums.outer * sums.inner; i += 32) {
    const int64_t outer = i / sums.inner, inner = i % sums.inner;
    total += load(sums.parts,
                  ((sum * sums.outer + outer) * sums.channels + channel) * sums.inner + inner);
  }
  total = warp_sum(total);
  if (lane == 0) store(sums.result(sum), channel, static_cast<R>(total));
}

// `like` is any of the tensors.
template <typename Body, typename R>
void launch_channels(const Body& body, const Channels& shape, ChannelSums<R> sums,
                     const Tensor& like, Stream stream) {
  constexpr int V = vector_width<typename Body::T>;
  const bool summed = sums.results[0] || sums.results[1];
  const bool long_inner = shape.inner >= kLongInner;
  const int64_t pieces = divide_up(shape.inner, int64_t{kChannelThreads} * V * kVectorsOfThread);
  const bool in_vectors = shape.width() % V == 0;
  int across = 1;
  while (across < 32 && across * (in_vectors ? V : 1) < shape.width()) across *= 2;
  const int64_t column_blocks = divide_up<int64_t>(shape.width(), across * (in_vectors ? V : 1));
  // Sums over no rows are a block's too.
  const int64_t row_parts = std::max<int64_t>(
      1, divide_up<int64_t>(shape.outer, kChannelThreads / across * kRowsOfThread));
  sums.channels = shape.channels;
  sums.outer = long_inner ? shape.outer : row_parts;
  sums.inner = long_inner ? pieces : shape.inner;
  const bool in_parts = summed && !(sums.outer == 1 && sums.inner == 1);
  std::optional<Tensor> parts;
  if (in_parts) {
    parts = empty(like, {2, sums.outer, sums.channels, sums.inner}, ScalarType::Double);
    sums.parts = output<double>(*parts);
  }
  if (long_inner) {
    if (shape.outer > 0 && shape.channels > 0)
      launch(by_channel<Body, R>, grid_of(shape.outer * shape.channels, pieces), kChannelThreads, 0,
             stream, body, shape, pieces, sums);
  } else if (shape.width() > 0) {
    const unsigned grid = grid_of(row_parts, column_blocks);
    if (in_vectors)
      launch(by_column<V, Body, R>, grid, kChannelThreads, 0, stream, body, shape, across,
             column_blocks, sums);
    else
      launch(by_column<1, Body, R>, grid, kChannelThreads, 0, stream, body, shape, across,
             column_blocks, sums);
  }
  if (in_parts && shape.channels > 0)
    launch(add_channel_parts<R>,
           grid_of(divide_up<int64_t>(64 * shape.channels, kChannelThreads), 1), kChannelThreads, 0,
           stream, sums);
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
