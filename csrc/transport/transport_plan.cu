// The plan of given potentials in CUDA, and what gradients need of it.
//
// Sums over rows and columns are taken tile by tile; what the tiles, or parts of a line of them, leave is
// added in order by a second launch.

#include "transport/exponentials_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kTileThreads)
    plan_kernel(Exponentials<kMetric, T> all, int64_t row_tiles, int64_t column_tiles,
                Global<const double> a, Global<const double> b, Global<T> plan) {
  const TilePlace place(row_tiles, column_tiles);
  TileElements e;
  all.of(place.item).tile(place.row, place.column, e);
  for (int r = 0; r < kThreadRows; ++r) {
    const int64_t i = place.row + tile_row(r);
    if (i >= all.n) continue;
    const double of_row = load(a, place.item * all.n + i);
    for (int c = 0; c < kThreadColumns; ++c) {
      const int64_t j = place.column + tile_column(c);
      if (j >= all.m) continue;
      const double mass = of_row * load(b, place.item * all.m + j);
      store(plan, (place.item * all.n + i) * all.m + j, static_cast<T>(weighted(mass, e[r][c])));
    }
  }
}

// What the rows, or the columns, bring along: their masses and the factors of their gradients.
struct Factors {
  Global<const double> mass, left;

  FUSEE_DEVICE Factors of(int64_t begin) const { return {mass + begin, left + begin}; }
};

// Costs: the gradient of a tile, and its sums, in (batch, column tiles, n) and (batch, row tiles, m).
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    cost_gradient_kernel(Exponentials<Metric::kCost, T> all, int64_t row_tiles,
                         int64_t column_tiles, Factors rows, Factors columns, Global<T> grad,
                         Global<double> row_parts, Global<double> column_parts) {
  const TilePlace place(row_tiles, column_tiles);
  const int64_t n = all.n, m = all.m;
  const Factors from = rows.of(place.item * n), to = columns.of(place.item * m);
  TileElements e;
  all.of(place.item).tile(place.row, place.column, e);
  double of_columns[kThreadColumns] = {}, b[kThreadColumns] = {}, right[kThreadColumns] = {};
  for (int c = 0; c < kThreadColumns; ++c) {
    const int64_t j = place.column + tile_column(c);
    if (j >= m) continue;
    b[c] = load(to.mass, j);
    right[c] = load(to.left, j);
  }
  for (int r = 0; r < kThreadRows; ++r) {
    const int64_t i = place.row + tile_row(r);
    if (i >= n) break;  // whole warps
    const double a = load(from.mass, i), left = load(from.left, i);
    double sum = 0;
    for (int c = 0; c < kThreadColumns; ++c) {
      const int64_t j = place.column + tile_column(c);
      if (j >= m) continue;
      const double of_row = weighted(b[c], e[r][c]);
      sum += of_row * right[c];
      of_columns[c] += weighted(a, e[r][c]) * left;
      store(grad, (place.item * n + i) * m + j,
            static_cast<T>(weighted(a, of_row * (left + right[c]))));
    }
    sum = warp_sum(sum);
    if (threadIdx.x == 0)
      store(row_parts, (place.item * column_tiles + place.column_tile) * n + i, sum);
  }
  sum_columns(of_columns, [&](int column, double sum) {
    const int64_t j = place.column + column;
    if (j < m) store(column_parts, (place.item * row_tiles + place.row_tile) * m + j, sum);
  });
}

// A term of the gradient in a point, but for the factor of the squared distance.
template <Metric kMetric>
FUSEE_DEVICE double coordinate_gradient(double weight, double from, double to) {
  if constexpr (kMetric == Metric::kDot) {
    return -(weight * to);
  } else if constexpr (kMetric == Metric::kCityblock) {
    return from > to ? weight : from < to ? -weight : 0.0;
  } else {
    return weight * (from - to);
  }
}

// Points: the gradients, in (batch, parts, d, n), and the sums, in (batch, parts, n), of one side, its points
// as rows. A block takes a part of a line of tiles.
template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kTileThreads, 3)
    point_gradient_kernel(Exponentials<kMetric, T> all, int64_t row_tiles, Cut cut, Factors rows,
                          Factors columns, Global<double> grad_parts, Global<double> row_parts) {
  constexpr int kOwn = kDepth / kTileWarps;
  static_assert(kTileRows == 32, "a row for each lane");
  FUSEE_SHARED(double, weights, kTileRows* kColumnPitch);
  FUSEE_SHARED(double, from, kDepth* kRowPitch);
  FUSEE_SHARED(double, to, kDepth* kColumnPitch);
  const int64_t n = all.n, m = all.m, d = all.d;
  const int64_t part = blockIdx.x % cut.parts, line = blockIdx.x / cut.parts;
  const int64_t item = line / row_tiles, row = line % row_tiles * kTileRows;
  const Exponentials<kMetric, T> own = all.of(item);
  const Factors of_rows = rows.of(item * n), of_columns = columns.of(item * m);
  const Global<double> grad = grad_parts + (item * cut.parts + part) * d * n;
  double sums[kThreadRows] = {};
  for (int64_t tile = cut.begin(part); tile < cut.end(part); ++tile) {
    const int64_t column = tile * kTileColumns;
    TileElements costs, e;
    own.costs(row, column, costs);
    for (int r = 0; r < kThreadRows; ++r)
      for (int c = 0; c < kThreadColumns; ++c) e[r][c] = costs[r][c];
    own.exponentiate(row, column, e);
    __syncthreads();  // the weights of the tile before are no longer read
    for (int c = 0; c < kThreadColumns; ++c) {
      const int64_t j = column + tile_column(c);
      const double b = j < m ? load(of_columns.mass, j) : 0;
      const double right = j < m ? load(of_columns.left, j) : 0;
      for (int r = 0; r < kThreadRows; ++r) {
        const int64_t i = row + tile_row(r);
        const double a = i < n ? load(of_rows.mass, i) : 0;
        const double left = i < n ? load(of_rows.left, i) : 0;
        const double of_row = weighted(b, e[r][c]);
        sums[r] += of_row * right;
        double weight = weighted(a, of_row * (left + right));
        if constexpr (kMetric == Metric::kEuclidean)
          weight = costs[r][c] > 0 ? weight / costs[r][c] : 0;
        weights.store(tile_row(r) * kColumnPitch + tile_column(c), weight);
      }
    }
    const int columns_here =
        m - column < kTileColumns ? static_cast<int>(m - column) : kTileColumns;
    const int64_t i = row + threadIdx.x;
    for (int64_t first = 0; first < d; first += kDepth) {
      const int depth = d - first < kDepth ? static_cast<int>(d - first) : kDepth;
      __syncthreads();
      stage_points<kTileRows>(own.x, n, d, row, first, depth, from);
      stage_points<kTileColumns>(own.y, m, d, column, first, depth, to);
      __syncthreads();
      double totals[kOwn] = {}, here[kOwn] = {};
      for (int q = 0; q < kOwn; ++q) {
        const int k = static_cast<int>(threadIdx.y) + q * kTileWarps;
        if (k < depth) here[q] = from.load(k * kRowPitch + threadIdx.x);
      }
      for (int j = 0; j < columns_here; ++j) {
        const double weight = weights.load(threadIdx.x * kColumnPitch + j);
        for (int q = 0; q < kOwn; ++q) {
          const int k = static_cast<int>(threadIdx.y) + q * kTileWarps;
          if (k < depth)
            totals[q] +=
                coordinate_gradient<kMetric>(weight, here[q], to.load(k * kColumnPitch + j));
        }
      }
      for (int q = 0; q < kOwn; ++q) {
        const int k = static_cast<int>(threadIdx.y) + q * kTileWarps;
        if (k >= depth || i >= n) continue;
        // The thread that stores an element here adds to it in the next tile.
        const int64_t at = (first + k) * n + i;
        store(grad, at, tile == cut.begin(part) ? totals[q] : load(grad, at) + totals[q]);
      }
    }
  }
  for (int r = 0; r < kThreadRows; ++r) {
    const double sum = warp_sum(sums[r]);
    const int64_t i = row + tile_row(r);
    if (threadIdx.x == 0 && i < n) store(row_parts, (item * cut.parts + part) * n + i, sum);
  }
}

// out (batch, n, d) = scale times the sum of parts (batch, count, d, n) in order.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    add_parts_kernel(Global<const double> parts, int64_t count, int64_t n, int64_t d, double scale,
                     int64_t size, Global<T> out) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  if (index >= size) return;
  const int64_t item = index / (n * d), at = index % (n * d);
  double sum = 0;
  for (int64_t part = 0; part < count; ++part)
    sum += load(parts, (item * count + part) * n * d + at);
  store(out, item * n * d + at % n * d + at / n, static_cast<T>(scale * sum));
}

template <typename T>
void add_parts(const Context& context, const Tensor& parts, int64_t d, double scale,
               const Tensor& out) {
  const int64_t size = out.numel(), n = parts.size(parts.dim() - 1);
  launch(&add_parts_kernel<T>, grid_of_blocks((size + kTileThreads - 1) / kTileThreads),
         kTileThreads, 0, context.stream, input<double>(parts), parts.size(1), n, d, scale, size,
         output<T>(out));
}

Tensor transport_plan(const Tensor& x, const std::optional<Tensor>& y, int64_t metric,
                      const Tensor& a, const Tensor& b, const Tensor& reg, const Tensor& f_,
                      const Tensor& g_) {
  const TransportTensors given(x, y, metric, a, b, reg, std::nullopt);
  const Tensor f = as_contiguous(f_), g = as_contiguous(g_);
  const Context context(given.x);
  Tensor plan = empty(given.x, {given.batch, given.n, given.m}, given.x.scalar_type());
  const int64_t rows = row_tiles(given.n), columns = column_tiles(given.m);
  dispatch_costs(given, [&]<typename M, typename T>(M, T) {
    launch(&plan_kernel<M::value, T>, grid_of_blocks(given.batch * rows * columns), kTileBlock, 0,
           context.stream, exponentials_of<M::value, T>(given, f, g), rows, columns,
           input<double>(given.a), input<double>(given.b), output<T>(plan));
  });
  return plan;
}

template <Metric kMetric, typename T>
void gradient_of_points(const Context& context, const Exponentials<kMetric, T>& all, int64_t batch,
                        const Factors& rows, const Factors& columns, const Tensor& grad,
                        const Tensor& sums) {
  const int64_t lines = row_tiles(all.n);
  const Cut cut = Cut::of(column_tiles(all.m), lines);
  const Tensor grad_parts = empty(sums, {batch, cut.parts, all.d, all.n}, ScalarType::Double);
  const Tensor row_parts = empty(sums, {batch, cut.parts, all.n}, ScalarType::Double);
  launch(&point_gradient_kernel<kMetric, T>, grid_of_blocks(batch * lines * cut.parts), kTileBlock,
         0, context.stream, all, lines, cut, rows, columns, output<double>(grad_parts),
         output<double>(row_parts));
  add_parts<T>(context, grad_parts, all.d, kMetric == Metric::kSqEuclidean ? 2.0 : 1.0, grad);
  add_parts<double>(context, row_parts, 1, 1.0, sums);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> transport_plan_gradient(
    const Tensor& x, const std::optional<Tensor>& y, int64_t metric, const Tensor& a,
    const Tensor& b, const Tensor& reg, const Tensor& f_, const Tensor& g_, const Tensor& left_,
    const Tensor& right_) {
  const TransportTensors given(x, y, metric, a, b, reg, std::nullopt);
  const Tensor f = as_contiguous(f_), g = as_contiguous(g_);
  const Tensor left = as_contiguous(left_), right = as_contiguous(right_);
  const Context context(given.x);
  const int64_t batch = given.batch, n = given.n, m = given.m;
  auto [grad_x, grad_y, row_sums, column_sums] = empty_gradient(given);
  const Factors rows{input<double>(given.a), input<double>(left)};
  const Factors columns{input<double>(given.b), input<double>(right)};
  dispatch_costs(given, [&]<typename M, typename T>(M, T) {
    const auto all = exponentials_of<M::value, T>(given, f, g);
    if constexpr (M::value == Metric::kCost) {
      const int64_t lines = row_tiles(n), tiles = column_tiles(m);
      const Tensor row_parts = empty(given.a, {batch, tiles, n}, ScalarType::Double);
      const Tensor column_parts = empty(given.a, {batch, lines, m}, ScalarType::Double);
      launch(&cost_gradient_kernel<T>, grid_of_blocks(batch * lines * tiles), kTileBlock, 0,
             context.stream, all, lines, tiles, rows, columns, output<T>(grad_x),
             output<double>(row_parts), output<double>(column_parts));
      add_parts<double>(context, row_parts, 1, 1.0, row_sums);
      add_parts<double>(context, column_parts, 1, 1.0, column_sums);
    } else {
      gradient_of_points(context, all, batch, rows, columns, grad_x, row_sums);
      gradient_of_points(context, all.transposed(), batch, columns, rows, grad_y, column_sums);
    }
  });
  return {grad_x, grad_y, row_sums, column_sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("transport_plan", TORCH_BOX(&transport_plan));
  m.impl("transport_plan_gradient", TORCH_BOX(&transport_plan_gradient));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
