// StableMax cross entropy in CUDA: the operators.

#include "core/cuda/torch_stream.h"
#include "losses/checks.h"
#include "losses/stablemax_cross_entropy_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

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

std::tuple<Tensor, Tensor, Tensor> stablemax_cross_entropy(const Tensor& input,
                                                           const Tensor& target,
                                                           const std::optional<Tensor>& weight,
                                                           int64_t ignore_index, int64_t reduction,
                                                           double label_smoothing, double z_loss) {
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
      const int64_t blocks = blocks_of_rows<Data>(shape);
      const Tensor totals = empty(input, {blocks, 4}, ScalarType::Double);
      launch_rows(Forward<Data>{data, arguments, output<A>(losses), output<A>(stats),
                                output<double>(totals)},
                  context.stream);
      launch(reduce_losses<A>, 1, 512, 0, context.stream, cuda::input<A>(losses), arguments,
             shape.outer * shape.inner, cuda::input<double>(totals), blocks, reduction,
             output<A>(loss), output<double>(info));
    });
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
