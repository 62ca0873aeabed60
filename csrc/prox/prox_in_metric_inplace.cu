// The proximal operator of the group envelope in a metric of elements, in place in CUDA: for all scopes together a
// fixed number of launches, nothing of which the host waits for. A pass leaves the sums of parts of groups, and one
// block of each scope adds them, takes a step of the search and says at which shares the next pass sums. Blocks of
// scopes whose search has ended return at once.

#include "prox/metric_envelope.h"

#include "core/cuda/table.h"
#include "core/cuda/torch_stream.h"
#include "prox/metric_envelope_scopes.h"
#include "prox/metric_envelope_step_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

// Steps that are launched, as many as inputs found by hill climbing needed, over 12 decades of the metric; others
// need 2 to 5. The shares of a search that has not ended sum up to k.
constexpr int kFloatSteps = 16, kDoubleSteps = 20;

enum class Pass { kSize, kMeasure, kCurve };

template <Pass kPass, typename A>
using TermsOf =
    std::conditional_t<kPass == Pass::kSize, MetricSize,
                       std::conditional_t<kPass == Pass::kMeasure, MetricMeasure, MetricCurve<A>>>;

// What a thread sums: few elements, so in the type of the terms.
template <typename A>
FUSEE_DEVICE void add(FourTerms<A>& sums, const FourTerms<A>& terms) {
  sums.first += terms.first;
  sums.second += terms.second;
  sums.third += terms.third;
  sums.fourth += terms.fourth;
}

template <Pass kPass, typename A, typename T, typename U>
FUSEE_DEVICE void sum_entry(const MetricEntry& entry, int block, const MetricState& state,
                            const Shared<double>& scratch) {
  using Terms = TermsOf<kPass, A>;
  using B = typename Terms::A;
  const Global<const T> v = memory_of<const T>(entry.v, entry);
  const Global<const U> H = memory_of<const U>(entry.H, entry);
  B coefficients[Terms::kCoefficients + 1] = {};
  auto prepare = [&](int64_t group) {
    if constexpr (kPass == Pass::kMeasure) {
      coefficients[0] = state.bare(group, entry.scope).shift();
      coefficients[1] = entry.wide ? state.get(kScaleOfC, group) : 1.0;
    } else if constexpr (kPass == Pass::kCurve) {
      if (state.get(kUsed, group) == 0) return false;
      for (int i = 0; i < Terms::kCoefficients; ++i)
        coefficients[i] = static_cast<B>(state.get(kCoefficients, group, i));
    }
    return true;
  };
  FourTerms<B> sums;
  auto one = [&](T x, U y) {
    add(sums,
        Terms::terms(static_cast<B>(x), static_cast<B>(y), [&](int i) { return coefficients[i]; }));
  };
  auto leave = [&](int64_t part, const FourSums& all) {
    for (int i = 0; i < Terms::kSums; ++i)
      store(state.parts, i * state.parts_count + part,
            i == 0   ? all.first
            : i == 1 ? all.second
            : i == 2 ? all.third
                     : all.fourth);
  };
  if (entry.columns()) {
    const Column own(entry, block);
    const int64_t width = entry.width();
    if (own.column >= width || !prepare(entry.first_group + own.column / entry.inner)) return;
    for (int64_t o = own.begin; o < own.end; ++o)
      one(load(v, o * width + own.column), load(H, o * width + own.column));
    leave(entry.first_part + own.range * width + own.column,
          {static_cast<double>(sums.first), static_cast<double>(sums.second),
           static_cast<double>(sums.third), static_cast<double>(sums.fourth)});
    return;
  }
  // Whole warps return, of blocks without barriers, or whole blocks.
  const Team team(entry, block);
  if (team.row >= entry.rows || !prepare(entry.first_group + team.row % entry.groups)) return;
  const Global<const T> of_row = v + team.row * entry.length;
  const Global<const U> H_of_row = H + team.row * entry.length;
  constexpr int N = kWidth<T, U>;
  auto scalar = [&](int64_t i) { one(load(of_row, i), load(H_of_row, i)); };
  auto vector = [&](int64_t i) {
    const Vector<T, N> x = load<N>(of_row, i);
    const Vector<U, N> y = load<N>(H_of_row, i);
    for (int n = 0; n < N; ++n) one(x[n], y[n]);
  };
  if (same_alignment<N>(of_row, H_of_row)) {
    for_each_vector<N>(of_row, team.begin, team.end, team.rank, team.size, vector, scalar);
  } else {
    for_each_vector<1>(of_row, team.begin, team.end, team.rank, team.size, vector, scalar);
  }
  auto reduced = [&](int i, B value) {
    if (i >= Terms::kSums) return 0.0;
    const double own = static_cast<double>(value);
    return entry.ranges == 0 ? warp_sum(own) : block_sum(own, scratch);
  };
  const FourSums all{reduced(0, sums.first), reduced(1, sums.second), reduced(2, sums.third),
                     reduced(3, sums.fourth)};
  if (team.rank == 0) leave(entry.first_part + team.row * entry.ranges_of_row() + team.range, all);
}

template <Pass kPass, int kCapacity>
__global__ void __launch_bounds__(kTableThreads, 2)
    metric_sums_kernel(const __grid_constant__ Table<MetricEntry, kCapacity> table,
                       const MetricState state) {
  FUSEE_SHARED(double, scratch, 32);
  const int block = static_cast<int>(blockIdx.x);
  const MetricEntry& entry = table.entries[table.find(block)];
  if (kPass == Pass::kCurve && state.settled(entry.scope)) return;
  if (kPass == Pass::kSize && !entry.wide) return;
  by_types(entry, [&]<typename T, typename U>(T, U) {
    if (kPass == Pass::kCurve && entry.wide) {
      sum_entry<kPass, double, T, U>(entry, block, state, scratch);
    } else {
      sum_entry<kPass, accumulate_t<T>, T, U>(entry, block, state, scratch);
    }
  });
}

enum class Step : int32_t { kScales, kMeasure, kStart, kStep };

template <int kCapacity>
__global__ void __launch_bounds__(kScopeThreads, 1)
    metric_step_kernel(const __grid_constant__ Table<MetricEntry, kCapacity> table,
                       const MetricState state, int64_t first_scope, Step step) {
  FUSEE_SHARED(double, scratch, Block::kScratch);
  const int64_t scope = first_scope + blockIdx.x;
  const ScopeStep<kCapacity> work(table, state, scratch, scope);
  if (work.empty()) {
    if (thread_rank() == 0) store(state.left, scope, 0);
    return;
  }
  if (step == Step::kScales) return work.set_scales();
  if (step == Step::kMeasure) return work.measure();
  if (state.settled(scope)) return;
  step == Step::kStart ? work.start() : work.step();
}

template <typename T, typename U>
FUSEE_DEVICE void scale_entry(const MetricEntry& entry, int block, const MetricState& state) {
  using A = accumulate_t<T>;
  const Global<T> v = memory_of<T>(entry.v, entry);
  const Global<const U> H = memory_of<const U>(entry.H, entry);
  A rise = 1, base = 0;
  bool zero = false;
  auto prepare = [&](int64_t group) {
    const MetricGroup g = state.group(group, entry.scope);
    const double share = state.get(kShare, group);
    // What is whole in the debiased form keeps its bits.
    if (share == MetricScale::kKeep || (share == 1 && g.debiased)) return false;
    const MetricScale scale(g, share);
    rise = static_cast<A>(scale.rise);
    base = static_cast<A>(scale.base);
    zero = share == 0;
    return true;
  };
  auto scaled = [&](T x, U y) {
    return static_cast<T>(MetricScale::scaled(static_cast<A>(x), static_cast<A>(y), rise, base));
  };
  if (entry.columns()) {
    const Column own(entry, block);
    const int64_t width = entry.width();
    if (own.column >= width || !prepare(entry.first_group + own.column / entry.inner)) return;
    for (int64_t o = own.begin; o < own.end; ++o) {
      const int64_t at = o * width + own.column;
      store(v, at, zero ? static_cast<T>(A(0)) : scaled(load(v, at), load(H, at)));
    }
    return;
  }
  const Team team(entry, block);
  if (team.row >= entry.rows || !prepare(entry.first_group + team.row % entry.groups)) return;
  const Global<T> of_row = v + team.row * entry.length;
  const Global<const U> H_of_row = H + team.row * entry.length;
  constexpr int N = kWidth<T, U>;
  auto scalar = [&](int64_t i) {
    store(of_row, i, zero ? static_cast<T>(A(0)) : scaled(load(of_row, i), load(H_of_row, i)));
  };
  auto vector = [&](int64_t i) {
    Vector<T, N> x;
    for (int n = 0; n < N; ++n) x[n] = static_cast<T>(A(0));
    if (!zero) {
      x = load<N>(of_row, i);
      const Vector<U, N> y = load<N>(H_of_row, i);
      for (int n = 0; n < N; ++n) x[n] = scaled(x[n], y[n]);
    }
    store_whole(of_row, i, x);
  };
  if (same_alignment<N>(of_row, H_of_row)) {
    for_each_vector<N>(of_row, team.begin, team.end, team.rank, team.size, vector, scalar);
  } else {
    for_each_vector<1>(of_row, team.begin, team.end, team.rank, team.size, vector, scalar);
  }
}

template <int kCapacity>
__global__ void __launch_bounds__(kTableThreads, 2)
    metric_scale_kernel(const __grid_constant__ Table<MetricEntry, kCapacity> table,
                        const MetricState state) {
  const int block = static_cast<int>(blockIdx.x);
  const MetricEntry& entry = table.entries[table.find(block)];
  by_types(entry, [&]<typename T, typename U>(T, U) { scale_entry<T, U>(entry, block, state); });
}

// All launches for scopes whose tensors fit into one table.
template <int kCapacity>
void run(const std::vector<MetricEntry>& entries, const MetricState& state, int64_t first_scope,
         int64_t scopes, Stream stream) {
  Table<MetricEntry, kCapacity> table{};
  int64_t blocks = 0;
  bool wide = false;
  for (const MetricEntry& entry : entries) {
    table.entries[table.count] = entry;
    table.entries[table.count++].first_block = static_cast<int32_t>(blocks);
    blocks += entry.blocks();
    FUSEE_REQUIRE(blocks < INT32_MAX, "too many rows for one launch");
    wide |= entry.wide;
  }
  table.blocks = static_cast<int32_t>(blocks);
  auto pass = [&]<Pass kPass>(std::integral_constant<Pass, kPass>) {
    if (table.blocks != 0)
      launch(&metric_sums_kernel<kPass, kCapacity>, table.blocks, kTableThreads, 0, stream, table,
             state);
  };
  auto step = [&](Step which) {
    launch(&metric_step_kernel<kCapacity>, scopes, kScopeThreads, 0, stream, table, state,
           first_scope, which);
  };
  if (wide) {
    pass(std::integral_constant<Pass, Pass::kSize>{});
    step(Step::kScales);
  }
  pass(std::integral_constant<Pass, Pass::kMeasure>{});
  step(Step::kMeasure);
  if (table.blocks == 0) return;
  for (int i = 0; i <= (wide ? kDoubleSteps : kFloatSteps); ++i) {
    pass(std::integral_constant<Pass, Pass::kCurve>{});
    step(i == 0 ? Step::kStart : Step::kStep);
  }
  launch(&metric_scale_kernel<kCapacity>, table.blocks, kTableThreads, 0, stream, table, state);
}

std::vector<MetricEntry> entries_of(const MetricScopes& all, size_t number, int64_t* parts) {
  const Scope& scope = all.scopes[number];
  std::vector<MetricEntry> entries;
  bool wide = false;
  for (size_t i = scope.begin; i < scope.end; ++i) {
    const auto& [tensor, first, l] = all.tensors[i];
    if (tensor.numel() == 0) continue;
    wide |= tensor.scalar_type() == ScalarType::Double;
    Share share = Share::of(l.outer * l.groups, l.inner);
    if (l.inner < kLongRow)
      share.ranges = static_cast<int32_t>((l.outer + kColumnPart - 1) / kColumnPart);
    const bool float_metric = all.metric[i].scalar_type() != tensor.scalar_type();
    entries.push_back({share, *parts, scope.first_group + first, l.outer, l.groups, l.inner,
                       tensor.mutable_data_ptr(), all.metric[i].const_data_ptr(),
                       static_cast<int32_t>(number), tensor.scalar_type(), float_metric, false});
    *parts += entries.back().parts();
  }
  for (MetricEntry& entry : entries) entry.wide = wide;
  return entries;
}

Tensor prox_group_envelope_metric_(std::vector<Tensor> tensors, std::vector<Tensor> metric,
                                   std::vector<int64_t> layout, std::optional<Tensor> weights,
                                   const Tensor& k, const Tensor& lam, int64_t form) {
  const MetricScopes all(tensors, metric, layout, weights, k, lam, form);
  const Context context(all.k);
  const int64_t count = static_cast<int64_t>(all.scopes.size());
  const Tensor left = empty(all.k, {count}, ScalarType::Long);
  if (count == 0) return left;
  constexpr size_t kMost = kLargeTable<MetricEntry>;
  int64_t parts = 0;
  // As many scopes at a time as fit into a table.
  struct Batch {
    std::vector<MetricEntry> entries;
    int64_t first = 0, scopes = 0;
  };
  std::vector<Batch> batches(1);
  for (int64_t number = 0; number < count; ++number) {
    const std::vector<MetricEntry> entries = entries_of(all, number, &parts);
    FUSEE_REQUIRE(entries.size() <= kMost, "a scope may have at most ", kMost, " tensors, got ",
                  entries.size());
    if (batches.back().entries.size() + entries.size() > kMost) batches.push_back({{}, number, 0});
    Batch& batch = batches.back();
    batch.entries.insert(batch.entries.end(), entries.begin(), entries.end());
    ++batch.scopes;
  }
  const Tensor numbers =
      empty(all.k, {kFields * all.groups + kNumbersOfScope * count}, ScalarType::Double);
  const Tensor sums = empty(all.k, {4 * parts}, ScalarType::Double);
  const MetricState state{output<double>(numbers),
                          output<double>(sums),
                          input<double>(all.weights),
                          input<double>(all.k),
                          input<double>(all.lam),
                          output<int64_t>(left),
                          all.groups,
                          parts,
                          all.form};
  for (const Batch& batch : batches) {
    if (batch.entries.size() <= kSmallTable) {
      run<kSmallTable>(batch.entries, state, batch.first, batch.scopes, context.stream);
    } else {
      run<kMost>(batch.entries, state, batch.first, batch.scopes, context.stream);
    }
  }
  return left;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("prox_group_envelope_metric_", TORCH_BOX(&prox_group_envelope_metric_));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
