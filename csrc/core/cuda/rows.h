// Walking a range of elements by the threads of a block: aligned vectors in the body, single
// elements in the head and the tail that do not fill one.
#pragma once

#include "core/cuda/memory.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// Calls `vector(index)` for each aligned run of N elements and `scalar(index)` for each other
// element of [begin, end). Neighbouring threads get neighbouring runs, so a warp's accesses
// coalesce. Alignment is that of the true address of `memory`; where several arrays are walked at
// once, all must be congruent to it (`same_alignment`), or the caller passes N = 1.
// kUnroll runs follow each other without a branch, so that their loads overlap.
template <int N, int kUnroll = 1, typename T, typename VectorFunction, typename ScalarFunction>
FUSEE_DEVICE void for_each_vector(Global<T> memory, int64_t begin, int64_t end, int thread,
                                  int threads, VectorFunction&& vector, ScalarFunction&& scalar) {
  if constexpr (N == 1) {
    for (int64_t i = begin + thread; i < end; i += threads) scalar(i);
  } else {
    const auto address = reinterpret_cast<uintptr_t>(memory.data + begin);
    const int64_t misplaced = static_cast<int64_t>((address / sizeof(T)) & (N - 1));
    const int64_t wanted = begin + ((N - misplaced) & (N - 1));
    const int64_t body = wanted < end ? wanted : end;
    const int64_t tail = body + ((end - body) & ~static_cast<int64_t>(N - 1));
    // The head and the tail hold fewer than N elements each, so one round of the threads mostly
    // does.
    for (int64_t j = begin + thread; j < body; j += threads) scalar(j);
    const int64_t step = static_cast<int64_t>(threads) * N;
    int64_t i = body + static_cast<int64_t>(thread) * N;
    if constexpr (kUnroll > 1) {
      for (; i + (kUnroll - 1) * step < tail; i += kUnroll * step) {
#if defined(__CUDACC__)
#pragma unroll
#endif
        for (int k = 0; k < kUnroll; ++k) vector(i + k * step);
      }
    }
    for (; i < tail; i += step) vector(i);
    for (int64_t j = tail + thread; j < end; j += threads) scalar(j);
  }
}

// Whether element `index` of both arrays lies at the same place within a vector of N.
template <int N, typename T, typename U>
FUSEE_HOST_DEVICE bool same_alignment(Global<T> a, Global<U> b) {
  return ((reinterpret_cast<uintptr_t>(a.data) / sizeof(T)) & (N - 1)) ==
         ((reinterpret_cast<uintptr_t>(b.data) / sizeof(U)) & (N - 1));
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
