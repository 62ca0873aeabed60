// The proximal operator of the group envelope in a metric of elements, in place on the CPU. Each step of the search
// reads the groups whose shares lie between 0 and 1. Where a scope is one tensor, the values at both ends come of one
// reading from memory.

#include "prox/metric_envelope.h"

#include "core/torch.h"
#include "prox/group_sums.h"
#include "prox/metric_envelope_scopes.h"
#include "prox/root_search.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

// Rows of at least so many elements are walked along; shorter ones across, with a column in each lane.
constexpr int64_t kLongRow = 64;
constexpr int64_t kColumns = 512;

FourSums operator+(const FourSums& a, const FourSums& b) {
  return {a.first + b.first, a.second + b.second, a.third + b.third, a.fourth + b.fourth};
}

template <typename Terms, typename T, typename U>
FourSums sum_row(const T* FUSEE_RESTRICT v, const U* FUSEE_RESTRICT H, int64_t count,
                 const Terms& terms) {
  using A = typename Terms::A;
  constexpr int64_t kPart = 1024;
  A coefficients[Terms::kCoefficients + 1];
  for (int i = 0; i < Terms::kCoefficients; ++i) coefficients[i] = terms.coefficient(i);
  FourSums sums;
  for (int64_t begin = 0; begin < count; begin += kPart) {
    const int64_t end = std::min(begin + kPart, count);
    A first = 0, second = 0, third = 0, fourth = 0;
#pragma omp simd reduction(+ : first, second, third, fourth)
    for (int64_t k = begin; k < end; ++k) {
      const FourTerms<A> t = Terms::terms(static_cast<A>(v[k]), static_cast<A>(H[k]),
                                          [&](int i) { return coefficients[i]; });
      first += t.first;
      second += t.second;
      third += t.third;
      fourth += t.fourth;
    }
    sums = sums + FourSums{static_cast<double>(first), static_cast<double>(second),
                           static_cast<double>(third), static_cast<double>(fourth)};
  }
  return sums;
}

// The sums over a few neighbouring groups, at most kColumns columns: a column in each lane.
template <typename Terms, typename T, typename U, typename Make>
void sum_columns(const T* v, const U* H, const Layout& l, int64_t first, int64_t count,
                 const Make& make, FourSums* sums) {
  using A = typename Terms::A;
  constexpr int64_t kPart = 64;
  const int64_t columns = count * l.inner;
  A coefficients[Terms::kCoefficients + 1][kColumns];
  for (int64_t j = 0; j < count; ++j) {
    const Terms terms = make(first + j);
    for (int i = 0; i < Terms::kCoefficients; ++i)
      std::fill_n(coefficients[i] + j * l.inner, l.inner, terms.coefficient(i));
  }
  for (int64_t begin = 0; begin < l.outer; begin += kPart) {
    A of_columns[Terms::kSums][kColumns];
    for (auto& of_sum : of_columns) std::fill_n(of_sum, columns, A(0));
    for (int64_t o = begin; o < std::min(begin + kPart, l.outer); ++o) {
      const T* FUSEE_RESTRICT vs = v + (o * l.groups + first) * l.inner;
      const U* FUSEE_RESTRICT Hs = H + (o * l.groups + first) * l.inner;
#pragma omp simd
      for (int64_t k = 0; k < columns; ++k) {
        const FourTerms<A> t = Terms::terms(static_cast<A>(vs[k]), static_cast<A>(Hs[k]),
                                            [&](int i) { return coefficients[i][k]; });
        of_columns[0][k] += t.first;
        if constexpr (Terms::kSums > 1) of_columns[1][k] += t.second;
        if constexpr (Terms::kSums > 2) of_columns[2][k] += t.third;
        if constexpr (Terms::kSums > 3) of_columns[3][k] += t.fourth;
      }
    }
    auto sum = [&](int which, int64_t j) {
      double total = 0;
      for (int64_t k = j * l.inner; which < Terms::kSums && k < (j + 1) * l.inner; ++k)
        total += static_cast<double>(of_columns[std::min(which, Terms::kSums - 1)][k]);
      return total;
    };
    for (int64_t j = 0; j < count; ++j)
      sums[j] = sums[j] + FourSums{sum(0, j), sum(1, j), sum(2, j), sum(3, j)};
  }
}

// The sums of a block's groups [first, end) over one tensor, of those that are used.
template <typename Terms, typename T, typename U, typename Used, typename Make>
void sum_block(const T* v, const U* H, const Layout& l, int64_t first, int64_t end,
               const Used& used, const Make& make, FourSums* sums) {
  std::fill_n(sums, end - first, FourSums{});
  if (l.inner >= kLongRow) {
    for (int64_t j = first; j < end; ++j) {
      if (!used(j)) continue;
      const Terms terms = make(j);
      for (int64_t o = 0; o < l.outer; ++o) {
        const int64_t at = (o * l.groups + j) * l.inner;
        sums[j - first] = sums[j - first] + sum_row(v + at, H + at, l.inner, terms);
      }
    }
    return;
  }
  const int64_t step = std::max<int64_t>(1, kColumns / std::max<int64_t>(1, l.inner));
  for (int64_t j = first; j < end; j += step) {
    const int64_t last = std::min(j + step, end);
    bool any = false;
    for (int64_t i = j; i < last; ++i) any |= used(i);
    if (any) sum_columns<Terms>(v, H, l, j, last - j, make, sums + (j - first));
  }
}

template <typename T, typename U>
void scale_block(T* v, const U* H, const Layout& l, int64_t first, int64_t end,
                 const MetricGroup* groups, const double* shares) {
  using A = accumulate_t<T>;
  auto change = [](T v, U H, A rise, A base) {
    return static_cast<T>(MetricScale::scaled(static_cast<A>(v), static_cast<A>(H), rise, base));
  };
  if (l.inner >= kLongRow) {
    for (int64_t j = first; j < end; ++j) {
      if (shares[j] == MetricScale::kKeep) continue;
      const MetricScale scale(groups[j], shares[j]);
      const A rise = static_cast<A>(scale.rise), base = static_cast<A>(scale.base);
      for (int64_t o = 0; o < l.outer; ++o) {
        T* FUSEE_RESTRICT vs = v + (o * l.groups + j) * l.inner;
        const U* FUSEE_RESTRICT Hs = H + (o * l.groups + j) * l.inner;
        if (shares[j] == 0) {
          std::fill_n(vs, l.inner, static_cast<T>(A(0)));
          continue;
        }
#pragma omp simd
        for (int64_t k = 0; k < l.inner; ++k) vs[k] = change(vs[k], Hs[k], rise, base);
      }
    }
    return;
  }
  const int64_t step = std::max<int64_t>(1, kColumns / std::max<int64_t>(1, l.inner));
  for (int64_t j = first; j < end; j += step) {
    const int64_t last = std::min(j + step, end), columns = (last - j) * l.inner;
    A rise[kColumns], base[kColumns];
    bool any = false;
    for (int64_t i = j; i < last; ++i) {
      const MetricScale scale(groups[i], shares[i]);
      std::fill_n(rise + (i - j) * l.inner, l.inner, static_cast<A>(scale.rise));
      std::fill_n(base + (i - j) * l.inner, l.inner, static_cast<A>(scale.base));
      any |= shares[i] != MetricScale::kKeep;
    }
    if (!any) continue;
    for (int64_t o = 0; o < l.outer; ++o) {
      T* FUSEE_RESTRICT vs = v + (o * l.groups + j) * l.inner;
      const U* FUSEE_RESTRICT Hs = H + (o * l.groups + j) * l.inner;
#pragma omp simd
      for (int64_t k = 0; k < columns; ++k) vs[k] = change(vs[k], Hs[k], rise[k], base[k]);
    }
  }
}

// The work on one scope, with terms of the type A.
template <typename A>
class ScopeInMetric {
 public:
  ScopeInMetric(const MetricScopes& all, size_t number)
      : all_(all),
        scope_(all.scopes[number]),
        k_(data<double>(all.k)[number]),
        lam_(data<double>(all.lam)[number]),
        measured_(scope_.groups),
        shares_(scope_.groups, MetricScale::kKeep) {
    const double* const weights = data_or_null<double>(all.weights);
    groups_.reserve(scope_.groups);
    for (int64_t j = 0; j < scope_.groups; ++j)
      groups_.emplace_back(weights == nullptr ? 1.0 : weights[scope_.first_group + j], lam_,
                           all.form == Form::kDebiased);
  }

  // Returns how many groups with a weight are left.
  int64_t run() {
    measure();
    find_shares();
    for_each_block_of_scope(
        [&](auto* v, const auto* H, const Layout& l, int64_t first, int64_t begin, int64_t end) {
          scale_block(v, H, l, begin, end, groups_.data() + first, shares_.data() + first);
        });
    int64_t left = 0;
    for (int64_t j = 0; j < scope_.groups; ++j)
      left += groups_[j].size != 0 && shares_[j] != 0 && groups_[j].root_weight != 0;
    return left;
  }

 private:
  // Calls f(v, H, layout, the number of the tensor's first group, begin, end) for blocks of groups of all tensors.
  template <typename F>
  void for_each_block_of_scope(const F& f) const {
    for (size_t i = scope_.begin; i < scope_.end; ++i) {
      const Placed& placed = all_.tensors[i];
      const Tensor& metric = all_.metric[i];
      dispatch_metric(placed.tensor, metric, [&]<typename T, typename U>(T, U) {
        T* const v = mutable_data<T>(placed.tensor);
        const U* const H = data<U>(metric);
        for_each_block(placed.layout, [&](int64_t, int64_t begin, int64_t end) {
          f(v, H, placed.layout, placed.first, begin, end);
        });
      });
    }
  }

  // Calls add(j, sums) with the sums of those of a block's groups that are used.
  template <typename Terms, typename T, typename U, typename Used, typename Make, typename Add>
  static void sum_groups(const T* v, const U* H, const Layout& l, int64_t first, int64_t begin,
                         int64_t end, const Used& used, const Make& make, const Add& add) {
    FourSums sums[kGroupsPerBlock];
    sum_block<Terms>(
        v, H, l, begin, end, [&](int64_t j) { return used(first + j); },
        [&](int64_t j) { return make(first + j); }, sums);
    for (int64_t j = begin; j < end; ++j)
      if (used(first + j)) add(first + j, sums[j - begin]);
  }

  // The values at both ends. Those at u = 1 need the others, but in a scope of one tensor no second reading.
  void measure() {
    const std::vector<double> scales = find_scales();
    const bool single = scope_.end - scope_.begin == 1;
    for_each_block_of_scope([&](const auto* v, const auto* H, const Layout& l, int64_t first,
                                int64_t begin, int64_t end) {
      sum_groups<MetricMeasure>(
          v, H, l, first, begin, end, [](int64_t) { return true; },
          [&](int64_t j) { return MetricMeasure{groups_[j].shift(), scales[j]}; },
          [&](int64_t j, const FourSums& sums) { measured_[j] = measured_[j] + sums; });
      if (!single) return;
      for (int64_t j = first + begin; j < first + end; ++j)
        groups_[j].measure(measured_[j], scales[j]);
      sum_groups<MetricCurve<A>>(
          v, H, l, first, begin, end, [&](int64_t j) { return groups_[j].counts(); },
          [&](int64_t j) { return MetricCurve<A>(groups_[j], 1); },
          [&](int64_t j, const FourSums& sums) { set_end(j, sums); });
    });
    if (single) return;
    for (int64_t j = 0; j < scope_.groups; ++j) groups_[j].measure(measured_[j], scales[j]);
    evaluate([&](int64_t j) { return groups_[j].counts(); }, [](int64_t) { return 1.0; });
    for (int64_t j = 0; j < scope_.groups; ++j)
      if (groups_[j].counts()) set_end(j, sums_[j]);
  }

  // The powers of two by which squares in float64 stay in range, as those of the other types do.
  std::vector<double> find_scales() const {
    std::vector<double> scales(scope_.groups, 1.0);
    if constexpr (std::is_same_v<A, double>) {
      std::vector<double> sizes(scope_.groups);
      for_each_block_of_scope([&](const auto* v, const auto* H, const Layout& l, int64_t first,
                                  int64_t begin, int64_t end) {
        sum_groups<MetricSize>(
            v, H, l, first, begin, end, [](int64_t) { return true; },
            [](int64_t) { return MetricSize{}; },
            [&](int64_t j, const FourSums& sums) { sizes[j] += sums.first; });
      });
      std::transform(sizes.begin(), sizes.end(), scales.begin(), scale_for);
    }
    return scales;
  }

  void set_end(int64_t j, const FourSums& sums) {
    const auto value = MetricCurve<A>(groups_[j], 1).value(groups_[j], sums);
    groups_[j].last = value.f;
    groups_[j].least = value.slope;
  }

  // Sums over the groups that are used at the shares of share(j).
  template <typename Used, typename Share>
  void evaluate(const Used& used, const Share& share) {
    sums_.assign(scope_.groups, FourSums{});
    for_each_block_of_scope([&](const auto* v, const auto* H, const Layout& l, int64_t first,
                                int64_t begin, int64_t end) {
      sum_groups<MetricCurve<A>>(
          v, H, l, first, begin, end, used,
          [&](int64_t j) { return MetricCurve<A>(groups_[j], share(j)); },
          [&](int64_t j, const FourSums& sums) { sums_[j] = sums_[j] + sums; });
    });
  }

  void find_shares() {
    MetricCounts counts;
    double nonzero = 0;
    for (int64_t j = 0; j < scope_.groups; ++j) {
      counts.add(measured_[j], groups_[j].root_weight);
      nonzero += groups_[j].counts();
    }
    const MetricCourse course = counts.course(all_.form, k_, lam_);
    if (course == MetricCourse::kBroken)
      return shares_.assign(scope_.groups, std::numeric_limits<double>::quiet_NaN());
    if (course == MetricCourse::kKeep) return;
    if (course == MetricCourse::kSearch && nonzero > k_) {
      search();
    } else if (course != MetricCourse::kProject) {
      const double share = course == MetricCourse::kSearch ? 1 : 0;
      for (int64_t j = 0; j < scope_.groups; ++j)
        if (groups_[j].counts()) shares_[j] = share;
    } else {
      select();
    }
    // What is whole in the debiased form keeps its bits.
    for (int64_t j = 0; j < scope_.groups; ++j)
      if (shares_[j] == 1 && groups_[j].debiased) shares_[j] = MetricScale::kKeep;
  }

  void select() {
    std::vector<double> keys(scope_.groups);
    for (int64_t j = 0; j < scope_.groups; ++j) {
      const double root = groups_[j].root_weight;
      keys[j] = root * root * measured_[j].third;
    }
    const Selection kept = select_largest(keys.data(), scope_.groups, k_);
    for (int64_t j = 0; j < scope_.groups; ++j) {
      const bool keep = keys[j] > kept.key || (keys[j] == kept.key && j <= kept.last);
      if (groups_[j].counts() && !keep) shares_[j] = 0;
    }
  }

  void search() {
    const int64_t count = scope_.groups;
    std::vector<double> alpha(count), beta(count), next(count);
    auto set = [&](int64_t j, const Tangent& tangent) {
      alpha[j] = tangent.alpha;
      beta[j] = tangent.beta;
    };
    auto solve = [&] {
      const double eta = 1 / solve_root(Problem<double>{alpha.data(), beta.data(), 0, count}, k_);
      for (int64_t j = 0; j < count; ++j) next[j] = Tangent::of(alpha[j], beta[j]).share(eta);
      return eta;
    };
    for (int64_t j = 0; j < count; ++j)
      if (groups_[j].counts()) set(j, groups_[j].chord());
    solve();
    double eta = std::numeric_limits<double>::infinity();
    std::vector<double> shares = next;
    for (int step = 0; step < kMetricSteps; ++step) {
      auto between = [&](int64_t j) { return shares[j] > 0 && shares[j] < 1; };
      evaluate(between, [&](int64_t j) { return shares[j]; });
      for (int64_t j = 0; j < count; ++j) {
        if (!groups_[j].counts()) continue;
        if (between(j)) {
          const auto value = MetricCurve<A>(groups_[j], shares[j]).value(groups_[j], sums_[j]);
          set(j, Tangent(value.f, value.slope, shares[j]));
        } else {
          set(j, groups_[j].at_end(shares[j]));
        }
      }
      const double lower = solve();
      bool close = true;
      for (int64_t j = 0; j < count; ++j)
        close &= is_close<A>(shares[j], next[j], Tangent::of(alpha[j], beta[j]));
      const bool falls = lower < eta;
      eta = lower;
      shares.swap(next);
      if (close || !falls) break;
    }
    for (int64_t j = 0; j < count; ++j)
      if (groups_[j].counts()) shares_[j] = shares[j];
  }

  const MetricScopes& all_;
  const Scope& scope_;
  const double k_, lam_;
  std::vector<MetricGroup> groups_;
  std::vector<FourSums> measured_, sums_;
  std::vector<double> shares_;
};

int64_t prox_scope(const MetricScopes& all, size_t number) {
  const Scope& scope = all.scopes[number];
  for (size_t i = scope.begin; i < scope.end; ++i)
    if (all.tensors[i].tensor.scalar_type() == ScalarType::Double)
      return ScopeInMetric<double>(all, number).run();
  return ScopeInMetric<float>(all, number).run();
}

Tensor prox_group_envelope_metric_(std::vector<Tensor> tensors, std::vector<Tensor> metric,
                                   std::vector<int64_t> layout, std::optional<Tensor> weights,
                                   const Tensor& k, const Tensor& lam, int64_t form) {
  const MetricScopes all(tensors, metric, layout, weights, k, lam, form);
  Tensor counts = empty(all.k, {all.k.numel()}, ScalarType::Long);
  int64_t* const left = mutable_data<int64_t>(counts);
  for_each_scope(all, [&](size_t number) { left[number] = prox_scope(all, number); });
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) {
  m.impl("prox_group_envelope_metric_", TORCH_BOX(&prox_group_envelope_metric_));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
