// The weight compander in CUDA: all weights of a dtype in one launch, forward; in one or two, backward.
//
// The gradients in a and b are sums over rows. A row that a warp or a block takes whole is summed where its
// elements are; of a longer one each block leaves its sums, and a second launch adds them in order.

#include "core/cuda/table.h"
#include "core/cuda/torch_stream.h"
#include "reparam/compand_weights.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

struct Entry : Share {
  const void *input, *grad;
  void* output;
  const void *a, *b;  // one for each row
  void *grad_a, *grad_b;
};

// A number of the team's row.
template <typename A, typename Void>
FUSEE_DEVICE Global<A> of_rows(Void* memory, const Share& share) {
  Global<A> all{static_cast<A*>(memory)};
#if defined(FUSEE_EMULATED)
  all.size = share.rows;
#endif
  return all;
}

template <Kind kKind, typename A, typename Entry>
FUSEE_DEVICE Curve<kKind, A> curve_of(const Entry& entry, int64_t row) {
  return make_curve<kKind, A>(load(of_rows<const A>(entry.a, entry), row),
                              load(of_rows<const A>(entry.b, entry), row));
}

template <Kind kKind, typename T, int kCapacity>
__global__ void __launch_bounds__(kTableThreads, 2)
    compand_kernel(const __grid_constant__ Table<Entry, kCapacity> table) {
  using A = accumulate_t<T>;
  constexpr int N = vector_width<T>;
  const int block = static_cast<int>(blockIdx.x);
  const Entry& entry = table.entries[table.find(block)];
  const Team team(entry, block);
  if (team.row >= entry.rows) return;  // whole warps, without barriers
  const auto curve = curve_of<kKind, A>(entry, team.row);
  const Global<const T> in = row_of<const T>(entry.input, entry, team);
  const Global<T> out = row_of<T>(entry.output, entry, team);
  auto scalar = [&](int64_t i) {
    store(out, i, static_cast<T>(companded(curve, static_cast<A>(load(in, i)))));
  };
  auto vector = [&](int64_t i) {
    const Vector<T, N> v = load<N>(in, i);
    Vector<T, N> w;
    for (int k = 0; k < N; ++k) w[k] = static_cast<T>(companded(curve, static_cast<A>(v[k])));
    store_whole(out, i, w);
  };
  if (same_alignment<N>(in, out)) {
    for_each_vector<N>(out, team.begin, team.end, team.rank, team.size, vector, scalar);
  } else {
    for_each_vector<1>(out, team.begin, team.end, team.rank, team.size, vector, scalar);
  }
}

// What a thread sums of F and T; few elements, so in the accumulation type.
template <typename A>
struct Sums {
  A f = 0, t = 0;
};

template <Kind kKind, typename T, typename A = accumulate_t<T>>
FUSEE_DEVICE Sums<A> team_gradient(const Curve<kKind, A>& curve, const Entry& entry,
                                   const Team& team) {
  constexpr int N = vector_width<T>;
  const Global<const T> in = row_of<const T>(entry.input, entry, team);
  const Global<const T> grad = row_of<const T>(entry.grad, entry, team);
  const Global<T> out = row_of<T>(entry.output, entry, team);
  const A scale = curve.derivative_scale();
  Sums<A> sums;
  auto one = [&](T input, T gradient) {
    const A v = static_cast<A>(input), g = static_cast<A>(gradient);
    const Slopes<A> slopes = curve.slopes(absolute(v));
    const A signed_grad = v < A(0) ? -g : g;
    sums.f += signed_grad * slopes.f;
    sums.t += signed_grad * slopes.t;
    return static_cast<T>(g * (scale * slopes.derivative));
  };
  auto scalar = [&](int64_t i) { store(out, i, one(load(in, i), load(grad, i))); };
  auto vector = [&](int64_t i) {
    const Vector<T, N> v = load<N>(in, i), g = load<N>(grad, i);
    Vector<T, N> result;
    for (int k = 0; k < N; ++k) result[k] = one(v[k], g[k]);
    store_whole(out, i, result);
  };
  if (same_alignment<N>(in, out) && same_alignment<N>(grad, out)) {
    for_each_vector<N>(out, team.begin, team.end, team.rank, team.size, vector, scalar);
  } else {
    for_each_vector<1>(out, team.begin, team.end, team.rank, team.size, vector, scalar);
  }
  return sums;
}

// The sum over the threads of a team.
FUSEE_DEVICE double team_sum(const Share& share, double own, const Shared<double>& scratch) {
  return share.ranges == 0 ? warp_sum(own) : block_sum(own, scratch);
}

template <Kind kKind, typename A, typename Entry>
FUSEE_DEVICE void store_parameters(const Curve<kKind, A>& curve, const Entry& entry, int64_t row,
                                   double f, double t) {
  const ParameterGradients<A> gradients = curve.gradients(f, t);
  store(of_rows<A>(entry.grad_a, entry), row, static_cast<A>(gradients.a));
  store(of_rows<A>(entry.grad_b, entry), row, static_cast<A>(gradients.b));
}

template <Kind kKind, typename T, int kCapacity>
__global__ void __launch_bounds__(kTableThreads, 2)
    gradient_kernel(const __grid_constant__ Table<Entry, kCapacity> table, Global<double> partial) {
  using A = accumulate_t<T>;
  FUSEE_SHARED(double, scratch, 32);
  const int block = static_cast<int>(blockIdx.x);
  const Entry& entry = table.entries[table.find(block)];
  const Team team(entry, block);
  if (team.row >= entry.rows) return;  // whole warps, of blocks without barriers
  const auto curve = curve_of<kKind, A>(entry, team.row);
  const Sums<A> sums = team_gradient<kKind, T>(curve, entry, team);
  const double f = team_sum(entry, static_cast<double>(sums.f), scratch);
  const double t = team_sum(entry, static_cast<double>(sums.t), scratch);
  if (team.rank != 0) return;
  if (entry.ranges > 1) {
    store(partial, block, f);
    store(partial, static_cast<int64_t>(table.range_blocks) + block, t);
  } else {
    store_parameters(curve, entry, team.row, f, t);
  }
}

// The sums that the blocks of a row left: a warp's for each row, or a block's where they are many.
struct PartialEntry : Share {
  int64_t first;
  const void *a, *b;
  void *grad_a, *grad_b;
};

template <Kind kKind, typename A, int kCapacity>
__global__ void __launch_bounds__(kTableThreads, 2)
    parameter_kernel(const __grid_constant__ Table<PartialEntry, kCapacity> table,
                     Global<const double> partial, int64_t count) {
  const int block = static_cast<int>(blockIdx.x);
  FUSEE_SHARED(double, scratch, 32);
  const PartialEntry& entry = table.entries[table.find(block)];
  const Team team(entry, block);
  if (team.row >= entry.rows) return;  // whole warps, of blocks without barriers
  double f = 0, t = 0;
  const int64_t first = entry.first + team.row * entry.length;
  for (int64_t i = team.rank; i < entry.length; i += team.size) {
    f += load(partial, first + i);
    t += load(partial, count + first + i);
  }
  f = team_sum(entry, f, scratch);
  t = team_sum(entry, t, scratch);
  if (team.rank == 0) store_parameters(curve_of<kKind, A>(entry, team.row), entry, team.row, f, t);
}

// Calls run(T{}, entries) with the weights of each dtype that has any.
template <typename Run>
void for_each_type(const std::vector<Weight>& weights, const Run& run) {
  for (ScalarType type :
       {ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16}) {
    std::vector<Entry> entries;
    for (const Weight& weight : weights) {
      if (weight.type != type || weight.rows == 0) continue;
      const bool backward = weight.grad.has_value();
      // Without elements there are still gradients in a and b to write.
      if (weight.length == 0 && !backward) continue;
      entries.push_back({Share::of(weight.rows, weight.length), weight.input.const_data_ptr(),
                         backward ? weight.grad->const_data_ptr() : nullptr,
                         weight.output.mutable_data_ptr(), weight.a.const_data_ptr(),
                         weight.b.const_data_ptr(),
                         backward ? weight.grad_a.mutable_data_ptr() : nullptr,
                         backward ? weight.grad_b.mutable_data_ptr() : nullptr});
    }
    if (!entries.empty()) dispatch_floating(type, [&](auto value) { run(value, entries); });
  }
}

void forward(const std::vector<Weight>& weights, int64_t kind) {
  if (weights.empty()) return;
  const Context context(weights[0].input);
  dispatch_kind(kind, [&](auto constant) {
    for_each_type(weights, [&]<typename T>(T, const std::vector<Entry>& entries) {
      for_each_table(entries, [&]<int kCapacity>(const Table<Entry, kCapacity>& table) {
        launch(&compand_kernel<constant(), T, kCapacity>, table.blocks, kTableThreads, 0,
               context.stream, table);
      });
    });
  });
}

template <Kind kKind, typename A, int kCapacity>
void add_partial(const Table<Entry, kCapacity>& table, const Tensor& partial,
                 const Context& context) {
  std::vector<PartialEntry> entries;
  for (int i = 0; i < table.count; ++i) {
    const Entry& entry = table.entries[i];
    if (entry.ranges > 1)
      entries.push_back({{entry.rows, entry.ranges, entry.ranges > kTableThreads / 2 ? 1 : 0},
                         entry.first_block,
                         entry.a,
                         entry.b,
                         entry.grad_a,
                         entry.grad_b});
  }
  const int64_t count = table.range_blocks;
  for_each_table(entries, [&]<int kSize>(const Table<PartialEntry, kSize>& of_partial) {
    launch(&parameter_kernel<kKind, A, kSize>, of_partial.blocks, kTableThreads, 0, context.stream,
           of_partial, input<double>(partial), count);
  });
}

void backward(const std::vector<Weight>& weights, int64_t kind) {
  if (weights.empty()) return;
  const Context context(weights[0].input);
  dispatch_kind(kind, [&](auto constant) {
    for_each_type(weights, [&]<typename T>(T, const std::vector<Entry>& entries) {
      for_each_table(entries, [&]<int kCapacity>(const Table<Entry, kCapacity>& table) {
        const Tensor partial = empty(weights[0].input, {2, table.range_blocks}, ScalarType::Double);
        launch(&gradient_kernel<constant(), T, kCapacity>, table.blocks, kTableThreads, 0,
               context.stream, table, output<double>(partial));
        add_partial<constant(), accumulate_t<T>>(table, partial, context);
      });
    });
  });
}

using Operators = CompandOperators<&forward, &backward>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("compand", TORCH_BOX(&Operators::one));
  m.impl("compand_backward", TORCH_BOX(&Operators::backward_of_one));
  m.impl("compand_foreach", TORCH_BOX(&Operators::foreach));
  m.impl("compand_foreach_backward", TORCH_BOX(&Operators::backward_of_foreach));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
