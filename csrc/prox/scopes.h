// The tensors of an operator that works in place on many scopes, checked. A scope is a set of tensors whose groups
// share one k.
#pragma once

#include "core/torch.h"
#include "prox/group_layout.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// A tensor whose memory is (outer, groups, inner); its groups are those of its scope from `first` on.
struct Placed {
  Tensor tensor;
  int64_t first;
  Layout layout;
};

struct Scope {
  size_t begin = 0, end = 0;  // of the tensors
  int64_t first_group = 0;    // among those of all scopes
  int64_t groups = 0;

  int64_t elements(const std::vector<Placed>& tensors) const {
    int64_t sum = 0;
    for (size_t i = begin; i < end; ++i) sum += tensors[i].tensor.numel();
    return sum;
  }
};

class Scopes {
 public:
  std::vector<Placed> tensors;
  std::vector<Scope> scopes;
  int64_t groups = 0;
  std::optional<Tensor> weights;  // of all groups, double
  Tensor k, lam;                  // of all scopes, double
  Form form;

  Scopes(const std::vector<Tensor>& given, const std::vector<int64_t>& layout,
         const std::optional<Tensor>& weights_, const Tensor& k_, const Tensor& lam_, int64_t form_)
      : weights(as_contiguous(weights_)),
        k(as_contiguous(k_)),
        lam(as_contiguous(lam_)),
        form(static_cast<Form>(form_)) {
    constexpr size_t kNumbers = 5;
    const size_t count = static_cast<size_t>(k.numel());
    FUSEE_REQUIRE(layout.size() == kNumbers * given.size(),
                  "layout must have five numbers for each of ", given.size(), " tensors, got ",
                  layout.size());
    FUSEE_REQUIRE(lam.numel() == k.numel() && k.scalar_type() == ScalarType::Double &&
                      lam.scalar_type() == ScalarType::Double,
                  "k and lam must be float64 tensors with one element for each scope");
    scopes.resize(count);
    tensors.reserve(given.size());
    size_t scope = 0;
    for (size_t i = 0; i < given.size(); ++i) {
      const int64_t* const numbers = layout.data() + kNumbers * i;
      FUSEE_REQUIRE(
          numbers[0] >= static_cast<int64_t>(scope) && numbers[0] < static_cast<int64_t>(count),
          "layout must number the scopes in order, below ", count, ", got ", numbers[0]);
      for (; scope < static_cast<size_t>(numbers[0]); ++scope)
        scopes[scope + 1].begin = scopes[scope + 1].end = i;
      add(given[i], numbers[1], Layout(1, numbers[2], numbers[3], numbers[4]), scopes[scope]);
    }
    for (; scope + 1 < count; ++scope)
      scopes[scope + 1].begin = scopes[scope + 1].end = given.size();
    for (Scope& each : scopes) {
      each.first_group = groups;
      groups += each.groups;
    }
    if (weights.has_value())
      FUSEE_REQUIRE(weights->numel() == groups && weights->scalar_type() == ScalarType::Double,
                    "weights must have one element for each group of all scopes, of float64");
    FUSEE_REQUIRE(form_ >= 0 && form_ <= 2, "form must be 0, 1 or 2, got ", form_);
  }

 private:
  void add(const Tensor& tensor, int64_t first, const Layout& layout, Scope& scope) {
    FUSEE_REQUIRE(is_dense(tensor) || tensor.numel() == 0,
                  "tensors must fill their memory without gaps");
    FUSEE_REQUIRE(first >= 0 && layout.outer >= 0 && layout.groups >= 0 && layout.inner >= 0 &&
                      layout.outer * layout.groups * layout.inner == tensor.numel(),
                  "layout must have as many elements as its tensor, ", tensor.numel(), ", got (",
                  layout.outer, ", ", layout.groups, ", ", layout.inner, ")");
    FUSEE_REQUIRE(tensor.device() == k.device(), "tensors, k and lam must all be on one device");
    dispatch_floating(tensor.scalar_type(), [](auto) {});
    tensors.push_back({tensor, first, layout});
    scope.end = tensors.size();
    scope.groups = std::max(scope.groups, first + layout.groups);
  }
};

// Calls f with the number of every scope: all threads share the work of a large one, the small ones are shared
// out whole.
template <typename F>
void for_each_scope(const Scopes& all, const F& f) {
  constexpr int64_t kLarge = 1 << 16;
  std::vector<size_t> small;
  int64_t elements = 0;
  for (size_t number = 0; number < all.scopes.size(); ++number) {
    const int64_t count = all.scopes[number].elements(all.tensors);
    if (count >= kLarge) {
      f(number);
    } else {
      small.push_back(number);
      elements += count;
    }
  }
  const int64_t count = static_cast<int64_t>(small.size());
  if (count == 0) return;
  parallel_for(0, count, grain(elements / count), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(small[i]);
  });
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
