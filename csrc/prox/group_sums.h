// Sums over the elements of groups on the CPU, and elementwise work with one number a group.
#pragma once

#include "core/torch.h"
#include "prox/group_layout.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

constexpr int kGroupsPerBlock = 256;

// Calls f(problem, first group, end) for blocks of neighbouring groups, in parallel.
template <typename F>
void for_each_block(const Layout& layout, const F& f) {
  const int64_t size = std::max<int64_t>(1, layout.group_size());
  // Where groups lie side by side, enough of them to read whole stretches of memory.
  const int64_t neighbours = layout.outer > 1 ? 512 / std::max<int64_t>(1, layout.inner) : 1;
  const int64_t step = std::clamp<int64_t>(std::max(8192 / size, neighbours), 1, kGroupsPerBlock);
  const int64_t blocks = (layout.groups + step - 1) / step;
  parallel_for(0, layout.batch * blocks, grain(step * size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * step;
      f(i / blocks, first, std::min(first + step, layout.groups));
    }
  });
}

// The sum of x y over `count` neighbours, in lanes whose number does not depend on the instruction set.
template <int kLanes, typename T>
double sum_products_in_lanes(const T* FUSEE_RESTRICT x, const T* FUSEE_RESTRICT y, int64_t count) {
  double lanes[kLanes] = {};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i)
      lanes[i] += static_cast<double>(x[k + i]) * static_cast<double>(y[k + i]);
  }
  for (int64_t k = whole; k < count; ++k)
    lanes[k - whole] += static_cast<double>(x[k]) * static_cast<double>(y[k]);
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

// Several vectors at a time hide the latency of the additions; few elements fill only one.
template <typename T>
double sum_products(const T* x, const T* y, int64_t count) {
  return count < 128 ? sum_products_in_lanes<8>(x, y, count)
                     : sum_products_in_lanes<32>(x, y, count);
}

// The sums of x y over each group of a block.
template <typename T>
void block_products(const T* x, const T* y, const Layout& layout, int64_t problem, int64_t first,
                    int64_t end, double* FUSEE_RESTRICT sums) {
  const int64_t count = end - first;
  std::fill_n(sums, count, 0.0);
  for (int64_t o = 0; o < layout.outer; ++o) {
    const int64_t start = ((problem * layout.outer + o) * layout.groups + first) * layout.inner;
    if (layout.inner == 1) {
      const T* FUSEE_RESTRICT xs = x + start;
      const T* FUSEE_RESTRICT ys = y + start;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j)
        sums[j] += static_cast<double>(xs[j]) * static_cast<double>(ys[j]);
    } else {
      for (int64_t j = 0; j < count; ++j)
        sums[j] +=
            sum_products(x + start + j * layout.inner, y + start + j * layout.inner, layout.inner);
    }
  }
}

// The norm of one group whose squares leave the range of double.
inline double scaled_norm(const double* x, const Layout& layout, int64_t problem, int64_t group) {
  double largest = 0, sum = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t o = 0; o < layout.outer; ++o) {
      const int64_t start = ((problem * layout.outer + o) * layout.groups + group) * layout.inner;
      for (int64_t i = 0; i < layout.inner; ++i) {
        const double size = std::fabs(x[start + i]);
        if (pass == 0) {
          largest = size > largest || size != size ? size : largest;
        } else {
          sum += (size / largest) * (size / largest);
        }
      }
    }
    if (largest == 0 || !(largest <= std::numeric_limits<double>::max())) return largest;
  }
  return largest * std::sqrt(sum);
}

// The norms of all groups, (batch, groups).
template <typename T, typename A = accumulate_t<T>>
void group_norms(const T* x, const Layout& layout, A* norms) {
  for_each_block(layout, [=](int64_t problem, int64_t first, int64_t end) {
    A* const of_block = norms + problem * layout.groups + first;
    if (layout.singles()) {
      const T* FUSEE_RESTRICT block = x + problem * layout.groups + first;
#pragma omp simd
      for (int64_t j = 0; j < end - first; ++j) of_block[j] = absolute(static_cast<A>(block[j]));
      return;
    }
    double sums[kGroupsPerBlock];
    block_products(x, x, layout, problem, first, end, sums);
    for (int64_t j = 0; j < end - first; ++j) {
      of_block[j] = static_cast<A>(std::sqrt(sums[j]));
      if constexpr (sizeof(T) == 8) {
        if (!(sums[j] < 1e300) || (sums[j] < 1e-280))
          of_block[j] = scaled_norm(x, layout, problem, first + j);
      }
    }
  });
}

// out = f(x, j) for every element of a block, j being its group within the block.
template <typename T, typename F>
void for_each_of_block(const Layout& layout, int64_t problem, int64_t first, int64_t end,
                       const F& f) {
  for (int64_t o = 0; o < layout.outer; ++o) {
    const int64_t start = ((problem * layout.outer + o) * layout.groups + first) * layout.inner;
    if (layout.inner == 1) {
#pragma omp simd
      for (int64_t j = 0; j < end - first; ++j) f(start + j, j);
    } else {
      for (int64_t j = 0; j < end - first; ++j) {
#pragma omp simd
        for (int64_t i = 0; i < layout.inner; ++i) f(start + j * layout.inner + i, j);
      }
    }
  }
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
