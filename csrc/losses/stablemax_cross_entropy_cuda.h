// StableMax cross entropy in CUDA: the kernels, over the rows of the logits or of a block of their
// classes. One read of the logits forward, one read and one write backward.
#pragma once

#include "core/cuda/row_views.h"
#include "losses/stablemax_cross_entropy.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// The largest coefficient of a probability target, and where it first stands.
template <typename A>
struct Largest {
  int64_t at;
  A value;

  FUSEE_HOST_DEVICE bool before(const Largest& other) const {
    return value > other.value || (value == other.value && at < other.at);
  }
};
struct Larger {
  template <typename A>
  FUSEE_HOST_DEVICE Largest<A> operator()(const Largest<A>& a, const Largest<A>& b) const {
    return a.before(b) ? a : b;
  }
};

// What a row adds to the divisor of a mean, and whether its target is out of range.
struct RowCount {
  double divisor = 0, invalid = 0;
};

// The arguments that both passes share.
template <typename A>
struct Target {
  Global<const int64_t> indices;  // or null: y of the row data holds probabilities
  Global<const A> weight;         // or null for ones
  Global<const double> weight_sum;
  CrossEntropyOptions options;
  int64_t classes;          // all of them
  int64_t first_class = 0;  // of the block at hand
  int64_t block_classes = classes;

  FUSEE_DEVICE A class_weight(int64_t c) const {
    return weight ? checked_class_weight(load(weight, c)) : A(1);
  }
  FUSEE_DEVICE double smooth() const {
    return options.label_smoothing / static_cast<double>(classes);
  }
  FUSEE_DEVICE bool spreads() const { return !indices || options.label_smoothing != 0; }
  // The coefficient of a class of the block beside the target's own: from smoothing, or its
  // probability q.
  FUSEE_DEVICE A coefficient(int64_t place, A q) const {
    const A given = indices ? A(0) : static_cast<A>(1 - options.label_smoothing) * q;
    return class_weight(first_class + place) * (given + static_cast<A>(smooth()));
  }
  FUSEE_DEVICE double all_weights() const {
    return weight_sum ? load(weight_sum, 0) : static_cast<double>(classes);
  }
  // The loss and the gradient of a row without a loss, whatever its logits hold.
  FUSEE_DEVICE A lost_value(int64_t row) const {
    return load(indices, row) == options.ignore_index ? A(0) : std::numeric_limits<A>::quiet_NaN();
  }

  FUSEE_DEVICE RowCount count(int64_t row, const Pivot& pivot) const {
    if (!indices) return {1, 0};
    if (pivot.at >= 0) return {static_cast<double>(class_weight(first_class + pivot.at)), 0};
    const int64_t y = load(indices, row);
    if (y == options.ignore_index) return {0, 0};
    if (y < 0 || y >= classes) return {0, 1};
    return {static_cast<double>(class_weight(y)), 0};
  }

  FUSEE_DEVICE Pivot index_pivot(int64_t row) const {
    const int64_t y = load(indices, row);
    if (y == options.ignore_index || y < 0 || y >= classes) return {kNoLoss, 0, 0};
    const int64_t place = y - first_class;
    const int64_t at = place >= 0 && place < block_classes ? place : kOtherBlock;
    const double w = class_weight(y);
    const double own = (1 - options.label_smoothing) * w;
    if (options.label_smoothing == 0) return {at, own, 0};
    const double all = all_weights();
    return {at, own + smooth() * all, smooth() * (all - w)};
  }

  template <typename View>
  FUSEE_DEVICE Pivot pivot(View& view) const {
    if (!indices) {
      const Largest<A> nothing{classes, -std::numeric_limits<A>::infinity()};
      Largest<A> largest = nothing;
      double rest = 0;  // without the thread's own largest, then without the row's
      view.visit(
          [&](int64_t j, A, A q) {
            const Largest<A> here{j, coefficient(j, q)};
            const Largest<A> less = here.before(largest) ? largest : here;
            largest = here.before(largest) ? here : largest;
            if (less.at != classes) rest += less.value;
          },
          NoFlush{});
      const Largest<A> pivot = view.reduce(largest, Larger{}, nothing);
      if (largest.at != pivot.at && largest.at != classes) rest += largest.value;
      const double remainder = view.reduce(rest, Sum{}, 0.0);
      return {pivot.at, remainder + pivot.value, remainder};
    }
    return view.active() ? index_pivot(view.row()) : Pivot{kNoLoss, 0, 0};
  }
};

// The end of a row's forward pass, from R without the pivot and the spread of the coefficients.
template <typename A>
struct LossOfRow {
  double loss;
  RowStats<A> stats{A(1), A(0)};
  RowCount count;

  FUSEE_DEVICE LossOfRow(const Target<A>& target, int64_t row, const Pivot& pivot,
                         const RowSum& rest, A x_t, double spread) {
    count = target.count(row, pivot);
    if (pivot.at == kNoLoss) {
      loss = target.lost_value(row);
      return;
    }
    const double s_t = stable_exp(static_cast<double>(x_t));
    const double odds = odds_against(rest, s_t);
    const double logarithm = log_odds(odds, rest, x_t);
    loss = spread + pivot.total * logarithm;
    if (target.options.z_loss != 0) loss += z_term(logarithm, x_t, target.options.z_loss);
    stats = {static_cast<A>(rest.value() + s_t), static_cast<A>(rest_share(odds))};
  }
};

template <typename Data_>
struct Forward {
  using Data = Data_;
  using A = typename Data::A;

  Data data;
  Target<A> target;
  Global<A> loss;
  Global<A> stats;
  Global<double> totals;  // of each block with several rows: loss, divisor, invalid, unused

  template <typename View>
  FUSEE_DEVICE void operator()(View& view) const {
    const Pivot pivot = target.pivot(view);
    const A x_t = view.active() ? view.element(pivot.at < 0 ? 0 : pivot.at) : A(0);
    Accumulator<A> positive, negative, spread;
    auto add = [&](Place j, A x) {
      const bool own = j.is(pivot.at);
      positive.add(own ? A(0) : StableSum<A>::positive_term(x));
      negative.add(own ? A(0) : StableSum<A>::negative_term(x));
    };
    auto flush = [&] {
      positive.flush();
      negative.flush();
    };
    const bool spreads = target.spreads();
    if (spreads) {
      const A symlog_t = symlog(x_t);
      view.visit(
          [&](Place j, A x, A q) {
            add(j, x);
            const A b = target.coefficient(j, q);
            // A class with no weight takes no part even at -inf.
            if (b != A(0)) spread.add(b * (symlog_t - symlog(x)));
          },
          [&] {
            flush();
            spread.flush();
          });
    } else {
      view.visit([&](Place j, A x, A) { add(j, x); }, flush);
    }
    const RowSum rest = RowSum::from<A>(view.reduce(positive.total, Sum{}, 0.0),
                                        view.reduce(negative.total, Sum{}, 0.0));
    double value = spreads ? view.reduce(spread.total, Sum{}, 0.0) : 0.0;
    RowCount count;
    if (view.leader()) {
      const LossOfRow<A> row(target, view.row(), pivot, rest, x_t, value);
      value = row.loss;
      count = row.count;
      store(loss, view.row(), static_cast<A>(row.loss));
      store(stats, 2 * view.row(), Vector<A, 2>{{row.stats.sum, row.stats.rest}});
    }
    if constexpr (View::kSeveralRows) {
      const double total =
          view.block_total(view.leader() ? static_cast<double>(static_cast<A>(value)) : 0.0);
      const double divisor = view.block_total(count.divisor);
      const double invalid = view.block_total(count.invalid);
      if (threadIdx.x != 0 || threadIdx.y != 0) return;
      store(totals, 4 * static_cast<int64_t>(blockIdx.x), Vector<double, 2>{{total, divisor}});
      store(totals, 4 * static_cast<int64_t>(blockIdx.x) + 2, Vector<double, 2>{{invalid, 0}});
    }
  }
};

template <typename Data_>
struct Backward {
  using Data = Data_;
  using A = typename Data::A;

  Data data;
  Target<A> target;
  Global<const A> grad;
  int64_t grad_stride;
  Global<const A> stats;

  template <typename View>
  FUSEE_DEVICE void operator()(View& view) const {
    const Pivot pivot = target.pivot(view);
    if (!view.active()) return;
    const A h = load(grad, view.row() * grad_stride);
    const Vector<A, 2> saved = load<2>(stats, 2 * view.row());
    const RowGradient<A> gradient(h, saved[0], saved[1], pivot.total, pivot.remainder,
                                  static_cast<A>(target.options.z_loss));
    if (pivot.at == kNoLoss) {
      const A value = target.lost_value(view.row());
      view.transform([&](int64_t, A, A) { return value; });
      return;
    }
    if (target.spreads()) {
      view.transform([&](Place j, A x, A q) {
        return gradient.at(x, h * target.coefficient(j, q), j.is(pivot.at));
      });
    } else {
      view.transform([&](Place j, A x, A) { return gradient.at(x, A(0), j.is(pivot.at)); });
    }
  }
};

// Sums the losses and what they count, in one block and so in one order: from the totals of the blocks
// of rows where there are any, else row by row.
template <typename A>
__global__ void __launch_bounds__(512)
    reduce_losses(Global<const A> losses, Target<A> target, int64_t rows,
                  Global<const double> totals, int64_t blocks, int64_t reduction, Global<A> loss,
                  Global<double> info) {
  double sum = 0, divisor = 0, invalid = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += blockDim.x) {
    const Vector<double, 2> first = load<2>(totals, 4 * b), second = load<2>(totals, 4 * b + 2);
    sum += first[0];
    divisor += first[1];
    invalid += second[0];
  }
  for (int64_t row = threadIdx.x; blocks == 0 && row < rows; row += blockDim.x) {
    if (reduction != kReductionNone) sum += load(losses, row);
    const RowCount count = target.count(row, Pivot{kNoLoss, 0, 0});
    divisor += count.divisor;
    invalid += count.invalid;
  }
  FUSEE_SHARED(double, scratch, 32);
  sum = block_sum(sum, scratch);
  divisor = block_sum(divisor, scratch);
  invalid = block_sum(invalid, scratch);
  if (threadIdx.x != 0) return;
  store(info, 0, divisor);
  store(info, 1, invalid);
  if (reduction != kReductionNone)
    store(loss, 0, static_cast<A>(reduction == kReductionMean ? sum / divisor : sum));
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
