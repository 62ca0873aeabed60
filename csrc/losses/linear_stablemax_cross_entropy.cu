// StableMax cross entropy of a linear layer in CUDA: torch's matrix products make a part of the logits at
// a time, and the kernels of the loss consume it. The host waits for nothing.

#include "core/cuda/torch_stream.h"
#include "losses/linear_blocks.h"
#include "losses/stablemax_cross_entropy_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

#if defined(FUSEE_EMULATED)
// Small enough that small tests have several of each.
constexpr int64_t kBlockElements = 4096;
constexpr int64_t kPartClasses = 64;
#else
// A block of logits large enough to fill the device.
constexpr int64_t kBlockElements = int64_t{1} << 23;
// How many classes one product over a chunk of rows takes.
constexpr int64_t kPartClasses = int64_t{1} << 15;
#endif

template <typename T>
using Logits = RowData<T, accumulate_t<T>, false, false>;

template <typename T>
struct AddBias {
  Logits<T> data;
  Global<const T> bias;

  template <typename View>
  FUSEE_DEVICE void operator()(View& view) const {
    using A = accumulate_t<T>;
    view.transform([&](int64_t j, A x, A) { return x + static_cast<A>(load(bias, j)); });
  }
};

// Adds the sums of a block of classes to the state of each row: both parts of R, the spread against
// zero, and the pivot's logit.
template <typename T>
struct AddBlock {
  using A = accumulate_t<T>;

  Logits<T> data;
  Target<A> target;
  Global<double> states;

  template <typename View>
  FUSEE_DEVICE void operator()(View& view) const {
    const Pivot pivot = target.pivot(view);
    Accumulator<A> positive, negative, spread;
    const bool spreads = target.spreads();
    view.visit(
        [&](Place j, A x, A) {
          const bool own = j.is(pivot.at);
          positive.add(own ? A(0) : StableSum<A>::positive_term(x));
          negative.add(own ? A(0) : StableSum<A>::negative_term(x));
          if (!spreads) return;
          const A b = target.coefficient(j, A(0));
          if (b != A(0)) spread.add(-b * symlog(x));
        },
        [&] {
          positive.flush();
          negative.flush();
          spread.flush();
        });
    double sums[4] = {view.reduce(positive.total, Sum{}, 0.0),
                      view.reduce(negative.total, Sum{}, 0.0),
                      spreads ? view.reduce(spread.total, Sum{}, 0.0) : 0.0, 0.0};
    if (!view.leader()) return;
    if (pivot.at >= 0)
      sums[3] = static_cast<A>(load(data.x, view.row() * data.shape.length + pivot.at));
    for (int i = 0; i < 4; i += 2) {
      Vector<double, 2> state{{sums[i], sums[i + 1]}};
      if (target.first_class != 0) {
        const Vector<double, 2> before = load<2>(states, 4 * view.row() + i);
        state = {{before[0] + state[0], before[1] + state[1]}};
      }
      store(states, 4 * view.row() + i, state);
    }
  }
};

template <typename A>
__global__ void __launch_bounds__(256) finish_rows(Global<const double> states, Target<A> target,
                                                   int64_t rows, Global<A> loss, Global<A> stats) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const Vector<double, 2> sums = load<2>(states, 4 * row),
                          rest_of_state = load<2>(states, 4 * row + 2);
  const double x_t = rest_of_state[1];
  const double all = target.smooth() * target.all_weights();  // sum_j b_j
  const double spread = target.spreads() ? rest_of_state[0] + all * symlog(x_t) : 0.0;
  const LossOfRow<A> result(target, row, target.index_pivot(row), RowSum::from<A>(sums[0], sums[1]),
                            static_cast<A>(x_t), spread);
  store(loss, row, static_cast<A>(result.loss));
  store(stats, 2 * row, Vector<A, 2>{{result.stats.sum, result.stats.rest}});
}

// The gradient of every row's loss where that of the reduced loss is one.
template <typename A>
__global__ void unit_gradient(Global<const double> info, int64_t reduction, Global<A> grad) {
  store(grad, 0, static_cast<A>(reduction == kReductionMean ? 1 / load(info, 0) : 1.0));
}

template <typename T>
__global__ void __launch_bounds__(256)
    add_elements(Global<const T> part, int64_t n, Global<accumulate_t<T>> total) {
  using A = accumulate_t<T>;
  constexpr int N = vector_width<A>;
  constexpr int64_t kPerBlock = 4096;
  const int64_t begin = blockIdx.x * kPerBlock;
  const int64_t end = begin + kPerBlock < n ? begin + kPerBlock : n;
  for_each_vector<N>(
      total, begin, end, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
      [&](int64_t i) {
        Vector<A, N> sum = load<N>(total, i);
        for (int k = 0; k < N; ++k) sum[k] += static_cast<A>(load(part, i + k));
        store(total, i, sum);
      },
      [&](int64_t i) { store(total, i, load(total, i) + static_cast<A>(load(part, i))); });
}

// The tensors of a call, and the launches over parts of its logits.
template <typename T>
struct Call {
  using A = accumulate_t<T>;

  const Stream stream;
  Linear layer;
  Tensor indices;
  std::optional<Tensor> weight, weight_sum;
  Target<A> whole;

  Call(Stream stream_, const Tensor& input_, const Tensor& linear_weight,
       const std::optional<Tensor>& linear_bias, const Tensor& target_,
       const std::optional<Tensor>& weight_, const CrossEntropyOptions& options)
      : stream(stream_),
        layer(input_, linear_weight, linear_bias, kPartClasses),
        indices(as_contiguous(target_)),
        weight(as_contiguous(weight_)) {
    check_linear_target(layer, indices, weight);
    if (weight.has_value() && options.label_smoothing != 0)
      weight_sum = torch::stable::sum(*weight, std::nullopt, false, ScalarType::Double);
    whole = {input<int64_t>(indices), input<A>(weight), input<double>(weight_sum), options,
             layer.classes};
  }

  Logits<T> logits(const Tensor& tensor) const {
    return {input<T>(tensor), {}, output<T>(tensor), {tensor.size(0), tensor.size(1), 1}};
  }

  // The target of a part of the logits, whose bias is added here.
  Target<A> part(int64_t first_row, int64_t first_class, const Tensor& tensor) const {
    if (layer.bias.has_value())
      launch_rows(AddBias<T>{logits(tensor), input<T>(*layer.bias) + first_class}, stream);
    Target<A> target = whole;
    target.indices = target.indices + first_row;
    target.first_class = first_class;
    target.block_classes = tensor.size(1);
    return target;
  }

  // What a mean divides by and the rows out of range, and with losses their reduction.
  void reduce(const Tensor& losses, int64_t reduction, const Tensor& loss,
              const Tensor& info) const {
    launch(reduce_losses<A>, 1, 512, 0, stream, input<A>(losses), whole, layer.rows,
           Global<const double>{}, int64_t{0}, reduction, output<A>(loss), output<double>(info));
  }

  auto gradients(const Wanted& wanted) const {
    return LinearGradients(
        layer, wanted, [stream = stream](const Tensor& part, const Tensor& total) {
          launch(add_elements<T>, static_cast<unsigned>((part.numel() + 4095) / 4096), 256, 0,
                 stream, input<T>(part), part.numel(), output<A>(total));
        });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_stablemax_cross_entropy(
    const Tensor& input_, const Tensor& linear_weight, const Tensor& target,
    const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
    int64_t ignore_index, int64_t reduction, double label_smoothing, bool input_grad,
    bool weight_grad, bool bias_grad) {
  const Context context(input_);
  const CrossEntropyOptions options{ignore_index, label_smoothing, 0.0};
  const Wanted wanted{input_grad, weight_grad, bias_grad};
  return dispatch_floating(input_.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Call<T> call(context.stream, input_, linear_weight, linear_bias, target, weight, options);
    const Linear& layer = call.layer;
    check_forward_gradients(layer, wanted, reduction != kReductionNone);
    const ScalarType type = accumulate_type(input_.scalar_type());
    const Tensor losses = empty(input_, {layer.rows}, type);
    const Tensor stats = empty(input_, {layer.rows, 2}, type);
    const Tensor info = empty(input_, {2}, ScalarType::Double);
    const Tensor loss = reduction == kReductionNone ? losses : empty(input_, {}, type);
    auto gradients = call.gradients(wanted);
    if constexpr (std::is_same_v<T, A>) {
      const Tensor grad = empty(input_, {1}, type);
      if (wanted.any()) {
        call.reduce(losses, kReductionNone, loss, info);
        launch(unit_gradient<A>, 1, 1, 0, context.stream, input<double>(info), reduction,
               output<A>(grad));
      }
      layer.for_each_row_chunk([&](int64_t first, int64_t n, const Tensor& tensor) {
        const Target<A> part = call.part(first, 0, tensor);
        const Logits<T> logits = call.logits(tensor);
        const Tensor totals =
            empty(input_, {blocks_of_rows<Logits<T>>(logits.shape), 4}, ScalarType::Double);
        launch_rows(Forward<Logits<T>>{logits, part, output<A>(losses) + first,
                                       output<A>(stats) + 2 * first, output<double>(totals)},
                    context.stream);
        if (wanted.any())
          launch_rows(
              Backward<Logits<T>>{logits, part, input<A>(grad), 0, input<A>(stats) + 2 * first},
              context.stream);
        gradients.add_row_chunk(first, n, tensor);
      });
    } else {
      const Tensor states = empty(input_, {layer.rows, 4}, ScalarType::Double);
      layer.for_each_class_block(kBlockElements, [&](int64_t first, int64_t, const Tensor& tensor) {
        launch_rows(
            AddBlock<T>{call.logits(tensor), call.part(0, first, tensor), output<double>(states)},
            context.stream);
      });
      launch(finish_rows<A>, static_cast<unsigned>((layer.rows + 255) / 256), 256, 0,
             context.stream, input<double>(states), call.whole, layer.rows, output<A>(losses),
             output<A>(stats));
    }
    call.reduce(losses, reduction, loss, info);
    return std::tuple_cat(std::make_tuple(loss, stats, info), gradients.finish());
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_stablemax_cross_entropy_backward(
    const Tensor& grad, const Tensor& input_, const Tensor& linear_weight, const Tensor& target,
    const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
    const Tensor& stats, int64_t ignore_index, double label_smoothing, bool input_grad,
    bool weight_grad, bool bias_grad) {
  const Context context(input_);
  const CrossEntropyOptions options{ignore_index, label_smoothing, 0.0};
  return dispatch_floating(input_.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Call<T> call(context.stream, input_, linear_weight, linear_bias, target, weight, options);
    const RowValues h(grad);
    const Tensor saved = as_aligned(stats);
    auto gradients = call.gradients({input_grad, weight_grad, bias_grad});
    call.layer.for_each_class_block(
        kBlockElements, [&](int64_t first, int64_t n, const Tensor& tensor) {
          launch_rows(Backward<Logits<T>>{call.logits(tensor), call.part(0, first, tensor),
                                          input<A>(h.tensor), h.stride, input<A>(saved)},
                      context.stream);
          gradients.add_class_block(first, n, tensor);
        });
    return gradients.finish();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("linear_stablemax_cross_entropy", TORCH_BOX(&linear_stablemax_cross_entropy));
  m.impl("linear_stablemax_cross_entropy_backward",
         TORCH_BOX(&linear_stablemax_cross_entropy_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
