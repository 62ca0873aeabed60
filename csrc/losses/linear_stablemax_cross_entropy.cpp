// StableMax cross entropy of a linear layer on the CPU.
//
// In float32 and float64 the logits exist a chunk of rows at a time, and where the gradients are wanted
// with the loss, each row becomes its gradient while it lies in cache. In the half types, and in a
// backward pass of its own, they exist a block of classes at a time: S is a plain sum, without a maximum
// to subtract, so the blocks' sums add up; and a gradient of the weights is one product, not a sum.

#include "losses/checks.h"
#include "losses/linear_blocks.h"
#include "losses/stablemax_cross_entropy_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

// A block of logits that the last level of cache holds.
constexpr int64_t kBlockElements = int64_t{1} << 21;
// Products of few rows run fastest over this many classes: 75 against 55 GFLOP/s for 131072 at once.
constexpr int64_t kPartClasses = 1024;

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

  Linear layer;
  Tensor target;
  std::optional<Tensor> weight;
  Problem<T> whole;

  Call(const Tensor& input, const Tensor& linear_weight, const std::optional<Tensor>& linear_bias,
       const Tensor& target_, const std::optional<Tensor>& weight_,
       const CrossEntropyOptions& options)
      : layer(input, linear_weight, linear_bias, kPartClasses),
        target(as_contiguous(target_)),
        weight(as_contiguous(weight_)) {
    check_linear_target(layer, target, weight);
    whole = {nullptr, {layer.rows, layer.classes, 1}, 0, layer.classes, data<int64_t>(target),
             nullptr, data_or_null<A>(weight),        0, options};
    for (int64_t c = 0; c < layer.classes; ++c) whole.weight_sum += whole.class_weight(c);
  }

  // The problem of a part of the logits, whose bias is added here.
  Problem<T> part(int64_t first_row, int64_t rows, int64_t first_class, int64_t classes,
                  const Tensor& logits) const {
    if (layer.bias.has_value())
      add_bias(data<T>(*layer.bias) + first_class, rows, classes, mutable_data<T>(logits));
    Problem<T> problem = whole;
    problem.input = data<T>(logits);
    problem.rows = {rows, classes, 1};
    problem.first_class = first_class;
    problem.target += first_row;
    return problem;
  }
};

template <typename T>
void add_block(const Problem<T>& p, RowState* states) {
  using A = typename Problem<T>::A;
  for_each_tile(p, [&](const Tile& tile) {
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
        state.x_pivot =
            static_cast<A>(p.input[tile.first + i * tile.lane_step + pivots[i].at * tile.step]);
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

template <typename T>
auto gradients_of(const Linear& layer, const Wanted& wanted) {
  return LinearGradients(layer, wanted, [](const Tensor& part, const Tensor& total) {
    add_to(data<T>(part), part.numel(), mutable_data<accumulate_t<T>>(total));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_stablemax_cross_entropy(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
    int64_t ignore_index, int64_t reduction, double label_smoothing, bool input_grad,
    bool weight_grad, bool bias_grad) {
  const CrossEntropyOptions options{ignore_index, label_smoothing, 0.0};
  const Wanted wanted{input_grad, weight_grad, bias_grad};
  return dispatch_floating(input.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Call<T> call(input, linear_weight, linear_bias, target, weight, options);
    const Linear& layer = call.layer;
    check_forward_gradients(layer, wanted, reduction != kReductionNone);
    const ScalarType type = accumulate_type(input.scalar_type());
    Tensor losses = empty(input, {layer.rows}, type);
    Tensor stats = empty(input, {layer.rows, 2}, type);
    Tensor info = empty(input, {2}, ScalarType::Double);
    const auto counts = count_rows(call.whole);
    std::copy(counts.begin(), counts.end(), mutable_data<double>(info));
    A* rows = mutable_data<A>(losses);
    auto* saved = reinterpret_cast<RowStats<A>*>(mutable_data<A>(stats));
    auto gradients = gradients_of<T>(layer, wanted);
    if constexpr (std::is_same_v<T, A>) {
      // Whether the gradients are formed or not, so that the loss has the same bits.
      const A h = static_cast<A>(reduction == kReductionMean ? 1 / counts[0] : 1);
      layer.for_each_row_chunk([&](int64_t first, int64_t n, const Tensor& logits) {
        const Problem<T> p = call.part(first, n, 0, layer.classes, logits);
        T* in_place = mutable_data<T>(logits);
        for_each_tile(p, [&](const Tile& tile) {
          forward(p, tile, rows + first, saved + first);
          if (wanted.any()) backward(p, tile, &h, 0, saved + first, in_place);
        });
        gradients.add_row_chunk(first, n, logits);
      });
    } else {
      std::vector<RowState> states(layer.rows, RowState{});
      layer.for_each_class_block(
          kBlockElements, [&](int64_t first, int64_t n, const Tensor& logits) {
            add_block(call.part(0, layer.rows, first, n, logits), states.data());
          });
      finish_rows(call.whole, states.data(), rows, saved);
    }
    Tensor loss = losses;
    if (reduction != kReductionNone) {
      loss = empty(input, {}, type);
      *mutable_data<A>(loss) = static_cast<A>(reduce_rows(rows, layer.rows, reduction, counts[0]));
    }
    return std::tuple_cat(std::make_tuple(loss, stats, info), gradients.finish());
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_stablemax_cross_entropy_backward(
    const Tensor& grad, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
    const Tensor& stats, int64_t ignore_index, double label_smoothing, bool input_grad,
    bool weight_grad, bool bias_grad) {
  const CrossEntropyOptions options{ignore_index, label_smoothing, 0.0};
  return dispatch_floating(input.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Call<T> call(input, linear_weight, linear_bias, target, weight, options);
    const Linear& layer = call.layer;
    const RowValues h(grad);
    const Tensor saved = as_contiguous(stats);
    const auto* row_stats = reinterpret_cast<const RowStats<A>*>(data<A>(saved));
    auto gradients = gradients_of<T>(layer, {input_grad, weight_grad, bias_grad});
    layer.for_each_class_block(kBlockElements, [&](int64_t first, int64_t n, const Tensor& logits) {
      const Problem<T> p = call.part(0, layer.rows, first, n, logits);
      T* in_place = mutable_data<T>(logits);
      for_each_tile(p, [&](const Tile& tile) {
        backward(p, tile, data<A>(h.tensor), h.stride, row_stats, in_place);
      });
      gradients.add_class_block(first, n, logits);
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
