// The shapes of block-diagonal and Monarch products, and the permutations between the factors.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// The blocks of a weight (count, out, in): block b takes columns b * in of its input to columns b * out
// of its output.
struct Blocks {
  int64_t count, out, in;

  FUSEE_HOST_DEVICE int64_t width_in() const { return count * in; }
  FUSEE_HOST_DEVICE int64_t width_out() const { return count * out; }
  FUSEE_HOST_DEVICE int64_t elements() const { return count * out * in; }
};

// Where an element lies among the blocks of a factor.
struct Place {
  int64_t block, index;
};

// Two factors: w1 (k, q, p) gives the middle of k q = l r elements, w2 (l, s, r) the output.
struct MonarchShape {
  Blocks first, second;

  FUSEE_HOST_DEVICE bool fits() const { return first.width_out() == second.width_in(); }
  FUSEE_HOST_DEVICE int64_t width_in() const { return first.width_in(); }
  FUSEE_HOST_DEVICE int64_t middle() const { return first.width_out(); }
  FUSEE_HOST_DEVICE int64_t width_out() const { return second.width_out(); }

  // Element h of the first factor's output, as an input of the second.
  FUSEE_HOST_DEVICE Place input_of_second(int64_t h) const {
    return {h % second.count, h / second.count};
  }
  // Input `index` of the second factor's block, as an element of the first factor's output.
  FUSEE_HOST_DEVICE int64_t output_of_first(int64_t block, int64_t index) const {
    return index * second.count + block;
  }
  FUSEE_HOST_DEVICE Place output_place(int64_t block, int64_t index) const {
    const int64_t h = output_of_first(block, index);
    return {h / first.out, h % first.out};
  }
  // Where output `index` of the second factor's block goes.
  FUSEE_HOST_DEVICE int64_t column(int64_t block, int64_t index) const {
    return index * second.count + block;
  }
};

// input_of_second of one element after another, without dividing for each.
class InputWalk {
 public:
  FUSEE_HOST_DEVICE explicit InputWalk(const MonarchShape& shape) : shape_(shape) {}

  FUSEE_HOST_DEVICE Place operator()(int64_t h) {
    if (h != next_) {
      place_ = shape_.input_of_second(h);
    } else if (++place_.block == shape_.second.count) {
      place_ = {0, place_.index + 1};
    }
    next_ = h + 1;
    return place_;
  }

 private:
  MonarchShape shape_;
  Place place_{0, 0};
  int64_t next_ = -1;
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
