// Bounds of the differences of a layer's outputs to that of the target, on the CPU. Boxes with the same
// target share the differences of weights.

#include "bounds/boxes_cpu.h"
#include "bounds/dual_dots_cpu.h"
#include "bounds/dual_product_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

// Rows of one target, as positions in the order of targets.
struct Bucket {
  int64_t target, first, rows;
};

struct Buckets {
  std::vector<int64_t> order;  // the rows by target, those without one last
  std::vector<Bucket> all;
  int64_t good;  // rows that have a target

  // Of at most so many rows each.
  Buckets(const int64_t* targets, int64_t rows, int64_t classes, int64_t most) : order(rows) {
    std::vector<int64_t> ends(classes + 2);
    const auto key = [&](int64_t row) {
      return targets[row] >= 0 && targets[row] < classes ? targets[row] : classes;
    };
    for (int64_t row = 0; row < rows; ++row) ++ends[key(row) + 1];
    for (int64_t c = 0; c <= classes; ++c) ends[c + 1] += ends[c];
    good = ends[classes];
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t first = ends[c]; first < ends[c + 1]; first += most)
        all.push_back({c, first, std::min(most, ends[c + 1] - first)});
    for (int64_t row = 0; row < rows; ++row) order[ends[key(row)]++] = row;
  }
};

struct Arguments {
  Tensor center, radius, weight, target;
  int64_t rows, in, classes;

  Arguments(const Tensor& center_, const Tensor& radius_, const Tensor& weight_,
            const Tensor& target_)
      : center(as_contiguous(center_)),
        radius(as_contiguous(radius_)),
        weight(as_contiguous(weight_)),
        target(as_contiguous(target_)) {
    FUSEE_REQUIRE(center.dim() == 2 && radius.dim() == 2 && weight.dim() == 2,
                  "expected center (rows, in), radius (rows, in) and weight (classes, in)");
    FUSEE_REQUIRE(center.scalar_type() == weight.scalar_type() &&
                      radius.scalar_type() == weight.scalar_type(),
                  "center, radius and weight must have one dtype");
    rows = center.size(0);
    classes = weight.size(0);
    in = weight.size(1);
    FUSEE_REQUIRE(center.size(1) == in && radius.size(0) == rows && radius.size(1) == in,
                  "center and radius must have one shape, as wide as the weight");
    FUSEE_REQUIRE(
        target.dim() == 1 && target.size(0) == rows && target.scalar_type() == ScalarType::Long,
        "target must be int64, one for each row");
  }
};

// Not below `value`.
template <typename T, typename A>
T round_up(A value) {
  T stored = static_cast<T>(value);
  if constexpr (!std::is_same_v<T, A>) {
    const bool below_zero = stored.bits >> 15;
    if (static_cast<A>(stored) < value) stored.bits += below_zero ? -1 : 1;
  }
  return stored;
}

template <typename T, typename A = accumulate_t<T>>
void store_margins(const DualTile<A>& tile, const A* bias, int64_t target,
                   const Rounding<A>* rounding, const int64_t* order, T* margins, int64_t classes) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const A *const m = tile.at(0, r), *const s = tile.at(1, r);
    T* const to = margins + order[tile.row + r] * classes + tile.column;
    for (int64_t c = 0; c < tile.columns; ++c) {
      const int64_t j = tile.column + c;
      const A plus = bias != nullptr ? bias[j] : A(0),
              minus = bias != nullptr ? bias[target] : A(0);
      A margin = m[c] + (plus - minus);
      if (rounding == nullptr)
        margin += s[c];
      else
        margin = next_above(margin + rounding->after(s[c], absolute(plus) + absolute(minus)));
      if (j == target && margin == margin) margin = A(0);
      to[c] = rounding == nullptr ? static_cast<T>(margin) : round_up<T>(margin);
    }
  }
}

Tensor interval_margins(const Tensor& center, const Tensor& radius, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Tensor& target, bool sound) {
  constexpr int64_t kRows = 64;
  const Arguments call(center, radius, weight, target);
  const int64_t in = call.in, classes = call.classes;
  FUSEE_REQUIRE(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == classes &&
                                      bias->scalar_type() == weight.scalar_type()),
                "bias must have one entry per class, of the weight's dtype");
  const Tensor margins = empty(center, {call.rows, classes}, center.scalar_type());
  const Buckets buckets(data<int64_t>(call.target), call.rows, classes, kRows);
  dispatch_floating(center.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const auto rounding = Rounding<A>::of(dot_roundings<A>(in));
    const Rounding<A>* const outward = sound ? &rounding : nullptr;
    const int64_t* const order = buckets.order.data();
    const PaddedRows<A, 2> boxes(buckets.good, in, [&](int64_t i, A* const* to) {
      load_boxes(data<T>(call.center) + order[i] * in, data<T>(call.radius) + order[i] * in, in,
                 outward, to);
    });
    const Widened<T> wide_bias(bias);
    const T* const w = data<T>(call.weight);
    T* const to = mutable_data<T>(margins);
    const int64_t tasks = (classes + kDotTask - 1) / kDotTask;
    const int64_t mean = buckets.good / std::max<int64_t>(1, buckets.all.size()) + 1;
    parallel_for(0, buckets.all.size() * tasks, grain(kDotTask * in * mean / 4),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const Bucket& bucket = buckets.all[i / tasks];
                     DotTask<A> task(bucket.rows);
                     const auto tile = task.template compute<T, true>(
                         {w, w + bucket.target * in, in}, i % tasks * kDotTask, classes,
                         rows_of(boxes, bucket.first));
                     store_margins(tile, wide_bias.get(), bucket.target, outward,
                                   order + bucket.first, to, classes);
                   }
                 });
    for (int64_t i = buckets.good; i < call.rows; ++i)
      std::fill_n(to + order[i] * classes, classes,
                  static_cast<T>(std::numeric_limits<A>::quiet_NaN()));
  });
  return margins;
}

// --- gradients ----------------------------------------------------------------------------------------
// The gradients from those of margins, which are kept in the order of targets, zero at the target.
template <typename T>
class Gradients {
 public:
  using A = accumulate_t<T>;

  Gradients(const Arguments& call, const Tensor& grad, const Buckets& buckets)
      : call_(call),
        buckets_(buckets),
        grads_(buckets.good, call.classes, [&](int64_t i, A* const* to) {
          const int64_t row = buckets.order[i];
          widen(data<T>(grad) + row * call.classes, call.classes, to[0]);
          to[0][data<int64_t>(call.target)[row]] = A(0);
        }) {}

  // Of centers (0) and radii (1), null where they are not wanted.
  void of_boxes(T* const (&to)[2]) const {
    const int64_t in = call_.in, classes = call_.classes;
    const T* const w = data<T>(call_.weight);
    for (const Bucket& bucket : buckets_.all) {
      const Factor<A> grads = grads_.by_row(0, bucket.first);
      const T* const less = w + bucket.target * in;
      dual_product<A, true>(
          {grads, grads}, bucket.rows, classes, in,
          [&](int64_t begin, int64_t depth, int64_t column, int64_t columns, A* const* lines) {
            copy_lines(w + begin * in + column, in, depth, columns, lines[0], less + column);
          },
          [&](const DualTile<A>& tile) {
            for (int which = 0; which < 2; ++which)
              for (int64_t r = 0; to[which] != nullptr && r < tile.rows; ++r)
                narrow(tile.at(which, r), tile.columns,
                       to[which] + buckets_.order[bucket.first + tile.row + r] * in + tile.column);
          });
    }
    for (int64_t i = buckets_.good; i < call_.rows; ++i)
      for (T* const results : to)
        if (results != nullptr) std::fill_n(results + buckets_.order[i] * in, in, not_a_number());
  }

  // Summed over targets for one part of the columns after another.
  void of_weight(T* to) const {
    constexpr int64_t kColumns = kTaskColumns<A>;
    const int64_t in = call_.in, classes = call_.classes;
    if (buckets_.good < call_.rows) {
      std::fill_n(to, classes * in, not_a_number());
      return;
    }
    parallel_for(0, (in + kColumns - 1) / kColumns, grain(classes * call_.rows * kColumns / 8),
                 [&](int64_t begin, int64_t end) {
                   const Scratch<A> sums(classes * kColumns);
                   for (int64_t first = begin * kColumns; first < std::min(in, end * kColumns);
                        first += kColumns) {
                     const int64_t count = std::min(kColumns, in - first);
                     std::fill_n(sums.get(), classes * kColumns, A(0));
                     for (const Bucket& bucket : buckets_.all)
                       add_bucket(bucket, first, count, sums.get());
                     for (int64_t j = 0; j < classes; ++j)
                       narrow(sums.get() + j * kColumns, count, to + j * in + first);
                   }
                 });
  }

  void of_bias(T* to) const {
    std::vector<double> sums(call_.classes);
    for (const Bucket& bucket : buckets_.all)
      for (int64_t i = bucket.first; i < bucket.first + bucket.rows; ++i) {
        double all = 0;
        for (int64_t j = 0; j < call_.classes; ++j) {
          sums[j] += grads_.row(0, i)[j];
          all += grads_.row(0, i)[j];
        }
        sums[bucket.target] -= all;
      }
    for (int64_t j = 0; j < call_.classes; ++j)
      to[j] = buckets_.good < call_.rows ? not_a_number() : static_cast<T>(static_cast<A>(sums[j]));
  }

 private:
  const Arguments& call_;
  const Buckets& buckets_;
  PaddedRows<A, 1> grads_;

  static T not_a_number() { return static_cast<T>(std::numeric_limits<A>::quiet_NaN()); }

  // Some columns of what the rows of one target give. A product of kTaskRows classes is one task: all
  // of them subtract from the row of the target.
  void add_bucket(const Bucket& bucket, int64_t first, int64_t count, A* sums) const {
    constexpr int64_t kColumns = kTaskColumns<A>;
    const int64_t in = call_.in, classes = call_.classes;
    const T *const w = data<T>(call_.weight) + first, *const less = w + bucket.target * in;
    const T* const boxes[2] = {data<T>(call_.center) + first, data<T>(call_.radius) + first};
    A of_target[kColumns] = {};
    for (int64_t j = 0; j < classes; j += kTaskRows) {
      const Factor<A> grads{grads_.row(0, bucket.first) + j, 1, grads_.stride()};
      dual_product<A, false>(
          {grads, grads}, std::min(kTaskRows, classes - j), bucket.rows, count,
          [&](int64_t begin, int64_t depth, int64_t, int64_t columns, A* const* lines) {
            for (int which = 0; which < 2; ++which)
              for (int64_t d = 0; d < depth; ++d)
                copy_lines(boxes[which] + buckets_.order[bucket.first + begin + d] * in, in, 1,
                           columns, lines[which] + d * kTileLanes<A>);
          },
          [&](const DualTile<A>& tile) {
            for (int64_t r = 0; r < tile.rows; ++r)
              add_row(tile, r, w + (j + r) * in, less, sums + (j + r) * kColumns, of_target);
          });
    }
    for (int64_t c = 0; c < count; ++c) sums[bucket.target * kColumns + c] -= of_target[c];
  }

  // The target's own row has no gradients.
  static void add_row(const DualTile<A>& tile, int64_t r, const T* FUSEE_RESTRICT weight,
                      const T* FUSEE_RESTRICT less, A* FUSEE_RESTRICT to,
                      A* FUSEE_RESTRICT of_target) {
    const A *FUSEE_RESTRICT center = tile.at(0, r), *FUSEE_RESTRICT radius = tile.at(1, r);
#pragma omp simd
    for (int64_t c = 0; c < tile.columns; ++c) {
      const A sign = sign_of(static_cast<A>(weight[c]) - static_cast<A>(less[c]));
      const A term = center[c] + sign * radius[c];
      to[c] += term;
      of_target[c] += term;
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> interval_margins_backward(
    const Tensor& grad, const Tensor& center, const Tensor& radius, const Tensor& weight,
    const Tensor& target, int64_t wanted) {
  const Arguments call(center, radius, weight, target);
  FUSEE_REQUIRE(grad.dim() == 2 && grad.size(0) == call.rows && grad.size(1) == call.classes &&
                    grad.scalar_type() == weight.scalar_type(),
                "grad must have shape (rows, classes) and the inputs' dtype");
  const Tensor upstream = as_contiguous(grad);
  const Buckets buckets(data<int64_t>(call.target), call.rows, call.classes, kTaskRows);
  const auto result = [&](int bit, const Shape& shape) {
    return empty(center, wanted >> bit & 1 ? shape : Shape{0}, center.scalar_type());
  };
  const std::array<Tensor, 4> results{
      result(0, {call.rows, call.in}), result(1, {call.rows, call.in}),
      result(2, {call.classes, call.in}), result(3, {call.classes})};
  dispatch_floating(center.scalar_type(), [&]<typename T>(T) {
    const Gradients<T> gradients(call, upstream, buckets);
    const auto data_of = [&](int which) {
      return wanted >> which & 1 ? mutable_data<T>(results[which]) : nullptr;
    };
    if (wanted & 3) gradients.of_boxes({data_of(0), data_of(1)});
    if (wanted & 4) gradients.of_weight(data_of(2));
    if (wanted & 8) gradients.of_bias(data_of(3));
  });
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) {
  m.impl("interval_margins", TORCH_BOX(&interval_margins));
  m.impl("interval_margins_backward", TORCH_BOX(&interval_margins_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
