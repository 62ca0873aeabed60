// PerpGrad in CUDA: all tensors in two launches, one that sums and one that rewrites.
//
// A unit that a warp or a block can take whole is rewritten in the first launch. No sum is atomic.

#include "losses/perp_grad.h"

#include "core/cuda/table.h"
#include "core/cuda/torch_stream.h"
#include "losses/perp_grad_pairs.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

using namespace cuda;

// Every block that rewrites a unit adds up the sums of all the unit's ranges, so there must be few.
constexpr int64_t kMaxRanges = 512;

struct Entry : Share {
  const void* weight;
  void* grad;
  int64_t first_unit;
  ScalarType type;
};

FUSEE_DEVICE Dots block_sum_dots(const Dots& dots, const Shared<double>& scratch) {
  return {block_sum(dots.ww, scratch), block_sum(dots.wg, scratch), block_sum(dots.gg, scratch)};
}

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
    store(g, i,
          static_cast<T>(static_cast<accumulate_t<T>>(
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

// Calls f with a value of the entry's type; the whole block takes the same branch.
template <typename F>
FUSEE_DEVICE void by_type(const Entry& entry, const F& f) {
  switch (entry.type) {
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

struct Options {
  Global<bool> degenerate;
  double threshold;
  bool rescale;
};

// Rewrites the team's part of a unit whose dot products are known.
template <typename T>
FUSEE_DEVICE void project(const Entry& entry, const Team& team, const Dots& dots,
                          const Options& options) {
  using A = accumulate_t<T>;
  const double ratio = degenerate_ratio<T>(options.threshold);
  const Projection projection = Projection::from(dots, options.rescale, ratio);
  if (team.rank == 0 && team.range == 0)
    store(options.degenerate, entry.first_unit + team.row, projection.action == Projection::kZero);
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
}

template <int kCapacity>
__global__ void __launch_bounds__(kTableThreads)
    sum_kernel(const __grid_constant__ Table<Entry, kCapacity> table, Global<double> sums,
               const Options options) {
  FUSEE_SHARED(double, scratch, 32);
  const int block = static_cast<int>(blockIdx.x);
  const Entry& entry = table.entries[table.find(block)];
  const Team team(entry, block);
  if (team.row >= entry.rows) return;  // whole warps, of blocks without barriers
  by_type(entry, [&]<typename T>(T) {
    const Dots dots = team_dots<T>(team, row_of<const T>(entry.weight, entry, team),
                                   row_of<const T>(entry.grad, entry, team));
    if (entry.ranges == 0) {
      const Dots all{warp_sum(dots.ww), warp_sum(dots.wg), warp_sum(dots.gg)};
      // No lane may write what another has yet to read.
      __syncwarp();
      project<T>(entry, team, all, options);
      return;
    }
    // Its barriers come after everybody's loads.
    const Dots all = block_sum_dots(dots, scratch);
    if (entry.ranges == 1) return project<T>(entry, team, all, options);
    if (team.rank != 0) return;
    store(sums, block, all.ww);
    store(sums, table.range_blocks + block, all.wg);
    store(sums, 2 * static_cast<int64_t>(table.range_blocks) + block, all.gg);
  });
}

template <int kCapacity>
__global__ void __launch_bounds__(kTableThreads)
    project_kernel(const __grid_constant__ Table<Entry, kCapacity> table, Global<const double> sums,
                   const Options options) {
  FUSEE_SHARED(double, scratch, 32);
  const int block = static_cast<int>(blockIdx.x);
  const Entry& entry = table.entries[table.find(block)];
  const Team team(entry, block);
  Dots dots;
  for (int i = team.rank; i < entry.ranges; i += kTableThreads) {
    const int64_t at = block - team.range + i, count = table.range_blocks;
    dots = dots + Dots{load(sums, at), load(sums, count + at), load(sums, 2 * count + at)};
  }
  dots = block_sum_dots(dots, scratch);
  by_type(entry, [&]<typename T>(T) { project<T>(entry, team, dots, options); });
}

template <int kCapacity>
void launch_table(const Table<Entry, kCapacity>& table, const Tensor& any, const Options& options,
                  const Context& context) {
  // The sums of each block of a cut unit.
  const Tensor sums = empty(any, {3, table.range_blocks}, ScalarType::Double);
  launch(&sum_kernel<kCapacity>, table.blocks, kTableThreads, 0, context.stream, table,
         output<double>(sums), options);
  if (table.range_blocks != 0) {
    launch(&project_kernel<kCapacity>, table.range_blocks, kTableThreads, 0, context.stream, table,
           input<double>(sums), options);
  }
}

Tensor perp_grad_(std::vector<Tensor> weights, std::vector<Tensor> grads, bool per_row,
                  bool rescale, bool skip_single, double threshold) {
  FUSEE_REQUIRE(!grads.empty(), "expected one gradient at least");
  const Context context(grads[0]);
  Pairs pairs(weights, grads, per_row, skip_single);
  Tensor degenerate = empty(grads[0], {pairs.units}, ScalarType::Bool);

  std::vector<Entry> entries;
  for (const Pair& pair : pairs.all) {
    if (pair.rows == 0) continue;
    // Kept units are entries of empty rows, which only report that they are not degenerate.
    const int64_t length = pair.keep ? 0 : pair.length;
    entries.push_back({Share::of(pair.rows, length, kMaxRanges), pair.weight.const_data_ptr(),
                       pair.grad.mutable_data_ptr(), pair.first_unit, pair.type});
  }
  const Options options{output<bool>(degenerate), threshold, rescale};
  for_each_table(entries,
                 [&](const auto& table) { launch_table(table, grads[0], options, context); });
  pairs.finish();
  return degenerate;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, FUSEE_CUDA_KEY, m) {
  m.impl("perp_grad_", TORCH_BOX(&perp_grad_));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
