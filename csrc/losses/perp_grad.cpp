// PerpGrad on the CPU. Units of up to kChunkElements are read once, while they are in the cache; of longer
// ones, all threads sum chunks of a fixed size and then rewrite chunks.

#include "losses/perp_grad.h"

#include "core/torch.h"
#include "losses/perp_grad_pairs.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

constexpr int64_t kChunkElements = 8192;

// How a call wants its units treated.
struct Options {
  bool rescale;
  double threshold;
  bool* degenerate;  // one entry a unit
};

// The sums are kept in eight lanes whatever the instruction set, and a product of two floats is exact in
// double, so every CPU engine gets the same bits.
template <typename T>
Dots sum_dots(const T* FUSEE_RESTRICT w, const T* FUSEE_RESTRICT g, int64_t count) {
  constexpr int kLanes = 8;
  double ww[kLanes] = {}, wg[kLanes] = {}, gg[kLanes] = {};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const double a = static_cast<double>(w[k + i]), b = static_cast<double>(g[k + i]);
      ww[i] += a * a;
      wg[i] += a * b;
      gg[i] += b * b;
    }
  }
  for (int64_t k = whole; k < count; ++k) {
    const double a = static_cast<double>(w[k]), b = static_cast<double>(g[k]);
    ww[k - whole] += a * a;
    wg[k - whole] += a * b;
    gg[k - whole] += b * b;
  }
  Dots dots;
  for (int i = 0; i < kLanes; ++i) dots = dots + Dots{ww[i], wg[i], gg[i]};
  return dots;
}

template <typename T>
void rewrite(const Projection& projection, const T* FUSEE_RESTRICT w, T* FUSEE_RESTRICT g,
             int64_t count) {
  if (projection.action == Projection::kKeep) return;
  if (projection.action == Projection::kZero) {
    std::fill_n(g, count, T(0.0f));
    return;
  }
  const Projector<double> project(projection);
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    // In double, whose conversions and products hide behind the memory.
    const double value = project(static_cast<double>(w[k]), static_cast<double>(g[k]));
    g[k] = static_cast<T>(static_cast<accumulate_t<T>>(value));
  }
}

template <typename T>
Projection decide(const Dots& dots, const Options& options, int64_t unit) {
  const double ratio = degenerate_ratio<T>(options.threshold);
  const Projection projection = Projection::from(dots, options.rescale, ratio);
  options.degenerate[unit] = projection.action == Projection::kZero;
  return projection;
}

template <typename T>
void project_rows(const Pair& pair, int64_t begin, int64_t end, const Options& options) {
  const T* const w = data<T>(pair.weight);
  T* const g = mutable_data<T>(pair.grad);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * pair.length;
    const Dots dots = sum_dots(w + first, g + first, pair.length);
    rewrite(decide<T>(dots, options, pair.first_unit + row), w + first, g + first, pair.length);
  }
}

template <typename T>
void project_long_row(const Pair& pair, int64_t row, const Options& options) {
  const T* const w = data<T>(pair.weight) + row * pair.length;
  T* const g = mutable_data<T>(pair.grad) + row * pair.length;
  const int64_t length = pair.length;
  const int64_t chunks = (length + kChunkElements - 1) / kChunkElements;
  auto count = [=](int64_t chunk) {
    return std::min(kChunkElements, length - chunk * kChunkElements);
  };

  std::vector<Dots> partial(chunks);
  Dots* const partials = partial.data();
  parallel_for(0, chunks, grain(kChunkElements), [=](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunkElements;
      partials[chunk] = sum_dots(w + first, g + first, count(chunk));
    }
  });
  Dots dots;
  for (const Dots& part : partial) dots = dots + part;
  const Projection projection = decide<T>(dots, options, pair.first_unit + row);
  // Backwards: the chunks read last are those still in the cache.
  parallel_for(0, chunks, grain(kChunkElements), [=](int64_t begin, int64_t end) {
    for (int64_t chunk = end - 1; chunk >= begin; --chunk) {
      const int64_t first = chunk * kChunkElements;
      rewrite(projection, w + first, g + first, count(chunk));
    }
  });
}

// A run of whole short rows of one pair.
struct Task {
  const Pair* pair;
  int64_t begin, end;
};

Tensor perp_grad_(std::vector<Tensor> weights, std::vector<Tensor> grads, bool per_row,
                  bool rescale, bool skip_single, double threshold) {
  Pairs pairs(weights, grads, per_row, skip_single);
  Tensor degenerate = empty(grads[0], {pairs.units}, ScalarType::Bool);
  const Options options{rescale, threshold, mutable_data<bool>(degenerate)};
  std::fill_n(options.degenerate, pairs.units, false);

  std::vector<Task> tasks;
  int64_t elements = 0;
  for (const Pair& pair : pairs.all) {
    if (pair.keep || pair.elements() == 0) continue;
    if (pair.length > kChunkElements) {
      dispatch_floating(pair.type, [&]<typename T>(T) {
        for (int64_t row = 0; row < pair.rows; ++row) project_long_row<T>(pair, row, options);
      });
      continue;
    }
    const int64_t rows_per_task = kChunkElements / pair.length;
    for (int64_t row = 0; row < pair.rows; row += rows_per_task)
      tasks.push_back({&pair, row, std::min(pair.rows, row + rows_per_task)});
    elements += pair.elements();
  }
  const int64_t count = static_cast<int64_t>(tasks.size());
  if (count != 0) {
    parallel_for(0, count, grain(elements / count), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Task& task = tasks[i];
        dispatch_floating(task.pair->type, [&]<typename T>(T) {
          project_rows<T>(*task.pair, task.begin, task.end, options);
        });
      }
    });
  }
  pairs.finish();
  return degenerate;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) { m.impl("perp_grad_", TORCH_BOX(&perp_grad_)); }

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
