// Reductions over a warp and over a block, in an order that depends on nothing but the block's
// shape, so the same input gives the same bits. Every thread gets the result.
#pragma once

#include "core/cuda/shared.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

inline constexpr unsigned full_mask = 0xffffffffu;

// The thread's place in its block, and the number of threads, in one dimension.
FUSEE_DEVICE int thread_rank() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
FUSEE_DEVICE int thread_count() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }

namespace detail {
// A shuffle of any small structure, word by word.
template <typename T>
FUSEE_DEVICE T shuffle_xor(const T& value, int lane_mask FUSEE_SITE) {
  if constexpr (std::is_arithmetic_v<T>) {
    return __shfl_xor_sync(full_mask, value, lane_mask, 32 FUSEE_AT_SITE);
  } else {
    static_assert(std::is_trivially_copyable_v<T>);
    constexpr int count = (sizeof(T) + 3) / 4;
    unsigned words[count] = {};
    memcpy(words, static_cast<const void*>(&value), sizeof(T));
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 0; i < count; ++i) {
      words[i] = __shfl_xor_sync(full_mask, words[i], lane_mask, 32 FUSEE_AT_SITE);
    }
    T result;
    memcpy(static_cast<void*>(&result), words, sizeof(T));
    return result;
  }
}
}  // namespace detail

// `op(a, b)` must be associative and commutative up to rounding. All 32 lanes must take part.
// Each lane combines with its partner in the order of the lanes, so all lanes hold the same bits
// even where `op` is not exactly commutative.
template <typename T, typename Op>
FUSEE_DEVICE T warp_reduce(T value, Op op FUSEE_SITE) {
  const int lane = thread_rank() & 31;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int distance = 16; distance > 0; distance >>= 1) {
    const T other = detail::shuffle_xor(value, distance FUSEE_AT_SITE);
    value = (lane & distance) == 0 ? op(value, other) : op(other, value);
  }
  return value;
}

struct Sum {
  template <typename T>
  FUSEE_HOST_DEVICE T operator()(const T& a, const T& b) const {
    return a + b;
  }
};
struct Maximum {
  template <typename T>
  FUSEE_HOST_DEVICE T operator()(const T& a, const T& b) const {
    // NaN goes through, whichever side it comes from.
    return a > b || a != a ? a : b;
  }
};
struct Minimum {
  template <typename T>
  FUSEE_HOST_DEVICE T operator()(const T& a, const T& b) const {
    return a < b || a != a ? a : b;
  }
};

template <typename T>
FUSEE_DEVICE T warp_sum(T value FUSEE_SITE) {
  return warp_reduce(value, Sum {} FUSEE_AT_SITE);
}

// The sums over the lanes of N values. Value i goes to the lanes from i (32 / N) on.
template <int kDistance = 16, int N, typename A>
FUSEE_DEVICE A sums_over_lanes(const A (&values)[N]) {
  if constexpr (N == 1) {
    A sum = values[0];
    for (int distance = kDistance; distance > 0; distance /= 2)
      sum += detail::shuffle_xor(sum, distance);
    return sum;
  } else {
    constexpr int kHalf = N / 2;
    const bool upper = (thread_rank() & kDistance) != 0;
    A kept[kHalf];
    FUSEE_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      const A sent = upper ? values[i] : values[i + kHalf];
      kept[i] = (upper ? values[i + kHalf] : values[i]) + detail::shuffle_xor(sent, kDistance);
    }
    return sums_over_lanes<kDistance / 2>(kept);
  }
}

// `scratch` holds one T for each warp (32 always suffice). The block must consist of whole warps.
// The scratch may be used again at once: the reduction begins with a barrier, and a barrier
// separates its stores from its loads.
template <typename T, typename Op>
FUSEE_DEVICE T block_reduce(T value, Op op, const T& identity,
                            const Shared<T>& scratch FUSEE_SITE) {
  value = warp_reduce(value, op FUSEE_AT_SITE);
  const int warps = thread_count() >> 5;
  if (warps == 1) return value;
  const int rank = thread_rank();
  // Whoever still reads the scratch of an earlier reduction must be done.
  __syncthreads(FUSEE_AT_SITE_ONLY);
  if ((rank & 31) == 0) scratch.store(rank >> 5, value FUSEE_AT_SITE);
  __syncthreads(FUSEE_AT_SITE_ONLY);
  // Every warp does the last step for itself, which saves the barrier of handing the result round.
  value = (rank & 31) < warps ? scratch.load(rank & 31 FUSEE_AT_SITE) : identity;
  return warp_reduce(value, op FUSEE_AT_SITE);
}

template <typename T>
FUSEE_DEVICE T block_sum(T value, const Shared<T>& scratch FUSEE_SITE) {
  return block_reduce(value, Sum{}, T(0), scratch FUSEE_AT_SITE);
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
