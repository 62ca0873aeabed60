// The weight compander on the CPU: one pass over pieces of a fixed size, of one weight or of many.

#include "core/torch.h"
#include "reparam/compand_weights.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

constexpr int64_t kPieceElements = 16384;
// Sums in the accumulation type are moved to double after this many elements.
constexpr int64_t kSummedElements = 1024;

// Whole short rows of a weight, or a piece of a long one.
struct Task {
  const Weight* weight;
  int64_t row_begin, row_end;
  int64_t begin, end;  // within the row
  int64_t sums;        // where the sums of the first row go
};

struct Sums {
  double f = 0, t = 0;
};

struct Tasks {
  std::vector<Task> all;
  std::vector<Sums> sums;
  std::vector<int64_t> first_sum;  // of each weight

  explicit Tasks(const std::vector<Weight>& weights) {
    int64_t count = 0;
    for (const Weight& weight : weights) {
      first_sum.push_back(count);
      const int64_t pieces = pieces_of(weight);
      if (pieces > 1) {
        for (int64_t row = 0; row < weight.rows; ++row)
          for (int64_t piece = 0; piece < pieces; ++piece) {
            const int64_t begin = piece * kPieceElements;
            all.push_back({&weight, row, row + 1, begin,
                           std::min(begin + kPieceElements, weight.length), count++});
          }
      } else {
        const int64_t rows = kPieceElements / std::max<int64_t>(weight.length, 1);
        for (int64_t row = 0; row < weight.rows; row += rows)
          all.push_back(
              {&weight, row, std::min(row + rows, weight.rows), 0, weight.length, count + row});
        count += weight.rows;
      }
    }
    sums.resize(count);
  }

  static int64_t pieces_of(const Weight& weight) {
    return std::max<int64_t>(1, (weight.length + kPieceElements - 1) / kPieceElements);
  }

  template <typename F>
  void for_each(const F& f) const {
    const int64_t count = static_cast<int64_t>(all.size());
    if (count == 0) return;
    int64_t elements = 0;
    for (const Task& task : all)
      elements += (task.row_end - task.row_begin) * (task.end - task.begin);
    parallel_for(0, count, grain(elements / count), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        dispatch_floating(all[i].weight->type, [&]<typename T>(T) { f(all[i], T{}); });
    });
  }
};

template <typename Curve, typename T>
void forward_row(const Curve& curve, const T* FUSEE_RESTRICT input, int64_t count,
                 T* FUSEE_RESTRICT output) {
  using A = accumulate_t<T>;
#pragma omp simd
  for (int64_t k = 0; k < count; ++k)
    output[k] = static_cast<T>(companded(curve, static_cast<A>(input[k])));
}

template <typename Curve, typename T>
Sums backward_row(const Curve& curve, const T* FUSEE_RESTRICT grad, const T* FUSEE_RESTRICT input,
                  int64_t count, T* FUSEE_RESTRICT output) {
  using A = accumulate_t<T>;
  const A scale = curve.derivative_scale();
  Sums sums;
  for (int64_t begin = 0; begin < count; begin += kSummedElements) {
    const int64_t end = std::min(begin + kSummedElements, count);
    A f = 0, t = 0;
#pragma omp simd reduction(+ : f, t)
    for (int64_t k = begin; k < end; ++k) {
      const A v = static_cast<A>(input[k]), g = static_cast<A>(grad[k]);
      const Slopes<A> slopes = curve.slopes(absolute(v));
      output[k] = static_cast<T>(g * (scale * slopes.derivative));
      const A signed_grad = v < A(0) ? -g : g;
      f += signed_grad * slopes.f;
      t += signed_grad * slopes.t;
    }
    sums.f += f;
    sums.t += t;
  }
  return sums;
}

template <Kind kKind, typename A>
Curve<kKind, A> curve_of(const Weight& weight, int64_t row) {
  return make_curve<kKind, A>(data<A>(weight.a)[row], data<A>(weight.b)[row]);
}

void forward(const std::vector<Weight>& weights, int64_t kind) {
  const Tasks tasks(weights);
  dispatch_kind(kind, [&](auto constant) {
    tasks.for_each([&]<typename T>(const Task& task, T) {
      using A = accumulate_t<T>;
      const Weight& weight = *task.weight;
      for (int64_t row = task.row_begin; row < task.row_end; ++row) {
        const int64_t first = row * weight.length + task.begin;
        const auto curve = curve_of<constant(), A>(weight, row);
        forward_row(curve, data<T>(weight.input) + first, task.end - task.begin,
                    mutable_data<T>(weight.output) + first);
      }
    });
  });
}

void backward(const std::vector<Weight>& weights, int64_t kind) {
  Tasks tasks(weights);
  dispatch_kind(kind, [&](auto constant) {
    tasks.for_each([&]<typename T>(const Task& task, T) {
      using A = accumulate_t<T>;
      const Weight& weight = *task.weight;
      for (int64_t row = task.row_begin; row < task.row_end; ++row) {
        const int64_t first = row * weight.length + task.begin;
        const auto curve = curve_of<constant(), A>(weight, row);
        tasks.sums[task.sums + row - task.row_begin] =
            backward_row(curve, data<T>(*weight.grad) + first, data<T>(weight.input) + first,
                         task.end - task.begin, mutable_data<T>(weight.output) + first);
      }
    });
    for (size_t i = 0; i < weights.size(); ++i) {
      const Weight& weight = weights[i];
      dispatch_floating(accumulate_type(weight.type), [&]<typename A>(A) {
        if constexpr (sizeof(A) >= sizeof(float)) {
          const int64_t pieces = Tasks::pieces_of(weight);
          const Sums* sums = tasks.sums.data() + tasks.first_sum[i];
          for (int64_t row = 0; row < weight.rows; ++row) {
            Sums total;
            for (int64_t piece = 0; piece < pieces; ++piece, ++sums) {
              total.f += sums->f;
              total.t += sums->t;
            }
            const auto curve = curve_of<constant(), A>(weight, row);
            const auto gradients = curve.gradients(total.f, total.t);
            mutable_data<A>(weight.grad_a)[row] = static_cast<A>(gradients.a);
            mutable_data<A>(weight.grad_b)[row] = static_cast<A>(gradients.b);
          }
        }
      });
    }
  });
}

using Operators = CompandOperators<&forward, &backward>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) {
  m.impl("compand", TORCH_BOX(&Operators::one));
  m.impl("compand_backward", TORCH_BOX(&Operators::backward_of_one));
  m.impl("compand_foreach", TORCH_BOX(&Operators::foreach));
  m.impl("compand_foreach_backward", TORCH_BOX(&Operators::backward_of_foreach));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
