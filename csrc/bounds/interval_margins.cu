// Bounds of how far the outputs of a layer exceed that of the target, and their gradients, in CUDA.

#include "bounds/box_arguments_cuda.h"
#include "bounds/few_boxes_cuda.h"
#include "core/cuda/row_data.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

inline constexpr int kColumnThreads = 128;

// The layer and the boxes that go into it.
template <typename T>
struct Margins {
  Global<const T> center, radius, weight;
  Global<const int64_t> target;
  int64_t rows, classes, in;

  FUSEE_DEVICE bool valid(int64_t label) const { return label >= 0 && label < classes; }
};

// Not below x.
template <typename T, typename A>
FUSEE_DEVICE T up_to(A x) {
  T result = static_cast<T>(x);
  if constexpr (!std::is_same_v<T, A>) {
    if (static_cast<A>(result) < x)
      result.bits = static_cast<uint16_t>(result.bits + (x < A(0) ? -1 : 1));
  }
  return result;
}

// A warp takes a few classes of a row.
template <typename T, typename A = accumulate_t<T>>
__global__ void __launch_bounds__(kBoxThreads)
    margins_of_rows(Margins<T> layer, Global<const T> bias, Outward<A> outward, Global<T> result) {
  const int64_t groups = divide_up<int64_t>(layer.classes, kBoxWarps * kWeightRows);
  const int64_t row = blockIdx.x / groups;
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first = (blockIdx.x % groups * kBoxWarps + warp) * kWeightRows;
  if (first >= layer.classes) return;
  const int64_t label = load(layer.target, row), in = layer.in;
  const bool valid = layer.valid(label);
  const int64_t of_label = (valid ? label : 0) * in;
  bool bad = !valid;
  A of_center[kWeightRows] = {}, of_radius[kWeightRows] = {};
  const auto add = [&]<int V>(int64_t at, std::integral_constant<int, V>) {
    const Vector<T, V> center = load<V>(layer.center, row * in + at);
    const Vector<T, V> radius = load<V>(layer.radius, row * in + at);
    const Vector<T, V> own = load<V>(layer.weight, of_label + at);
    Box<A> boxes[V];
    for (int v = 0; v < V; ++v) {
      boxes[v] = outward({static_cast<A>(center[v]), static_cast<A>(radius[v])});
      bad = bad || !is_radius(static_cast<A>(radius[v]));
    }
    FUSEE_UNROLL
    for (int n = 0; n < kWeightRows; ++n) {
      if (first + n >= layer.classes) continue;
      const Vector<T, V> other = load<V>(layer.weight, (first + n) * in + at);
      for (int v = 0; v < V; ++v) {
        const A weight = static_cast<A>(other[v]) - static_cast<A>(own[v]);
        of_center[n] += boxes[v].center * weight;
        of_radius[n] += boxes[v].radius * absolute(weight);
      }
    }
  };
  constexpr int V = vector_width<T>;
  if (in % V == 0) {
    for (int64_t at = lane * V; at < in; at += 32 * V) add(at, std::integral_constant<int, V>{});
  } else {
    for (int64_t at = lane; at < in; at += 32) add(at, std::integral_constant<int, 1>{});
  }
  A center = sums_over_lanes(of_center), radius = sums_over_lanes(of_radius);
  bad = __ballot_sync(full_mask, bad) != 0;
  constexpr int kLanes = 32 / kWeightRows;
  const int64_t j = first + lane / kLanes;
  if (lane % kLanes != 0 || j >= layer.classes) return;
  A added = 0, sizes = 0;
  if (bias && valid) {
    const A one = static_cast<A>(load(bias, j)), other = static_cast<A>(load(bias, label));
    added = one - other;
    sizes = absolute(one) + absolute(other);
  }
  A margin = center + added + radius;
  if (outward.sound) margin = next_above(center + added + outward.rounding.after(radius, sizes));
  if (bad)
    margin = std::numeric_limits<A>::quiet_NaN();
  else if (j == label)
    margin = 0;
  store(result, row * layer.classes + j, outward.sound ? up_to<T>(margin) : static_cast<T>(margin));
}

template <int M, typename T, typename A = accumulate_t<T>>
FUSEE_DEVICE void read(Global<const T> from, int64_t at, A (&values)[M]) {
  const Vector<T, M> loaded = load<M>(from, at);
  for (int i = 0; i < M; ++i) values[i] = static_cast<A>(loaded[i]);
}

// M columns of a row for each thread.
template <typename T, int M, typename A = accumulate_t<T>>
__global__ void __launch_bounds__(kColumnThreads)
    margins_box_gradient(Margins<T> layer, Global<const T> grad, Global<T> to_center,
                         Global<T> to_radius) {
  const int64_t blocks = divide_up<int64_t>(layer.in, kColumnThreads * M);
  const int64_t row = blockIdx.x / blocks;
  const int64_t column = (blockIdx.x % blocks * kColumnThreads + threadIdx.x) * M;
  if (column >= layer.in) return;
  const int64_t label = load(layer.target, row);
  const bool valid = layer.valid(label);
  A own[M] = {};
  if (valid) read(layer.weight, label * layer.in + column, own);
  Accumulator<A> center[M], radius[M];
  for (int64_t j = 0; valid && j < layer.classes; ++j) {
    if (j == label) continue;
    const A g = static_cast<A>(load(grad, row * layer.classes + j));
    A other[M];
    read(layer.weight, j * layer.in + column, other);
    for (int i = 0; i < M; ++i) {
      center[i].add(g * (other[i] - own[i]));
      radius[i].add(g * absolute(other[i] - own[i]));
    }
    if (j % 32 == 31)
      for (int i = 0; i < M; ++i) {
        center[i].flush();
        radius[i].flush();
      }
  }
  Vector<T, M> of_center, of_radius;
  for (int i = 0; i < M; ++i) {
    center[i].flush();
    radius[i].flush();
    constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();
    of_center[i] = static_cast<T>(valid ? static_cast<A>(center[i].total) : kNaN);
    of_radius[i] = static_cast<T>(valid ? static_cast<A>(radius[i].total) : kNaN);
  }
  if (to_center) store_whole(to_center, row * layer.in + column, of_center);
  if (to_radius) store_whole(to_radius, row * layer.in + column, of_radius);
}

// The gradient of a class's weights: M columns for each lane, the rows dealt out to the warps. A row whose target
// is the class has all its others' gradients, and one without a valid target makes all NaN.
template <typename T, int M, typename A = accumulate_t<T>>
__global__ void __launch_bounds__(kColumnThreads)
    margins_weight_gradient(Margins<T> layer, Global<const T> grad, int64_t blocks,
                            Global<T> to_weight, Global<T> to_bias) {
  constexpr int kWarps = kColumnThreads / 32;
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t j = blockIdx.x / blocks, in = layer.in;
  const int64_t column = (blockIdx.x % blocks * 32 + lane) * M;
  const bool active = to_weight && column < in;
  A own[M] = {};
  if (active) read(layer.weight, j * in + column, own);
  Accumulator<A> sums[M], of_bias;
  const auto flush = [&] {
    of_bias.flush();
    for (int i = 0; i < M; ++i) sums[i].flush();
  };
  for (int64_t row = warp; row < layer.rows; row += kWarps) {
    const int64_t label = load(layer.target, row);
    A center[M] = {}, radius[M] = {};
    if (active) {
      read(layer.center, row * in + column, center);
      read(layer.radius, row * in + column, radius);
    }
    // What the margin of `other` gives the two classes it compares.
    const auto add = [&](A g, int64_t other, A sign) {
      A weight[M] = {};
      if (active) read(layer.weight, other * in + column, weight);
      of_bias.add(sign * g);
      for (int i = 0; i < M; ++i)
        sums[i].add(g * (sign * center[i] + sign_of(own[i] - weight[i]) * radius[i]));
    };
    if (!layer.valid(label)) {
      constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();
      of_bias.add(kNaN);
      for (int i = 0; i < M; ++i) sums[i].add(kNaN);
    } else if (label != j) {
      add(static_cast<A>(load(grad, row * layer.classes + j)), label, A(1));
    } else {
      for (int64_t k = 0; k < layer.classes; ++k) {
        if (k != j) add(static_cast<A>(load(grad, row * layer.classes + k)), k, A(-1));
        if (k % 32 == 31) flush();
      }
    }
    if (row / kWarps % 32 == 31) flush();
  }
  flush();
  // What a warp stores and loads lies in different banks.
  constexpr int kApart = kColumnThreads + 16 / M, kSums = kApart * M;
  FUSEE_SHARED(double, scratch, kSums + kWarps);
  for (int i = 0; i < M; ++i) scratch.store(i * kApart + warp * 32 + lane, sums[i].total);
  if (lane == 0) scratch.store(kSums + warp, of_bias.total);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); to_weight && i < 32 * M; i += kColumnThreads) {
    const int64_t place = blockIdx.x % blocks * 32 * M + i;
    if (place >= in) break;
    double total = 0;
    for (int n = 0; n < kWarps; ++n) total += scratch.load(i % M * kApart + n * 32 + i / M);
    store(to_weight, j * in + place, static_cast<T>(static_cast<A>(total)));
  }
  if (to_bias && threadIdx.x == 0 && blockIdx.x % blocks == 0) {
    double total = 0;
    for (int n = 0; n < kWarps; ++n) total += scratch.load(kSums + n);
    store(to_bias, j, static_cast<T>(static_cast<A>(total)));
  }
}

void check_target(const Tensor& target, const Tensor& center) {
  FUSEE_REQUIRE(target.dim() == 1 && target.size(0) == center.size(0) &&
                    target.scalar_type() == ScalarType::Long,
                "expected an int64 target for each row");
}

template <typename T>
Margins<T> margins_of(const Tensor& center, const Tensor& radius, const Tensor& weight,
                      const Tensor& target) {
  return {input<T>(center), input<T>(radius), input<T>(weight), input<int64_t>(target),
          center.size(0),   weight.size(0),   weight.size(1)};
}

Tensor interval_margins(const Tensor& center_, const Tensor& radius_, const Tensor& weight_,
                        const std::optional<Tensor>& bias_, const Tensor& target_, bool sound) {
  const Context context(center_);
  const Tensor center = as_aligned(center_), radius = as_aligned(radius_);
  const Tensor weight = as_aligned(weight_), target = as_contiguous(target_);
  const std::optional<Tensor> bias = as_contiguous(bias_);
  check_layer(center, radius, weight);
  check_vector(bias, weight.size(0), weight);
  check_target(target, center);
  const int64_t rows = center.size(0), classes = weight.size(0), in = weight.size(1);
  const Tensor result = empty(center, {rows, classes}, center.scalar_type());
  if (result.numel() == 0) return result;
  dispatch_floating(center.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Outward<A> outward{sound, Rounding<A>::of(few_boxes_terms<T>(in) + 2)};
    const int64_t groups = divide_up<int64_t>(classes, kBoxWarps * kWeightRows);
    launch(margins_of_rows<T>, grid_of(rows, groups), kBoxThreads, 0, context.stream,
           margins_of<T>(center, radius, weight, target), input<T>(bias), outward,
           output<T>(result));
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> interval_margins_backward(
    const Tensor& grad_, const Tensor& center_, const Tensor& radius_, const Tensor& weight_,
    const Tensor& target_, int64_t wanted) {
  const Context context(grad_);
  const Tensor grad = as_contiguous(grad_);
  const Tensor center = as_aligned(center_), radius = as_aligned(radius_);
  const Tensor weight = as_aligned(weight_), target = as_contiguous(target_);
  check_layer(center, radius, weight);
  check_target(target, center);
  const int64_t rows = center.size(0), classes = weight.size(0), in = weight.size(1);
  FUSEE_REQUIRE(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == classes &&
                    grad.scalar_type() == center.scalar_type(),
                "the gradient does not fit the margins");
  const Tensor to_center = gradient_of(center, {rows, in}, wanted & 1);
  const Tensor to_radius = gradient_of(center, {rows, in}, wanted & 2);
  const Tensor to_weight = gradient_of(weight, {classes, in}, wanted & 4);
  const Tensor to_bias = gradient_of(weight, {classes}, wanted & 8);
  dispatch_floating(center.scalar_type(), [&]<typename T>(T) {
    const Margins<T> layer = margins_of<T>(center, radius, weight, target);
    const auto run = [&]<int M>(std::integral_constant<int, M>) {
      if ((wanted & 3) && rows > 0 && in > 0)
        launch(margins_box_gradient<T, M>,
               grid_of(rows, divide_up<int64_t>(in, kColumnThreads * M)), kColumnThreads, 0,
               context.stream, layer, input<T>(grad), output_if<T>(wanted & 1, to_center),
               output_if<T>(wanted & 2, to_radius));
      if ((wanted & 12) && classes > 0) {
        const int64_t blocks =
            wanted & 4 ? std::max<int64_t>(1, divide_up<int64_t>(in, 32 * M)) : 1;
        launch(margins_weight_gradient<T, M>, grid_of(classes, blocks), kColumnThreads, 0,
               context.stream, layer, input<T>(grad), blocks, output_if<T>(wanted & 4, to_weight),
               output_if<T>(wanted & 8, to_bias));
      }
    };
    if (in % vector_width<T> == 0)
      run(std::integral_constant<int, vector_width<T>>{});
    else
      run(std::integral_constant<int, 1>{});
  });
  return {to_center, to_radius, to_weight, to_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("interval_margins", TORCH_BOX(&interval_margins));
  m.impl("interval_margins_backward", TORCH_BOX(&interval_margins_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
