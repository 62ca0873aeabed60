// The proximal operator of the group envelope in CUDA: sums over groups, the root of each problem, one
// elementwise pass. Nothing is read back by the host.

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
GroupArguments<A> arguments_of(const Given& given, const Layout& layout, Form form) {
  return {input<A>(given.weights),  input<A>(given.metric), input<double>(given.k),
          input<double>(given.lam), layout.groups,          form};
}

// The norms, the root, and what the elements of every group are multiplied with; of single elements that is found
// again from each.
template <typename T, Worker kWorker>
__global__ void __launch_bounds__(kRootThreads, blocks_at_once(kWorker))
    prox_root_kernel(WorkerMemory<accumulate_t<T>> memory, Layout layout, Global<const T> x,
                     Global<const double> sums, Parts parts,
                     GroupArguments<accumulate_t<T>> arguments, Global<accumulate_t<T>> norms,
                     Global<double> roots, Global<accumulate_t<T>> scales) {
  using A = accumulate_t<T>;
  for_problem<A, kWorker>(memory, [&](const auto& team, int64_t problem) {
    const int64_t count = layout.groups;
    const Global<const A> known(norms + problem * count);
    const Root root = find_root(arguments, problem, known, team, [&](const auto& of) {
      store_norms(x, sums, parts, layout, problem, team, norms, of);
    });
    if (team.rank() == 0) store_root(roots, problem, root);
    if (layout.singles()) return;
    const A lam = arguments.lam_of(problem);
    for (int64_t j = team.rank(); j < count; j += team.size())
      store(scales, problem * count + j,
            root.scale(arguments.group(problem, j, lam), load(known, j), j));
  });
}

template <typename T>
__global__ void __launch_bounds__(kGroupThreads)
    prox_scale_kernel(Layout layout, Global<const T> x, Global<const accumulate_t<T>> scales,
                      Global<T> out, int64_t count) {
  using A = accumulate_t<T>;
  for_each_element<false>(
      layout, x, x, out, count,
      [&](const Place& place) { return load(scales, place.problem * layout.groups + place.group); },
      [](A v, A, A scale, int64_t) { return v * scale; });
}

// What single elements need of their problem.
template <typename A>
struct OfProblem {
  int64_t problem;
  Root root;
  A lam;
  double share;
};

template <typename T>
__global__ void __launch_bounds__(kGroupThreads, 1)
    prox_single_kernel(Layout layout, Global<const T> x, GroupArguments<accumulate_t<T>> arguments,
                       Global<const double> roots, Global<T> out, int64_t count) {
  using A = accumulate_t<T>;
  for_each_element<false>(
      layout.whole(), x, x, out, count,
      [&](const Place& at) {
        return OfProblem<A>{at.problem, load_root(roots, at.problem), arguments.lam_of(at.problem),
                            0};
      },
      [&](A v, A, const OfProblem<A>& of, int64_t j) {
        return v * of.root.scale(arguments.group(of.problem, j, of.lam), absolute(v), j);
      });
}

// The gradients in k and lam of each problem, and for every group the two numbers of which the gradient of its
// elements is made; for single elements their share, from which those are found again.
template <typename T, Worker kWorker>
__global__ void __launch_bounds__(kRootThreads, blocks_at_once(kWorker))
    prox_gradient_sums_kernel(WorkerMemory<accumulate_t<T>> memory, Layout layout,
                              Global<const T> x, Global<const T> grad, Global<const double> sums,
                              Parts parts, GroupArguments<accumulate_t<T>> arguments,
                              Global<const accumulate_t<T>> norms, Global<const double> roots,
                              Global<double> dots, Global<double> shares, Global<double> grad_k,
                              Global<double> grad_lam, Global<accumulate_t<T>> of_grad,
                              Global<accumulate_t<T>> of_input) {
  using A = accumulate_t<T>;
  for_problem<A, kWorker>(memory, [&](const auto& team, int64_t problem) {
    const int64_t count = layout.groups, first = problem * count;
    // Few parts are added where they are wanted.
    const bool few = parts.count() <= 8;
    if (!few) {
      for_each_sum(sums, parts, problem, count, false, team, [&](int64_t j, double dot) {
        if (team.lane() == 0) store(dots, first + j, dot);
      });
      team.barrier();
    }
    const Root root = load_root(roots, problem);
    const A lam = arguments.lam_of(problem);
    const Global<const double> known(dots);
    auto dot_of = [&](int64_t j) {
      return few ? parts.share(sums, problem, j, 0, 1) : load(known, first + j);
    };
    GradientSums own;
    for (int64_t j = team.rank(); j < count; j += team.size()) {
      A norm;
      double dot;
      if (layout.singles()) {
        const A v = static_cast<A>(load(x, first + j));
        norm = absolute(v);
        dot = static_cast<double>(v) * static_cast<double>(load(grad, first + j));
      } else {
        norm = load(norms, first + j);
        dot = dot_of(j);
      }
      own.add(arguments.group(problem, j, lam), norm, dot, root, j,
              arguments.form == Form::kDebiased);
    }
    const GradientSums all = team.sum(own);
    const double k = load(arguments.k, problem), share = all.share(k);
    if (team.rank() == 0) {
      store(grad_k, problem, all.grad_k(k, root));
      store(grad_lam, problem, all.grad_lam(k, root));
      store(shares, problem, share);
    }
    if (layout.singles()) return;
    for (int64_t j = team.rank(); j < count; j += team.size()) {
      const GradientScales<A> s = gradient_scales(
          arguments.group(problem, j, lam), load(norms, first + j), dot_of(j), root, j, share);
      store(of_grad, first + j, s.grad);
      store(of_input, first + j, s.input);
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(kGroupThreads)
    prox_gradient_kernel(Layout layout, Global<const T> grad, Global<const T> x,
                         Global<const accumulate_t<T>> of_grad,
                         Global<const accumulate_t<T>> of_input, Global<T> out, int64_t count) {
  using A = accumulate_t<T>;
  for_each_element<true>(
      layout, grad, x, out, count,
      [&](const Place& place) {
        const int64_t at = place.problem * layout.groups + place.group;
        return GradientScales<A>{load(of_grad, at), load(of_input, at)};
      },
      [](A g, A v, const GradientScales<A>& s, int64_t) { return g * s.grad + v * s.input; });
}

template <typename T>
__global__ void __launch_bounds__(kGroupThreads, 1)
    prox_single_gradient_kernel(Layout layout, Global<const T> grad, Global<const T> x,
                                GroupArguments<accumulate_t<T>> arguments,
                                Global<const double> roots, Global<const double> shares,
                                Global<T> out, int64_t count) {
  using A = accumulate_t<T>;
  for_each_element<true>(
      layout.whole(), grad, x, out, count,
      [&](const Place& at) {
        return OfProblem<A>{at.problem, load_root(roots, at.problem), arguments.lam_of(at.problem),
                            load(shares, at.problem)};
      },
      [&](A g, A v, const OfProblem<A>& of, int64_t j) {
        const double dot = static_cast<double>(v) * static_cast<double>(g);
        const GradientScales<A> s = gradient_scales(arguments.group(of.problem, j, of.lam),
                                                    absolute(v), dot, of.root, j, of.share);
        return g * s.grad + v * s.input;
      });
}

std::tuple<Tensor, Tensor, Tensor> prox_group_envelope(const Tensor& input_,
                                                       const std::optional<Tensor>& weights,
                                                       const std::optional<Tensor>& metric,
                                                       const Tensor& k, const Tensor& lam,
                                                       int64_t form) {
  const Given given(input_, weights, metric, k, lam);
  const Context context(input_);
  const Tensor x = as_aligned(input_);
  const Layout layout(x);
  const ScalarType type = accumulate_type(x.scalar_type());
  Tensor result = empty(x, to_shape(x.sizes()), x.scalar_type());
  Tensor norms = empty(x, {layout.batch, layout.groups}, type);
  Tensor roots = empty(x, {layout.batch, Root::kNumbers}, ScalarType::Double);
  const Tensor scales = empty(x, {layout.batch, layout.singles() ? 0 : layout.groups}, type);
  if (layout.batch == 0) return {result, norms, roots};
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const SumPlan plan(layout, columns_of_block<T>);
    const auto arguments = arguments_of<A>(given, layout, static_cast<Form>(form));
    const Tensor sums = group_products<T, false>(x, x, layout, plan, context);
    launch_workers<A>(
        layout, [](auto worker) { return &prox_root_kernel<T, worker.value>; }, true, x,
        context.stream, layout, input<T>(x), input<double>(sums), plan.parts, arguments,
        output<A>(norms), output<double>(roots), output<A>(scales));
    const int64_t count = x.numel(), blocks = element_blocks(count, sizeof(T));
    if (count == 0) return;
    if (layout.singles()) {
      launch(&prox_single_kernel<T>, blocks, kGroupThreads, 0, context.stream, layout, input<T>(x),
             arguments, input<double>(roots), output<T>(result), count);
    } else {
      launch(&prox_scale_kernel<T>, blocks, kGroupThreads, 0, context.stream, layout, input<T>(x),
             input<A>(scales), output<T>(result), count);
    }
  });
  return {result, norms, roots};
}

std::tuple<Tensor, Tensor, Tensor> prox_group_envelope_backward(
    const Tensor& grad_, const Tensor& input_, const Tensor& norms_, const Tensor& roots_,
    const std::optional<Tensor>& weights, const std::optional<Tensor>& metric, const Tensor& k,
    const Tensor& lam, int64_t form) {
  const Given given(input_, weights, metric, k, lam);
  check_backward(grad_, input_, norms_, roots_);
  const Context context(input_);
  const Tensor x = as_aligned(input_), grad = as_aligned(grad_), norms = as_contiguous(norms_),
               roots = as_contiguous(roots_);
  const Layout layout(x);
  const ScalarType type = accumulate_type(x.scalar_type());
  const Shape of_groups{layout.batch, layout.singles() ? 0 : layout.groups};
  Tensor result = empty(x, to_shape(x.sizes()), x.scalar_type());
  Tensor grad_k = empty(x, {layout.batch}, ScalarType::Double);
  Tensor grad_lam = empty(x, {layout.batch}, ScalarType::Double);
  if (layout.batch == 0) return {result, grad_k, grad_lam};
  const Tensor of_grad = empty(x, of_groups, type), of_input = empty(x, of_groups, type),
               dots = empty(x, of_groups, ScalarType::Double),
               shares = empty(x, {layout.batch}, ScalarType::Double);
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const SumPlan plan(layout, columns_of_block<T>);
    const auto arguments = arguments_of<A>(given, layout, static_cast<Form>(form));
    const Tensor sums = group_products<T, true>(x, grad, layout, plan, context);
    launch_workers<A>(
        layout, [](auto worker) { return &prox_gradient_sums_kernel<T, worker.value>; }, false, x,
        context.stream, layout, input<T>(x), input<T>(grad), input<double>(sums), plan.parts,
        arguments, input<A>(norms), input<double>(roots), output<double>(dots),
        output<double>(shares), output<double>(grad_k), output<double>(grad_lam),
        output<A>(of_grad), output<A>(of_input));
    const int64_t count = x.numel(), blocks = element_blocks(count, sizeof(T));
    if (count == 0) return;
    if (layout.singles()) {
      launch(&prox_single_gradient_kernel<T>, blocks, kGroupThreads, 0, context.stream, layout,
             input<T>(grad), input<T>(x), arguments, input<double>(roots), input<double>(shares),
             output<T>(result), count);
    } else {
      launch(&prox_gradient_kernel<T>, blocks, kGroupThreads, 0, context.stream, layout,
             input<T>(grad), input<T>(x), input<A>(of_grad), input<A>(of_input), output<T>(result),
             count);
    }
  });
  return {result, grad_k, grad_lam};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("prox_group_envelope", TORCH_BOX(&prox_group_envelope));
  m.impl("prox_group_envelope_backward", TORCH_BOX(&prox_group_envelope_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
