// StableMax and its logarithm in CUDA: the row is read once, summed, and written from on-chip memory.

#include "losses/stablemax.h"

#include "core/cuda/row_views.h"
#include "core/cuda/torch_stream.h"
#include "losses/checks.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

template <typename Data_>
struct Forward {
  using Data = Data_;
  using A = typename Data::A;

  Data data;
  Global<double> sum;
  bool log;

  template <typename View>
  FUSEE_DEVICE void operator()(View& view) const {
    Accumulator<A> positive, negative;
    view.visit(
        [&](int64_t, A x, A) {
          positive.add(StableSum<A>::positive_term(x));
          negative.add(StableSum<A>::negative_term(x));
        },
        [&] {
          positive.flush();
          negative.flush();
        });
    const RowSum row_sum = RowSum::from<A>(view.reduce(positive.total, Sum{}, 0.0),
                                           view.reduce(negative.total, Sum{}, 0.0));
    if (view.leader()) store(sum, view.row(), row_sum.value());
    const Normalizer<A> normalize(row_sum);
    if (log) {
      const A log_sum = static_cast<A>(row_sum.log());
      view.transform([&](int64_t, A x, A) { return log_share(x, normalize, log_sum); });
    } else {
      view.transform([&](int64_t, A x, A) { return normalize(stable_exp(x)); });
    }
  }
};

template <typename Data_>
struct Backward {
  using Data = Data_;
  using A = typename Data::A;

  Data data;  // x is the input, y its gradient
  Global<const double> sum;
  bool log;

  template <typename View>
  FUSEE_DEVICE void operator()(View& view) const {
    const double row_sum = view.active() ? load(sum, view.row()) : 1.0;
    const Normalizer<A> normalize(row_sum);
    const A inverse = static_cast<A>(1 / row_sum);
    Accumulator<A> dot;
    view.visit([&](int64_t, A x, A g) { dot.add(log ? g : g * normalize(stable_exp(x))); },
               [&] { dot.flush(); });
    const A row_dot = static_cast<A>(view.reduce(dot.total, Sum{}, 0.0));
    view.transform(
        [&](int64_t, A x, A g) { return stablemax_derivative(x, g, row_dot, inverse, log); });
  }
};

RowShape shape_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2)}; }

std::tuple<Tensor, Tensor> stablemax(const Tensor& input_, bool log) {
  check_rows(input_);
  const Context context(input_);
  const Tensor x = as_aligned(input_);
  Tensor result = empty(x, to_shape(x.sizes()), x.scalar_type());
  Tensor sum = empty(x, {x.size(0), x.size(2)}, ScalarType::Double);
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    using Data = RowData<T, T, false, true>;
    launch_rows(
        Forward<Data>{{input<T>(x), {}, output<T>(result), shape_of(x)}, output<double>(sum), log},
        context.stream);
  });
  return {result, sum};
}

Tensor stablemax_backward(const Tensor& grad, const Tensor& input_, const Tensor& sum_, bool log) {
  check_rows(input_);
  check_stablemax_backward(grad, input_, sum_);
  const Context context(input_);
  const Tensor x = as_aligned(input_), g = as_aligned(grad), sum = as_contiguous(sum_);
  Tensor result = empty(x, to_shape(x.sizes()), x.scalar_type());
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    using Data = RowData<T, T, true, true>;
    launch_rows(
        Backward<Data>{
            {input<T>(x), input<T>(g), output<T>(result), shape_of(x)}, input<double>(sum), log},
        context.stream);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("stablemax", TORCH_BOX(&stablemax));
  m.impl("stablemax_backward", TORCH_BOX(&stablemax_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
