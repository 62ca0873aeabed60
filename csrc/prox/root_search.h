// The root of the group envelope on the CPU, and the selection of the largest groups.
#pragma once

#include "core/torch.h"
#include "prox/group_layout.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// The coefficients of the groups of a problem: a of each, and b of each or one for all.
template <typename A>
struct Problem {
  const A* a;
  const A* b;  // null: b_all
  A b_all;
  int64_t count;
};

// Sixty-four bytes of numbers, and of conditions on them: all ones or zero.
template <typename A>
struct Lanes {
  typedef A Values __attribute__((vector_size(64)));
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> Condition
      __attribute__((vector_size(64)));
  static constexpr int kCount = 64 / sizeof(A);

  static Values load(const A* memory) {
    Values values;
    memcpy(&values, memory, sizeof(values));
    return values;
  }
  // x where the condition holds, and zero elsewhere.
  static Values where(Condition condition, Values x) {
    return reinterpret_cast<Values>(reinterpret_cast<Condition>(x) & condition);
  }
  static double sum(Values values) {
    double total = 0;
    for (int i = 0; i < kCount; ++i) total += static_cast<double>(values[i]);
    return total;
  }
};

// Calls f(a, b) with the coefficients of all groups, a vector at a time, and flush() now and then, so that sums
// in the accumulation type stay short. The last vector is filled up with groups that do not count.
template <typename A, typename F, typename Flush>
void for_each_vector(const Problem<A>& p, const F& f, const Flush& flush) {
  using L = Lanes<A>;
  using Values = typename L::Values;
  constexpr int64_t kVectors = 64;
  const Values b_all = p.b_all - Values{};
  const int64_t whole = p.count / L::kCount * L::kCount;
  for (int64_t begin = 0; begin < whole; begin += kVectors * L::kCount) {
    const int64_t end = std::min(begin + kVectors * L::kCount, whole);
    if (p.b == nullptr) {
      for (int64_t j = begin; j < end; j += L::kCount) f(L::load(p.a + j), b_all);
    } else {
      for (int64_t j = begin; j < end; j += L::kCount) f(L::load(p.a + j), L::load(p.b + j));
    }
    flush();
  }
  if (whole == p.count) return;
  Values a{}, b{};
  for (int64_t j = whole; j < p.count; ++j) {
    a[j - whole] = p.a[j];
    b[j - whole] = p.b == nullptr ? p.b_all : p.b[j];
  }
  f(a, b);
  flush();
}

template <typename A>
RootSearch::Start first_pass(const Problem<A>& p) {
  using L = Lanes<A>;
  using Values = typename L::Values;
  using Condition = typename L::Condition;
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  const Values one = A(1) - Values{}, infinity = kInfinity - Values{};
  RootSearch::Start start;
  Values count{}, infinite{}, a{}, b{}, least = infinity;
  for_each_vector(
      p,
      [&](Values aj, Values bj) {
        const Condition counts = ~(aj <= A(0)), beyond = aj == kInfinity;  // NaN counts
        const Condition finite = counts & ~beyond;
        count += L::where(counts, one);
        infinite += L::where(beyond, one);
        a += L::where(finite, aj);
        b += L::where(finite, bj);
        const Values knee = finite ? aj / (A(1) + bj) : infinity;
        least = knee < least ? knee : least;
      },
      [&] {
        start.count += L::sum(count);
        start.infinite += L::sum(infinite);
        start.a += L::sum(a);
        start.b += L::sum(b);
        count = infinite = a = b = Values{};
      });
  start.least = kInfinity;
  for (int i = 0; i < L::kCount; ++i)
    start.least = std::min(start.least, static_cast<double>(least[i]));
  return start;
}

template <typename A>
RootSearch::Sums pass(const Problem<A>& p, A theta) {
  using L = Lanes<A>;
  using Values = typename L::Values;
  using Condition = typename L::Condition;
  const Values one = A(1) - Values{};
  RootSearch::Sums sums;
  Values saturated{}, middle{}, a{}, b{};
  for_each_vector(
      p,
      [&](Values aj, Values bj) {
        // A group without weight has a = b = 0.
        const Condition below = aj < (A(1) + bj) * theta;
        const Condition between = below & (aj > bj * theta);
        saturated += L::where(~below, one);
        middle += L::where(between, one);
        a += L::where(between, aj);
        b += L::where(between, bj);
      },
      [&] {
        sums.saturated += L::sum(saturated);
        sums.middle += L::sum(middle);
        sums.a += L::sum(a);
        sums.b += L::sum(b);
        saturated = middle = a = b = Values{};
      });
  return sums;
}

// Where the sums leave the range of A, or a number is NaN: in double, and scaled if need be.
template <typename A>
double solve_beyond(const Problem<A>& problem, double k) {
  const double scale = sizeof(A) == 8 ? kDownScale : 1;
  std::vector<double> a(problem.count), b(problem.count);
  for (int64_t j = 0; j < problem.count; ++j) {
    a[j] = static_cast<double>(problem.a[j]) * scale;
    b[j] = static_cast<double>(problem.b == nullptr ? problem.b_all : problem.b[j]);
  }
  const Problem<double> scaled{a.data(), b.data(), 0, problem.count};
  RootSearch search(k, first_pass(scaled));
  while (!search.done()) search.step(pass(scaled, search.theta()));
  return search.theta() / scale;
}

template <typename A>
double solve_root(const Problem<A>& problem, double k) {
  const RootSearch::Start start = first_pass(problem);
  if (!(start.a <= std::numeric_limits<A>::max())) return solve_beyond(problem, k);
  RootSearch search(k, start);
  while (!search.done()) search.step(pass(problem, static_cast<A>(search.theta())));
  return search.theta();
}

// Which keys are the k largest: those above `key`, and of those equal to it the first up to `last`.
struct Selection {
  double key;
  double last;
};

template <typename A>
Selection select_largest(const A* keys, int64_t count, double k) {
  using Bits = typename Format<A>::Bits;
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  if (k != k) return {kNan, 0};
  for (int64_t j = 0; j < count; ++j)
    if (keys[j] != keys[j]) return {kNan, 0};
  const int64_t wanted = k < 1 ? 0 : k >= count ? count : static_cast<int64_t>(k);
  if (wanted == count) return {-1, 0};
  if (wanted == 0) return {std::numeric_limits<double>::infinity(), -1};
  constexpr int64_t kFew = 16;
  for (int64_t j = 0; count <= kFew && j < count; ++j) {
    int64_t before = 0;
    for (int64_t i = 0; i < count; ++i)
      before += keys[i] > keys[j] || (keys[i] == keys[j] && i < j) ? 1 : 0;
    if (before == wanted - 1) return {static_cast<double>(keys[j]), static_cast<double>(j)};
  }
  // Numbers that are not negative are ordered as their bits: the largest key that `wanted` keys reach.
  Bits low = 0, high = bit_cast<Bits>(std::numeric_limits<A>::infinity());
  auto reached = [&](Bits bits) {
    const A least = bit_cast<A>(bits);
    int64_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) sum += keys[j] >= least ? 1 : 0;
    return sum;
  };
  while (low < high) {
    const Bits middle = low + (high - low + 1) / 2;
    const int64_t sum = reached(middle);
    if (sum == wanted) {
      low = middle;
      break;
    }
    if (sum > wanted) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  // The search may have ended between two keys.
  A key = std::numeric_limits<A>::infinity();
  for (int64_t j = 0; j < count; ++j)
    if (keys[j] >= bit_cast<A>(low) && keys[j] < key) key = keys[j];
  int64_t above = 0, last = -1;
  for (int64_t j = 0; j < count; ++j) above += keys[j] > key;
  for (int64_t j = 0; j < count && above < wanted; ++j) {
    if (keys[j] == key) {
      ++above;
      last = j;
    }
  }
  return {static_cast<double>(key), static_cast<double>(last)};
}

// What the root of one problem depends on.
template <typename A>
struct RootProblem {
  Groups<A> groups;
  const A* norms;
  int64_t count;
  double k, lam;
  Form form;

  bool uniform() const { return groups.weights == nullptr && groups.metric == nullptr; }

  // Whether the debiased form has left the range in which it is convex with the quadratic term.
  bool projects() const {
    if (form != Form::kDebiased) return form == Form::kProjection;
    if (uniform()) return groups.lam >= A(1);
    for (int64_t j = 0; j < count; ++j)
      if (!(groups[j].inner > A(0))) return true;
    return false;
  }
};

template <typename A>
Root find_root(const RootProblem<A>& p) {
  if (p.projects()) {
    std::vector<A> keys;
    if (!p.uniform()) {
      keys.resize(p.count);
      // Groups without weight are kept beside the k.
      for (int64_t j = 0; j < p.count; ++j) keys[j] = p.groups[j].key(p.norms[j]);
    }
    const Selection selection = select_largest(p.uniform() ? p.norms : keys.data(), p.count, p.k);
    return {selection.key, selection.last, 1};
  }
  if (!(p.k > 0) || p.lam > std::numeric_limits<A>::max()) {
    const double none = p.lam == 0 ? 0 : std::numeric_limits<double>::infinity();
    return {p.k != p.k ? p.k : none, 0, 0};
  }
  if (p.uniform()) {
    // In terms of the norms themselves: all groups have the same gain.
    const Group<A> group = p.groups[0];
    const A gain = group.metric / group.inner;
    const Problem<A> of_norms{p.norms, nullptr, group.coefficients(A(0)).b, p.count};
    return Root::of_theta(solve_root(of_norms, p.k) * static_cast<double>(gain), p.lam);
  }
  std::vector<A> a(p.count), b(p.count);
  for (int64_t j = 0; j < p.count; ++j) {
    const Coefficients<A> c = p.groups[j].coefficients(p.norms[j]);
    a[j] = c.a;
    b[j] = c.b;
  }
  return Root::of_theta(solve_root(Problem<A>{a.data(), b.data(), A(0), p.count}, p.k), p.lam);
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
