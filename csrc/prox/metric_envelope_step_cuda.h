// A step of the search for the shares, by one block for each scope.
#pragma once

#include "prox/group_roots_cuda.h"
#include "prox/metric_envelope_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// The work of a block on its scope between two passes.
template <int kCapacity>
struct ScopeStep {
  const Table<MetricEntry, kCapacity>& table;
  const MetricState& state;
  const Shared<double>& scratch;
  int64_t scope;
  int begin, end;        // of the entries
  int64_t first, count;  // of the groups
  bool wide, by_warps;
  double k;

  FUSEE_DEVICE ScopeStep(const Table<MetricEntry, kCapacity>& table_, const MetricState& state_,
                         const Shared<double>& scratch_, int64_t scope_)
      : table(table_), state(state_), scratch(scratch_), scope(scope_) {
    begin = first_entry(scope);
    end = first_entry(scope + 1);
    if (empty()) return;
    first = table.entries[begin].first_group;
    int64_t last = first;
    by_warps = false;
    for (int i = begin; i < end; ++i) {
      const MetricEntry& entry = table.entries[i];
      first = entry.first_group < first ? entry.first_group : first;
      last = entry.first_group + entry.groups > last ? entry.first_group + entry.groups : last;
      by_warps |= entry.parts_of_group() > 32;
    }
    count = last - first;
    wide = table.entries[begin].wide;
    k = load(state.k, scope);
  }

  FUSEE_DEVICE bool empty() const { return begin == end; }

  FUSEE_DEVICE int first_entry(int64_t number) const {
    int low = 0, high = table.count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (table.entries[middle].scope < number) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Calls f(group) for the groups of the scope, each by one thread.
  template <typename F>
  FUSEE_DEVICE void for_each_group(const F& f) const {
    for (int64_t j = thread_rank(); j < count; j += kScopeThreads) f(first + j);
  }

  // The sums of a group's parts that are every `step`-th from `begin_part` on.
  template <int kSums>
  FUSEE_DEVICE FourSums sums_of(int64_t group, int begin_part, int step) const {
    FourSums sums;
    for (int i = begin; i < end; ++i) {
      const MetricEntry& entry = table.entries[i];
      const int64_t j = group - entry.first_group;
      if (j < 0 || j >= entry.groups) continue;
      const int64_t parts = entry.parts_of_group();
      for (int64_t p = begin_part; p < parts; p += step) {
        const int64_t part = entry.part(j, p);
        sums.first += load(state.parts, part);
        if (kSums > 1) sums.second += load(state.parts, state.parts_count + part);
        if (kSums > 2) sums.third += load(state.parts, 2 * state.parts_count + part);
        if (kSums > 3) sums.fourth += load(state.parts, 3 * state.parts_count + part);
      }
    }
    return sums;
  }

  // Calls f(group, sums) for the groups that are used, each by one thread, which may be another than that of
  // for_each_group; waits before and after.
  template <int kSums, typename Used, typename F>
  FUSEE_DEVICE void for_each_sum(const Used& used, const F& f) const {
    __syncthreads();
    if (by_warps) {
      const int lane = thread_rank() & 31;
      for (int64_t j = thread_rank() >> 5; j < count; j += kScopeThreads / 32) {
        if (!used(first + j)) continue;
        const FourSums own = sums_of<kSums>(first + j, lane, 32);
        const FourSums sums{warp_sum(own.first), kSums > 1 ? warp_sum(own.second) : 0.0,
                            kSums > 2 ? warp_sum(own.third) : 0.0,
                            kSums > 3 ? warp_sum(own.fourth) : 0.0};
        if (lane == 0) f(first + j, sums);
      }
    } else {
      for_each_group([&](int64_t group) {
        if (used(group)) f(group, sums_of<kSums>(group, 0, 1));
      });
    }
    __syncthreads();
  }

  FUSEE_DEVICE MetricGroup group(int64_t j) const { return state.group(j, scope); }

  FUSEE_DEVICE double share(int64_t j) const { return state.get(kShare, j); }

  template <typename A>
  FUSEE_DEVICE void set_curve(int64_t j, const MetricGroup& g, double u) const {
    const MetricCurve<A> curve(g, u);
    for (int i = 0; i < MetricCurve<A>::kCoefficients; ++i)
      state.set(kCoefficients, j, static_cast<double>(curve.coefficient(i)), i);
  }

  // The next pass sums at the share u.
  FUSEE_DEVICE void use(int64_t j, const MetricGroup& g, double u) const {
    state.set(kUsed, j, 1);
    wide ? set_curve<double>(j, g, u) : set_curve<float>(j, g, u);
  }

  struct Value {
    double f, slope;
  };
  FUSEE_DEVICE Value value(const MetricGroup& g, double u, const FourSums& sums) const {
    if (wide) {
      const auto of_double = MetricCurve<double>(g, u).value(g, sums);
      return {of_double.f, of_double.slope};
    }
    const auto of_float = MetricCurve<float>(g, u).value(g, sums);
    return {of_float.f, of_float.slope};
  }

  FUSEE_DEVICE void set_tangent(int64_t j, const Tangent& tangent) const {
    state.set(kAlpha, j, tangent.alpha);
    state.set(kBeta, j, tangent.beta);
  }
  FUSEE_DEVICE Tangent tangent(int64_t j) const {
    return Tangent::of(state.get(kAlpha, j), state.get(kBeta, j));
  }

  FUSEE_DEVICE void settle() const {
    if (thread_rank() == 0) store(state.numbers, state.at(kSettled, scope), 1.0);
  }

  // How many groups are left, after every step: any may be the last.
  FUSEE_DEVICE void count_left() const {
    double own = 0;
    for_each_group([&](int64_t j) {
      own += state.get(kSize, j) != 0 && share(j) != 0 && state.bare(j, scope).root_weight != 0;
    });
    own = block_sum(own, scratch);
    if (thread_rank() == 0) store(state.left, scope, static_cast<int64_t>(own));
  }

  FUSEE_DEVICE void set_scales() const {
    if (!wide) return;
    for_each_sum<1>(
        [](int64_t) { return true; },
        [&](int64_t j, const FourSums& sums) { state.set(kScaleOfC, j, scale_for(sums.first)); });
  }

  // From the sums of the first pass: what becomes of the scope, and the values at u = 0.
  FUSEE_DEVICE void measure() const {
    MetricCounts own;
    double nonzero = 0;
    for_each_sum<4>([](int64_t) { return true; },
                    [&](int64_t j, const FourSums& sums) {
                      MetricGroup g = state.bare(j, scope);
                      g.measure(sums, wide ? state.get(kScaleOfC, j) : 1.0);
                      state.set(kSize, j, g.size);
                      state.set(kMean, j, g.mean);
                      state.set(kFirst, j, g.first);
                      state.set(kMost, j, g.most);
                      state.set(kLast, j, g.last);
                      state.set(kLeast, j, g.least);
                      state.set(kKey, j, g.root_weight * g.root_weight * sums.third);
                      state.set(kShare, j, MetricScale::kKeep);
                      own.add(sums, g.root_weight);
                      nonzero += g.counts() ? 1 : 0;
                    });
    MetricCounts counts;
    counts.broken = block_sum(own.broken, scratch);
    counts.wrong = block_sum(own.wrong, scratch);
    counts.weights = block_sum(own.weights, scratch);
    nonzero = block_sum(nonzero, scratch);
    const MetricCourse course = counts.course(state.form, k, load(state.lam, scope));
    const bool searches = course == MetricCourse::kSearch && nonzero > k;
    if (thread_rank() == 0) {
      store(state.numbers, state.at(kSettled, scope), searches ? 0.0 : 1.0);
      store(state.numbers, state.at(kEta, scope), std::numeric_limits<double>::infinity());
    }
    if (searches) {
      for_each_group([&](int64_t j) {
        const MetricGroup g = group(j);
        state.set(kUsed, j, 0);
        if (g.counts()) use(j, g, 1);
      });
      return;
    }
    Root root{0, 0, 0};
    if (course == MetricCourse::kProject)
      root = select_root<double>(
          k, count, [&](int64_t j) { return state.get(kKey, first + j); }, Block{scratch});
    for_each_group([&](int64_t j) {
      const double key = state.get(kKey, j);
      const bool kept =
          key > root.theta || (key == root.theta && static_cast<double>(j - first) <= root.last);
      double u = MetricScale::kKeep;
      if (course == MetricCourse::kBroken) {
        u = std::numeric_limits<double>::quiet_NaN();
      } else if (group(j).counts() && course != MetricCourse::kKeep) {
        u = course == MetricCourse::kSearch            ? 1
            : course == MetricCourse::kProject && kept ? MetricScale::kKeep
                                                       : 0;
      }
      state.set(kShare, j, u);
    });
    __syncthreads();
    count_left();
  }

  // The shares of the present tangents. Returns eta; the shares are not stored.
  FUSEE_DEVICE double solve() const {
    const double theta = search_root<double>(
        k, count,
        [&](int64_t j) {
          const Tangent of_group = tangent(first + j);
          return Coefficients<double>{of_group.alpha, of_group.beta};
        },
        Block{scratch});
    return 1 / theta;
  }

  FUSEE_DEVICE void set_share(int64_t j, const MetricGroup& g, double u) const {
    state.set(kShare, j, u);
    state.set(kUsed, j, 0);
    if (u > 0 && u < 1) use(j, g, u);
  }

  // From the sums at u = 1: the shares of the chords.
  FUSEE_DEVICE void start() const {
    for_each_group([&](int64_t j) {
      if (!group(j).counts()) set_tangent(j, Tangent());
    });
    for_each_sum<3>([&](int64_t j) { return state.get(kUsed, j) != 0; },
                    [&](int64_t j, const FourSums& sums) {
                      MetricGroup g = group(j);
                      const Value at_end = value(g, 1, sums);
                      g.last = at_end.f;
                      g.least = at_end.slope;
                      state.set(kLast, j, g.last);
                      state.set(kLeast, j, g.least);
                      set_tangent(j, g.chord());
                    });
    const double eta = solve();
    for_each_group([&](int64_t j) {
      const MetricGroup g = group(j);
      if (g.counts()) set_share(j, g, tangent(j).share(eta));
    });
    __syncthreads();
    count_left();
  }

  // From the sums at the shares: the next ones.
  FUSEE_DEVICE void step() const {
    for_each_group([&](int64_t j) {
      const double u = share(j);
      if (u == 0 || u == 1) set_tangent(j, group(j).at_end(u));
    });
    for_each_sum<3>([&](int64_t j) { return state.get(kUsed, j) != 0; },
                    [&](int64_t j, const FourSums& sums) {
                      const MetricGroup g = group(j);
                      const double u = share(j);
                      const Value at = value(g, u, sums);
                      set_tangent(j, Tangent(at.f, at.slope, u));
                    });
    const double eta = solve();
    double far = 0;
    for_each_group([&](int64_t j) {
      const MetricGroup g = group(j);
      if (!g.counts()) return;
      const Tangent of_group = tangent(j);
      const double before = share(j), after = of_group.share(eta);
      far += wide ? !is_close<double>(before, after, of_group)
                  : !is_close<float>(before, after, of_group);
      set_share(j, g, after);
    });
    far = block_sum(far, scratch);
    const double before = load(state.numbers, state.at(kEta, scope));
    __syncthreads();
    if (thread_rank() == 0) store(state.numbers, state.at(kEta, scope), eta);
    if (far == 0 || !(eta < before)) settle();
    count_left();
  }
};

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
