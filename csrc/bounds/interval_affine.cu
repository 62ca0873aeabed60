// A factor and a shift for each channel of boxes, and ReLU, in CUDA.

#include "bounds/box_gradient_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

template <typename T_>
struct AffineBoxes {
  using T = T_;
  using A = accumulate_t<T>;
  template <int N>
  struct Factors {
    A scale[N], shift[N];
  };
  static constexpr bool kSums = false;

  Global<const T> center, radius;
  Global<const A> scale, shift;
  Global<T> to_center, to_radius;
  bool relu, sound;

  FUSEE_DEVICE Global<const T> memory() const { return center; }
  template <int N>
  FUSEE_DEVICE void load_factors(int64_t column, int64_t inner, Factors<N>& factors) const {
    load_channels(scale, column, inner, A(1), factors.scale);
    load_channels(shift, column, inner, A(0), factors.shift);
  }

  template <int M, int N, int K>
  FUSEE_DEVICE void apply(int64_t at, const Factors<N>& factors, A (&)[2][K]) const {
    const Vector<T, M> m = load<M>(center, at), r = load<M>(radius, at);
    Vector<T, M> centers, radii;
    for (int i = 0; i < M; ++i) {
      Box<A> box{static_cast<A>(m[i]), checked_radius(static_cast<A>(r[i]))};
      if (box.radius != box.radius) box.center = box.radius;
      if (scale || shift) box = box_affine(box, factors.scale[i % N], factors.shift[i % N], sound);
      if (relu) box = box_relu(box, sound);
      const Box<T> stored = box_to<T>(box, sound);
      centers[i] = stored.center;
      radii[i] = stored.radius;
    }
    store(to_center, at, centers);
    store(to_radius, at, radii);
  }
};

Channels channels_of(const Tensor& center) {
  FUSEE_REQUIRE(center.dim() == 3, "expected center and radius (outer, channels, inner)");
  return {center.size(0), center.size(1), center.size(2)};
}

// They are numbers of the accumulation type, which those of many elements are computed from.
void check_of_channels(const std::optional<Tensor>& vector, int64_t channels,
                       const Tensor& center) {
  FUSEE_REQUIRE(
      !vector.has_value() || (vector->dim() == 1 && vector->size(0) == channels &&
                              vector->scalar_type() == accumulate_type(center.scalar_type())),
      "scale and shift must have one entry per channel, of the accumulation type");
}

std::tuple<Tensor, Tensor> interval_affine(const Tensor& center_, const Tensor& radius_,
                                           const std::optional<Tensor>& scale_,
                                           const std::optional<Tensor>& shift_, bool relu,
                                           bool sound) {
  const Context context(center_);
  const Tensor center = as_aligned(center_), radius = as_aligned(radius_);
  const std::optional<Tensor> scale = as_aligned(scale_), shift = as_aligned(shift_);
  Channels shape = channels_of(center);
  check_same(radius, center);
  check_of_channels(scale, shape.channels, center);
  check_of_channels(shift, shape.channels, center);
  const Tensor out_center = empty(center, to_shape(center.sizes()), center.scalar_type());
  const Tensor out_radius = empty(center, to_shape(center.sizes()), center.scalar_type());
  // Without factors all elements are alike.
  if (!scale.has_value() && !shift.has_value()) shape = {1, 1, center.numel()};
  dispatch_floating(center.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const AffineBoxes<T> body{input<T>(center),
                              input<T>(radius),
                              input<A>(scale),
                              input<A>(shift),
                              output<T>(out_center),
                              output<T>(out_radius),
                              relu,
                              sound};
    launch_channels(body, shape, ChannelSums<A>{}, center, context.stream);
  });
  return {out_center, out_radius};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> interval_affine_backward(
    const Tensor& grad_center_, const Tensor& grad_radius_, const Tensor& center_,
    const Tensor& radius_, const std::optional<Tensor>& scale_,
    const std::optional<Tensor>& out_center_, const std::optional<Tensor>& out_radius_,
    int64_t wanted) {
  const Context context(grad_center_);
  const Tensor grad_center = as_aligned(grad_center_), grad_radius = as_aligned(grad_radius_);
  const Tensor center = as_aligned(center_), radius = as_aligned(radius_);
  const std::optional<Tensor> scale = as_aligned(scale_);
  const std::optional<Tensor> out_center = as_aligned(out_center_);
  const std::optional<Tensor> out_radius = as_aligned(out_radius_);
  Channels shape = channels_of(center);
  for (const Tensor& tensor : {radius, grad_center, grad_radius}) check_same(tensor, center);
  FUSEE_REQUIRE(out_center.has_value() == out_radius.has_value(),
                "out_center and out_radius go together");
  if (out_center.has_value()) {
    check_same(*out_center, center);
    check_same(*out_radius, center);
  }
  check_of_channels(scale, shape.channels, center);
  const Shape whole = to_shape(center.sizes());
  const Tensor to_center = gradient_of(center, whole, wanted & 1);
  const Tensor to_radius = gradient_of(center, whole, wanted & 2);
  const auto gradient_of_channels = [&](bool asked) {
    return empty(center, asked ? Shape{shape.channels} : Shape{0},
                 accumulate_type(center.scalar_type()));
  };
  const Tensor to_scale = gradient_of_channels(wanted & 4);
  const Tensor to_shift = gradient_of_channels(wanted & 8);
  if (!scale.has_value() && !(wanted & 12)) shape = {1, 1, center.numel()};
  dispatch_floating(center.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    BoxGradient<T> body{};
    body.grad_center = input<T>(grad_center);
    body.grad_radius = input<T>(grad_radius);
    body.out_center = input<T>(out_center);
    body.out_radius = input<T>(out_radius);
    if (wanted & 4) {
      body.center = input<T>(center);
      body.radius = input<T>(radius);
    }
    body.scale = input<A>(scale);
    body.to_center = output_if<T>(wanted & 1, to_center);
    body.to_radius = output_if<T>(wanted & 2, to_radius);
    ChannelSums<A> sums;
    sums.results[0] = output_if<A>(wanted & 4, to_scale);
    sums.results[1] = output_if<A>(wanted & 8, to_shift);
    launch_channels(body, shape, sums, center, context.stream);
  });
  return {to_center, to_radius, to_scale, to_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("interval_affine", TORCH_BOX(&interval_affine));
  m.impl("interval_affine_backward", TORCH_BOX(&interval_affine_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
