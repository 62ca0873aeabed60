// The linear system behind implicit derivatives in CUDA: conjugate gradients with the whole plan, for all
// problems in three launches, none of which the host waits for.
//
// In each, passes over the tiles of the plan's exponentials, which all blocks share, take turns with steps in
// which a block has each problem.

#include "transport/implicit_system_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

// From S: the masses, what the rows ask for, and the shift.
template <Metric kMetric, typename T>
FUSEE_DEVICE void begin_rows(const System<kMetric, T>& system, int64_t item) {
  const int64_t n = system.all.n, m = system.all.m, first = item * n;
  // The mass, and how many rows with mass have no pair at all.
  const Two masses = block_total<Two>(n, [&](int64_t i) {
    const double sum = system.row_total(item, i);
    store(system.row_sum, first + i, sum);
    const double a = load(system.a, first + i);
    const bool empty = a > 0 && !(sum > 0 && sum < kInfinity);
    return Two(weighted(a, sum), empty ? 1.0 : 0.0);
  });
  const double mass = masses.first;
  const bool singular = system.singular(item) && mass > 0;
  double shift = 0;
  if (singular) {
    const double of_rows =
        block_total<double>(n, [&](int64_t i) { return load(system.p, first + i); });
    const double of_columns =
        block_total<double>(m, [&](int64_t j) { return load(system.q, item * m + j); });
    shift = (of_rows - of_columns) / (2 * mass);
  }
  for_block(n, [&](int64_t i) {
    const double own = weighted(load(system.a, first + i), load(system.row_sum, first + i));
    store(system.asked, first + i, own > 0 ? load(system.p, first + i) / own - shift : 0);
  });
  if (thread_rank() != 0) return;
  const bool nothing = masses.second > 0 || mass != mass;
  system.set(item, kUnsolvable, nothing ? 1 : 0);
  system.set(item, kMass, mass);
  system.set(item, kShift, shift);
}

// Rounding leaves the range of a singular matrix.
template <Metric kMetric, typename T>
FUSEE_DEVICE void into_range(const System<kMetric, T>& system, int64_t item, double weight) {
  if (!system.singular(item)) return;
  const int64_t m = system.all.m, first = item * m;
  const double excess =
      block_total<double>(m, [&](int64_t j) { return load(system.residual, first + j); }) / weight;
  for_block(m, [&](int64_t j) {
    store(system.residual, first + j,
          load(system.residual, first + j) - excess * load(system.diagonal, first + j));
  });
}

// The preconditioned size of the residual, and its plain size.
template <Metric kMetric, typename T>
FUSEE_DEVICE Two residual_sizes(const System<kMetric, T>& system, int64_t item) {
  const int64_t first = item * system.all.m;
  return block_total<Two>(system.all.m, [&](int64_t j) {
    const double r = load(system.residual, first + j);
    return Two(r * r * load(system.preconditioner, first + j), absolute(r));
  });
}

// From the first sums along columns: the matrix's diagonal, the right side, and the first direction.
template <Metric kMetric, typename T>
FUSEE_DEVICE void begin_columns(const System<kMetric, T>& system, int64_t item) {
  const int64_t m = system.all.m, first = item * m;
  const double factor = 1 + kRidge + system.columns(item).softness(system.reg(item));
  const double shift = system.number(item, kShift);
  const double weight = block_total<double>(m, [&](int64_t j) {
    const double b = load(system.b, first + j), sum = system.column_total(item, j, 0);
    const double mass = weighted(b, sum), diagonal = factor * mass;
    const double least = 1e-8 * diagonal, rest = diagonal - system.column_total(item, j, 2);
    const double asked =
        load(system.q, first + j) + shift * mass - weighted(b, system.column_total(item, j, 1));
    store(system.column_sum, first + j, sum);
    store(system.diagonal, first + j, diagonal);
    store(system.preconditioner, first + j, mass > 0 ? 1 / (rest > least ? rest : least) : 0);
    store(system.residual, first + j, mass > 0 ? asked : 0);
    store(system.solution, first + j, 0);
    store(system.best, first + j, 0);
    return diagonal;
  });
  into_range(system, item, weight);
  const double rho = residual_sizes(system, item).first;
  for_block(m, [&](int64_t j) {
    store(system.direction, first + j,
          load(system.residual, first + j) * load(system.preconditioner, first + j));
  });
  if (thread_rank() != 0) return;
  const bool active = system.number(item, kUnsolvable) == 0 && rho > 0;
  system.set(item, kActive, active ? 1 : 0);
  system.set(item, kWeight, weight);
  system.set(item, kFirstRho, rho);
  system.set(item, kRho, rho);
  system.set(item, kBest, kInfinity);
  system.set(item, kSince, 0);
  system.set(item, kIterations, 0);
  if (active) atomic_add(system.active, 0, 1);
}

// An iteration, after the direction was multiplied by the matrix.
template <Metric kMetric, typename T>
FUSEE_DEVICE void iterate(const System<kMetric, T>& system, int64_t item) {
  constexpr double kTolerance = 1e-13, kMost = 5000, kPatience = 300;
  const int64_t m = system.all.m, first = item * m;
  const double weight = system.number(item, kWeight), rho = system.number(item, kRho);
  const double best = system.number(item, kBest);
  double since = system.number(item, kSince) + 1;
  const double iterations = system.number(item, kIterations) + 1;
  const Two along = block_total<Two>(m, [&](int64_t j) {
    const double direction = load(system.direction, first + j);
    const double product = load(system.diagonal, first + j) * direction -
                           weighted(load(system.b, first + j), system.column_total(item, j, 0));
    store(system.product, first + j, product);
    return Two(direction * product, direction * load(system.residual, first + j));
  });
  bool active = along.first > 0;
  double now = rho, size = kInfinity;
  if (active) {
    const double step = along.second / along.first;
    for_block(m, [&](int64_t j) {
      const double more = step * load(system.direction, first + j);
      store(system.solution, first + j, load(system.solution, first + j) + more);
      store(system.residual, first + j,
            load(system.residual, first + j) - step * load(system.product, first + j));
    });
    into_range(system, item, weight);
    const Two sizes = residual_sizes(system, item);
    now = sizes.first;
    size = sizes.second;
    if (size < 0.5 * best) since = 0;
    active = now > kTolerance * kTolerance * system.number(item, kFirstRho) && since < kPatience &&
             iterations < kMost;
    const double turn = now / rho;
    for_block(m, [&](int64_t j) {
      if (size < best) store(system.best, first + j, load(system.solution, first + j));
      const double scaled =
          load(system.residual, first + j) * load(system.preconditioner, first + j);
      store(system.direction, first + j, scaled + turn * load(system.direction, first + j));
    });
  }
  __syncthreads();  // every thread has read the numbers
  if (thread_rank() != 0) return;
  system.set(item, kRho, now);
  system.set(item, kBest, size < best ? size : best);
  system.set(item, kSince, since);
  system.set(item, kIterations, iterations);
  if (active) return;
  system.set(item, kActive, 0);
  atomic_add(system.active, 0, -1);
}

// From the means of the solution in the rows.
template <Metric kMetric, typename T>
FUSEE_DEVICE void finish_rows(const System<kMetric, T>& system, int64_t item) {
  const double share = system.share(item);
  for_block(system.all.n, [&](int64_t i) {
    const int64_t at = item * system.all.n + i;
    const double sum = load(system.row_sum, at);
    const double mean = sum > 0 ? system.row_total(item, i) / sum : 0;
    double u = share * (load(system.asked, at) - mean);
    if (load(system.a, at) == 0 && load(system.p, at) != 0) u = kNaN;
    store(system.u, at, u);
  });
}

// From the sums of u along the columns, which columns without mass take.
template <Metric kMetric, typename T>
FUSEE_DEVICE void finish_columns(const System<kMetric, T>& system, int64_t item) {
  const int64_t n = system.all.n, m = system.all.m;
  const bool nothing = system.number(item, kUnsolvable) != 0;
  const double mass = system.number(item, kMass);
  const double damping = system.columns(item).damping(system.reg(item));
  const double of_v = block_total<double>(m, [&](int64_t j) {
    const int64_t at = item * m + j;
    const double b = load(system.b, at), sum = load(system.column_sum, at);
    double v = load(system.best, at);
    if (!(b > 0)) {
      const double mean = sum > 0 ? system.column_total(item, j, 0) / sum : 0;
      v = load(system.q, at) != 0 ? kNaN : -damping * mean;
    }
    if (nothing) v = kNaN;
    store(system.v, at, v);
    return b > 0 ? weighted(b, sum) * v : 0;
  });
  const double of_u = block_total<double>(n, [&](int64_t i) {
    const int64_t at = item * n + i;
    const double a = load(system.a, at);
    return a > 0 ? a * load(system.row_sum, at) * load(system.u, at) : 0;
  });
  const bool singular = system.singular(item) && mass > 0;
  const double shift = nothing ? kNaN : singular ? (of_u - of_v) / (2 * mass) : 0;
  for_block(
      n, [&](int64_t i) { store(system.u, item * n + i, load(system.u, item * n + i) - shift); });
  for_block(
      m, [&](int64_t j) { store(system.v, item * m + j, load(system.v, item * m + j) + shift); });
}

template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kTileThreads)
    keep_kernel(const Exponentials<kMetric, T> all, int64_t row_tiles, int64_t column_tiles,
                Global<double> kept) {
  const TilePlace place(row_tiles, column_tiles);
  TileElements e;
  all.of(place.item).tile(place.row, place.column, e);
  for (int r = 0; r < kThreadRows; ++r) {
    for (int c = 0; c < kThreadColumns; ++c) {
      const int64_t i = place.row + tile_row(r), j = place.column + tile_column(c);
      if (i < all.n && j < all.m) store(kept, (place.item * all.n + i) * all.m + j, e[r][c]);
    }
  }
}

// The masses, the right side and the diagonal.
template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kTileThreads)
    begin_kernel(const __grid_constant__ System<kMetric, T> system) {
  const int64_t n = system.all.n, m = system.all.m;
  if (blockIdx.x == 0 && thread_rank() == 0) store(system.active, 0, 0);
  pass_along_rows(system, true,
                  [&](int64_t item, int64_t j) { return load(system.b, item * m + j); });
  grid_sync();
  for_each_item(system.batch, [&](int64_t item) { begin_rows(system, item); });
  // E^T a, and the right side.
  for (int which = 0; which < 2; ++which) {
    pass_along_columns(
        system, true, which,
        [&](int64_t item, int64_t i) {
          const double a = load(system.a, item * n + i);
          if (which == 0) return a;
          return weighted(a, system.share(item) * load(system.asked, item * n + i));
        },
        Identity{});
  }
  // The squares on the diagonal.
  pass_along_columns(
      system, true, 2,
      [&](int64_t item, int64_t i) {
        const double a = load(system.a, item * n + i);
        return weighted(a, system.share(item) / load(system.row_sum, item * n + i));
      },
      [&](int64_t item, int64_t j, double e) {
        const double entry = weighted(load(system.b, item * m + j), e);
        return entry * entry;
      });
  grid_sync();
  for_each_item(system.batch, [&](int64_t item) { begin_columns(system, item); });
}

// Conjugate gradients until every problem is solved.
template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kTileThreads, 2)
    iterate_kernel(const __grid_constant__ System<kMetric, T> system) {
  const int64_t n = system.all.n, m = system.all.m;
  while (load(system.active, 0) > 0) {
    pass_along_rows(system, false, [&](int64_t item, int64_t j) {
      return load(system.b, item * m + j) * load(system.direction, item * m + j);
    });
    grid_sync();
    pass_along_columns(
        system, false, 0,
        [&](int64_t item, int64_t i) {
          const double a = load(system.a, item * n + i);
          const double mean = system.row_total(item, i) / load(system.row_sum, item * n + i);
          return weighted(a, system.share(item) * mean);
        },
        Identity{});
    grid_sync();
    for_each_item(system.batch, [&](int64_t item) {
      if (system.number(item, kActive) != 0) iterate(system, item);
    });
  }
}

// The unknowns of the rows, and of columns without mass.
template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kTileThreads, 2)
    finish_kernel(const __grid_constant__ System<kMetric, T> system) {
  const int64_t n = system.all.n, m = system.all.m;
  pass_along_rows(system, true, [&](int64_t item, int64_t j) {
    return load(system.b, item * m + j) * load(system.best, item * m + j);
  });
  grid_sync();
  for_each_item(system.batch, [&](int64_t item) { finish_rows(system, item); });
  pass_along_columns(
      system, true, 0,
      [&](int64_t item, int64_t i) {
        return weighted(load(system.a, item * n + i), load(system.u, item * n + i));
      },
      Identity{});
  grid_sync();
  for_each_item(system.batch, [&](int64_t item) { finish_columns(system, item); });
}

// Whether exponentials are computed once: those of points with many coordinates, where they fit.
bool worth_keeping(const TransportTensors& given) {
  constexpr int64_t kFew = 4, kMost = int64_t{1} << 26;
  return given.d > kFew && given.batch * given.n * given.m <= kMost;
}

template <Metric kMetric, typename T>
Tensor keep(const Context& context, const Exponentials<kMetric, T>& all,
            const TransportTensors& given) {
  const int64_t rows = row_tiles(all.n), columns = column_tiles(all.m);
  Tensor kept = empty(given.a, {given.batch, all.n, all.m}, ScalarType::Double);
  launch(&keep_kernel<kMetric, T>, grid_of_blocks(given.batch * rows * columns), kTileBlock, 0,
         context.stream, all, rows, columns, output<double>(kept));
  return kept;
}

std::tuple<Tensor, Tensor> transport_solve(const Tensor& x, const std::optional<Tensor>& y,
                                           int64_t metric, const Tensor& a, const Tensor& b,
                                           const Tensor& reg, const Tensor& penalty,
                                           const Tensor& f_, const Tensor& g_, const Tensor& p_,
                                           const Tensor& q_) {
  const TransportTensors given(x, y, metric, a, b, reg, penalty);
  const Tensor f = as_contiguous(f_), g = as_contiguous(g_);
  const Tensor p = as_contiguous(p_), q = as_contiguous(q_);
  const Context context(given.x);
  const int64_t batch = given.batch, n = given.n, m = given.m;
  const Cut row_cut = Cut::of(column_tiles(m), row_tiles(n));
  const Cut column_cut = Cut::of(row_tiles(n), column_tiles(m));
  const auto doubles = [&](const Shape& shape) {
    return empty(given.a, shape, ScalarType::Double);
  };
  Tensor u = doubles({batch, n}), v = doubles({batch, m});
  const Tensor row_parts = doubles({batch, row_cut.parts, n}), of_rows = doubles({2, batch, n});
  const Tensor column_parts = doubles({batch, column_cut.parts, kColumnSums, m});
  const Tensor of_columns = doubles({8, batch, m}), numbers = doubles({batch, kNumbers});
  const Tensor active = empty(given.a, {1}, ScalarType::Int);
  const auto vector = [&](const Tensor& all, int64_t which) {
    return output<double>(all) + which * all.size(1) * all.size(2);
  };
  const auto solve = [&]<Metric kMetric, typename T>(const Exponentials<kMetric, T>& all) {
    const System<kMetric, T> system{all,
                                    batch,
                                    row_cut,
                                    column_cut,
                                    input<double>(given.a),
                                    input<double>(given.b),
                                    input<double>(given.penalty),
                                    input<double>(p),
                                    input<double>(q),
                                    output<double>(u),
                                    output<double>(v),
                                    output<double>(row_parts),
                                    vector(of_rows, 0),
                                    vector(of_rows, 1),
                                    output<double>(column_parts),
                                    vector(of_columns, 0),
                                    vector(of_columns, 1),
                                    vector(of_columns, 2),
                                    vector(of_columns, 3),
                                    vector(of_columns, 4),
                                    vector(of_columns, 5),
                                    vector(of_columns, 6),
                                    vector(of_columns, 7),
                                    output<double>(numbers),
                                    output<int32_t>(active)};
    const int64_t work = batch * std::max({row_tiles(n) * row_cut.parts,
                                           column_tiles(m) * column_cut.parts, int64_t{1}});
    for (const auto kernel :
         {&begin_kernel<kMetric, T>, &iterate_kernel<kMetric, T>, &finish_kernel<kMetric, T>}) {
      const int64_t most = cooperative_blocks(kernel, kTileThreads, 0);
      launch_cooperative(kernel, static_cast<unsigned>(std::min(most, work)), kTileBlock, 0,
                         context.stream, system);
    }
  };
  dispatch_costs(given, [&]<typename M, typename T>(M, T) {
    const auto all = exponentials_of<M::value, T>(given, f, g);
    if constexpr (M::value != Metric::kCost) {
      if (worth_keeping(given)) {
        const Tensor kept = keep(context, all, given);
        return solve(Exponentials<Metric::kCost, double>{
            n, m, m, input<double>(kept), {}, all.f, all.g, all.reg, true});
      }
    }
    solve(all);
  });
  return {u, v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("transport_solve", TORCH_BOX(&transport_solve));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
