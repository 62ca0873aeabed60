// Both factors of a Monarch product in one kernel, with the middle of some rows in shared memory: of some of the
// second factor's blocks, for the product, or of some of the first one's, for the gradient of the input.
#pragma once

#include "structured/block_product_cuda.h"
#include "structured/monarch.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// How blocks of threads share out a product: `group` blocks of the factor that comes last, of `groups` in all.
struct MonarchPlan {
  int group, groups;
  Walk first, second;
};

// The middle that belongs to blocks [block, block + blocks) of the second factor (l, s, r). Rows of the walk over
// the first factor's block are all elements of those blocks that it might reach, of one index after another.
struct MiddleOfSecond {
  int l, q;  // blocks of the second factor, outputs of each block of the first
  int group, block, blocks;

  // How many rows that may be.
  static int rows(int l, int q, int group) { return (q % l == 0 ? q / l : q / l + 2) * group; }

  // The element of the middle, or -1, and its place.
  FUSEE_DEVICE int element(int first_block, int row) const {
    const int own = row % group, begin = first_block * q;
    const int64_t h = static_cast<int64_t>(begin / l + row / group) * l + block + own;
    return own < blocks && h >= begin && h < begin + q ? static_cast<int>(h) : -1;
  }
  FUSEE_DEVICE int place(int first_block, int row, int stride, int pitch) const {
    return element(first_block, row) < 0
               ? -1
               : row % group * stride + (first_block * q / l + row / group) * pitch;
  }
};

template <typename E, int kColumns, typename T = stored_t<E>>
__global__ void __launch_bounds__(kProductThreads, kOnTensorCores<E>&& kColumns == 32 ? 2 : 1)
    monarch_product(Columns<const T, Layout::kBlocked> x, Global<const T> w1, Global<const T> w2,
                    Global<const T> bias, Columns<T, Layout::kInterleaved> y, MonarchPlan plan,
                    int q, int r) {
  using InMiddle = Middle<kColumns, E>;
  const int64_t row = static_cast<int64_t>(blockIdx.x / plan.groups) * kColumns;
  const int block = static_cast<int>(blockIdx.x % plan.groups) * plan.group;
  const MiddleOfSecond part{y.count, q, plan.group, block, clamp(y.count - block, plan.group)};
  plan.second.blocks = part.blocks;

  const auto first_row = [&](int b, int i) { return part.element(b, i); };
  const auto second_row = [&](int b, int i) { return i < y.size ? (block + b) * y.size + i : -1; };
  const auto place = [&](int b, int i) {
    return part.place(b, i, InMiddle::stride(r), InMiddle::kPitch);
  };
  using First = RowsOfFactor<T, decltype(first_row)>;
  using Second = RowsOfFactor<T, decltype(second_row)>;
  using Input = GlobalInput<kColumns, E, Layout::kBlocked>;
  const int of_middle = plan.group * InMiddle::stride(r);
  const int of_first = staged_elements<First, Input>(plan.first);
  const int of_second =
      kOutputElements<T, kColumns> + staged_elements<Second, InMiddle>(plan.second);
  const int rest = of_first < of_second ? of_second : of_first;
  FUSEE_DYNAMIC_SHARED(T, memory, of_middle + rest);
  const InMiddle middle{memory.slice(0, of_middle), part.blocks, r};
  const Shared<T> of_steps = memory.slice(of_middle, rest);
  const Shared<T> of_output = of_steps.slice(0, kOutputElements<T, kColumns>);

  middle.clear_padding();
  multiply_factor<E, kColumns>(plan.first, 0, plan.first.passes(), First{w1, x.size, first_row},
                               Input{x, row}, ToMiddle<kColumns, E, decltype(place)>{middle, place},
                               of_steps);
  multiply_factor<E, kColumns>(
      plan.second, 0, plan.second.passes(), Second{w2, r, second_row}, middle,
      ToGlobal<kColumns, T, Layout::kInterleaved>{y, bias, row, block, of_output},
      of_steps.slice(kOutputElements<T, kColumns>, rest - kOutputElements<T, kColumns>));
}

// The middle that belongs to blocks [block, block + blocks) of the first factor (k, q, p). Rows of the walk over
// the second factor's transpose are its columns from a whole vector on.
struct MiddleOfFirst {
  int l, q;
  int block, blocks;

  template <typename T>
  FUSEE_HOST_DEVICE int first_column() const {
    return block * q / l / vector_width<T> * vector_width<T>;
  }
  // How many columns a group needs.
  template <typename T>
  int rows() const {
    return ((block + blocks) * q - 1) / l + 1 - first_column<T>();
  }
  FUSEE_DEVICE int place(int second_block, int column, int stride, int pitch) const {
    const int64_t h = static_cast<int64_t>(column) * l + second_block - block * q;
    if (h < 0 || h >= blocks * q) return -1;
    return static_cast<int>(h) / q * stride + static_cast<int>(h) % q * pitch;
  }
};

// x = the gradient of the input, from that of the output; `kept` is that of the middle, where it is wanted.
template <typename E, int kColumns, typename T = stored_t<E>>
__global__ void __launch_bounds__(kProductThreads, kOnTensorCores<E>&& kColumns == 32 ? 2 : 1)
    monarch_input_gradient(Columns<const T, Layout::kInterleaved> grad, Global<const T> w1,
                           Global<const T> w2, Columns<T, Layout::kBlocked> x,
                           Columns<T, Layout::kBlocked> kept, MonarchPlan plan, int q, int r) {
  using InMiddle = Middle<kColumns, E>;
  using Input = GlobalInput<kColumns, E, Layout::kInterleaved>;
  using Factor = ColumnsOfFactor<E>;
  const int64_t row = static_cast<int64_t>(blockIdx.x / plan.groups) * kColumns;
  const int block = static_cast<int>(blockIdx.x % plan.groups) * plan.group;
  const MiddleOfFirst part{grad.count, q, block, clamp(x.count - block, plan.group)};
  plan.second.blocks = part.blocks;

  const int first = part.first_column<T>();
  const auto place = [&](int b, int i) {
    return part.place(b, first + i, InMiddle::stride(q), InMiddle::kPitch);
  };
  const int of_middle = plan.group * InMiddle::stride(q);
  const int of_first = staged_elements<Factor, Input>(plan.first);
  const int of_second =
      kOutputElements<T, kColumns> + staged_elements<Factor, InMiddle>(plan.second);
  const int rest = of_first < of_second ? of_second : of_first;
  FUSEE_DYNAMIC_SHARED(T, memory, of_middle + rest);
  const InMiddle middle{memory.slice(0, of_middle), part.blocks, q};
  const Shared<T> of_steps = memory.slice(of_middle, rest);
  const Shared<T> of_output = of_steps.slice(0, kOutputElements<T, kColumns>);

  middle.clear_padding();
  multiply_factor<E, kColumns>(plan.first, 0, plan.first.passes(), Factor{w2, grad.size, r, first},
                               Input{grad, row},
                               ToMiddle<kColumns, E, decltype(place)>{middle, place}, of_steps);
  if (kept.data) middle.write(kept, row, block);
  const Global<const T> own = w1 + static_cast<int64_t>(block) * q * x.size;
  multiply_factor<E, kColumns>(
      plan.second, 0, plan.second.passes(), Factor{own, q, x.size}, middle,
      ToGlobal<kColumns, T, Layout::kBlocked>{x, {}, row, block, of_output},
      of_steps.slice(kOutputElements<T, kColumns>, rest - kOutputElements<T, kColumns>));
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
