// Which share of a Monarch product a block of threads takes, and the launches.
#pragma once

#include <optional>

#include "structured/monarch_kernels_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// A plan, the shared memory it takes, and about how long it takes: the bytes that go to and from a processor.
struct RatedPlan {
  MonarchPlan plan;
  size_t shared;
  double cost;
};

// The cheapest of the groups of `blocks` that `rate(group)` has a plan for.
template <typename F>
std::optional<RatedPlan> cheapest(int blocks, const F& rate) {
  std::optional<RatedPlan> best;
  const auto offer = [&](int group) {
    const std::optional<RatedPlan> plan = rate(group);
    if (plan.has_value() && (!best.has_value() || plan->cost < best->cost)) best = plan;
  };
  offer(blocks);
  for (int group = 1 << 12; group > 0; group /= 2)
    if (group < blocks) offer(group);
  return best;
}

// The elements of shared memory that are left to the operands beside a middle of so many: as many as let two blocks
// of threads share a processor that has 227 KB, or all.
template <typename T>
int64_t left_beside(int64_t middle) {
  constexpr int64_t kHalf = 112 * 1024, kLeast = 64 * 1024, kMost = 96 * 1024;
  const int64_t size = sizeof(T), all = most_shared_bytes();
  const int64_t shared = middle * size + kLeast <= kHalf ? std::min(kHalf, all) : all;
  return std::min(kMost / size, shared / size - middle);
}

// Both factors' walks and what they cost, if they fit beside the middle of a group.
template <typename E, int kColumns, typename First, typename Input, typename Second>
struct Planner {
  using T = stored_t<E>;
  using InMiddle = Middle<kColumns, E>;

  int64_t middle;
  MonarchPlan plan;

  int64_t left(bool with_output) const {
    return left_beside<T>(middle) - (with_output ? kOutputElements<T, kColumns> : 0);
  }
  bool walk_first(int blocks, int rows, int depth, bool interleaved) {
    plan.first =
        plan_walk<T, kColumns, First, Input>(blocks, rows, depth, interleaved, left(false));
    return plan.first.length > 0;
  }
  bool walk_second(int rows, int depth, bool interleaved) {
    plan.second =
        plan_walk<T, kColumns, Second, InMiddle>(plan.group, rows, depth, interleaved, left(true));
    return plan.second.length > 0;
  }
  // All rows cost the factors and what goes out, of each of which a group has its part, and what every group
  // reads of the input.
  RatedPlan rate(int64_t rows, double factors, double in, double out) const {
    const int64_t staged = std::max<int64_t>(
        staged_elements<First, Input>(plan.first),
        kOutputElements<T, kColumns> + staged_elements<Second, InMiddle>(plan.second));
    const double tokens = static_cast<double>(std::min<int64_t>(rows, kColumns));
    const double blocks = static_cast<double>(divide_up<int64_t>(rows, kColumns)) * plan.groups;
    const double of_block =
        tokens * in * plan.first.row_passes() + (factors + tokens * out) / plan.groups;
    return {plan, static_cast<size_t>(middle + staged) * sizeof(T),
            std::max(1.0, blocks / processors()) * of_block};
  }
};

// A product (k, q, p), (l, s, r) of some rows.
struct MonarchSizes {
  int k, q, p, l, s, r;
  int64_t rows;

  explicit MonarchSizes(const MonarchShape& shape, int64_t rows_)
      : k(static_cast<int>(shape.first.count)),
        q(static_cast<int>(shape.first.out)),
        p(static_cast<int>(shape.first.in)),
        l(static_cast<int>(shape.second.count)),
        s(static_cast<int>(shape.second.out)),
        r(static_cast<int>(shape.second.in)),
        rows(rows_) {}

  double factors() const { return double(k) * q * p + double(l) * s * r; }
};

template <typename E, int kColumns>
std::optional<RatedPlan> plan_product(const MonarchSizes& z) {
  using Factor = RowsOfFactor<stored_t<E>, PlainRow>;
  using Input = GlobalInput<kColumns, E, Layout::kBlocked>;
  return cheapest(z.l, [&](int group) -> std::optional<RatedPlan> {
    Planner<E, kColumns, Factor, Input, Factor> planner{Middle<kColumns, E>::elements(group, z.r),
                                                        {group, divide_up(z.l, group), {}, {}}};
    const int rows = MiddleOfSecond::rows(z.l, z.q, group);
    if (!planner.walk_first(z.k, rows, z.p, false) || !planner.walk_second(z.s, z.r, true))
      return std::nullopt;
    // Less than a sector is written as a whole one.
    const double waste = std::max(1.0, 32.0 / sizeof(stored_t<E>) / group);
    return planner.rate(z.rows, z.factors(), double(z.k) * z.p, waste * z.l * z.s);
  });
}

template <typename E, int kColumns>
std::optional<RatedPlan> plan_gradient(const MonarchSizes& z) {
  using T = stored_t<E>;
  using Factor = ColumnsOfFactor<E>;
  using Input = GlobalInput<kColumns, E, Layout::kInterleaved>;
  return cheapest(z.k, [&](int group) -> std::optional<RatedPlan> {
    Planner<E, kColumns, Factor, Input, Factor> planner{Middle<kColumns, E>::elements(group, z.q),
                                                        {group, divide_up(z.k, group), {}, {}}};
    const auto columns_of = [&](int block) {
      return MiddleOfFirst{z.l, z.q, block, std::min(group, z.k - block)}.template rows<T>();
    };
    int columns = columns_of(0);
    // Where every group begins at a whole vector, the first one needs as many as any.
    if (static_cast<int64_t>(group) * z.q % (static_cast<int64_t>(z.l) * vector_width<T>) != 0)
      for (int block = group; block < z.k; block += group)
        columns = std::max(columns, columns_of(block));
    if (!planner.walk_first(z.l, columns, z.s, true) || !planner.walk_second(z.p, z.q, false))
      return std::nullopt;
    return planner.rate(z.rows, z.factors(), double(z.l) * z.s, double(z.k) * z.p);
  });
}

// Calls f<kColumns>(plan) with the cheaper plan of those for blocks of more and of fewer rows; false if none.
template <typename T, typename Plan, typename F>
bool with_plan(const Plan& plan, const F& f) {
  constexpr int kFew = sizeof(T) == 8 ? 16 : 32;
  const std::optional<RatedPlan> few = plan.template operator()<kFew>();
  if constexpr (kIsHalf<T>) {
    const std::optional<RatedPlan> many = plan.template operator()<64>();
    if (many.has_value() && (!few.has_value() || many->cost < few->cost)) {
      f.template operator()<64>(*many);
      return true;
    }
  }
  if (few.has_value()) f.template operator()<kFew>(*few);
  return few.has_value();
}

// Both return false where no middle fits into shared memory.
template <typename T>
bool launch_monarch_product(const MonarchSizes& z, const Columns<const T, Layout::kBlocked>& x,
                            Global<const T> w1, Global<const T> w2, Global<const T> bias,
                            const Columns<T, Layout::kInterleaved>& y, bool tf32, Stream stream) {
  return as_multiplied<T>(tf32, [&]<typename E>() {
    return with_plan<T>([&]<int kColumns>() { return plan_product<E, kColumns>(z); },
                        [&]<int kColumns>(const RatedPlan& rated) {
                          launch(monarch_product<E, kColumns>,
                                 grid_of(divide_up<int64_t>(z.rows, kColumns), rated.plan.groups),
                                 kProductThreads, rated.shared, stream, x, w1, w2, bias, y,
                                 rated.plan, z.q, z.r);
                        });
  });
}

template <typename T>
bool launch_monarch_gradient(const MonarchSizes& z,
                             const Columns<const T, Layout::kInterleaved>& grad, Global<const T> w1,
                             Global<const T> w2, const Columns<T, Layout::kBlocked>& x,
                             const Columns<T, Layout::kBlocked>& kept, bool tf32, Stream stream) {
  return as_multiplied<T>(tf32, [&]<typename E>() {
    return with_plan<T>([&]<int kColumns>() { return plan_gradient<E, kColumns>(z); },
                        [&]<int kColumns>(const RatedPlan& rated) {
                          launch(monarch_input_gradient<E, kColumns>,
                                 grid_of(divide_up<int64_t>(z.rows, kColumns), rated.plan.groups),
                                 kProductThreads, rated.shared, stream, grad, w1, w2, x, kept,
                                 rated.plan, z.q, z.r);
                        });
  });
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
