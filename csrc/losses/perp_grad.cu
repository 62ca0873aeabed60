// PerpGrad in CUDA: all tensors in two launches, one that sums and one that rewrites.
//
// The table of tensors travels as a kernel argument, not through device memory: nothing is copied from
// the host, and a captured CUDA graph keeps its own table. A team of threads, a warp for short units
// and a block for others, works on one range of a unit. How units are cut depends on their lengths
// alone, and no sum is atomic, so the result does not depend on the device.

#include "losses/perp_grad.h"

#include "core/cuda/kernel.h"
#include "core/cuda/torch_stream.h"
#include "losses/perp_grad_pairs.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Up to this many elements a warp takes a whole unit; a block takes kRangeElements at least.
constexpr int64_t kWarpElements = 1024;
constexpr int64_t kRangeElements = 16384;
// Every block that rewrites a unit adds up the sums of all the unit's ranges, so there must be few.
constexpr int64_t kMaxRanges = 512;

struct Entry {
  const void* weight;
  void* grad;
  int64_t rows, length;
  int64_t first_unit;
  int64_t first_slot;
  int32_t first_block;
  int16_t ranges;  // of each row; 0: each row by a warp
  int16_t type;
};

// A launch takes 32 KB of arguments, but is quicker with few.
constexpr int kSmallTable = 64, kLargeTable = 576;

template <int kCapacity>
struct Table {
  int32_t count;
  int32_t blocks;
  int64_t slots;
  Entry entries[kCapacity];

  // The entry that a block works on: the last whose first block is not beyond it.
  FUSEE_DEVICE int find(int block) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (entries[middle].first_block <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

static_assert(sizeof(Table<kLargeTable>) + 64 <= 32764, "what a launch takes");

// The part of the work that a thread takes part in.
struct Team {
  int64_t row;         // of the entry
  int64_t begin, end;  // within the row; empty for a warp without a row
  int64_t row_slot;    // where the sums of the row's ranges are kept
  int range, ranges;
  bool warp;  // whether the team is a warp, not the block
  int rank, size;

  FUSEE_DEVICE Team(const Entry& entry, int block) {
    const int local = block - entry.first_block;
    warp = entry.ranges == 0;
    if (warp) {
      row = static_cast<int64_t>(local) * kWarps + (thread_rank() >> 5);
      begin = 0;
      end = row < entry.rows ? entry.length : 0;
      range = 0;
      ranges = 1;
      rank = thread_rank() & 31;
      size = 32;
    } else {
      ranges = entry.ranges;
      row = local / ranges;
      range = local % ranges;
      // Ranges of equal size, in whole pieces of 64 elements, so that all begin on the same alignment.
      const int64_t share = ((entry.length + ranges - 1) / ranges + 63) / 64 * 64;
      begin = range * share < entry.length ? range * share : entry.length;
      end = begin + share < entry.length ? begin + share : entry.length;
      rank = thread_rank();
      size = kThreads;
    }
    row_slot = entry.first_slot + row * ranges;
  }

  FUSEE_DEVICE Dots sum(const Dots& dots, const Shared<double>& scratch) const {
    if (warp) return {warp_sum(dots.ww), warp_sum(dots.wg), warp_sum(dots.gg)};
    return {block_sum(dots.ww, scratch), block_sum(dots.wg, scratch), block_sum(dots.gg, scratch)};
  }
};

// The dot products of a few elements. Floats are multiplied and added with their rounding errors carried
// along, which gives about the precision of double at the speed of float, and first scaled by powers
// of two, so that neither tiny gradients vanish nor large ones overflow when squared.
template <int M>
FUSEE_DEVICE Dots few_dots(const double (&w)[M], const double (&g)[M]) {
  Dots dots;
  for (int i = 0; i < M; ++i) {
    dots.ww += w[i] * w[i];
    dots.wg += w[i] * g[i];
    dots.gg += g[i] * g[i];
  }
  return dots;
}

class CompensatedDot {
 public:
  FUSEE_DEVICE void add(float a, float b) {
    const float product = __fmul_rn(a, b);
    const float lost = __fmaf_rn(a, b, -product);
    const float sum = __fadd_rn(sum_, product);
    const float part = sum - sum_;
    error_ += (sum_ - (sum - part)) + (product - part) + lost;
    sum_ = sum;
  }
  FUSEE_DEVICE double value() const {
    return static_cast<double>(sum_) + static_cast<double>(error_);
  }

 private:
  float sum_ = 0, error_ = 0;
};

// Brings values of this magnitude to about one; an infinity or a NaN keeps its kind.
struct PowerOfTwo {
  int32_t exponent;

  explicit FUSEE_DEVICE PowerOfTwo(float magnitude) {
    const int32_t biased = bit_cast<int32_t>(magnitude) >> 23;
    exponent = biased < 1 ? 126 : biased > 253 ? -126 : 127 - biased;
  }
  FUSEE_DEVICE float value() const { return bit_cast<float>((exponent + 127) << 23); }
};

FUSEE_DEVICE double inverse_power(int32_t exponent) {
  return bit_cast<double>(static_cast<int64_t>(1023 - exponent) << 52);
}

template <int M>
FUSEE_DEVICE Dots few_dots(const float (&w)[M], const float (&g)[M]) {
  float largest_w = 0, largest_g = 0;
  for (int i = 0; i < M; ++i) {
    largest_w = fmaxf(largest_w, fabsf(w[i]));
    largest_g = fmaxf(largest_g, fabsf(g[i]));
  }
  const PowerOfTwo scale_w(largest_w), scale_g(largest_g);
  const float by_w = scale_w.value(), by_g = scale_g.value();
  CompensatedDot ww, wg, gg;
  for (int i = 0; i < M; ++i) {
    const float a = w[i] * by_w, b = g[i] * by_g;
    ww.add(a, a);
    wg.add(a, b);
    gg.add(b, b);
  }
  return {ww.value() * inverse_power(2 * scale_w.exponent),
          wg.value() * inverse_power(scale_w.exponent + scale_g.exponent),
          gg.value() * inverse_power(2 * scale_g.exponent)};
}

// The team's sums over [begin, end) in accesses of N elements, 16 elements a thread in flight.
template <int N, typename T>
FUSEE_DEVICE Dots range_dots(const Team& team, Global<const T> w, Global<const T> g, int64_t begin,
                             int64_t end) {
  using A = accumulate_t<T>;
  constexpr int kElements = 16;
  Dots dots;
  for (int64_t base = begin + team.rank * N; base < end;
       base += static_cast<int64_t>(team.size) * kElements) {
    A a[kElements], b[kElements];
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int k = 0; k < kElements; k += N) {
      const int64_t index = base + static_cast<int64_t>(team.size) * k;
      Vector<T, N> x{}, y{};
      if (index < end) {
        x = load<N>(w, index);
        y = load<N>(g, index);
      }
      for (int i = 0; i < N; ++i) {
        a[k + i] = static_cast<A>(x[i]);
        b[k + i] = static_cast<A>(y[i]);
      }
    }
    dots = dots + few_dots(a, b);
  }
  return dots;
}

// The same over any range: vectors where both tensors are aligned, single elements around them.
template <typename T>
FUSEE_DEVICE Dots team_dots(const Team& team, Global<const T> w, Global<const T> g) {
  constexpr int N = vector_width<T>;
  if (!same_alignment<N>(w, g)) return range_dots<1>(team, w, g, team.begin, team.end);
  const auto address = reinterpret_cast<uintptr_t>(g.data + team.begin) / sizeof(T);
  const int64_t head = team.begin + static_cast<int64_t>((N - (address & (N - 1))) & (N - 1));
  const int64_t body = head < team.end ? head : team.end;
  const int64_t tail = body + (team.end - body) / N * N;
  Dots dots = range_dots<N>(team, w, g, body, tail);
  if (body != team.begin) dots = dots + range_dots<1>(team, w, g, team.begin, body);
  if (tail != team.end) dots = dots + range_dots<1>(team, w, g, tail, team.end);
  return dots;
}

template <typename A, typename T, typename Change>
FUSEE_DEVICE void team_rewrite(const Team& team, Global<const T> w, Global<T> g,
                               const Change& change) {
  constexpr int N = vector_width<T>;
  auto scalar = [&](int64_t i) {
    store(g, i, static_cast<T>(static_cast<accumulate_t<T>>(
                  change(static_cast<A>(load(w, i)), static_cast<A>(load(g, i))))));
  };
  auto vector = [&](int64_t i) {
    const Vector<T, N> x = load<N>(w, i);
    Vector<T, N> y = load<N>(g, i);
    for (int k = 0; k < N; ++k)
      y[k] = static_cast<T>(
          static_cast<accumulate_t<T>>(change(static_cast<A>(x[k]), static_cast<A>(y[k]))));
    store(g, i, y);
  };
  if (same_alignment<N>(w, g)) {
    for_each_vector<N>(g, team.begin, team.end, team.rank, team.size, vector, scalar);
  } else {
    for_each_vector<1>(g, team.begin, team.end, team.rank, team.size, vector, scalar);
  }
}

// The team's row of one of the entry's two tensors.
template <typename T, typename Void>
FUSEE_DEVICE Global<T> row_of(Void* memory, const Entry& entry, const Team& team) {
  Global<T> all{static_cast<T*>(memory)};
#if defined(FUSEE_EMULATED)
  all.size = entry.rows * entry.length;
#endif
  return all + team.row * entry.length;
}

// Calls f with a value of the entry's type; the whole block takes the same branch.
template <typename F>
FUSEE_DEVICE void by_type(const Entry& entry, const F& f) {
  switch (static_cast<ScalarType>(entry.type)) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(Half{});
    default:
      return f(BFloat16{});
  }
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const __grid_constant__ Table<kCapacity> table, Global<double> sums) {
  FUSEE_SHARED(double, scratch, 32);
  const int block = static_cast<int>(blockIdx.x);
  const Entry& entry = table.entries[table.find(block)];
  const Team team(entry, block);
  by_type(entry, [&]<typename T>(T) {
    Dots dots;
    if (team.begin < team.end)
      dots = team_dots<T>(team, row_of<const T>(entry.weight, entry, team),
                          row_of<const T>(entry.grad, entry, team));
    dots = team.sum(dots, scratch);
    if (team.rank != 0 || team.row >= entry.rows) return;
    const int64_t slot = team.row_slot + team.range;
    store(sums, slot, dots.ww);
    store(sums, table.slots + slot, dots.wg);
    store(sums, 2 * table.slots + slot, dots.gg);
  });
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    project_kernel(const __grid_constant__ Table<kCapacity> table, Global<const double> sums,
                   Global<bool> degenerate, bool rescale, double threshold) {
  FUSEE_SHARED(double, scratch, 32);
  const int block = static_cast<int>(blockIdx.x);
  const Entry& entry = table.entries[table.find(block)];
  const Team team(entry, block);
  Dots dots;
  if (team.row < entry.rows) {
    for (int i = team.rank; i < team.ranges; i += team.size) {
      const int64_t slot = team.row_slot + i;
      dots = dots + Dots{load(sums, slot), load(sums, table.slots + slot),
                         load(sums, 2 * table.slots + slot)};
    }
  }
  dots = team.sum(dots, scratch);
  if (team.row >= entry.rows) return;

  by_type(entry, [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const double ratio = degenerate_ratio<T>(threshold);
    const Projection projection = Projection::from(dots, rescale, ratio);
    if (team.rank == 0 && team.begin == 0)
      store(degenerate, entry.first_unit + team.row, projection.action == Projection::kZero);
    if (projection.action == Projection::kKeep) return;
    const Global<const T> w = row_of<const T>(entry.weight, entry, team);
    const Global<T> g = row_of<T>(entry.grad, entry, team);
    if (projection.action == Projection::kZero) {
      team_rewrite<A>(team, w, g, [](A, A) { return A(0); });
    } else if (std::is_same_v<A, float> && Projector<float>::suits(projection)) {
      team_rewrite<A>(team, w, g, Projector<A>(projection));
    } else {
      team_rewrite<double>(team, w, g, Projector<double>(projection));
    }
  });
}

template <int kCapacity>
void launch_table(const Table<kCapacity>& table, const Tensor& any, const Tensor& degenerate,
                  bool rescale, double threshold, const Context& context) {
  const Tensor sums = empty(any, {3, table.slots}, ScalarType::Double);
  launch(&sum_kernel<kCapacity>, table.blocks, kThreads, 0, context.stream, table,
         output<double>(sums));
  launch(&project_kernel<kCapacity>, table.blocks, kThreads, 0, context.stream, table,
         input<double>(sums), output<bool>(degenerate), rescale, threshold);
}

// How many blocks a tensor takes; sets how its rows are cut.
int64_t cut(Entry& entry) {
  if (entry.length <= kWarpElements) {
    entry.ranges = 0;
    return (entry.rows + kWarps - 1) / kWarps;
  }
  const int64_t ranges = (entry.length + kRangeElements - 1) / kRangeElements;
  entry.ranges = static_cast<int16_t>(std::min(ranges, kMaxRanges));
  return entry.rows * entry.ranges;
}

Tensor perp_grad_(std::vector<Tensor> weights, std::vector<Tensor> grads, bool per_row, bool rescale,
                  bool skip_single, double threshold) {
  FUSEE_REQUIRE(!grads.empty(), "expected one gradient at least");
  const Context context(grads[0]);
  Pairs pairs(weights, grads, per_row, skip_single);
  Tensor degenerate = empty(grads[0], {pairs.units}, ScalarType::Bool);

  std::vector<Entry> entries;
  std::vector<int64_t> blocks;
  for (const Pair& pair : pairs.all) {
    if (pair.rows == 0) continue;
    // Kept units are entries of empty rows, which only report that they are not degenerate.
    const int64_t length = pair.keep ? 0 : pair.length;
    Entry entry{pair.weight.const_data_ptr(),
                pair.grad.mutable_data_ptr(),
                pair.rows,
                length,
                pair.first_unit,
                0,
                0,
                0,
                static_cast<int16_t>(pair.type)};
    blocks.push_back(cut(entry));
    entries.push_back(entry);
  }
  auto run = [&]<int kCapacity>(size_t begin, size_t end) {
    Table<kCapacity> table{};
    int64_t total = 0;
    for (size_t i = begin; i < end; ++i) {
      entries[i].first_block = static_cast<int32_t>(total);
      entries[i].first_slot = table.slots;
      table.entries[table.count++] = entries[i];
      table.slots += entries[i].rows * std::max<int64_t>(1, entries[i].ranges);
      total += blocks[i];
    }
    FUSEE_REQUIRE(total < INT32_MAX, "too many rows for one launch");
    table.blocks = static_cast<int32_t>(total);
    launch_table(table, grads[0], degenerate, rescale, threshold, context);
  };
  for (size_t begin = 0; begin < entries.size(); begin += kLargeTable) {
    const size_t end = std::min(entries.size(), begin + kLargeTable);
    if (end - begin <= kSmallTable) {
      run.template operator()<kSmallTable>(begin, end);
    } else {
      run.template operator()<kLargeTable>(begin, end);
    }
  }
  pairs.finish();
  return degenerate;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) { m.impl("perp_grad_", TORCH_BOX(&perp_grad_)); }

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
