// Entropic transport in CUDA: annealing, Sinkhorn's iteration and Newton's method on the semi-dual.
//
// All problems go round together. In a round each does what its machine says: it solves the equations of a Newton
// step or not, then goes on to another point, and is judged there. What is done with returns at once. The host
// looks at the problems once in a while.

#include "transport/judgement_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

struct Solution {
  Global<double> value, f, g, error;
  Global<int64_t> iterations;
  Global<double> stages;
};

// The potentials of each problem's last point.
template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kMostThreads, 1)
    give_kernel(Exponentials<kMetric, T> all, Semidual s, Solution out) {
  FUSEE_SHARED(double, scratch, 32);
  constexpr int64_t kNumbers = kStages * kStageNumbers;
  const int64_t item = blockIdx.x, n = s.n, m = s.m;
  const Item p = s.item(item);
  const bool nothing = (p.turn.flags & kUnsolvable) != 0;
  const Annealing& machine = s.machine.data[item];
  const Global<double> f = out.f + item * n, g = out.g + item * m;
  const Exponentials<kMetric, T> own = all.of(item);
  each(kNumbers, [&](int64_t k) {
    store(out.stages, item * kNumbers + k,
          nothing ? 0 : machine.reports[k / kStageNumbers][k % kStageNumbers]);
  });
  if (thread_rank() == 0) store(out.iterations, item, nothing ? int64_t{0} : machine.iterations);
  each(n, [&](int64_t i) {
    const double potential = p.f(p.current, i);
    store(f, i, nothing ? kNaN : potential < kInfinity ? potential : 0);
  });
  each(m, [&](int64_t j) {
    double potential = nothing ? kNaN : load(p.current.g, j);
    if (!nothing && load(p.b, j) == 0) {
      potential =
          -p.last_reg * p.columns.damping(p.last_reg) * log_sum_of_column(own, p, p.current, j);
      if (!(potential < kInfinity)) potential = 0;
    }
    store(g, j, potential);
  });
  if (nothing || !p.rows.balanced() || !p.columns.balanced()) return;
  // A constant goes from one side to the other, so that both have the same mean over their masses.
  const double mass = total(n, scratch, [&](int64_t i) { return load(p.a, i); });
  const double of_f = total(n, scratch, [&](int64_t i) { return load(p.a, i) * load(f, i); });
  const double of_g = total(m, scratch, [&](int64_t j) { return load(p.b, j) * load(g, j); });
  if (!(mass > 0)) return;
  const double shift = (of_f - of_g) / (2 * mass);
  each(n, [&](int64_t i) { store(f, i, load(f, i) - shift); });
  each(m, [&](int64_t j) { store(g, j, load(g, j) + shift); });
}

// The sums of the plan's tiles, in (batch, column tiles, n) and (batch, row tiles, m).
template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kTileThreads)
    sum_plan_kernel(Exponentials<kMetric, T> all, Semidual s, int64_t lines, int64_t tiles,
                    Global<double> row_parts, Global<double> column_parts) {
  const int64_t line = blockIdx.x / tiles, tile = blockIdx.x % tiles, item = line / lines;
  const int64_t row = line % lines * kTileRows, column = tile * kTileColumns;
  const int64_t n = s.n, m = s.m;
  TileElements e;
  all.of(item).tile(row, column, e);
  double b[kThreadColumns], sums[kThreadColumns] = {};
  for (int c = 0; c < kThreadColumns; ++c) {
    const int64_t j = column + tile_column(c);
    b[c] = j < m ? load(s.b, item * m + j) : 0;
  }
  for (int r = 0; r < kThreadRows; ++r) {
    const int64_t i = row + tile_row(r);
    if (i >= n) break;  // whole warps
    const double a = load(s.a, item * n + i);
    double sum = 0;
    for (int c = 0; c < kThreadColumns; ++c) {
      const double entry = weighted(a * b[c], e[r][c]);
      sum += entry;
      sums[c] += entry;
    }
    sum = warp_sum(sum);
    if (threadIdx.x == 0) store(row_parts, (item * tiles + tile) * n + i, sum);
  }
  sum_columns(sums, [&](int c, double sum) {
    if (column + c < m) store(column_parts, line * m + column + c, sum);
  });
}

// The value and the error of the potentials as they are returned.
__global__ void __launch_bounds__(kMostThreads, 1)
    certify_kernel(Semidual s, int64_t lines, int64_t tiles, Global<const double> row_parts,
                   Global<const double> column_parts, Solution out) {
  FUSEE_SHARED(double, scratch, 32);
  const int64_t item = blockIdx.x, n = s.n, m = s.m;
  const Item p = s.item(item);
  double error = 0, mass = 0, value = 0, mass_of_a = 0, mass_of_b = 0;
  each(n, [&](int64_t i) {
    const double a = load(p.a, i), f = load(out.f, item * n + i);
    double sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile)
      sum += load(row_parts, (item * tiles + tile) * n + i);
    const double target = a == 0 ? 0 : a * p.rows.factor(f);
    error += absolute(sum - target);
    mass += sum;
    mass_of_a += a;
    if (a != 0) value += a * p.rows.charge(f);
  });
  each(m, [&](int64_t j) {
    const double b = load(p.b, j), g = load(out.g, item * m + j);
    double sum = 0;
    for (int64_t line = 0; line < lines; ++line)
      sum += load(column_parts, (item * lines + line) * m + j);
    const double target = b == 0 ? 0 : b * p.columns.factor(g);
    error += absolute(sum - target);
    mass_of_b += b;
    if (b != 0) value += b * p.columns.charge(g);
  });
  error = block_sum(error, scratch);
  mass = block_sum(mass, scratch);
  value = block_sum(value, scratch);
  mass_of_a = block_sum(mass_of_a, scratch);
  mass_of_b = block_sum(mass_of_b, scratch);
  if (thread_rank() != 0) return;
  value -= p.last_reg * (mass - mass_of_a * mass_of_b);
  if ((p.turn.flags & kUnsolvable) != 0) value = error = kNaN;
  store(out.value, item, value);
  store(out.error, item, error);
}

// How many problems are not done, and the entries that one of them asks for.
__global__ void __launch_bounds__(kTileThreads)
    look_kernel(Semidual s, Global<int64_t> needed, Global<int64_t> status) {
  FUSEE_SHARED(int64_t, scratch, 32);
  int64_t active = 0;
  each(s.batch, [&](int64_t item) { active += load(s.turn, item).action != Action::kDone; });
  active = block_sum(active, scratch);
  if (thread_rank() != 0) return;
  store(status, 0, active);
  store(status, 1, load(needed, 0));
  store(needed, 0, int64_t{0});
}

// Memory for the length of a call.
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : like_(like) {}

  template <typename T>
  Global<T> take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    tensors_.push_back(empty(like_, {(bytes + 7) / 8}, ScalarType::Double));
    return global(static_cast<T*>(tensors_.back().mutable_data_ptr()), count);
  }

 private:
  Tensor like_;
  std::vector<Tensor> tensors_;
};

// The host's side of the solution of a batch.
template <Metric kMetric, typename T>
class Solver {
  static constexpr int64_t kLarge = int64_t{1} << 20;

 public:
  Solver(const TransportTensors& given, const Exponentials<kMetric, T>& all)
      : context_(given.x),
        like_(given.a),
        work_(given.a),
        all_(all),
        batch_(given.batch),
        n_(given.n),
        m_(given.m),
        lines_(row_tiles(n_)),
        tiles_(column_tiles(m_)),
        threads_(threads_of_item(n_, m_)) {
    const auto doubles = [&](int64_t count) { return work_.template take<double>(count); };
    const int64_t rows = batch_ * n_, columns = batch_ * m_;
    s_.batch = batch_;
    s_.n = n_;
    s_.m = m_;
    s_.a = input<double>(given.a);
    s_.b = input<double>(given.b);
    s_.last_reg = input<double>(given.reg);
    s_.penalty = input<double>(given.penalty);
    s_.machine = work_.template take<Annealing>(batch_);
    s_.turn = work_.template take<Turn>(batch_);
    s_.scale = work_.template take<Scale>(batch_);
    for (Global<double>* array : {&s_.g, &s_.column_mass, &s_.target})
      *array = doubles(2 * columns);
    for (Global<double>* array : {&s_.log_sum, &s_.row_mass}) *array = doubles(2 * rows);
    for (Global<double>* array : {&s_.largest, &s_.share}) *array = doubles(rows);
    s_.weight = doubles(columns);
    // As one problem asks for, so that it has the same bits in any batch.
    s_.row_cut = Cut::of(tiles_, lines_);
    s_.column_cut = Cut::of(lines_, tiles_);
    for (Global<double>* array : {&s_.row_largest, &s_.row_sums})
      *array = doubles(rows * s_.row_cut.parts);
    s_.column_sums = doubles(columns * s_.column_cut.parts);

    schur_.n = n_;
    schur_.m = m_;
    schur_.words = (m_ + 31) / 32;
    schur_.parts = (n_ + kRowsOfPart - 1) / kRowsOfPart;
    schur_.kept = work_.template take<uint32_t>(rows * schur_.words);
    schur_.by_rows.starts = work_.template take<int64_t>(batch_ * (n_ + 1));
    schur_.by_columns.starts = work_.template take<int64_t>(batch_ * (m_ * schur_.parts + 1));
    for (Global<double>* array : {&schur_.row_weight, &schur_.through}) *array = doubles(rows);
    for (Global<double>* array : {&schur_.diagonal, &schur_.preconditioner, &schur_.residual,
                                  &schur_.product, &schur_.search, &schur_.direction})
      *array = doubles(columns);
    schur_.least = doubles(batch_);
    schur_.slope = doubles(batch_);
    schur_.needed = work_.template take<int64_t>(1);
    static_cast<void>(cudaMemsetAsync(schur_.needed.data, 0, sizeof(int64_t), context_.stream));
    // A few large problems have the whole device in turn, others a block each.
    if (n_ * m_ >= kLarge && 8 * batch_ <= multiprocessor_count())
      team_ =
          std::min(multiprocessor_count(), cooperative_blocks(&solve_together_kernel, threads_, 0));
    team_sums_ = doubles(2 * team_);
    // Far more than most problems keep.
    reserve(std::min(n_ * m_, 64 * (n_ + m_)));
  }

  void run(Global<const double> first, double tolerance, int64_t max_iterations) {
    constexpr int kRounds = 6;
    start(first, tolerance, max_iterations);
    Tensor status = empty(like_, {2}, ScalarType::Long);
    while (true) {
      for (int k = 0; k < kRounds; ++k) round();
      launch(&look_kernel, 1, kTileThreads, 0, context_.stream, s_, schur_.needed,
             output<int64_t>(status));
      const Tensor seen =
          torch::stable::to(status, torch::stable::Device(torch::headeronly::DeviceType::CPU));
      if (data<int64_t>(seen)[0] == 0) return;
      if (data<int64_t>(seen)[1] > 0)
        reserve(std::min(n_ * m_, data<int64_t>(seen)[1] + data<int64_t>(seen)[1] / 2));
    }
  }

  void give(const Exponentials<kMetric, T>& given, const Solution& out) {
    launch(&give_kernel<kMetric, T>, Grid(batch()), threads_, 0, context_.stream, all_, s_, out);
    const Global<double> of_rows = work_.template take<double>(batch_ * tiles_ * n_);
    const Global<double> of_columns = work_.template take<double>(batch_ * lines_ * m_);
    launch(&sum_plan_kernel<kMetric, T>, grid_of_blocks(batch_ * lines_ * tiles_), kTileBlock, 0,
           context_.stream, given, s_, lines_, tiles_, of_rows, of_columns);
    launch(&certify_kernel, Grid(batch()), threads_, 0, context_.stream, s_, lines_, tiles_,
           of_rows, of_columns, out);
  }

 private:
  unsigned batch() const { return static_cast<unsigned>(batch_); }

  // Room for so many entries of each problem, in place of what there was.
  void reserve(int64_t capacity) {
    schur_.capacity = capacity;
    entries_ = Workspace(like_);
    for (Entries* entries : {&schur_.by_rows, &schur_.by_columns}) {
      entries->indices = entries_.template take<int32_t>(batch_ * capacity);
      entries->values = entries_.template take<double>(batch_ * capacity);
    }
  }

  void start(Global<const double> first, double tolerance, int64_t max_iterations) {
    const int64_t blocks = lines_ * s_.row_cut.parts;
    const Global<double> lows = work_.template take<double>(batch_ * blocks);
    const Global<double> highs = work_.template take<double>(batch_ * blocks);
    launch(&range_kernel<kMetric, T>, grid_of_blocks(batch_ * blocks), kTileBlock, 0,
           context_.stream, all_, lines_, s_.row_cut, lows, highs);
    launch(&start_kernel, Grid(batch()), threads_, 0, context_.stream, s_, first, tolerance,
           max_iterations, blocks, lows, highs);
  }

  void round() {
    const Stream stream = context_.stream;
    const int64_t of_rows = (n_ + kTileThreads - 1) / kTileThreads;
    const int64_t of_columns = (m_ + kTileThreads - 1) / kTileThreads;
    const int64_t warps = (n_ + schur_.words * schur_.parts + kTileWarps - 1) / kTileWarps;
    launch(&mark_kernel<kMetric, T>, grid_of_blocks(batch_ * lines_ * tiles_), kTileBlock, 0,
           stream, all_, s_, schur_, lines_, tiles_);
    launch(&count_kernel, grid_of_blocks(batch_ * warps), kTileBlock, 0, stream, s_, schur_, warps);
    launch(&scan_kernel, Grid(2 * batch()), threads_, 0, stream, s_, schur_);
    launch(&fill_kernel<kMetric, T>, grid_of_blocks(batch_ * warps), kTileBlock, 0, stream, all_,
           s_, schur_, warps);
    if (team_ > 0) {
      for (int64_t item = 0; item < batch_; ++item)
        launch_cooperative(&solve_together_kernel, Grid(team_), threads_, 0, stream, s_, schur_,
                           team_sums_, item);
    } else {
      launch(&solve_kernel, Grid(batch()), threads_, 0, stream, s_, schur_);
    }
    launch(&propose_kernel<kMetric, T>, grid_of_blocks(batch_ * of_columns), kTileThreads, 0,
           stream, all_, s_, of_columns, schur_.direction);
    launch(&rows_kernel<kMetric, T>, grid_of_blocks(batch_ * lines_ * s_.row_cut.parts), kTileBlock,
           0, stream, all_, s_, lines_);
    launch(&fold_rows_kernel, grid_of_blocks(batch_ * of_rows), kTileThreads, 0, stream, s_,
           of_rows);
    launch(&columns_kernel<kMetric, T>, grid_of_blocks(batch_ * tiles_ * s_.column_cut.parts),
           kTileBlock, 0, stream, all_, s_, tiles_);
    launch(&judge_kernel<kMetric, T>, Grid(batch()), threads_, 0, stream, all_, s_, schur_);
  }

  Context context_;
  Tensor like_;
  Workspace work_, entries_{like_};
  Exponentials<kMetric, T> all_;
  int64_t batch_, n_, m_, lines_, tiles_;
  int threads_, team_ = 0;
  Global<double> team_sums_;
  Semidual s_{};
  Schur schur_{};
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_newton(
    const Tensor& x, const std::optional<Tensor>& y, int64_t metric, const Tensor& a,
    const Tensor& b, const Tensor& reg, const Tensor& penalty, const std::optional<Tensor>& g_init,
    double tol, int64_t max_iter) {
  const TransportTensors given(x, y, metric, a, b, reg, penalty);
  const std::optional<Tensor> first = as_contiguous(g_init);
  auto [value, f, g, error, n_iter, stages] = empty_solution(given);
  const Solution out{output<double>(value), output<double>(f),       output<double>(g),
                     output<double>(error), output<int64_t>(n_iter), output<double>(stages)};
  if (given.batch > 0) {
    dispatch_costs(given, [&]<typename M, typename T>(M, T) {
      const auto all = exponentials_of<M::value, T>(given, f, g);
      Solver<M::value, T> solver(given, all);
      solver.run(input<double>(first), tol, max_iter);
      solver.give(all, out);
    });
  }
  return {value, f, g, error, n_iter, stages};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("sinkhorn_newton", TORCH_BOX(&sinkhorn_newton));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
