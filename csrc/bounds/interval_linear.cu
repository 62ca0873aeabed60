// A layer on boxes in CUDA.

#include "bounds/box_arguments_cuda.h"
#include "bounds/box_product_cuda.h"
#include "bounds/few_boxes_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

template <typename A, int V>
struct Added {
  A values[V];
};

// What becomes of the sums: bias, outward rounding, ReLU.
template <typename T, typename A = accumulate_t<T>>
struct ToLayer {
  Global<const T> bias;
  Global<T> center, radius;
  int64_t width;
  Outward<A> outward;
  bool relu;

  FUSEE_DEVICE Box<T> result(A of_center, A of_radius, A added) const {
    Box<A> box{of_center + added, of_radius};
    if (outward.sound) box.radius = outward.rounding.after(of_radius, added);
    return box_to<T>(relu ? box_relu(box, outward.sound) : box, outward.sound);
  }

  FUSEE_DEVICE void operator()(int64_t line, int64_t column, A of_center, A of_radius) const {
    const A added = bias ? static_cast<A>(load(bias, column)) : A(0);
    const Box<T> box = result(of_center, of_radius, added);
    store(center, line * width + column, box.center);
    store(radius, line * width + column, box.radius);
  }

  template <int V>
  FUSEE_DEVICE Added<A, V> of_column(int64_t column, int valid) const {
    Added<A, V> added{};
    if (bias) load_line(bias, 0, width, column, added.values, valid);
    return added;
  }
  template <int V>
  FUSEE_DEVICE void operator()(int64_t line, int64_t column, const Added<A, V>& added,
                               const A (&of_center)[V], const A (&of_radius)[V], int valid) const {
    T centers[V], radii[V];
    for (int v = 0; v < V; ++v) {
      const Box<T> box = result(of_center[v], of_radius[v], added.values[v]);
      centers[v] = box.center;
      radii[v] = box.radius;
    }
    store_line(center, line, width, column, centers, valid);
    store_line(radius, line, width, column, radii, valid);
  }
};

std::tuple<Tensor, Tensor> interval_linear(const Tensor& center_, const Tensor& radius_,
                                           const Tensor& weight_,
                                           const std::optional<Tensor>& bias_, bool relu,
                                           bool sound, bool tf32) {
  const Context context(center_);
  const Tensor center = as_aligned(center_), radius = as_aligned(radius_);
  const Tensor weight = as_aligned(weight_);
  const std::optional<Tensor> bias = as_aligned(bias_);
  check_layer(center, radius, weight);
  check_vector(bias, weight.size(0), weight);
  const int64_t rows = center.size(0), in = weight.size(1), out = weight.size(0);
  const Tensor out_center = empty(center, {rows, out}, center.scalar_type());
  const Tensor out_radius = empty(center, {rows, out}, center.scalar_type());
  dispatch_floating(center.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Matrix<T> centers{input<T>(center), rows, in}, radii{input<T>(radius), rows, in};
    const Matrix<T> weights{input<T>(weight), out, in};
    // With a product, and the bias, as one more of each.
    const auto outward_of = [&](int64_t additions) {
      return Outward<A>{sound, Rounding<A>::of(additions + 2)};
    };
    const auto finish = [&](const Outward<A>& outward) {
      return ToLayer<T>{
          input<T>(bias), output<T>(out_center), output<T>(out_radius), out, outward, relu};
    };
    // Tensor cores are quicker at five boxes already.
    if (rows <= (kIsHalf<T> && !sound ? kMostFewBoxes / 2 : kMostFewBoxes)) {
      const Outward<A> outward = outward_of(few_boxes_terms<T>(in));
      return launch_few_boxes(centers, radii, weights, outward, finish(outward), context.stream);
    }
    const auto run = [&]<typename E, int kColumns>() {
      using Product = BoxProduct<E, T, kColumns, Form::kLayer>;
      const Product product{{weights, weights}, {centers, radii}, out, rows, in};
      const Outward<A> outward = outward_of(Product::kLength + product.steps() + parts_of(product));
      launch_box_product(product, outward, finish(outward), center, context.stream);
    };
    if (kIsHalf<T> && sound) return run.template operator()<A, 32>();
    as_multiplied<T>(tf32 && !sound, [&]<typename E>() {
      as_wide_as<E, kOnTensorCores<E> ? 16 : 32>(
          rows, [&]<int kColumns>() { run.template operator()<E, kColumns>(); });
    });
  });
  return {out_center, out_radius};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("interval_linear", TORCH_BOX(&interval_linear));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
