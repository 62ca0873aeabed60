// The proximal operator of the group envelope on the CPU: norms, one root for each problem, one scaling.

#include "core/torch.h"
#include "prox/group_layout.h"
#include "prox/group_sums.h"
#include "prox/root_search.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

// What the kernels know of a call, as pointers.
template <typename A>
struct Call {
  Layout layout;
  const A *weights, *metric;
  const double *k, *lam;
  Form form;

  Call(const Tensor& input, const Given& given, Form form_)
      : layout(input),
        weights(data_or_null<A>(given.weights)),
        metric(data_or_null<A>(given.metric)),
        k(data<double>(given.k)),
        lam(data<double>(given.lam)),
        form(form_) {}

  bool uniform() const { return weights == nullptr && metric == nullptr; }

  Groups<A> groups(int64_t problem) const {
    return {weights, metric == nullptr ? nullptr : metric + problem * layout.groups,
            static_cast<A>(lam[problem]), form == Form::kDebiased};
  }

  RootProblem<A> root_problem(int64_t problem, const A* norms) const {
    return {groups(problem), norms, layout.groups, k[problem], lam[problem], form};
  }
};

template <typename T, typename A = accumulate_t<T>>
void forward(const Call<A>& call, const T* FUSEE_RESTRICT input, T* FUSEE_RESTRICT output, A* norms,
             Root* roots) {
  const Layout& layout = call.layout;
  group_norms(input, layout, norms);
  parallel_for(0, layout.batch, grain(8 * layout.groups), [&](int64_t begin, int64_t end) {
    for (int64_t problem = begin; problem < end; ++problem)
      roots[problem] = find_root(call.root_problem(problem, norms + problem * layout.groups));
  });
  for_each_block(layout, [&](int64_t problem, int64_t first, int64_t end) {
    const Root root = roots[problem];
    const Groups<A> groups = call.groups(problem);
    const A* const of_block = norms + problem * layout.groups + first;
    if (layout.singles() && call.uniform() && !root.projects()) {
      const Scaler<A> scaler(groups[0], root.theta);
      for_each_of_block<T>(layout, problem, first, end, [=](int64_t at, int64_t) {
        const A x = static_cast<A>(input[at]);
        output[at] = static_cast<T>(x * scaler(absolute(x)));
      });
      return;
    }
    A scales[kGroupsPerBlock];
    for (int64_t j = 0; j < end - first; ++j)
      scales[j] = root.scale(groups[first + j], of_block[j], first + j);
    for_each_of_block<T>(layout, problem, first, end, [&](int64_t at, int64_t j) {
      output[at] = static_cast<T>(static_cast<A>(input[at]) * scales[j]);
    });
  });
}

template <typename T, typename A = accumulate_t<T>>
void backward(const Call<A>& call, const T* FUSEE_RESTRICT grad, const T* FUSEE_RESTRICT input,
              const A* norms, const Root* roots, T* FUSEE_RESTRICT output, double* grad_k,
              double* grad_lam) {
  const Layout& layout = call.layout;
  // <v, g> of every group.
  std::vector<double> dots(layout.batch * layout.groups);
  for_each_block(layout, [&](int64_t problem, int64_t first, int64_t end) {
    block_products(input, grad, layout, problem, first, end,
                   dots.data() + problem * layout.groups + first);
  });
  // (C / D) of every problem, see below.
  std::vector<double> shares(layout.batch);
  parallel_for(0, layout.batch, grain(8 * layout.groups), [&](int64_t begin, int64_t end) {
    for (int64_t problem = begin; problem < end; ++problem) {
      GradientSums sums;
      const Groups<A> groups = call.groups(problem);
      for (int64_t j = 0; j < layout.groups; ++j) {
        const int64_t at = problem * layout.groups + j;
        sums.add(groups[j], norms[at], dots[at], roots[problem], j, call.form == Form::kDebiased);
      }
      shares[problem] = sums.share(call.k[problem]);
      grad_k[problem] = sums.grad_k(call.k[problem], roots[problem]);
      grad_lam[problem] = sums.grad_lam(call.k[problem], roots[problem]);
    }
  });
  for_each_block(layout, [&](int64_t problem, int64_t first, int64_t end) {
    A scales[kGroupsPerBlock], along[kGroupsPerBlock];
    const Groups<A> groups = call.groups(problem);
    for (int64_t j = 0; j < end - first; ++j) {
      const int64_t at = problem * layout.groups + first + j;
      const GradientScales<A> s = gradient_scales(groups[first + j], norms[at], dots[at],
                                                  roots[problem], first + j, shares[problem]);
      scales[j] = s.grad;
      along[j] = s.input;
    }
    for_each_of_block<T>(layout, problem, first, end, [&](int64_t at, int64_t j) {
      output[at] = static_cast<T>(static_cast<A>(grad[at]) * scales[j] +
                                  static_cast<A>(input[at]) * along[j]);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> prox_group_envelope(const Tensor& input,
                                                       const std::optional<Tensor>& weights,
                                                       const std::optional<Tensor>& metric,
                                                       const Tensor& k, const Tensor& lam,
                                                       int64_t form) {
  const Given given(input, weights, metric, k, lam);
  const Tensor x = as_contiguous(input);
  const Layout layout(x);
  Tensor output = empty(x, to_shape(x.sizes()), x.scalar_type());
  Tensor norms = empty(x, {layout.batch, layout.groups}, accumulate_type(x.scalar_type()));
  Tensor roots = empty(x, {layout.batch, Root::kNumbers}, ScalarType::Double);
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    forward(Call<A>(x, given, static_cast<Form>(form)), data<T>(x), mutable_data<T>(output),
            mutable_data<A>(norms), static_cast<Root*>(roots.mutable_data_ptr()));
  });
  return {output, norms, roots};
}

std::tuple<Tensor, Tensor, Tensor> prox_group_envelope_backward(
    const Tensor& grad, const Tensor& input, const Tensor& norms_, const Tensor& roots_,
    const std::optional<Tensor>& weights, const std::optional<Tensor>& metric, const Tensor& k,
    const Tensor& lam, int64_t form) {
  const Given given(input, weights, metric, k, lam);
  check_backward(grad, input, norms_, roots_);
  const Tensor x = as_contiguous(input), g = as_contiguous(grad), norms = as_contiguous(norms_),
               roots = as_contiguous(roots_);
  const Layout layout(x);
  Tensor output = empty(x, to_shape(x.sizes()), x.scalar_type());
  Tensor grad_k = empty(x, {layout.batch}, ScalarType::Double);
  Tensor grad_lam = empty(x, {layout.batch}, ScalarType::Double);
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    backward(Call<A>(x, given, static_cast<Form>(form)), data<T>(g), data<T>(x), data<A>(norms),
             static_cast<const Root*>(roots.const_data_ptr()), mutable_data<T>(output),
             mutable_data<double>(grad_k), mutable_data<double>(grad_lam));
  });
  return {output, grad_k, grad_lam};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) {
  m.impl("prox_group_envelope", TORCH_BOX(&prox_group_envelope));
  m.impl("prox_group_envelope_backward", TORCH_BOX(&prox_group_envelope_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
