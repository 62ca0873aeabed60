// What products of boxes read and hand on: rows in the accumulation type, and tiles of results.
#pragma once

#include "core/buffers_cpu.h"
#include "core/product_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// kParts matrices of equal shape. Rows are whole vectors wide, with zeros after the last number, and one
// vector apart, so that rows of a power of two do not fall on the same lines of the cache.
template <typename A, int kParts>
class PaddedRows {
 public:
  // fill(row, to) writes a row of each.
  template <typename Fill>
  PaddedRows(int64_t rows, int64_t width, const Fill& fill)
      : stride_((width + kLanes<A> - 1) / kLanes<A> * kLanes<A> + kLanes<A>),
        size_(rows * stride_),
        space_(kParts * size_) {
    parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        A* to[kParts];
        for (int i = 0; i < kParts; ++i) to[i] = space_.get() + i * size_ + row * stride_;
        fill(row, to);
        for (int i = 0; i < kParts; ++i) std::fill(to[i] + width, to[i] + stride_, A(0));
      }
    });
  }

  int64_t stride() const { return stride_; }
  const A* row(int part, int64_t row) const { return space_.get() + part * size_ + row * stride_; }

  // For products with the rows from one on.
  Factor<A> by_row(int part, int64_t from = 0) const { return {row(part, from), stride_, 1}; }

 private:
  int64_t stride_, size_;
  Scratch<A> space_;
};

// The results of a tile: centers (0) and radii (1).
template <typename A>
struct DualTile {
  int64_t row, rows, column, columns;
  const A* sums[2];
  int64_t stride;

  const A* at(int which, int64_t r) const { return sums[which] + r * stride; }
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
