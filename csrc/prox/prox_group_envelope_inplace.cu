// The proximal operator of the group envelope in place in CUDA: the squares of all tensors, one block that finds
// the root of each scope, one pass that scales all tensors. Three launches for each dtype's tensors, of which the
// second serves all; scopes of very many groups have one more. Nothing is read back by the host.

#include "core/cuda/kernel.h"
#include "core/cuda/table.h"
#include "core/cuda/torch_stream.h"
#include "prox/group_roots_cuda.h"
#include "prox/group_sums_cuda.h"
#include "prox/scopes.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

// A tensor as rows of neighbours that share a group, or where these are short as columns.
struct TensorEntry : Share {
  void* memory;
  int64_t outer, groups, inner;
  int64_t column_ranges;  // of the outer dimension where it is summed by columns, else 0
  int64_t first_part;     // of the sums that its blocks leave
  int64_t first_group;    // among those of all scopes

  static constexpr int64_t kShortRow = 64, kColumnPart = 64;

  static TensorEntry of(const Placed& placed, const Scope& scope, int64_t first_part) {
    const Layout& l = placed.layout;
    const bool by_columns = l.inner < kShortRow;
    const Share share =
        by_columns ? Share{l.outer, l.groups * l.inner, 1} : Share::of(l.outer * l.groups, l.inner);
    return {share,      placed.tensor.mutable_data_ptr(),
            l.outer,    l.groups,
            l.inner,    by_columns ? (l.outer + kColumnPart - 1) / kColumnPart : 0,
            first_part, scope.first_group + placed.first};
  }

  FUSEE_HOST_DEVICE bool by_columns() const { return inner < kShortRow; }
  FUSEE_HOST_DEVICE int64_t tiles() const { return (length + kTableThreads - 1) / kTableThreads; }
  FUSEE_HOST_DEVICE int64_t parts_of_row() const { return ranges == 0 ? 1 : ranges; }

  int64_t blocks() const { return column_ranges != 0 ? column_ranges * tiles() : Share::blocks(); }
  int64_t parts_count() const {
    return by_columns() ? column_ranges * length : rows * parts_of_row();
  }

  // For an elementwise pass columns are taken as they lie, in one row.
  TensorEntry elementwise() const {
    TensorEntry entry = *this;
    if (by_columns()) static_cast<Share&>(entry) = Share::of(1, rows * length);
    entry.column_ranges = 0;
    return entry;
  }

  Parts parts() const {
    if (by_columns()) return {column_ranges, length, inner, 1, inner, 0};
    return {outer, groups * parts_of_row(), parts_of_row(), 1, parts_of_row(), 0};
  }
};

template <typename T>
FUSEE_DEVICE double sum_of_squares(Global<const T> x, const Team& team) {
  constexpr int N = vector_width<T>;
  double sum = 0;
  auto add = [&](T value) { sum += static_cast<double>(value) * static_cast<double>(value); };
  for_each_vector<N>(
      x, team.begin, team.end, team.rank, team.size,
      [&](int64_t i) {
        const Vector<T, N> v = load<N>(x, i);
        for (int k = 0; k < N; ++k) add(v[k]);
      },
      [&](int64_t i) { add(load(x, i)); });
  return sum;
}

template <typename T, int kCapacity>
__global__ void __launch_bounds__(kTableThreads, 4)
    squares_kernel(const __grid_constant__ Table<TensorEntry, kCapacity> table,
                   Global<double> all_parts) {
  FUSEE_SHARED(double, scratch, 32);
  const int block = static_cast<int>(blockIdx.x);
  const TensorEntry& entry = table.entries[table.find(block)];
  const Global<double> parts = all_parts + entry.first_part;
  if (entry.by_columns()) {
    const int64_t tiles = entry.tiles(), local = block - entry.first_block;
    const int64_t column = local % tiles * kTableThreads + thread_rank(), range = local / tiles;
    if (column >= entry.length) return;
    const Global<const T> x = memory_of<const T>(entry.memory, entry.outer * entry.length);
    const int64_t share = (entry.outer + entry.column_ranges - 1) / entry.column_ranges;
    const int64_t end = (range + 1) * share < entry.outer ? (range + 1) * share : entry.outer;
    double sum = 0;
    for (int64_t o = range * share; o < end; ++o) {
      const double value = static_cast<double>(load(x, o * entry.length + column));
      sum += value * value;
    }
    store(parts, range * entry.length + column, sum);
    return;
  }
  const Team team(entry, block);
  if (team.row >= entry.rows) return;  // whole warps, of blocks without barriers
  const double own = sum_of_squares(row_of<const T>(entry.memory, entry, team), team);
  const double sum = entry.ranges == 0 ? warp_sum(own) : block_sum(own, scratch);
  if (team.rank == 0) store(parts, team.row * entry.parts_of_row() + team.range, sum);
}

// Where the sums of a tensor's groups lie.
struct PartsEntry {
  Parts parts;
  int64_t first_part, first_group, groups;
};
struct ScopeEntry {
  int32_t number;
  int16_t begin, end;  // of the tensors
  int64_t first_group, groups;
};

template <int kScopes, int kTensors>
struct ScopeTable {
  int32_t scopes_count, tensors_count;
  int64_t groups;  // the most of a scope
  ScopeEntry scopes[kScopes];
  PartsEntry tensors[kTensors];
};
using SmallScopes = ScopeTable<4, 8>;
using LargeScopes = ScopeTable<256, 352>;
static_assert(sizeof(LargeScopes) <= 32000);

// What is given for the scopes, as kernels see it.
struct ScopeArguments {
  Global<const double> weights;  // may be absent
  Global<const double> k, lam;
  Form form;
};

// The squares of a tensor's groups, added to what is there; a warp each, or where the parts are few a thread.
template <typename Who>
FUSEE_DEVICE void add_squares(Global<const double> parts, const PartsEntry& entry,
                              Global<double> squares, const Who& team) {
  const Global<double> of_tensor = squares + entry.first_group;
  const Global<const double> known(of_tensor);
  const bool by_threads = entry.parts.count() <= 8;
  for_each_sum(parts + entry.first_part, entry.parts, 0, entry.groups, by_threads, team,
               [&](int64_t j, double sum) {
                 if (by_threads || team.lane() == 0) store(of_tensor, j, load(known, j) + sum);
               });
}

template <typename Who>
FUSEE_DEVICE void find_scales(const ScopeEntry& scope, const PartsEntry* tensors,
                              const ScopeArguments& given, Global<const double> parts,
                              Global<double> norms, Global<double> scales, Global<int64_t> counts,
                              const Who& team) {
  const int64_t count = scope.groups;
  const Global<double> of_scope = norms + scope.first_group;
  const Global<const double> known(of_scope);
  const GroupArguments<double> arguments{
      given.weights ? given.weights + scope.first_group : Global<const double>{},
      Global<const double>{},
      given.k,
      given.lam,
      count,
      given.form};
  const Root root = find_root(arguments, scope.number, known, team, [&](const auto& of) {
    for (int64_t j = team.rank(); j < count; j += team.size()) store(of_scope, j, 0.0);
    team.barrier();
    for (int i = scope.begin; i < scope.end; ++i) {
      add_squares(parts, tensors[i], norms, team);
      team.barrier();
    }
    for (int64_t j = team.rank(); j < count; j += team.size()) {
      const double norm = sqrt(load(known, j));
      store(of_scope, j, norm);
      team.keep(j, of(j, norm));
    }
    team.barrier();
  });
  const double lam = arguments.lam_of(scope.number);
  double left = 0;
  for (int64_t j = team.rank(); j < count; j += team.size()) {
    const double norm = load(known, j);
    const Group<double> group = arguments.group(scope.number, j, lam);
    const double scale = root.scale(group, norm, j);
    store(scales, scope.first_group + j, scale);
    left += norm != 0 && scale != 0 && group.weight != 0 ? 1 : 0;
  }
  left = team.sum(left);
  if (team.rank() == 0) store(counts, scope.number, static_cast<int64_t>(left));
}

template <typename Scopes, Worker kWorker>
__global__ void __launch_bounds__(kRootThreads, blocks_at_once(kWorker))
    scope_root_kernel(WorkerMemory<double> memory, const __grid_constant__ Scopes table,
                      ScopeArguments given, Global<const double> parts, Global<double> norms,
                      Global<double> scales, Global<int64_t> counts) {
  for_problem<double, kWorker>(memory, [&](const auto& team, int64_t i) {
    find_scales(table.scopes[i], table.tensors, given, parts, norms, scales, counts, team);
  });
}

// Memory is written only where it changes.
template <typename T>
FUSEE_DEVICE void scale_row(Global<T> x, const Team& team, double scale) {
  using A = accumulate_t<T>;
  constexpr int N = vector_width<T>;
  if (scale == 1) return;
  const A factor = static_cast<A>(scale);
  const Global<const T> in(x);
  for_each_vector<N>(
      x, team.begin, team.end, team.rank, team.size,
      [&](int64_t i) {
        Vector<T, N> v = load<N>(in, i);
        for (int k = 0; k < N; ++k) v[k] = static_cast<T>(static_cast<A>(v[k]) * factor);
        store_whole(x, i, v);
      },
      [&](int64_t i) { store(x, i, static_cast<T>(static_cast<A>(load(in, i)) * factor)); });
}

template <typename T>
FUSEE_DEVICE void scale_columns(Global<T> x, const TensorEntry& entry, const Team& team,
                                Global<const double> scales) {
  using A = accumulate_t<T>;
  constexpr int N = vector_width<T>;
  const Layout layout(1, entry.outer, entry.groups, entry.inner);
  const Global<const T> in(x);
  auto factor = [&](const Place& place) { return static_cast<A>(load(scales, place.group)); };
  for_each_vector<N>(
      x, team.begin, team.end, team.rank, team.size,
      [&](int64_t first) {
        Vector<T, N> v = load<N>(in, first);
        for_neighbours<N>(layout, first, factor, [&](int k, A scale, int64_t) {
          v[k] = static_cast<T>(static_cast<A>(v[k]) * scale);
        });
        store_whole(x, first, v);
      },
      [&](int64_t at) {
        for_neighbours<1>(layout, at, factor, [&](int, A scale, int64_t) {
          store(x, at, static_cast<T>(static_cast<A>(load(in, at)) * scale));
        });
      });
}

template <typename T, int kCapacity>
__global__ void __launch_bounds__(kTableThreads, 4)
    scale_tensors_kernel(const __grid_constant__ Table<TensorEntry, kCapacity> table,
                         Global<const double> scales) {
  const int block = static_cast<int>(blockIdx.x);
  const TensorEntry& entry = table.entries[table.find(block)];
  const Team team(entry, block);
  if (team.row >= entry.rows) return;
  const Global<const double> of_tensor = scales + entry.first_group;
  const Global<T> row = row_of<T>(entry.memory, entry, team);
  if (entry.by_columns()) {
    scale_columns(row, entry, team, of_tensor);
  } else {
    scale_row(row, team, load(of_tensor, team.row % entry.groups));
  }
}

// Calls run(T{}, entries) with the tensors of each dtype that has any.
template <typename Run>
void for_each_type(const Scopes& all, const std::vector<TensorEntry>& entries, const Run& run) {
  for (ScalarType type :
       {ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16}) {
    std::vector<TensorEntry> chosen;
    for (size_t i = 0; i < entries.size(); ++i)
      if (all.tensors[i].tensor.scalar_type() == type && all.tensors[i].tensor.numel() != 0)
        chosen.push_back(entries[i]);
    if (!chosen.empty()) dispatch_floating(type, [&](auto value) { run(value, chosen); });
  }
}

// Calls run(table) for tables of all scopes that `chosen` takes: of one mostly.
template <typename Table, typename Chosen, typename Run>
void for_each_scope_table(const Scopes& all, const std::vector<TensorEntry>& entries,
                          const Chosen& chosen, const Run& run) {
  Table table{};
  auto flush = [&] {
    if (table.scopes_count != 0) run(table);
    table.scopes_count = table.tensors_count = 0;
    table.groups = 0;
  };
  for (size_t number = 0; number < all.scopes.size(); ++number) {
    const Scope& scope = all.scopes[number];
    if (!chosen(scope)) continue;
    const int32_t tensors = static_cast<int32_t>(scope.end - scope.begin);
    constexpr int32_t kMost = std::extent_v<decltype(Table::tensors)>;
    FUSEE_REQUIRE(tensors <= kMost, "a scope may have ", kMost, " tensors, got ", tensors);
    if (table.scopes_count == static_cast<int32_t>(std::extent_v<decltype(Table::scopes)>) ||
        table.tensors_count + tensors > kMost)
      flush();
    ScopeEntry& entry = table.scopes[table.scopes_count++];
    entry = {static_cast<int32_t>(number), static_cast<int16_t>(table.tensors_count),
             static_cast<int16_t>(table.tensors_count + tensors), scope.first_group, scope.groups};
    table.groups = std::max(table.groups, scope.groups);
    for (size_t i = scope.begin; i < scope.end; ++i)
      table.tensors[table.tensors_count++] = {entries[i].parts(), entries[i].first_part,
                                              entries[i].first_group, entries[i].groups};
  }
  flush();
}

// The scales of all scopes: of each by a block, of those with very many groups by all blocks, one after the other.
template <typename Table, typename... Arguments>
void launch_scopes(const Scopes& all, const std::vector<TensorEntry>& entries,
                   const Context& context, const Arguments&... arguments) {
  const int64_t large = std::count_if(all.scopes.begin(), all.scopes.end(), [](const Scope& scope) {
    return by_all_blocks(1, scope.groups);
  });
  auto shared = [&](const Scope& scope) {
    return by_all_blocks(std::max<int64_t>(1, large), scope.groups);
  };
  auto alone = [&](const Scope& scope) { return !shared(scope); };
  for_each_scope_table<Table>(all, entries, alone, [&](const Table& table) {
    const int64_t remembered = std::min(table.groups, kMostRemembered);
    launch(&scope_root_kernel<Table, Worker::kBlock>, table.scopes_count, kRootThreads,
           static_cast<size_t>(remembered) * sizeof(Coefficients<double>), context.stream,
           WorkerMemory<double>{table.scopes_count, remembered, {}, {}}, table, arguments...);
  });
  for_each_scope_table<Table>(all, entries, shared, [&](const Table& table) {
    launch_all_blocks<double>(&scope_root_kernel<Table, Worker::kAllBlocks>, table.scopes_count,
                              table.groups, table.groups, all.k, context.stream, table,
                              arguments...);
  });
}

Tensor prox_group_envelope_(std::vector<Tensor> tensors, std::vector<int64_t> layout,
                            std::optional<Tensor> weights, const Tensor& k, const Tensor& lam,
                            int64_t form) {
  const Scopes all(tensors, layout, weights, k, lam, form);
  const Context context(all.k);
  Tensor counts = empty(all.k, {all.k.numel()}, ScalarType::Long);
  if (all.scopes.empty()) return counts;
  std::vector<TensorEntry> entries;
  int64_t parts_count = 0;
  for (const Scope& scope : all.scopes) {
    for (size_t i = scope.begin; i < scope.end; ++i) {
      entries.push_back(TensorEntry::of(all.tensors[i], scope, parts_count));
      parts_count += entries.back().parts_count();
    }
  }
  const Tensor parts = empty(all.k, {parts_count}, ScalarType::Double);
  const Tensor norms = empty(all.k, {all.groups}, ScalarType::Double);
  const Tensor scales = empty(all.k, {all.groups}, ScalarType::Double);
  for_each_type(all, entries, [&]<typename T>(T, const std::vector<TensorEntry>& of_type) {
    for_each_table(of_type, [&]<int kCapacity>(const Table<TensorEntry, kCapacity>& table) {
      launch(&squares_kernel<T, kCapacity>, table.blocks, kTableThreads, 0, context.stream, table,
             output<double>(parts));
    });
  });
  const ScopeArguments given{input<double>(all.weights), input<double>(all.k),
                             input<double>(all.lam), all.form};
  auto find_roots = [&]<typename Table>() {
    launch_scopes<Table>(all, entries, context, given, input<double>(parts), output<double>(norms),
                         output<double>(scales), output<int64_t>(counts));
  };
  const bool few = all.scopes.size() <= std::extent_v<decltype(SmallScopes::scopes)> &&
                   all.tensors.size() <= std::extent_v<decltype(SmallScopes::tensors)>;
  if (few) {
    find_roots.template operator()<SmallScopes>();
  } else {
    find_roots.template operator()<LargeScopes>();
  }
  for_each_type(all, entries, [&]<typename T>(T, std::vector<TensorEntry> of_type) {
    for (TensorEntry& entry : of_type) entry = entry.elementwise();
    for_each_table(of_type, [&]<int kCapacity>(const Table<TensorEntry, kCapacity>& table) {
      launch(&scale_tensors_kernel<T, kCapacity>, table.blocks, kTableThreads, 0, context.stream,
             table, input<double>(scales));
    });
  });
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("prox_group_envelope_", TORCH_BOX(&prox_group_envelope_));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
