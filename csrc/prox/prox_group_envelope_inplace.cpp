// The proximal operator of the group envelope in place on the CPU. A scope is read a second time, to be scaled,
// right after its norms are known, so that what fits into the cache is read from memory once.

#include "core/torch.h"
#include "prox/group_sums.h"
#include "prox/root_search.h"
#include "prox/scopes.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

// The norm of a group that has parts in two tensors.
double joined(double x, double y) {
  if (x == 0 || y == 0) return x + y;
  return x != x || y != y ? x + y : std::hypot(x, y);  // which takes a NaN for less than infinity
}

template <typename T>
void add_norms(const Placed& placed, std::vector<double>& part, double* norms) {
  part.resize(placed.layout.groups);
  group_norms<T, double>(data<T>(placed.tensor), placed.layout, part.data());
  for (int64_t j = 0; j < placed.layout.groups; ++j)
    norms[placed.first + j] = joined(norms[placed.first + j], part[j]);
}

// Memory is written only where it changes.
template <typename T>
void scale_row(T* FUSEE_RESTRICT row, int64_t count, double scale) {
  using A = accumulate_t<T>;
  if (scale == 1) return;
  const A factor = static_cast<A>(scale);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) row[i] = static_cast<T>(static_cast<A>(row[i]) * factor);
}

template <typename T>
void scale_tensor(const Placed& placed, const double* scales_of_scope) {
  using A = accumulate_t<T>;
  const Layout& layout = placed.layout;
  T* const x = mutable_data<T>(placed.tensor);
  const double* const scales = scales_of_scope + placed.first;
  for_each_block(layout, [=](int64_t problem, int64_t first, int64_t end) {
    if (layout.inner > 1) {
      for (int64_t o = 0; o < layout.outer; ++o)
        for (int64_t j = first; j < end; ++j)
          scale_row(x + (o * layout.groups + j) * layout.inner, layout.inner, scales[j]);
      return;
    }
    for_each_of_block<T>(layout, problem, first, end, [=](int64_t at, int64_t j) {
      x[at] = static_cast<T>(static_cast<A>(x[at]) * static_cast<A>(scales[first + j]));
    });
  });
}

// Scales the tensors of a scope; returns how many groups with a weight are left.
int64_t prox_scope(const Scopes& all, size_t number) {
  const Scope& scope = all.scopes[number];
  std::vector<double> norms(scope.groups), scales;
  for (size_t i = scope.begin; i < scope.end; ++i)
    dispatch_floating(all.tensors[i].tensor.scalar_type(),
                      [&]<typename T>(T) { add_norms<T>(all.tensors[i], scales, norms.data()); });
  const double* const weights = data_or_null<double>(all.weights);
  const double k = data<double>(all.k)[number], lam = data<double>(all.lam)[number];
  const Groups<double> groups{weights == nullptr ? nullptr : weights + scope.first_group, nullptr,
                              lam, all.form == Form::kDebiased};
  const Root root =
      find_root(RootProblem<double>{groups, norms.data(), scope.groups, k, lam, all.form});
  scales.resize(scope.groups);
  int64_t left = 0;
  for (int64_t j = 0; j < scope.groups; ++j) {
    const Group<double> group = groups[j];
    scales[j] = root.scale(group, norms[j], j);
    left += norms[j] != 0 && scales[j] != 0 && group.weight != 0;
  }
  for (size_t i = scope.begin; i < scope.end; ++i)
    dispatch_floating(all.tensors[i].tensor.scalar_type(),
                      [&]<typename T>(T) { scale_tensor<T>(all.tensors[i], scales.data()); });
  return left;
}

Tensor prox_group_envelope_(std::vector<Tensor> tensors, std::vector<int64_t> layout,
                            std::optional<Tensor> weights, const Tensor& k, const Tensor& lam,
                            int64_t form) {
  const Scopes all(tensors, layout, weights, k, lam, form);
  Tensor counts = empty(all.k, {all.k.numel()}, ScalarType::Long);
  int64_t* const left = mutable_data<int64_t>(counts);
  for_each_scope(all, [&](size_t number) { left[number] = prox_scope(all, number); });
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) {
  m.impl("prox_group_envelope_", TORCH_BOX(&prox_group_envelope_));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
