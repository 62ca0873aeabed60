// The value of the group envelope on the CPU, and its gradient.

#include "core/torch.h"
#include "prox/group_layout.h"
#include "prox/group_sums.h"
#include "prox/root_search.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

template <typename A>
Groups<A> plain_groups(const Given& given) {
  return {data_or_null<A>(given.weights), nullptr, A(0), false};
}

template <typename T, typename A = accumulate_t<T>>
void forward(const T* input, const Layout& layout, const Groups<A>& groups, const double* k,
             bool debiased, double* values, A* norms, double* knees) {
  group_norms(input, layout, norms);
  parallel_for(0, layout.batch, grain(8 * layout.groups), [&](int64_t begin, int64_t end) {
    for (int64_t problem = begin; problem < end; ++problem) {
      const A* const of_problem = norms + problem * layout.groups;
      std::vector<A> z(of_problem, of_problem + layout.groups);
      if (groups.weights != nullptr)
        for (int64_t j = 0; j < layout.groups; ++j) z[j] *= groups[j].root_weight;
      const double knee =
          k[problem] > 0 || k[problem] != k[problem]
              ? solve_root(Problem<A>{z.data(), nullptr, A(0), layout.groups}, k[problem])
              : std::numeric_limits<double>::infinity();
      EnvelopeSums sums;
      for (int64_t j = 0; j < layout.groups; ++j) sums.add(static_cast<double>(z[j]), knee);
      knees[problem] = knee;
      values[problem] = sums.value(knee, debiased);
    }
  });
}

template <typename T, typename A = accumulate_t<T>>
void backward(const double* grad, const T* FUSEE_RESTRICT input, const Layout& layout,
              const Groups<A>& groups, bool debiased, const A* norms, const double* knees,
              T* FUSEE_RESTRICT output) {
  for_each_block(layout, [&](int64_t problem, int64_t first, int64_t end) {
    A scales[kGroupsPerBlock];
    const A* const of_block = norms + problem * layout.groups + first;
    for (int64_t j = 0; j < end - first; ++j)
      scales[j] = static_cast<A>(
          grad[problem] * envelope_slope(groups[first + j], of_block[j], knees[problem], debiased));
    for_each_of_block<T>(layout, problem, first, end, [&](int64_t at, int64_t j) {
      output[at] = static_cast<T>(static_cast<A>(input[at]) * scales[j]);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> group_envelope(const Tensor& input,
                                                  const std::optional<Tensor>& weights,
                                                  const Tensor& k, bool debiased) {
  const Given given(input, weights, std::nullopt, k, k);
  const Tensor x = as_contiguous(input);
  const Layout layout(x);
  Tensor value = empty(x, {layout.batch}, ScalarType::Double);
  Tensor norms = empty(x, {layout.batch, layout.groups}, accumulate_type(x.scalar_type()));
  Tensor knee = empty(x, {layout.batch}, ScalarType::Double);
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    forward(data<T>(x), layout, plain_groups<A>(given), data<double>(given.k), debiased,
            mutable_data<double>(value), mutable_data<A>(norms), mutable_data<double>(knee));
  });
  return {value, norms, knee};
}

Tensor group_envelope_backward(const Tensor& grad, const Tensor& input, const Tensor& norms_,
                               const Tensor& knee_, const std::optional<Tensor>& weights,
                               bool debiased) {
  const Given given(input, weights, std::nullopt, knee_, knee_);
  check_value_backward(grad, input, norms_, knee_);
  const Tensor x = as_contiguous(input), g = as_contiguous(grad), norms = as_contiguous(norms_),
               knee = as_contiguous(knee_);
  const Layout layout(x);
  Tensor output = empty(x, to_shape(x.sizes()), x.scalar_type());
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    backward(data<double>(g), data<T>(x), layout, plain_groups<A>(given), debiased, data<A>(norms),
             data<double>(knee), mutable_data<T>(output));
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) {
  m.impl("group_envelope", TORCH_BOX(&group_envelope));
  m.impl("group_envelope_backward", TORCH_BOX(&group_envelope_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
