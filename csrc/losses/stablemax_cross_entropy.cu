// StableMax cross entropy in CUDA: one read of the logits forward, one read and one write backward.

#include "losses/stablemax_cross_entropy.h"

#include "core/cuda/row_views.h"
#include "core/cuda/torch_stream.h"
#include "losses/checks.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

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

// The arguments that both passes share.
template <typename A>
struct Target {
  Global<const int64_t> indices;  // or null: y of the row data holds probabilities
  Global<const A> weight;         // or null for ones
  Global<const double> weight_sum;
  CrossEntropyOptions options;
  int64_t classes;

  FUSEE_DEVICE A class_weight(int64_t c) const {
    return weight ? checked_class_weight(load(weight, c)) : A(1);
  }
  FUSEE_DEVICE double smooth() const {
    return options.label_smoothing / static_cast<double>(classes);
  }
  FUSEE_DEVICE bool spreads() const { return !indices || options.label_smoothing != 0; }
  // The coefficient of a class beside the target's own: from smoothing, or its probability q.
  FUSEE_DEVICE A coefficient(int64_t c, A q) const {
    const A given = indices ? A(0) : static_cast<A>(1 - options.label_smoothing) * q;
    return class_weight(c) * (given + static_cast<A>(smooth()));
  }
  // The loss and the gradient of a row without a loss, whatever its logits hold.
  FUSEE_DEVICE A lost_value(int64_t row) const {
    return load(indices, row) == options.ignore_index ? A(0)
                                                      : std::numeric_limits<A>::quiet_NaN();
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
    if (!view.active()) return {-1, 0, 0};
    const int64_t y = load(indices, view.row());
    if (y == options.ignore_index || y < 0 || y >= classes) return {-1, 0, 0};
    const double w = class_weight(y);
    const double own = (1 - options.label_smoothing) * w;
    if (options.label_smoothing == 0) return {y, own, 0};
    const double all = weight_sum ? load(weight_sum, 0) : static_cast<double>(classes);
    return {y, own + smooth() * all, smooth() * (all - w)};
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

  template <typename View>
  FUSEE_DEVICE void operator()(View& view) const {
    const Pivot pivot = target.pivot(view);
    const int64_t element =
        view.row() / data.shape.inner * data.shape.length * data.shape.inner +
        view.row() % data.shape.inner + (pivot.at < 0 ? 0 : pivot.at) * data.shape.inner;
    const A x_t = view.active() ? static_cast<A>(load(data.x, element)) : A(0);
    const A symlog_t = symlog(x_t);
    Accumulator<A> positive, negative, spread;
    const bool spreads = target.spreads();
    view.visit(
        [&](int64_t j, A x, A q) {
          const bool own = j == pivot.at;
          positive.add(own ? A(0) : StableSum<A>::positive_term(x));
          negative.add(own ? A(0) : StableSum<A>::negative_term(x));
          if (spreads) {
            const A b = target.coefficient(j, q);
            // A class with no weight takes no part even at -inf.
            if (b != A(0)) spread.add(b * (symlog_t - symlog(x)));
          }
        },
        [&] {
          positive.flush();
          negative.flush();
          spread.flush();
        });
    const RowSum rest = RowSum::from<A>(view.reduce(positive.total, Sum{}, 0.0),
                                        view.reduce(negative.total, Sum{}, 0.0));
    double value = spreads ? view.reduce(spread.total, Sum{}, 0.0) : 0.0;
    if (!view.leader()) return;
    RowStats<A> saved{A(1), A(0)};
    if (pivot.at < 0) {
      value = target.lost_value(view.row());
    } else {
      const double s_t = stable_exp(static_cast<double>(x_t));
      const double odds = odds_against(rest, s_t);
      const double logarithm = log_odds(odds, rest, x_t);
      value += pivot.total * logarithm;
      if (target.options.z_loss != 0) value += z_term(logarithm, x_t, target.options.z_loss);
      saved = {static_cast<A>(rest.value() + s_t), static_cast<A>(rest_share(odds))};
    }
    store(loss, view.row(), static_cast<A>(value));
    store(stats, 2 * view.row(), Vector<A, 2>{{saved.sum, saved.rest}});
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
    if (pivot.at < 0) {
      const A value = target.lost_value(view.row());
      view.transform([&](int64_t, A, A) { return value; });
      return;
    }
    const bool spreads = target.spreads();
    view.transform([&](int64_t j, A x, A q) {
      const A c = spreads ? h * target.coefficient(j, q) : A(0);
      return j == pivot.at ? gradient.at_pivot(x) : row_derivative(x, gradient.over_sum, c);
    });
  }
};

// Sums the rows' losses, and what they add to the divisor, in one block and so in one order.
template <typename A>
__global__ void __launch_bounds__(512)
    reduce_losses(Global<const A> losses, Target<A> target, int64_t rows, int64_t reduction,
                  Global<A> loss, Global<double> info) {
  double sum = 0, divisor = 0, invalid = 0;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    if (reduction != kReductionNone) sum += load(losses, row);
    if (!target.indices) continue;
    const int64_t y = load(target.indices, row);
    if (y == target.options.ignore_index) continue;
    if (y < 0 || y >= target.classes) {
      invalid += 1;
    } else {
      divisor += target.class_weight(y);
    }
  }
  FUSEE_SHARED(double, scratch, 32);
  sum = block_sum(sum, scratch);
  divisor = target.indices ? block_sum(divisor, scratch) : static_cast<double>(rows);
  invalid = block_sum(invalid, scratch);
  if (threadIdx.x != 0) return;
  store(info, 0, divisor);
  store(info, 1, invalid);
  if (reduction != kReductionNone)
    store(loss, 0, static_cast<A>(reduction == kReductionMean ? sum / divisor : sum));
}

// The tensors of a call, in the layout that the kernels want.
struct Tensors {
  Tensor input, target;
  std::optional<Tensor> weight, weight_sum;

  Tensors(const Tensor& input_, const Tensor& target_, const std::optional<Tensor>& weight_,
          double label_smoothing)
      : input(as_aligned(input_)), target(as_aligned(target_)), weight(as_contiguous(weight_)) {
    if (weight.has_value() && label_smoothing != 0)
      weight_sum = torch::stable::sum(*weight, std::nullopt, false, ScalarType::Double);
  }

  bool indices() const { return target.scalar_type() == ScalarType::Long; }
  RowShape shape() const { return {input.size(0), input.size(1), input.size(2)}; }

  template <typename A>
  Target<A> arguments(const CrossEntropyOptions& options) const {
    return {indices() ? cuda::input<int64_t>(target) : Global<const int64_t>{},
            cuda::input<A>(weight), cuda::input<double>(weight_sum), options, input.size(1)};
  }

  // Calls f with the RowData of the call; `result` is the output, or absent.
  template <typename T, typename F>
  void with_data(const std::optional<Tensor>& result, const F& f) const {
    using A = accumulate_t<T>;
    const Global<T> out = result.has_value() ? cuda::output<T>(*result) : Global<T>{};
    if (indices()) {
      f(RowData<T, A, false, false>{cuda::input<T>(input), {}, out, shape()});
    } else {
      f(RowData<T, A, true, true>{cuda::input<T>(input), cuda::input<A>(target), out, shape()});
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> stablemax_cross_entropy(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
    int64_t ignore_index, int64_t reduction, double label_smoothing, double z_loss) {
  check_cross_entropy(input, target, weight);
  const Context context(input);
  const CrossEntropyOptions options{ignore_index, label_smoothing, z_loss};
  const Tensors tensors(input, target, weight, label_smoothing);
  const RowShape shape = tensors.shape();
  const ScalarType type = accumulate_type(input.scalar_type());
  Tensor losses = empty(input, {shape.outer, shape.inner}, type);
  Tensor stats = empty(input, {shape.outer, shape.inner, 2}, type);
  Tensor info = empty(input, {2}, ScalarType::Double);
  Tensor loss = reduction == kReductionNone ? losses : empty(input, {}, type);
  dispatch_floating(input.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Target<A> arguments = tensors.arguments<A>(options);
    tensors.with_data<T>(std::nullopt, [&](const auto& data) {
      using Data = std::decay_t<decltype(data)>;
      launch_rows(Forward<Data>{data, arguments, output<A>(losses), output<A>(stats)},
                  context.stream);
    });
    launch(reduce_losses<A>, 1, 512, 0, context.stream, cuda::input<A>(losses), arguments,
           shape.outer * shape.inner, reduction, output<A>(loss), output<double>(info));
  });
  return {loss, stats, info};
}

Tensor stablemax_cross_entropy_backward(const Tensor& grad, const Tensor& input,
                                        const Tensor& target, const std::optional<Tensor>& weight,
                                        const Tensor& stats, int64_t ignore_index,
                                        double label_smoothing, double z_loss) {
  check_cross_entropy(input, target, weight);
  check_cross_entropy_backward(grad, input, stats);
  const Context context(input);
  const CrossEntropyOptions options{ignore_index, label_smoothing, z_loss};
  const Tensors tensors(input, target, weight, label_smoothing);
  const RowValues h(grad);
  const Tensor saved = as_aligned(stats);
  Tensor result = empty(input, to_shape(input.sizes()), input.scalar_type());
  dispatch_floating(input.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    tensors.with_data<T>(result, [&](const auto& data) {
      using Data = std::decay_t<decltype(data)>;
      launch_rows(Backward<Data>{data, tensors.arguments<A>(options), cuda::input<A>(h.tensor),
                                 h.stride, cuda::input<A>(saved)},
                  context.stream);
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("stablemax_cross_entropy", TORCH_BOX(&stablemax_cross_entropy));
  m.impl("stablemax_cross_entropy_backward", TORCH_BOX(&stablemax_cross_entropy_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
