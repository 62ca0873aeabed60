// StableMax cross entropy of a linear layer on the CPU.
//
// The logits exist a block of classes at a time. As S is a plain sum, without a maximum to subtract, the
// blocks' sums simply add up; the backward pass makes each block again, now knowing S, and turns it into
// the gradients while it lies in cache.

#include "losses/checks.h"
#include "losses/linear_blocks.h"
#include "losses/stablemax_cross_entropy_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

// A block of logits that the last level of cache holds.
constexpr int64_t kBlockElements = int64_t{1} << 21;

template <typename T>
void add_bias(const T* bias, int64_t rows, int64_t classes, T* logits) {
  parallel_for(0, rows, grain(classes), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* FUSEE_RESTRICT out = logits + row * classes;
#pragma omp simd
      for (int64_t c = 0; c < classes; ++c)
        out[c] = static_cast<T>(static_cast<accumulate_t<T>>(out[c]) +
                                static_cast<accumulate_t<T>>(bias[c]));
    }
  });
}

template <typename T>
void add_to(const T* FUSEE_RESTRICT part, int64_t n, accumulate_t<T>* FUSEE_RESTRICT total) {
  parallel_for(0, n, grain(1), [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) total[i] += static_cast<accumulate_t<T>>(part[i]);
  });
}

// What has been summed of one row over the blocks so far.
struct RowState {
  double positive, negative, spread, x_pivot;
};

template <typename T>
struct Call {
  using A = accumulate_t<T>;

  LinearBlocks blocks;
  Tensor target;
  std::optional<Tensor> weight;
  Problem<T> whole;

  Call(const LinearBlocks& blocks_, const Tensor& target_, const std::optional<Tensor>& weight_,
       const CrossEntropyOptions& options)
      : blocks(blocks_), target(as_contiguous(target_)), weight(as_contiguous(weight_)) {
    whole = {nullptr, {blocks.rows, blocks.classes, 1}, 0, blocks.classes, data<int64_t>(target),
             nullptr, data_or_null<A>(weight),          0, options};
    for (int64_t c = 0; c < blocks.classes; ++c) whole.weight_sum += whole.class_weight(c);
  }

  // The logits of classes [first, first + n) in `logits`, and the problem of that block.
  Problem<T> block(int64_t first, int64_t n, const Tensor& logits) const {
    blocks.logits(first, n, logits);
    if (blocks.bias.has_value())
      add_bias(data<T>(*blocks.bias) + first, blocks.rows, n, mutable_data<T>(logits));
    Problem<T> problem = whole;
    problem.input = data<T>(logits);
    problem.rows.length = n;
    problem.first_class = first;
    return problem;
  }
};

template <typename T>
void add_block(const Problem<T>& p, RowState* states) {
  using A = typename Problem<T>::A;
  parallel_for(0, p.rows.tiles(), grain(p.rows.elements_per_tile()), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = p.rows.tile(index);
      Pivot pivots[kLanes];
      const A zeros[kLanes] = {};
      double sums[4][kLanes];
      tile_pivots(p, tile, pivots);
      // Against zero the spread is -sum_j b_j log s_j, to which the pivot's logarithm comes at the end.
      sum_tile(p, tile, pivots, zeros, sums);
      for (int i = 0; i < tile.lanes; ++i) {
        RowState& state = states[tile.row + i];
        state.positive += sums[0][i];
        state.negative += sums[1][i];
        state.spread += sums[2][i];
        if (pivots[i].at >= 0)
          state.x_pivot = static_cast<A>(
              p.input[tile.first + i * tile.lane_step + pivots[i].at * tile.step]);
      }
    }
  });
}

template <typename T, typename A = accumulate_t<T>>
void finish_rows(const Problem<T>& p, const RowState* states, A* loss, RowStats<A>* stats) {
  const double all = p.smooth() * p.weight_sum;  // sum_j b_j
  for (int64_t row = 0; row < p.rows.count(); ++row) {
    const Pivot pivot = index_pivot(p, row);
    if (pivot.at == kNoLoss) {
      loss[row] = p.lost_value(row);
      stats[row] = {A(1), A(0)};
      continue;
    }
    const RowState& state = states[row];
    const RowSum rest = RowSum::from<A>(state.positive, state.negative);
    const A x_pivot = static_cast<A>(state.x_pivot);
    const double s_t = stable_exp(state.x_pivot), odds = odds_against(rest, s_t);
    const double spread = p.spreads() ? state.spread + all * symlog(state.x_pivot) : 0.0;
    loss[row] = static_cast<A>(pivot.total * log_odds(odds, rest, x_pivot) + spread);
    stats[row] = {static_cast<A>(rest.value() + s_t), static_cast<A>(rest_share(odds))};
  }
}

std::tuple<Tensor, Tensor, Tensor> linear_stablemax_cross_entropy(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
    int64_t ignore_index, int64_t reduction, double label_smoothing) {
  const LinearBlocks blocks(input, linear_weight, linear_bias, kBlockElements);
  check_linear_target(blocks, target, weight);
  return dispatch_floating(input.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Call<T> call(blocks, target, weight, {ignore_index, label_smoothing, 0.0});
    std::vector<RowState> states(blocks.rows, RowState{});
    blocks.for_each([&](int64_t first, int64_t n, const Tensor& logits) {
      add_block(call.block(first, n, logits), states.data());
    });
    const ScalarType type = accumulate_type(input.scalar_type());
    Tensor losses = empty(input, {blocks.rows}, type);
    Tensor stats = empty(input, {blocks.rows, 2}, type);
    Tensor info = empty(input, {2}, ScalarType::Double);
    A* rows = mutable_data<A>(losses);
    finish_rows(call.whole, states.data(), rows, reinterpret_cast<RowStats<A>*>(mutable_data<A>(stats)));
    const auto counts = count_rows(call.whole);
    std::copy(counts.begin(), counts.end(), mutable_data<double>(info));
    if (reduction == kReductionNone) return std::make_tuple(losses, stats, info);
    Tensor loss = empty(input, {}, type);
    *mutable_data<A>(loss) =
        static_cast<A>(reduce_rows(rows, blocks.rows, reduction, counts[0]));
    return std::make_tuple(loss, stats, info);
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_stablemax_cross_entropy_backward(
    const Tensor& grad, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
    const Tensor& stats, int64_t ignore_index, double label_smoothing, bool input_grad,
    bool weight_grad, bool bias_grad) {
  const LinearBlocks blocks(input, linear_weight, linear_bias, kBlockElements);
  check_linear_target(blocks, target, weight);
  return dispatch_floating(input.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Call<T> call(blocks, target, weight, {ignore_index, label_smoothing, 0.0});
    const RowValues h(grad);
    const Tensor saved = as_contiguous(stats);
    LinearGradients gradients(blocks, input_grad, weight_grad, bias_grad);
    if (input_grad)
      std::fill_n(mutable_data<A>(gradients.input_total), blocks.rows * blocks.features, A(0));
    blocks.for_each([&](int64_t first, int64_t n, const Tensor& logits) {
      const Tensor block_grad = blocks.block(n);
      backward(call.block(first, n, logits), data<A>(h.tensor), h.stride,
               reinterpret_cast<const RowStats<A>*>(data<A>(saved)), mutable_data<T>(block_grad));
      gradients.add(first, n, block_grad, [](const Tensor& part, const Tensor& total) {
        add_to(data<T>(part), part.numel(), mutable_data<A>(total));
      });
    });
    return gradients.finish();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) {
  m.impl("linear_stablemax_cross_entropy", TORCH_BOX(&linear_stablemax_cross_entropy));
  m.impl("linear_stablemax_cross_entropy_backward",
         TORCH_BOX(&linear_stablemax_cross_entropy_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
