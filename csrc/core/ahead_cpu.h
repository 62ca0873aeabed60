// Memory that is asked for ahead of its use, a little at a time between tiles of a product: rows of
// tokens lie too far apart for the processor to foresee the next.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/macros.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// Rows of evenly spaced pieces of memory; strides and lengths in bytes.
struct Pieces {
  const void* first;
  int64_t rows, row_stride, count, stride, bytes;
};

template <bool kWrite>
class Ahead {
 public:
  // What all is asked for by so many calls. Rows that the cache holds are left alone.
  Ahead(const Pieces& pieces, int64_t calls)
      : pieces_(pieces), at_(static_cast<const char*>(pieces.first)) {
    const int64_t steps = (pieces.bytes + kStep - 1) / kStep * pieces.count * pieces.rows;
    at_once_ = (steps + calls - 1) / std::max<int64_t>(1, calls);
    if (pieces.rows * pieces.row_stride <= kNear) row_ = pieces.rows;
  }

  void operator()() {
    for (int64_t i = 0; i < at_once_ && row_ < pieces_.rows; ++i) {
      for (int64_t byte = 0; byte < std::min(kStep, pieces_.bytes - done_); byte += kLine)
        __builtin_prefetch(at_ + done_ + byte, kWrite, 2);
      done_ += kStep;
      if (done_ < pieces_.bytes) continue;
      done_ = 0;
      at_ += pieces_.stride;
      if (++piece_ < pieces_.count) continue;
      piece_ = 0;
      ++row_;
      at_ = static_cast<const char*>(pieces_.first) + row_ * pieces_.row_stride;
    }
  }

 private:
  static constexpr int64_t kLine = 64, kStep = 4 * kLine, kNear = 256 * 1024;

  Pieces pieces_;
  const char* at_;
  int64_t at_once_, row_ = 0, piece_ = 0, done_ = 0;
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
