// The matrix of a Newton step in CUDA, with the small entries of the plan left out.
//
// One pass over the costs marks what is kept, a bit for each entry; the entries are then written both row by row
// and column by column, so that products in either direction are sums in order.
#pragma once

#include "transport/semidual_cuda.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// Rows that one warp takes when it goes down 32 columns.
constexpr int64_t kRowsOfPart = 128;

// The entries of a problem in order of its rows, or of its columns: of each, where they begin, and where the end.
struct Entries {
  Global<int64_t> starts;
  Global<int32_t> indices;
  Global<double> values;
};

struct Schur {
  int64_t n, m, words, parts, capacity;
  Global<double> least;   // of each problem, what a kept entry has at least of its column's mass
  Global<uint32_t> kept;  // (batch, n, words): the bits of 32 columns each
  Entries by_rows, by_columns;         // starts (batch, n + 1) and (batch, m * parts + 1)
  Global<double> row_weight, through;  // (batch, n)
  Global<double> diagonal, preconditioner, residual, product;  // (batch, m)
  Global<double> search, direction, slope;
  Global<int64_t> needed;  // the most entries that a problem has, where they are more than capacity

  FUSEE_DEVICE Entries rows(int64_t item) const { return of(by_rows, item, n + 1); }
  FUSEE_DEVICE Entries columns(int64_t item) const { return of(by_columns, item, m * parts + 1); }
  FUSEE_DEVICE bool fits(int64_t item) const { return load(rows(item).starts, n) <= capacity; }

 private:
  FUSEE_DEVICE Entries of(const Entries& all, int64_t item, int64_t starts) const {
    return {all.starts + item * starts, all.indices + item * capacity,
            all.values + item * capacity};
  }
};

FUSEE_DEVICE bool wants_newton(const Semidual& s, int64_t item) {
  return load(s.turn, item).action == Action::kNewton;
}

// The log of a row's part of the plan relative to the exponents of its terms.
FUSEE_DEVICE double log_scale(const Point& at, int64_t i) {
  const double mass = load(at.row_mass, i);
  return mass > 0 ? log(mass) - load(at.log_sum, i) : -kInfinity;
}

// Marks the entries of a tile that are more than `least` of their column's mass.
template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kTileThreads)
    mark_kernel(Exponentials<kMetric, T> all, Semidual s, Schur schur, int64_t lines,
                int64_t tiles) {
  const int64_t line = blockIdx.x / tiles, column = blockIdx.x % tiles * kTileColumns;
  const int64_t item = line / lines, row = line % lines * kTileRows;
  if (!wants_newton(s, item)) return;
  const Item p = s.item(item);
  const double inverse = 1 / p.reg, least = load(schur.least, item);
  TileElements e;
  all.of(item).costs(row, column, e);
  double offset[kThreadColumns];
  for (int c = 0; c < kThreadColumns; ++c) {
    const int64_t j = column + tile_column(c);
    const double mass = j < s.m ? load(p.current.column_mass, j) : 0;
    offset[c] = mass > 0 ? load(s.weight, item * s.m + j) - log(mass * least) : -kInfinity;
  }
  for (int r = 0; r < kThreadRows; ++r) {
    const int64_t i = row + tile_row(r);
    if (i >= s.n) break;  // whole warps
    const double scale = log_scale(p.current, i);
    for (int c = 0; c < kThreadColumns; ++c) {
      const bool keep = offset[c] - e[r][c] * inverse + scale > 0;
      const uint32_t bits = __ballot_sync(full_mask, keep);
      const int64_t word = column / 32 + c;
      if (threadIdx.x == 0 && word < schur.words)
        store(schur.kept, (item * s.n + i) * schur.words + word, bits);
    }
  }
}

// Calls row(item, i) for a warp for each row, and column(item, j, part, first row, end) for a thread for each
// column's part.
template <typename Row, typename Column>
FUSEE_DEVICE void for_lines(const Semidual& s, const Schur& schur, int64_t warps, const Row& row,
                            const Column& column) {
  const int64_t item = blockIdx.x / warps;
  const int64_t line = blockIdx.x % warps * kTileWarps + threadIdx.y;
  if (!wants_newton(s, item)) return;
  if (line < s.n) {
    row(item, line);
  } else if (line - s.n < schur.words * schur.parts) {
    const int64_t word = (line - s.n) / schur.parts, part = (line - s.n) % schur.parts;
    const int64_t end = (part + 1) * kRowsOfPart;
    column(item, word * 32 + threadIdx.x, part, part * kRowsOfPart, end < s.n ? end : s.n);
  }
}

FUSEE_DEVICE bool is_kept(const Schur& schur, int64_t item, int64_t i, int64_t j) {
  return (load(schur.kept, (item * schur.n + i) * schur.words + j / 32) >> (j % 32) & 1) != 0;
}

// How many entries each row and each part of a column has, one place further on.
static __global__ void __launch_bounds__(kTileThreads)
    count_kernel(Semidual s, Schur schur, int64_t warps) {
  for_lines(
      s, schur, warps,
      [&](int64_t item, int64_t i) {
        int64_t count = 0;
        for (int64_t word = threadIdx.x; word < schur.words; word += 32)
          count += __popc(load(schur.kept, (item * s.n + i) * schur.words + word));
        count = warp_sum(count);
        if (threadIdx.x == 0) store(schur.rows(item).starts, i + 1, count);
      },
      [&](int64_t item, int64_t j, int64_t part, int64_t first, int64_t end) {
        int64_t count = 0;
        for (int64_t i = first; i < end; ++i) count += is_kept(schur, item, i, j);
        if (j < s.m) store(schur.columns(item).starts, j * schur.parts + part + 1, count);
      });
}

// Counts to where the entries begin: a block for each problem's rows, and one for its columns.
static __global__ void __launch_bounds__(kMostThreads, 1) scan_kernel(Semidual s, Schur schur) {
  FUSEE_SHARED(int64_t, sums, kMostThreads);
  const int64_t item = blockIdx.x / 2;
  if (!wants_newton(s, item)) return;
  const bool of_rows = blockIdx.x % 2 == 0;
  const Global<int64_t> starts = (of_rows ? schur.rows(item) : schur.columns(item)).starts + 1;
  const int64_t count = of_rows ? s.n : s.m * schur.parts;
  const int64_t own = (count + thread_count() - 1) / thread_count();
  const int64_t first = own * thread_rank(), end = first + own < count ? first + own : count;
  int64_t sum = 0;
  for (int64_t k = first; k < end; ++k) sum += load(starts, k);
  sums.store(thread_rank(), sum);
  __syncthreads();
  int64_t before = 0;
  for (int distance = 1; distance < thread_count(); distance *= 2) {
    const int64_t other = thread_rank() >= distance ? sums.load(thread_rank() - distance) : 0;
    __syncthreads();
    before += other;
    sums.store(thread_rank(), before + sum);
    __syncthreads();
  }
  for (int64_t k = first; k < end; ++k) {
    before += load(starts, k);
    store(starts, k, before);
  }
  if (thread_rank() != 0) return;
  store(of_rows ? schur.rows(item).starts : schur.columns(item).starts, 0, int64_t{0});
  const int64_t all = sums.load(thread_count() - 1);
  if (of_rows && all > schur.capacity) atomic_max(schur.needed, 0, all);
}

// Writes the marked entries where they belong.
template <Metric kMetric, typename T>
__global__ void __launch_bounds__(kTileThreads)
    fill_kernel(Exponentials<kMetric, T> all, Semidual s, Schur schur, int64_t warps) {
  const auto value = [&](const Item& p, int64_t item, int64_t i, int64_t j) {
    const double cost = cost_of_pair(all.of(item), i, j);
    return exp_in_range(load(s.weight, item * s.m + j) - cost / p.reg + log_scale(p.current, i));
  };
  for_lines(
      s, schur, warps,
      [&](int64_t item, int64_t i) {
        if (!schur.fits(item)) return;
        const Item p = s.item(item);
        const Entries out = schur.rows(item);
        int64_t at = load(out.starts, i);
        for (int64_t word = 0; word < schur.words; ++word) {
          const uint32_t bits = load(schur.kept, (item * s.n + i) * schur.words + word);
          if ((bits >> threadIdx.x & 1) != 0) {
            const int64_t mine = at + __popc(bits & ((1u << threadIdx.x) - 1));
            const int64_t j = word * 32 + threadIdx.x;
            store(out.indices, mine, static_cast<int32_t>(j));
            store(out.values, mine, value(p, item, i, j));
          }
          at += __popc(bits);
        }
      },
      [&](int64_t item, int64_t j, int64_t part, int64_t first, int64_t end) {
        if (!schur.fits(item) || j >= s.m) return;
        const Item p = s.item(item);
        const Entries out = schur.columns(item);
        int64_t at = load(out.starts, j * schur.parts + part);
        for (int64_t i = first; i < end; ++i) {
          if (!is_kept(schur, item, i, j)) continue;
          store(out.indices, at, static_cast<int32_t>(i));
          store(out.values, at, value(p, item, i, j));
          ++at;
        }
      });
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
