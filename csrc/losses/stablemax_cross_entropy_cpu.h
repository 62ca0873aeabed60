// StableMax cross entropy on the CPU: the loops over the rows of the logits, or of a block of their
// classes. They include no torch header but for its thread pool.
#pragma once

#include "core/tiles.h"
#include "core/torch.h"
#include "losses/stablemax_cross_entropy.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
template <typename T>
struct Problem {
  using A = accumulate_t<T>;

  const T* input;
  Rows rows;            // of the logits at hand, whose length may be a block of the classes
  int64_t first_class;  // of the block
  int64_t all_classes;
  const int64_t* target;   // class indices (outer, inner), or null
  const A* probabilities;  // in the input's layout, or null
  const A* weight;         // (classes), or null for ones
  double weight_sum;
  CrossEntropyOptions options;

  int64_t classes() const { return rows.length; }
  A class_weight(int64_t c) const { return weight ? checked_class_weight(weight[c]) : A(1); }
  // Smoothing gives every class j the coefficient smooth() w_j.
  double smooth() const { return options.label_smoothing / static_cast<double>(all_classes); }
  bool spreads() const { return probabilities || options.label_smoothing != 0; }
  bool ignored(int64_t row) const { return target && target[row] == options.ignore_index; }
  // The loss and the gradient of a row without a loss, whatever its logits hold.
  A lost_value(int64_t row) const {
    return ignored(row) ? A(0) : std::numeric_limits<A>::quiet_NaN();
  }
  bool out_of_range(int64_t row) const {
    return target && (target[row] < 0 || target[row] >= all_classes);
  }
};

// Calls f with the function (offset in memory, class) -> coefficient of every class: what smoothing
// gives it, or its probability. One instance per case, so that each one's loops vectorise.
template <typename T, typename F>
auto with_coefficient(const Problem<T>& p, const F& f) {
  using A = typename Problem<T>::A;
  const A smooth = static_cast<A>(p.smooth());
  const A keep = static_cast<A>(1 - p.options.label_smoothing);
  const A* w = p.weight ? p.weight + p.first_class : nullptr;
  const A* q = p.probabilities;
  if (q && w)
    return f([=](int64_t at, int64_t c) {
      return checked_class_weight(w[c]) * (keep * q[at] + smooth);
    });
  if (q) return f([=](int64_t at, int64_t) { return keep * q[at] + smooth; });
  if (w) return f([=](int64_t, int64_t c) { return checked_class_weight(w[c]) * smooth; });
  return f([=](int64_t, int64_t) { return smooth; });
}

template <typename T>
Pivot index_pivot(const Problem<T>& p, int64_t row) {
  if (p.ignored(row) || p.out_of_range(row)) return {kNoLoss, 0, 0};
  const int64_t place = p.target[row] - p.first_class;
  const int64_t at = place >= 0 && place < p.classes() ? place : kOtherBlock;
  const double w = p.class_weight(p.target[row]);
  const double own = (1 - p.options.label_smoothing) * w;
  if (p.options.label_smoothing == 0) return {at, own, 0.0};
  return {at, own + p.smooth() * p.weight_sum, p.smooth() * (p.weight_sum - w)};
}

// The pivot of a probability target is its largest coefficient.
template <typename T>
Pivot probability_pivot(const Problem<T>& p, int64_t first, int64_t step) {
  return with_coefficient(p, [&](const auto& coefficient) {
    Pivot pivot{0, 0, 0};
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t c = 0; c < p.classes(); ++c) {
      const double value = coefficient(first + c * step, c);
      pivot.total += value;
      if (value > largest) {
        largest = value;
        pivot.at = c;
      }
    }
    for (int64_t c = 0; c < p.classes(); ++c)
      if (c != pivot.at) pivot.remainder += coefficient(first + c * step, c);
    return pivot;
  });
}

template <typename T>
void tile_pivots(const Problem<T>& p, const Tile& tile, Pivot* pivots) {
  for (int i = 0; i < tile.lanes; ++i)
    pivots[i] = p.target ? index_pivot(p, tile.row + i)
                         : probability_pivot(p, tile.first + i * tile.lane_step, tile.step);
}

// The pivot's place among the kChunk classes from `begin` on, or -1.
inline int32_t place_in_chunk(const Pivot& pivot, int64_t begin) {
  const int64_t place = pivot.at - begin;
  return place >= 0 && place < kChunk ? static_cast<int32_t>(place) : -1;
}

// The sums of a tile: both parts of R, and the spread of the coefficients around the pivot,
// sum_j b_j (log s_t - log s_j), where a class with no weight takes no part even at x_j = -inf.
template <typename T, typename A = accumulate_t<T>>
void sum_tile(const Problem<T>& p, const Tile& tile, const Pivot* pivots, const A* symlog_pivot,
              double (*sums)[kLanes]) {
  auto rest = [&](int i, int64_t begin) {
    const T* FUSEE_RESTRICT input = p.input;
    const int32_t place = place_in_chunk(pivots[i], begin);
    return [=](int32_t k, int64_t at) {
      const A x = static_cast<A>(input[at]);
      const bool own = k == place;
      return Terms<A>{own ? A(0) : StableSum<A>::positive_term(x),
                      own ? A(0) : StableSum<A>::negative_term(x)};
    };
  };
  sum_elements<A>(tile, p.classes(), rest, sums);
  if (!p.spreads()) {
    std::fill_n(sums[2], tile.lanes, 0.0);
    return;
  }
  with_coefficient(p, [&](const auto& coefficient) {
    auto spread = [&](int i, int64_t begin) {
      const T* FUSEE_RESTRICT input = p.input;
      return [=, symlog_t = symlog_pivot[i]](int32_t k, int64_t at) {
        const A b = coefficient(at, begin + k);
        const A term = b * (symlog_t - symlog(static_cast<A>(input[at])));
        return Terms<A>{b == A(0) ? A(0) : term, A(0)};
      };
    };
    sum_elements<A>(tile, p.classes(), spread, sums + 2);
  });
}

// What R and s_t say of the rows of a tile. Loops over plain arrays vectorise where loops over small
// structures do not.
struct Odds {
  double odds[kLanes], log[kLanes], sum[kLanes];

  // From R of float rows, which double holds.
  template <typename A>
  void set(int lanes, const double* rest, const A* x_pivot) {
#pragma omp simd
    for (int i = 0; i < lanes; ++i) {
      const double s_t = stable_exp(static_cast<double>(x_pivot[i]));
      odds[i] = rest[i] / s_t;
      sum[i] = rest[i] + s_t;
    }
#pragma omp simd
    for (int i = 0; i < lanes; ++i) log[i] = log1p_nonnegative(odds[i]);
  }

  void set(int i, const RowSum& rest, double x_pivot) {
    const double s_t = stable_exp(x_pivot);
    odds[i] = odds_against(rest, s_t);
    log[i] = log_odds(odds[i], rest, x_pivot);
    sum[i] = rest.value() + s_t;
  }
};

// The losses and the saved values of a tile.
template <typename T, typename A = accumulate_t<T>>
void finish_tile(const Problem<T>& p, const Tile& tile, const Pivot* pivots, const Odds& odds,
                 const double* spread, const A* x_pivot, A* loss, RowStats<A>* stats) {
  double share[kLanes];
#pragma omp simd
  for (int i = 0; i < tile.lanes; ++i) share[i] = rest_share(odds.odds[i]);
  for (int i = 0; i < tile.lanes; ++i) {
    stats[i] = {static_cast<A>(odds.sum[i]), static_cast<A>(share[i])};
    loss[i] = static_cast<A>(pivots[i].total * odds.log[i] + spread[i]);
  }
  if (p.options.z_loss != 0)
    for (int i = 0; i < tile.lanes; ++i)
      loss[i] += static_cast<A>(z_term(odds.log[i], x_pivot[i], p.options.z_loss));
  for (int i = 0; i < tile.lanes; ++i) {
    if (pivots[i].at != kNoLoss) continue;
    loss[i] = p.lost_value(tile.row + i);
    stats[i] = {A(1), A(0)};
  }
}

template <typename T, typename A = accumulate_t<T>>
void forward_tile(const Problem<T>& p, const Tile& tile, A* loss, RowStats<A>* stats) {
  Pivot pivots[kLanes];
  A x_pivot[kLanes], symlog_pivot[kLanes];
  double sums[4][kLanes];
  tile_pivots(p, tile, pivots);
  for (int i = 0; i < tile.lanes; ++i) {
    const int64_t at =
        tile.first + i * tile.lane_step + std::max<int64_t>(0, pivots[i].at) * tile.step;
    x_pivot[i] = static_cast<A>(p.input[at]);
  }
  if (p.spreads())
    for (int i = 0; i < tile.lanes; ++i) symlog_pivot[i] = symlog(x_pivot[i]);
  sum_tile(p, tile, pivots, symlog_pivot, sums);
  Odds odds;
  if constexpr (sizeof(A) == 4) {
    double rest[kLanes];
    for (int i = 0; i < tile.lanes; ++i) rest[i] = RowSum::value_from<A>(sums[0][i], sums[1][i]);
    odds.set(tile.lanes, rest, x_pivot);
  } else {
    for (int i = 0; i < tile.lanes; ++i)
      odds.set(i, RowSum::from<A>(sums[0][i], sums[1][i]), x_pivot[i]);
  }
  finish_tile(p, tile, pivots, odds, sums[2], x_pivot, loss, stats);
}

// Rows too short for a vector, with nothing but the target's own coefficient: the elements of all rows
// of a tile are walked as one array, and only the sums and the pivots row by row.
template <typename T>
bool is_flat(const Problem<T>& p) {
  return sizeof(accumulate_t<T>) == 4 && p.rows.inner == 1 && p.classes() <= kShortRow &&
         !p.spreads();
}

template <typename T, typename A = accumulate_t<T>>
void forward_flat(const Problem<T>& p, const Tile& tile, A* loss, RowStats<A>* stats) {
  const int classes = static_cast<int>(p.classes()), n = tile.lanes * classes;
  const T* FUSEE_RESTRICT x = p.input + tile.first;
  double terms[kLanes * kShortRow];
#pragma omp simd
  for (int k = 0; k < n; ++k) terms[k] = static_cast<double>(stable_exp(static_cast<A>(x[k])));
  Pivot pivots[kLanes];
  tile_pivots(p, tile, pivots);
  A x_pivot[kLanes];
  double rest[kLanes], spread[kLanes] = {};
  for (int i = 0; i < tile.lanes; ++i) {
    const int at = i * classes + static_cast<int>(std::max<int64_t>(0, pivots[i].at));
    x_pivot[i] = static_cast<A>(x[at]);
    terms[at] = 0;
  }
  for (int i = 0; i < tile.lanes; ++i) {
    double total = 0;
    for (int c = 0; c < classes; ++c) total += terms[i * classes + c];
    rest[i] = total;
  }
  Odds odds;
  odds.set(tile.lanes, rest, x_pivot);
  finish_tile(p, tile, pivots, odds, spread, x_pivot, loss, stats);
}

// The backward pass may write its output over the logits: an element is read before it is written.
template <typename T, typename A>
void backward_flat(const Problem<T>& p, const Tile& tile, const A* over_sum, T* output) {
  constexpr int kWidth = 16;
  const int classes = static_cast<int>(p.classes()), n = tile.lanes * classes;
  const T* x = p.input + tile.first;
  T* out = output + tile.first;
  // Every element's factor. Whole vectors are written; the next row overwrites what is too much.
  A factor[kLanes * kShortRow + kWidth];
  for (int i = 0; i < tile.lanes; ++i)
    for (int c = 0; c < classes; c += kWidth)
      std::fill_n(factor + i * classes + c, kWidth, over_sum[i]);
#pragma omp simd
  for (int k = 0; k < n; ++k) {
    const A value = static_cast<A>(x[k]);
    out[k] = static_cast<T>(factor[k] * stable_exp_derivative(value, reciprocal(value)));
  }
}

template <typename T, typename A = accumulate_t<T>>
void backward_tile(const Problem<T>& p, const Tile& tile, const A* h, const RowStats<A>* stats,
                   T* output) {
  Pivot pivots[kLanes];
  tile_pivots(p, tile, pivots);
  const T* input = p.input;
  A x_pivot[kLanes], over_sum[kLanes], at_pivot[kLanes];
  for (int i = 0; i < tile.lanes; ++i)
    x_pivot[i] = static_cast<A>(
        input[tile.first + i * tile.lane_step + std::max<int64_t>(0, pivots[i].at) * tile.step]);
  const A z_loss = static_cast<A>(p.options.z_loss);
#pragma omp simd
  for (int i = 0; i < tile.lanes; ++i) {
    const RowGradient<A> gradient(h[i], stats[i].sum, stats[i].rest, pivots[i].total,
                                  pivots[i].remainder, z_loss);
    over_sum[i] = gradient.over_sum;
    at_pivot[i] = gradient.at_pivot(x_pivot[i]);
  }
  if (is_flat(p)) {
    backward_flat(p, tile, over_sum, output);
  } else if (p.spreads()) {
    with_coefficient(p, [&](const auto& coefficient) {
      for_each_element(tile, p.classes(), [&](int i, int64_t) {
        return [=, factor = over_sum[i], scale = h[i]](int64_t c, int64_t at) {
          output[at] = static_cast<T>(
              row_derivative(static_cast<A>(input[at]), factor, scale * coefficient(at, c)));
        };
      });
    });
  } else {
    for_each_element(tile, p.classes(), [&](int i, int64_t) {
      return [=, factor = over_sum[i]](int64_t, int64_t at) {
        const A x = static_cast<A>(input[at]);
        output[at] = static_cast<T>(factor * stable_exp_derivative(x, reciprocal(x)));
      };
    });
  }
  for (int i = 0; i < tile.lanes; ++i) {
    T* row = output + tile.first + i * tile.lane_step;
    if (pivots[i].at >= 0) row[pivots[i].at * tile.step] = static_cast<T>(at_pivot[i]);
    if (pivots[i].at == kNoLoss) {
      const T value = static_cast<T>(p.lost_value(tile.row + i));
      for (int64_t c = 0; c < p.classes(); ++c) row[c * tile.step] = value;
    }
  }
}

template <typename T, typename F>
void for_each_tile(const Problem<T>& p, const F& f) {
  parallel_for(0, p.rows.tiles(), grain(p.rows.elements_per_tile()),
               [&](int64_t begin, int64_t end) {
                 for (int64_t index = begin; index < end; ++index) f(p.rows.tile(index));
               });
}

template <typename T, typename A = accumulate_t<T>>
void forward(const Problem<T>& p, const Tile& tile, A* loss, RowStats<A>* stats) {
  if (is_flat(p)) {
    forward_flat(p, tile, loss + tile.row, stats + tile.row);
  } else {
    forward_tile(p, tile, loss + tile.row, stats + tile.row);
  }
}

// `grad` holds one value per row, or with stride 0 one for all.
template <typename T, typename A = accumulate_t<T>>
void backward(const Problem<T>& p, const Tile& tile, const A* grad, int64_t grad_stride,
              const RowStats<A>* stats, T* output) {
  A h[kLanes];
  for (int i = 0; i < tile.lanes; ++i) h[i] = grad[(tile.row + i) * grad_stride];
  backward_tile(p, tile, h, stats + tile.row, output);
}

// info = (what a mean divides by, the number of rows whose target is out of range).
template <typename T>
std::array<double, 2> count_rows(const Problem<T>& p) {
  if (!p.target) return {static_cast<double>(p.rows.count()), 0};
  int64_t ignored = 0, invalid = 0;
#pragma omp simd reduction(+ : ignored, invalid)
  for (int64_t row = 0; row < p.rows.count(); ++row) {
    const int64_t y = p.target[row];
    const bool outside = (y < 0) | (y >= p.all_classes);
    ignored += y == p.options.ignore_index;
    invalid += outside & (y != p.options.ignore_index);
  }
  double divisor = static_cast<double>(p.rows.count() - ignored - invalid);
  if (p.weight) {
    divisor = 0;
    for (int64_t row = 0; row < p.rows.count(); ++row)
      if (!p.ignored(row) && !p.out_of_range(row)) divisor += p.class_weight(p.target[row]);
  }
  return {divisor, static_cast<double>(invalid)};
}

// The rows' losses reduced in one fixed order, whatever the number of threads.
template <typename A>
double reduce_rows(const A* losses, int64_t rows, int64_t reduction, double divisor) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t row = 0; row < rows; ++row) sum += losses[row];
  return reduction == kReductionMean ? sum / divisor : sum;
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
