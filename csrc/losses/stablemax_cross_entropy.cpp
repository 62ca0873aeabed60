// StableMax cross entropy on the CPU: the operators.

#include "losses/checks.h"
#include "losses/stablemax_cross_entropy_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

// The operators' arguments, as the kernels take them.
template <typename T>
struct Arguments {
  Tensor input;
  std::optional<Tensor> target, weight;
  Problem<T> problem;

  Arguments(const Tensor& input_, const Tensor& target_, const std::optional<Tensor>& weight_,
            const CrossEntropyOptions& options)
      : input(as_contiguous(input_)),
        target(as_contiguous(target_)),
        weight(as_contiguous(weight_)) {
    using A = accumulate_t<T>;
    const bool indices = target->scalar_type() == ScalarType::Long;
    problem = {data<T>(input),
               {input.size(0), input.size(1), input.size(2)},
               0,
               input.size(1),
               indices ? data<int64_t>(*target) : nullptr,
               indices ? nullptr : data<A>(*target),
               data_or_null<A>(weight),
               0,
               options};
    for (int64_t c = 0; c < problem.classes(); ++c) problem.weight_sum += problem.class_weight(c);
  }
};

std::tuple<Tensor, Tensor, Tensor> stablemax_cross_entropy(const Tensor& input,
                                                           const Tensor& target,
                                                           const std::optional<Tensor>& weight,
                                                           int64_t ignore_index, int64_t reduction,
                                                           double label_smoothing, double z_loss) {
  const CrossEntropyOptions options{ignore_index, label_smoothing, z_loss};
  check_cross_entropy(input, target, weight);
  return dispatch_floating(input.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Arguments<T> arguments(input, target, weight, options);
    const Problem<T>& p = arguments.problem;
    const ScalarType type = accumulate_type(input.scalar_type());
    Tensor stats = empty(input, {p.rows.outer, p.rows.inner, 2}, type);
    Tensor info = empty(input, {2}, ScalarType::Double);
    Tensor losses = empty(input, {p.rows.outer, p.rows.inner}, type);
    A* rows = mutable_data<A>(losses);
    auto* saved = reinterpret_cast<RowStats<A>*>(mutable_data<A>(stats));
    for_each_tile(p, [&](const Tile& tile) { forward(p, tile, rows, saved); });
    const auto counts = count_rows(p);
    std::copy(counts.begin(), counts.end(), mutable_data<double>(info));
    if (reduction == kReductionNone) return std::make_tuple(losses, stats, info);
    Tensor loss = empty(input, {}, type);
    *mutable_data<A>(loss) =
        static_cast<A>(reduce_rows(rows, p.rows.count(), reduction, counts[0]));
    return std::make_tuple(loss, stats, info);
  });
}

Tensor stablemax_cross_entropy_backward(const Tensor& grad, const Tensor& input,
                                        const Tensor& target, const std::optional<Tensor>& weight,
                                        const Tensor& stats, int64_t ignore_index,
                                        double label_smoothing, double z_loss) {
  const CrossEntropyOptions options{ignore_index, label_smoothing, z_loss};
  check_cross_entropy(input, target, weight);
  check_cross_entropy_backward(grad, input, stats);
  return dispatch_floating(input.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Arguments<T> arguments(input, target, weight, options);
    const RowValues h(grad);
    const Tensor saved = as_contiguous(stats);
    Tensor output = empty(input, to_shape(input.sizes()), input.scalar_type());
    const auto* row_stats = reinterpret_cast<const RowStats<A>*>(data<A>(saved));
    T* gradient = mutable_data<T>(output);
    for_each_tile(arguments.problem, [&](const Tile& tile) {
      backward(arguments.problem, tile, data<A>(h.tensor), h.stride, row_stats, gradient);
    });
    return output;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) {
  m.impl("stablemax_cross_entropy", TORCH_BOX(&stablemax_cross_entropy));
  m.impl("stablemax_cross_entropy_backward", TORCH_BOX(&stablemax_cross_entropy_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
