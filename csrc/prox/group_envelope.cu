// The value of the group envelope in CUDA, and its gradient.

#include "core/cuda/kernel.h"
#include "core/cuda/torch_stream.h"
#include "prox/group_layout.h"
#include "prox/group_roots_cuda.h"
#include "prox/group_sums_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

template <typename A>
FUSEE_DEVICE Group<A> plain_group(Global<const A> weights, int64_t j) {
  return Group<A>(weights ? load(weights, j) : A(1), A(1), A(0), false);
}

template <typename T, Worker kWorker>
__global__ void __launch_bounds__(kRootThreads, blocks_at_once(kWorker))
    envelope_root_kernel(WorkerMemory<accumulate_t<T>> memory, Layout layout, Global<const T> x,
                         Global<const double> sums, Parts parts,
                         Global<const accumulate_t<T>> weights, Global<const double> budgets,
                         bool debiased, Global<accumulate_t<T>> norms, Global<double> knees,
                         Global<double> values) {
  using A = accumulate_t<T>;
  for_problem<A, kWorker>(memory, [&](const auto& team, int64_t problem) {
    const int64_t count = layout.groups;
    const double k = load(budgets, problem);
    auto made_of = [&](int64_t j, A norm) {
      return Coefficients<A>{plain_group(weights, j).root_weight * norm, A(0)};
    };
    store_norms(x, sums, parts, layout, problem, team, norms, made_of);
    const Global<const A> known(norms + problem * count);
    auto of = [&](int64_t j) {
      return team.recall(j, [&](int64_t i) { return made_of(i, load(known, i)); });
    };
    const double knee = k > 0 || k != k ? search_root<A>(k, count, of, team)
                                        : std::numeric_limits<double>::infinity();
    EnvelopeSums own;
    for (int64_t j = team.rank(); j < count; j += team.size())
      own.add(static_cast<double>(of(j).a), knee);
    const EnvelopeSums all = team.sum(own);
    if (team.rank() == 0) {
      store(knees, problem, knee);
      store(values, problem, all.value(knee, debiased));
    }
  });
}

// What the elements of every group are multiplied with.
template <typename A>
__global__ void __launch_bounds__(kGroupThreads)
    envelope_slope_kernel(Global<const double> grad, Global<const A> weights, Global<const A> norms,
                          Global<const double> knees, int64_t groups, int64_t count, bool debiased,
                          Global<A> slopes) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kGroupThreads + thread_rank();
  if (at >= count) return;
  const int64_t problem = at / groups;
  const double slope = envelope_slope(plain_group(weights, at % groups), load(norms, at),
                                      load(knees, problem), debiased);
  store(slopes, at, static_cast<A>(load(grad, problem) * slope));
}

template <typename T>
__global__ void __launch_bounds__(kGroupThreads)
    envelope_gradient_kernel(Layout layout, Global<const T> x, Global<const accumulate_t<T>> slopes,
                             Global<T> out, int64_t count) {
  using A = accumulate_t<T>;
  for_each_element<false>(
      layout, x, x, out, count,
      [&](const Place& place) { return load(slopes, place.problem * layout.groups + place.group); },
      [](A v, A, A slope, int64_t) { return v * slope; });
}

// What single elements need of their problem.
struct OfProblem {
  double grad, knee;
};

template <typename T>
__global__ void __launch_bounds__(kGroupThreads, 1)
    envelope_single_gradient_kernel(Layout layout, Global<const double> grad, Global<const T> x,
                                    Global<const accumulate_t<T>> weights,
                                    Global<const double> knees, bool debiased, Global<T> out,
                                    int64_t count) {
  using A = accumulate_t<T>;
  for_each_element<false>(
      layout.whole(), x, x, out, count,
      [&](const Place& at) { return OfProblem{load(grad, at.problem), load(knees, at.problem)}; },
      [&](A v, A, const OfProblem& of, int64_t j) {
        return v * static_cast<A>(of.grad * envelope_slope(plain_group(weights, j), absolute(v),
                                                           of.knee, debiased));
      });
}

std::tuple<Tensor, Tensor, Tensor> group_envelope(const Tensor& input_,
                                                  const std::optional<Tensor>& weights,
                                                  const Tensor& k, bool debiased) {
  const Given given(input_, weights, std::nullopt, k, k);
  const Context context(input_);
  const Tensor x = as_aligned(input_);
  const Layout layout(x);
  Tensor value = empty(x, {layout.batch}, ScalarType::Double);
  Tensor norms = empty(x, {layout.batch, layout.groups}, accumulate_type(x.scalar_type()));
  Tensor knee = empty(x, {layout.batch}, ScalarType::Double);
  if (layout.batch == 0) return {value, norms, knee};
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const SumPlan plan(layout, columns_of_block<T>);
    const Tensor sums = group_products<T, false>(x, x, layout, plan, context);
    launch_workers<A>(
        layout, [](auto worker) { return &envelope_root_kernel<T, worker.value>; }, true, x,
        context.stream, layout, input<T>(x), input<double>(sums), plan.parts,
        input<A>(given.weights), input<double>(given.k), debiased, output<A>(norms),
        output<double>(knee), output<double>(value));
  });
  return {value, norms, knee};
}

Tensor group_envelope_backward(const Tensor& grad_, const Tensor& input_, const Tensor& norms_,
                               const Tensor& knee_, const std::optional<Tensor>& weights,
                               bool debiased) {
  const Given given(input_, weights, std::nullopt, knee_, knee_);
  check_value_backward(grad_, input_, norms_, knee_);
  const Context context(input_);
  const Tensor x = as_aligned(input_), grad = as_contiguous(grad_), norms = as_contiguous(norms_),
               knee = as_contiguous(knee_);
  const Layout layout(x);
  Tensor result = empty(x, to_shape(x.sizes()), x.scalar_type());
  if (x.numel() == 0) return result;
  const int64_t count = layout.batch * layout.groups;
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const int64_t elements = element_blocks(x.numel(), sizeof(T));
    if (layout.singles()) {
      launch(&envelope_single_gradient_kernel<T>, elements, kGroupThreads, 0, context.stream,
             layout, input<double>(grad), input<T>(x), input<A>(given.weights), input<double>(knee),
             debiased, output<T>(result), x.numel());
      return;
    }
    const Tensor slopes = empty(x, {count}, accumulate_type(x.scalar_type()));
    launch(&envelope_slope_kernel<A>, (count + kGroupThreads - 1) / kGroupThreads, kGroupThreads, 0,
           context.stream, input<double>(grad), input<A>(given.weights), input<A>(norms),
           input<double>(knee), layout.groups, count, debiased, output<A>(slopes));
    launch(&envelope_gradient_kernel<T>, elements, kGroupThreads, 0, context.stream, layout,
           input<T>(x), input<A>(slopes), output<T>(result), x.numel());
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("group_envelope", TORCH_BOX(&group_envelope));
  m.impl("group_envelope_backward", TORCH_BOX(&group_envelope_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
