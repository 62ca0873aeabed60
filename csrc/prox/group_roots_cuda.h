// The root of the group envelope by a thread, a block or all blocks, and the selection of the largest groups.
#pragma once

#include "core/cuda/kernel.h"
#include "prox/group_layout.h"
#include "prox/group_sums_cuda.h"
#include "prox/group_workers_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// What is given for groups and problems, as kernels see it.
template <typename A>
struct GroupArguments {
  Global<const A> weights, metric;  // may be absent
  Global<const double> k, lam;
  int64_t groups;
  Form form;

  FUSEE_DEVICE A lam_of(int64_t problem) const { return static_cast<A>(load(lam, problem)); }
  FUSEE_DEVICE Group<A> group(int64_t problem, int64_t j, A of_lam) const {
    return Group<A>(weights ? load(weights, j) : A(1),
                    metric ? load(metric, problem * groups + j) : A(1), of_lam,
                    form == Form::kDebiased);
  }
};

FUSEE_DEVICE void store_root(Global<double> roots, int64_t problem, const Root& root) {
  store(roots, problem * Root::kNumbers, root.theta);
  store(roots, problem * Root::kNumbers + 1, root.last);
  store(roots, problem * Root::kNumbers + 2, root.projection);
}
FUSEE_DEVICE Root load_root(Global<const double> roots, int64_t problem) {
  return {load(roots, problem * Root::kNumbers), load(roots, problem * Root::kNumbers + 1),
          load(roots, problem * Root::kNumbers + 2)};
}

// The norm of one group whose squares leave the range of double, by the lanes of a worker.
template <typename Of>
FUSEE_DEVICE double scaled_norm(Global<const double> x, const Layout& l, int64_t problem,
                                int64_t group, const Of& team) {
  const int64_t count = l.group_size();
  auto element = [&](int64_t i) {
    const int64_t row = (problem * l.outer + i / l.inner) * l.groups + group;
    return absolute(load(x, row * l.inner + i % l.inner));
  };
  double largest = 0, sum = 0;
  for (int64_t i = team.lane(); i < count; i += Of::kLanes)
    largest = Maximum{}(largest, element(i));
  largest = team.lane_most(largest);
  if (largest == 0 || !(largest <= std::numeric_limits<double>::max())) return largest;
  for (int64_t i = team.lane(); i < count; i += Of::kLanes) {
    const double size = element(i) / largest;
    sum += size * size;
  }
  return largest * sqrt(team.lane_sum(sum));
}

// Calls f(j, sum) with the sum of the parts of every group of a problem, by one thread for each.
template <typename Of, typename F>
FUSEE_DEVICE void for_each_sum(Global<const double> sums, const Parts& parts, int64_t problem,
                               int64_t count, bool by_threads, const Of& team, const F& f) {
  if (by_threads) {
    for (int64_t j = team.rank(); j < count; j += team.size())
      f(j, parts.share(sums, problem, j, 0, 1));
  } else {
    for (int64_t j = team.rank() / Of::kLanes; j < count; j += team.size() / Of::kLanes)
      f(j, team.lane_sum(parts.share(sums, problem, j, team.lane(), Of::kLanes)));
  }
}

// The norms of all groups of a problem, from the elements where groups are single ones; the team keeps what
// of(j, norm) makes of them.
template <typename T, typename Of, typename Coefficients_>
FUSEE_DEVICE void store_norms(Global<const T> x, Global<const double> sums, const Parts& parts,
                              const Layout& l, int64_t problem, const Of& team,
                              Global<accumulate_t<T>> norms, const Coefficients_& of) {
  using A = accumulate_t<T>;
  const int64_t first = problem * l.groups;
  auto keep = [&](int64_t j, A norm) {
    store(norms, first + j, norm);
    team.keep(j, of(j, norm));
  };
  if (l.singles()) {
    for (int64_t j = team.rank(); j < l.groups; j += team.size())
      keep(j, absolute(static_cast<A>(load(x, first + j))));
  } else {
    const bool by_threads = sizeof(T) < 8 && parts.count() <= 8;
    for_each_sum(sums, parts, problem, l.groups, by_threads, team, [&](int64_t j, double sum) {
      double norm = sqrt(sum);
      if constexpr (sizeof(T) == 8)
        if (!(sum < 1e300) || sum < 1e-280) norm = scaled_norm(x, l, problem, j, team);
      if (by_threads || team.lane() == 0) keep(j, static_cast<A>(norm));
    });
  }
  team.barrier();
}

// What the search over `count` groups begins with.
template <typename A, typename Of, typename Who>
FUSEE_DEVICE RootSearch::Start start_search(int64_t count, const Of& of, const Who& team) {
  RootSearch::Totals own;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t j = team.rank(); j < count; j += team.size()) {
    const Coefficients<A> c = of(j);
    if (c.a <= A(0)) continue;  // NaN counts
    own.count += 1;
    if (c.a > std::numeric_limits<A>::max()) {
      own.infinite += 1;
    } else {
      own.a += static_cast<double>(c.a);
      own.b += static_cast<double>(c.b);
      const double knee = static_cast<double>(c.a / (A(1) + c.b));
      least = knee < least ? knee : least;
    }
  }
  return {team.sum(own), team.least(least)};
}

// The search over `count` groups whose coefficients `of(j)` gives, by all threads of a team alike.
template <typename A, typename Of, typename Who>
FUSEE_DEVICE double search_root(double k, int64_t count, const Of& of, const Who& team) {
  RootSearch::Start start = start_search<A>(count, of, team);
  // Theta may be as large as the sum; a NaN stays one.
  const bool beyond = !(start.a <= std::numeric_limits<A>::max());
  const A scale = static_cast<A>(beyond ? kDownScale : 1);
  auto scaled = [&](int64_t j) {
    Coefficients<A> c = of(j);
    c.a *= scale;
    return c;
  };
  if (beyond) start = start_search<A>(count, scaled, team);
  RootSearch search(k, start);
  while (!search.done()) {
    const A theta = static_cast<A>(search.theta());
    RootSearch::Sums sums;
    for (int64_t j = team.rank(); j < count; j += team.size()) {
      const Coefficients<A> c = scaled(j);
      // Without branches, so that the loads of several groups are in flight.
      const bool below = c.a < (A(1) + c.b) * theta, between = below && c.a > c.b * theta;
      sums.saturated += below ? 0 : 1;
      sums.middle += between ? 1 : 0;
      sums.a += between ? static_cast<double>(c.a) : 0.0;
      sums.b += between ? static_cast<double>(c.b) : 0.0;
    }
    search.step(team.sum(sums));
  }
  return search.theta() / static_cast<double>(scale);
}

// How many j below `count` satisfy the condition.
template <typename Condition, typename Who>
FUSEE_DEVICE double count_if(int64_t count, const Condition& condition, const Who& team) {
  double own = 0;
  for (int64_t j = team.rank(); j < count; j += team.size()) own += condition(j) ? 1 : 0;
  return team.sum(own);
}

// The least number(j), infinity if there is none.
template <typename Number, typename Who>
FUSEE_DEVICE double least_of(int64_t count, const Number& number, const Who& team) {
  double own = std::numeric_limits<double>::infinity();
  for (int64_t j = team.rank(); j < count; j += team.size()) own = Minimum{}(own, number(j));
  return team.least(own);
}

// The k largest of the keys that `key(j)` gives; see select_largest of the CPU.
template <typename A, typename Key, typename Who>
FUSEE_DEVICE Root select_root(double k, int64_t count, const Key& key, const Who& team) {
  using Bits = typename Format<A>::Bits;
  if (k != k || count_if(count, [&](int64_t j) { return key(j) != key(j); }, team) != 0)
    return {std::numeric_limits<double>::quiet_NaN(), 0, 1};
  const double all = static_cast<double>(count);
  const double wanted = k < 1 ? 0 : k >= all ? all : floor(k);
  if (wanted == all) return {-1, 0, 1};
  if (wanted == 0) return {std::numeric_limits<double>::infinity(), -1, 1};
  constexpr double kNone = std::numeric_limits<double>::infinity();
  Bits low = 0, high = bit_cast<Bits>(std::numeric_limits<A>::infinity());
  while (low < high) {
    const Bits middle = low + (high - low + 1) / 2;
    const A least = bit_cast<A>(middle);
    const double reach = count_if(count, [&](int64_t j) { return key(j) >= least; }, team);
    if (reach == wanted) {
      // The search has ended between two keys, or at the last of those that are equal.
      auto reached = [&](int64_t j) {
        return key(j) >= least ? static_cast<double>(key(j)) : kNone;
      };
      const A last = static_cast<A>(least_of(count, reached, team));
      auto place = [&](int64_t j) { return key(j) == last ? -static_cast<double>(j) : kNone; };
      return {static_cast<double>(last), -least_of(count, place, team), 1};
    }
    if (reach > wanted) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const A least = bit_cast<A>(low);
  const double above = count_if(count, [&](int64_t j) { return key(j) > least; }, team);
  // The first group up to which enough of the equal keys lie.
  int64_t begin = 0, end = count - 1;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (above + count_if(middle + 1, [&](int64_t j) { return key(j) == least; }, team) >= wanted) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return {static_cast<double>(least), static_cast<double>(end), 1};
}

// The root of a problem; `find_norms` calls store_norms with what the team is to keep.
template <typename A, typename Who, typename FindNorms>
FUSEE_DEVICE Root find_root(const GroupArguments<A>& arguments, int64_t problem,
                            Global<const A> norms, const Who& team, const FindNorms& find_norms) {
  const int64_t count = arguments.groups;
  const double k = load(arguments.k, problem), lam = load(arguments.lam, problem);
  auto group = [&](int64_t j) { return arguments.group(problem, j, static_cast<A>(lam)); };
  const bool projects =
      arguments.form == Form::kProjection ||
      (arguments.form == Form::kDebiased &&
       count_if(count, [&](int64_t j) { return !(group(j).inner > A(0)); }, team) != 0);
  auto made_of = [&](int64_t j, A norm) {
    return projects ? Coefficients<A>{group(j).key(norm), A(0)} : group(j).coefficients(norm);
  };
  find_norms(made_of);
  auto of = [&](int64_t j) {
    return team.recall(j, [&](int64_t i) { return made_of(i, load(norms, i)); });
  };
  if (projects) return select_root<A>(k, count, [&](int64_t j) { return of(j).a; }, team);
  if (!(k > 0) || lam > std::numeric_limits<A>::max()) {
    const double none = lam == 0 ? 0 : std::numeric_limits<double>::infinity();
    return {k != k ? k : none, 0, 0};
  }
  return Root::of_theta(search_root<A>(k, count, of, team), lam);
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
