// The Monarch product and its gradients in CUDA. The middle stays in shared memory, but for gradients of
// factors, and where no part of it fits.

#include "structured/arguments_cuda.h"
#include "structured/monarch_launch_cuda.h"
#include "structured/weight_gradient_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

struct Call {
  const Context context;
  Tensor w1, w2;
  MonarchShape shape;

  Call(const Tensor& w1_, const Tensor& w2_)
      : context(w1_),
        w1(as_aligned(w1_)),
        w2(as_aligned(w2_)),
        shape{blocks_of(w1), blocks_of(w2)} {
    FUSEE_REQUIRE(shape.fits(), "w1 (k, q, p) and w2 (l, s, r) must have k q = l r");
    FUSEE_REQUIRE(w1.scalar_type() == w2.scalar_type(), "all tensors must have one dtype");
  }

  Tensor middle(const Tensor& like) const {
    return empty(like, {like.size(0), shape.middle()}, like.scalar_type());
  }

  // The middle as the first factor's output and as the second one's input.
  template <typename T>
  auto as_first(const Tensor& middle) const {
    return output_columns<T, Layout::kBlocked>(middle, shape.first.count, shape.first.out);
  }
  template <typename T>
  auto as_second(const Tensor& middle) const {
    return output_columns<T, Layout::kInterleaved>(middle, shape.second.count, shape.second.in);
  }
};

// The same columns for reading.
template <typename T, Layout kLayout>
Columns<const T, kLayout> read(const Columns<T, kLayout>& columns) {
  return {columns.data, columns.rows, columns.count, columns.size};
}

Tensor monarch_matmul(const Tensor& input_, const Tensor& w1, const Tensor& w2,
                      const std::optional<Tensor>& bias_, bool tf32) {
  const Call call(w1, w2);
  const MonarchShape& shape = call.shape;
  const Tensor x = as_aligned(input_);
  const std::optional<Tensor> bias = as_contiguous(bias_);
  check_rows(x, shape.width_in(), call.w1);
  check_bias(bias, shape.width_out(), call.w1);
  const Tensor y = empty(x, {x.size(0), shape.width_out()}, x.scalar_type());
  if (y.numel() == 0) return y;
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    const Stream stream = call.context.stream;
    const auto from = input_columns<T, Layout::kBlocked>(x, shape.first.count, shape.first.in);
    const auto to =
        output_columns<T, Layout::kInterleaved>(y, shape.second.count, shape.second.out);
    const Global<const T> first = input<T>(call.w1), second = input<T>(call.w2);
    if (shape.middle() > 0 && launch_monarch_product(MonarchSizes(shape, x.size(0)), from, first,
                                                     second, input<T>(bias), to, tf32, stream))
      return;
    const Tensor middle = call.middle(x);
    launch_block_product<false>(from, first, Global<const T>{}, call.as_first<T>(middle), tf32,
                                stream);
    launch_block_product<false>(read(call.as_second<T>(middle)), second, input<T>(bias), to, tf32,
                                stream);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> monarch_matmul_backward(const Tensor& grad_,
                                                           const Tensor& input_, const Tensor& w1,
                                                           const Tensor& w2, int64_t wanted,
                                                           bool tf32) {
  const bool input_grad = wanted & 1, w1_grad = wanted & 2, w2_grad = wanted & 4;
  const Call call(w1, w2);
  const MonarchShape& shape = call.shape;
  const Tensor grad = as_aligned(grad_), x = as_aligned(input_);
  check_rows(x, shape.width_in(), call.w1);
  check_rows(grad, shape.width_out(), call.w1);
  FUSEE_REQUIRE(grad.size(0) == x.size(0), "grad and input must have as many rows");
  const Tensor grad_input = gradient_of(x, input_grad);
  const Tensor grad_w1 = gradient_of(call.w1, w1_grad), grad_w2 = gradient_of(call.w2, w2_grad);
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    const Stream stream = call.context.stream;
    const Global<const T> first = input<T>(call.w1), second = input<T>(call.w2), none;
    const auto of_x = input_columns<T, Layout::kBlocked>(x, shape.first.count, shape.first.in);
    const auto of_grad =
        input_columns<T, Layout::kInterleaved>(grad, shape.second.count, shape.second.out);
    const auto to =
        output_columns<T, Layout::kBlocked>(grad_input, shape.first.count, shape.first.in);
    const std::optional<Tensor> of_middle =
        w1_grad ? std::optional<Tensor>(call.middle(x)) : std::nullopt;
    const auto kept = w1_grad ? call.as_first<T>(*of_middle) : Columns<T, Layout::kBlocked>{};
    const bool fused = input_grad && shape.middle() > 0 && x.numel() > 0 &&
                       launch_monarch_gradient(MonarchSizes(shape, x.size(0)), of_grad, first,
                                               second, to, kept, tf32, stream);
    if (!fused && (input_grad || w1_grad)) {
      const Tensor middle = w1_grad ? *of_middle : call.middle(x);
      launch_block_product<true>(of_grad, second, none, call.as_second<T>(middle), tf32, stream);
      if (input_grad)
        launch_block_product<true>(read(call.as_first<T>(middle)), first, none, to, tf32, stream);
    }
    if (w1_grad) launch_weight_gradient(read(kept), of_x, grad_w1, tf32, stream);
    if (w2_grad) {
      const Tensor middle = call.middle(x);
      launch_block_product<false>(of_x, first, none, call.as_first<T>(middle), tf32, stream);
      launch_weight_gradient(of_grad, read(call.as_second<T>(middle)), grad_w2, tf32, stream);
    }
  });
  return {grad_input, grad_w1, grad_w2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("monarch_matmul", TORCH_BOX(&monarch_matmul));
  m.impl("monarch_matmul_backward", TORCH_BOX(&monarch_matmul_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
