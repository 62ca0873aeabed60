// How the threads of a block share the rows of a contiguous (outer, length, inner) tensor.
//
// A kernel is written once, against a view of "its" row, and compiled for three:
//
//   BlockRow    one block per row (inner == 1, long rows), 16-byte accesses along the row
//   ThreadRow   one thread per row (inner == 1, short rows), staged through shared memory so that the
//               block's accesses to global memory still are neighbouring ones
//   ColumnRow   32 neighbouring rows per block (inner > 1), one in each lane, their elements dealt
//               out to the warps
//
// A view binds one or two inputs of the same shape, x and y, and an output. `visit` reads the row,
// `transform` reads it and writes the output, `reduce` combines what the threads of a row hold.
// Inputs and output must be aligned to 16 bytes, which the host sees to.
#pragma once

#include "core/cuda/block_row.h"
#include "core/cuda/column_row.h"
#include "core/cuda/thread_row.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// Launches Kernel::run<View> for the view that suits the shape. Kernel is a callable structure of
// parameters with a member `data`, a RowData.
template <typename View, typename Kernel>
__global__ void __launch_bounds__(512, sizeof(typename View::A) == 8 ? 1 : 2)
    run_rows(const Kernel kernel) {
  View view(kernel.data);
  kernel(view);
  view.finish();
}

// Calls f.template operator()<View>() for the view that suits the shape.
template <typename Data, typename F>
void with_view(const RowShape& shape, const F& f) {
  if (shape.inner > 1) {
    f.template operator()<ColumnRow<Data>>();
  } else if (shape.length <= kShortRow) {
    f.template operator()<ThreadRow<Data>>();
  } else {
    f.template operator()<BlockRow<Data>>();
  }
}

// How many blocks share the rows, where each has several; zero where every row has its own.
template <typename Data>
int64_t blocks_of_rows(const RowShape& shape) {
  int64_t blocks = 0;
  with_view<Data>(shape, [&]<typename View>() {
    if (View::kSeveralRows) blocks = View::grid(shape).x;
  });
  return blocks;
}

template <typename Kernel>
void launch_rows(const Kernel& kernel, Stream stream) {
  using Data = std::decay_t<decltype(kernel.data)>;
  const RowShape& shape = kernel.data.shape;
  if (shape.outer == 0 || shape.inner == 0) return;
  with_view<Data>(shape, [&]<typename View>() {
    launch(run_rows<View, Kernel>, View::grid(shape), View::block(shape), View::shared_bytes(shape),
           stream, kernel);
  });
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
