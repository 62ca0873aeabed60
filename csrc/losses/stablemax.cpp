// StableMax and its logarithm on the CPU: one pass over a row for the sums, one for the result.

#include "losses/stablemax.h"

#include "core/tiles.h"
#include "core/torch.h"
#include "losses/checks.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

template <typename T, typename A = accumulate_t<T>>
void forward(const T* FUSEE_RESTRICT input, const Rows& rows, bool log, T* FUSEE_RESTRICT output,
             double* saved_sum) {
  parallel_for(0, rows.tiles(), grain(rows.elements_per_tile()), [=](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = rows.tile(index);
      double sums[2][kLanes];
      auto terms = [=](int, int64_t) {
        return [=](int64_t, int64_t at) {
          const A x = static_cast<A>(input[at]);
          return Terms<A>{StableSum<A>::positive_term(x), StableSum<A>::negative_term(x)};
        };
      };
      sum_elements<A>(tile, rows.length, terms, sums);

      Normalizer<A> normalizers[kLanes];
      A log_sums[kLanes];
      for (int i = 0; i < tile.lanes; ++i) {
        const RowSum sum = RowSum::from<A>(sums[0][i], sums[1][i]);
        saved_sum[tile.row + i] = sum.value();
        normalizers[i] = Normalizer<A>(sum);
        log_sums[i] = static_cast<A>(sum.log());
      }
      if (log) {
        for_each_element(tile, rows.length, [&](int i, int64_t) {
          return [=, normalize = normalizers[i], log_sum = log_sums[i]](int64_t, int64_t at) {
            output[at] = static_cast<T>(log_share(static_cast<A>(input[at]), normalize, log_sum));
          };
        });
      } else {
        for_each_element(tile, rows.length, [&](int i, int64_t) {
          return [=, normalize = normalizers[i]](int64_t, int64_t at) {
            output[at] = static_cast<T>(normalize(stable_exp(static_cast<A>(input[at]))));
          };
        });
      }
    }
  });
}

template <typename T, typename A = accumulate_t<T>>
void backward(const T* FUSEE_RESTRICT grad, const T* FUSEE_RESTRICT input, const double* saved_sum,
              const Rows& rows, bool log, T* FUSEE_RESTRICT output) {
  parallel_for(0, rows.tiles(), grain(rows.elements_per_tile()), [=](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = rows.tile(index);
      double dots[2][kLanes];
      auto terms = [=](int i, int64_t) {
        return [=, normalize = Normalizer<A>(saved_sum[tile.row + i])](int64_t, int64_t at) {
          const A g = static_cast<A>(grad[at]);
          const A y = normalize(stable_exp(static_cast<A>(input[at])));
          return Terms<A>{log ? g : g * y, A(0)};
        };
      };
      sum_elements<A>(tile, rows.length, terms, dots);

      for_each_element(tile, rows.length, [&](int i, int64_t) {
        return [=, dot = static_cast<A>(dots[0][i]),
                inverse = static_cast<A>(1 / saved_sum[tile.row + i])](int64_t, int64_t at) {
          output[at] = static_cast<T>(stablemax_derivative(
              static_cast<A>(input[at]), static_cast<A>(grad[at]), dot, inverse, log));
        };
      });
    }
  });
}

std::tuple<Tensor, Tensor> stablemax(const Tensor& input, bool log) {
  check_rows(input);
  const Tensor x = as_contiguous(input);
  const Rows rows{x.size(0), x.size(1), x.size(2)};
  Tensor output = empty(x, to_shape(x.sizes()), x.scalar_type());
  Tensor sum = empty(x, {rows.outer, rows.inner}, ScalarType::Double);
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    forward(data<T>(x), rows, log, mutable_data<T>(output), mutable_data<double>(sum));
  });
  return {output, sum};
}

Tensor stablemax_backward(const Tensor& grad, const Tensor& input, const Tensor& sum, bool log) {
  check_rows(input);
  check_stablemax_backward(grad, input, sum);
  const Tensor x = as_contiguous(input), g = as_contiguous(grad), s = as_contiguous(sum);
  const Rows rows{x.size(0), x.size(1), x.size(2)};
  Tensor output = empty(x, to_shape(x.sizes()), x.scalar_type());
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    backward(data<T>(g), data<T>(x), data<double>(s), rows, log, mutable_data<T>(output));
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) {
  m.impl("stablemax", TORCH_BOX(&stablemax));
  m.impl("stablemax_backward", TORCH_BOX(&stablemax_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
