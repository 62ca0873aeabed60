// The product with one block-diagonal factor or its transpose, as a kernel of its own.
#pragma once

#include "structured/walk_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// The rows of a plain factor with `rows` rows in each block.
struct PlainRow {
  int rows;
  FUSEE_DEVICE int operator()(int block, int row) const {
    return row < rows ? block * rows + row : -1;
  }
};

template <typename E, bool kTransposed>
using WholeFactor =
    std::conditional_t<kTransposed, ColumnsOfFactor<E>, RowsOfFactor<stored_t<E>, PlainRow>>;

template <typename E, int kColumns, Layout kIn, Layout kOut, bool kTransposed,
          typename T = stored_t<E>>
__global__ void __launch_bounds__(kProductThreads, kOnTensorCores<E> ? 2 : 1)
    block_product(Columns<const T, kIn> x, Global<const T> weight, Global<const T> bias,
                  Columns<T, kOut> y, Walk walk) {
  const int passes = walk.passes();
  const int64_t row = static_cast<int64_t>(blockIdx.x / passes) * kColumns;
  const int pass = static_cast<int>(blockIdx.x % passes);
  using Weights = WholeFactor<E, kTransposed>;
  using Input = GlobalInput<kColumns, E, kIn>;
  const int staged = staged_elements<Weights, Input>(walk);
  FUSEE_DYNAMIC_SHARED(T, memory, (kOutputElements<T, kColumns> + staged));
  const ToGlobal<kColumns, T, kOut> output{y, bias, row, 0,
                                           memory.slice(0, kOutputElements<T, kColumns>)};
  const Shared<T> staging = memory.slice(kOutputElements<T, kColumns>, staged);
  const Input from{x, row};
  if constexpr (kTransposed) {
    multiply_factor<E, kColumns>(walk, pass, pass + 1, Weights{weight, walk.depth, walk.rows}, from,
                                 output, staging);
  } else {
    multiply_factor<E, kColumns>(walk, pass, pass + 1, Weights{weight, walk.depth, {walk.rows}},
                                 from, output, staging);
  }
}

template <bool kTransposed, int kColumns, typename E, typename T, Layout kIn, Layout kOut>
void launch_block_product_of(const Columns<const T, kIn>& x, Global<const T> weight,
                             Global<const T> bias, const Columns<T, kOut>& y, Stream stream) {
  constexpr bool kInterleaved = kIn == Layout::kInterleaved || kOut == Layout::kInterleaved;
  // Two blocks of threads to a processor where they have 227 KB.
  const int64_t bytes = std::min(112 * 1024, most_shared_bytes());
  const int64_t elements = bytes / static_cast<int64_t>(sizeof(T)) - kOutputElements<T, kColumns>;
  using Weights = WholeFactor<E, kTransposed>;
  using Input = GlobalInput<kColumns, E, kIn>;
  const Walk walk =
      plan_walk<T, kColumns, Weights, Input>(y.count, y.size, x.size, kInterleaved, elements);
  FUSEE_REQUIRE(walk.length > 0, "the device has too little shared memory");
  const auto shared =
      (kOutputElements<T, kColumns> + static_cast<size_t>(staged_elements<Weights, Input>(walk))) *
      sizeof(T);
  launch(block_product<E, kColumns, kIn, kOut, kTransposed>,
         grid_of(divide_up<int64_t>(y.rows, kColumns), walk.passes()), kProductThreads, shared,
         stream, x, weight, bias, y, walk);
}

// y = x times the factor (y.count, y.size, x.size), or times the transpose of (x.count, x.size, y.size), and
// the bias, if there is one.
template <bool kTransposed, typename T, Layout kIn, Layout kOut>
void launch_block_product(const Columns<const T, kIn>& x, Global<const T> weight,
                          Global<const T> bias, const Columns<T, kOut>& y, bool tf32,
                          Stream stream) {
  if constexpr (kIsHalf<T>) {
    if (y.rows > 32) return launch_block_product_of<kTransposed, 64, T>(x, weight, bias, y, stream);
  }
  as_multiplied<T>(tf32, [&]<typename E>() {
    constexpr int kColumns = sizeof(T) == 8 ? 16 : 32;
    launch_block_product_of<kTransposed, kColumns, E>(x, weight, bias, y, stream);
  });
}

// Without interleaved columns it is compiled once, in block_diagonal_matmul.cu.
#define FUSEE_BLOCKED_PRODUCT(prefix, transposed, T)                               \
  prefix template void launch_block_product<transposed>(                           \
      const Columns<const T, Layout::kBlocked>&, Global<const T>, Global<const T>, \
      const Columns<T, Layout::kBlocked>&, bool, Stream);
#define FUSEE_BLOCKED_PRODUCTS(prefix)           \
  FUSEE_BLOCKED_PRODUCT(prefix, false, float)    \
  FUSEE_BLOCKED_PRODUCT(prefix, true, float)     \
  FUSEE_BLOCKED_PRODUCT(prefix, false, double)   \
  FUSEE_BLOCKED_PRODUCT(prefix, true, double)    \
  FUSEE_BLOCKED_PRODUCT(prefix, false, Half)     \
  FUSEE_BLOCKED_PRODUCT(prefix, true, Half)      \
  FUSEE_BLOCKED_PRODUCT(prefix, false, BFloat16) \
  FUSEE_BLOCKED_PRODUCT(prefix, true, BFloat16)
FUSEE_BLOCKED_PRODUCTS(extern)

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
