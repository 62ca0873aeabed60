// Boxes through linear layers on the CPU.

#include "bounds/boxes_cpu.h"
#include "bounds/dual_dots_cpu.h"
#include "bounds/dual_product_cpu.h"
#include "bounds/signed_product_cpu.h"
#include "core/ahead_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

struct Arguments {
  Tensor center, radius, weight;
  int64_t rows, in, out;

  Arguments(const Tensor& center_, const Tensor& radius_, const Tensor& weight_)
      : center(as_contiguous(center_)),
        radius(as_contiguous(radius_)),
        weight(as_contiguous(weight_)) {
    FUSEE_REQUIRE(center.dim() == 2 && radius.dim() == 2 && weight.dim() == 2,
                  "expected center (rows, in), radius (rows, in) and weight (out, in)");
    FUSEE_REQUIRE(center.scalar_type() == weight.scalar_type() &&
                      radius.scalar_type() == weight.scalar_type(),
                  "center, radius and weight must have one dtype");
    rows = center.size(0);
    out = weight.size(0);
    in = weight.size(1);
    FUSEE_REQUIRE(center.size(1) == in && radius.size(0) == rows && radius.size(1) == in,
                  "center and radius must have one shape, as wide as the weight");
  }

  void check_result(const Tensor& result) const {
    FUSEE_REQUIRE(result.dim() == 2 && result.size(0) == rows && result.size(1) == out &&
                      result.scalar_type() == weight.scalar_type(),
                  "results and their gradients must have shape (rows, out) and the inputs' dtype");
  }
};

// The boxes of a tile of products.
template <typename T>
struct StoreBoxes {
  using A = accumulate_t<T>;

  const A* bias;
  bool relu;
  const Rounding<A>* rounding;  // or null
  T *center, *radius;
  int64_t width;

  template <bool kRelu, bool kSound>
  FUSEE_HOST_DEVICE void store_element(A product, A spread, A shift, T* to_center,
                                       T* to_radius) const {
    Box<A> box{product + shift, kSound ? rounding->after(spread, shift) : spread};
    if (kRelu) box = box_relu(box, kSound);
    store_box(box, kSound, to_center, to_radius);
  }

  template <bool kRelu, bool kSound>
  void store(const DualTile<A>& tile) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const A *FUSEE_RESTRICT product = tile.at(0, r), *FUSEE_RESTRICT spread = tile.at(1, r);
      const A* FUSEE_RESTRICT shift = bias + tile.column;
      const int64_t at = (tile.row + r) * width + tile.column;
      T *FUSEE_RESTRICT to_center = center + at, *FUSEE_RESTRICT to_radius = radius + at;
#pragma omp simd
      for (int64_t c = 0; c < tile.columns; ++c)
        store_element<kRelu, kSound>(product[c], spread[c], shift[c], to_center + c, to_radius + c);
    }
  }

  void operator()(const DualTile<A>& tile) const {
    if (relu)
      rounding != nullptr ? store<true, true>(tile) : store<true, false>(tile);
    else
      rounding != nullptr ? store<false, true>(tile) : store<false, false>(tile);
  }
};

// The lines of a weight from its rows.
template <typename T>
struct WeightLines {
  const T* weight;
  int64_t in;

  template <typename A>
  void operator()(int64_t begin, int64_t depth, int64_t column, int64_t columns,
                  A* const* lines) const {
    copy_lines(weight + begin * in + column, in, depth, columns, lines[0]);
  }
};

// The same with the weight's rows as columns.
template <typename T>
struct TransposedLines {
  const T* weight;
  int64_t in;

  template <typename A>
  void operator()(int64_t begin, int64_t depth, int64_t column, int64_t columns,
                  A* const* lines) const {
    load_lines(weight + column * in + begin, in, depth, Chunk{0, columns}, lines[0],
               kTileDepth * kTileLanes<A>, [](int64_t d) { return d * kTileLanes<A>; });
  }
};

std::tuple<Tensor, Tensor> interval_linear(const Tensor& center, const Tensor& radius,
                                           const Tensor& weight, const std::optional<Tensor>& bias,
                                           bool relu, bool sound, bool) {
  const Arguments call(center, radius, weight);
  const int64_t rows = call.rows, in = call.in, out = call.out;
  FUSEE_REQUIRE(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == out &&
                                      bias->scalar_type() == weight.scalar_type()),
                "bias must have one entry per output, of the weight's dtype");
  const Tensor out_center = empty(center, {rows, out}, center.scalar_type());
  const Tensor out_radius = empty(center, {rows, out}, center.scalar_type());
  dispatch_floating(center.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const bool few = rows <= kFewBoxes;
    const auto rounding = Rounding<A>::of(few ? dot_roundings<A>(in) : product_roundings(in));
    const Rounding<A>* const outward = sound ? &rounding : nullptr;
    const PaddedRows<A, 2> boxes(rows, in, [&](int64_t row, A* const* to) {
      load_boxes(data<T>(call.center) + row * in, data<T>(call.radius) + row * in, in, outward, to);
    });
    std::vector<A> shift(out);
    if (bias.has_value()) widen(data<T>(as_contiguous(*bias)), out, shift.data());
    const T* const w = data<T>(call.weight);
    const StoreBoxes<T> store{
        shift.data(), relu, outward, mutable_data<T>(out_center), mutable_data<T>(out_radius), out};
    if (!few) {
      dual_product<A, true>({boxes.by_row(0), boxes.by_row(1)}, rows, in, out,
                            TransposedLines<T>{w, in}, store);
      return;
    }
    parallel_for(
        0, (out + kDotTask - 1) / kDotTask, grain(kDotTask * in), [&](int64_t begin, int64_t end) {
          DotTask<A> task(rows);
          for (int64_t f = begin * kDotTask; f < std::min(end * kDotTask, out); f += kDotTask)
            store(task.template compute<T, false>({w, nullptr, in}, f, out, rows_of(boxes)));
        });
  });
  return {out_center, out_radius};
}

// --- gradients ----------------------------------------------------------------------------------------
// A part of a matrix, to be asked for while something else is computed.
template <typename T>
Pieces part_of(const T* matrix, int64_t width, int64_t row, int64_t rows, int64_t column,
               int64_t columns) {
  constexpr int64_t kSize = sizeof(T);
  return {matrix + row * width + column, rows, width * kSize, 1, 0, columns * kSize};
}

template <typename T>
struct Gradients {
  using A = accumulate_t<T>;

  const Arguments& call;
  const PaddedRows<A, 2>& grads;  // of the products

  // Of centers (0) and radii (1), null where they are not wanted.
  void of_boxes(T* const (&to)[2]) const {
    const int64_t in = call.in, out = call.out;
    const T* const w = data<T>(call.weight);
    dual_product<A, true>(
        {grads.by_row(0), grads.by_row(1)}, call.rows, out, in, WeightLines<T>{w, in},
        [&](const DualTile<A>& tile) {
          for (int which = 0; which < 2; ++which)
            for (int64_t r = 0; to[which] != nullptr && r < tile.rows; ++r)
              narrow(tile.at(which, r), tile.columns,
                     to[which] + (tile.row + r) * in + tile.column);
        },
        [&](const DualTile<A>& tile, int64_t begin, int64_t calls) {
          // What the next lines are made of.
          const bool deeper = begin + kTileDepth < out;
          const int64_t row = deeper ? begin + kTileDepth : 0;
          const int64_t column = deeper ? tile.column : tile.column + tile.columns;
          return Ahead<false>(part_of(w, in, row, std::min(kTileDepth, out - row), column,
                                      std::min(kTaskColumns<A>, in - column)),
                              calls);
        });
  }

  void of_weight(T* to) const {
    const int64_t rows = call.rows, in = call.in, out = call.out;
    const T* const w = data<T>(call.weight);
    if (rows <= kSignedDepth)
      return signed_products<T>(grads, {data<T>(call.center), data<T>(call.radius)}, rows,
                                {w, to, in, out, in});
    const Turned<A> turned[2] = {{grads.row(0, 0), grads.stride(), rows, out},
                                 {grads.row(1, 0), grads.stride(), rows, out}};
    dual_product<A, false>(
        {turned[0].factor(), turned[1].factor()}, out, rows, in,
        [&](int64_t begin, int64_t depth, int64_t column, int64_t columns, A* const* lines) {
          const int64_t at = begin * in + column;
          copy_lines(data<T>(call.center) + at, in, depth, columns, lines[0]);
          copy_lines(data<T>(call.radius) + at, in, depth, columns, lines[1]);
        },
        [&](const DualTile<A>& tile) {
          for (int64_t r = 0; r < tile.rows; ++r) {
            const int64_t at = (tile.row + r) * in + tile.column;
            add_signed(tile.at(0, r), tile.at(1, r), w + at, tile.columns, to + at);
          }
        },
        [&](const DualTile<A>& tile, int64_t begin, int64_t calls) {
          const int64_t tile_rows = begin + kTileDepth < rows ? 0 : tile.rows;
          const auto pieces = [&](const T* matrix) {
            return part_of(matrix, in, tile.row, tile_rows, tile.column, tile.columns);
          };
          return [from = Ahead<false>(pieces(w), calls),
                  result = Ahead<true>(pieces(to), calls)]() mutable {
            from();
            result();
          };
        });
  }

  void of_bias(T* to) const {
    constexpr int64_t kColumns = 64, kRows = 256;
    const int64_t rows = call.rows, out = call.out;
    parallel_for(0, (out + kColumns - 1) / kColumns, grain(rows * kColumns),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t first = begin * kColumns; first < std::min(out, end * kColumns);
                        first += kColumns)
                     sum_columns<kColumns, kRows>(first, std::min(kColumns, out - first), to);
                 });
  }

 private:
  template <int64_t kColumns, int64_t kRows>
  void sum_columns(int64_t first, int64_t count, T* to) const {
    double total[kColumns] = {};
    for (int64_t row = 0; row < call.rows; row += kRows) {
      A sums[kColumns] = {};
      for (int64_t r = row; r < std::min(call.rows, row + kRows); ++r) {
        const A* FUSEE_RESTRICT from = grads.row(0, r) + first;
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) sums[c] += from[c];
      }
      for (int64_t c = 0; c < count; ++c) total[c] += sums[c];
    }
    for (int64_t c = 0; c < count; ++c) to[first + c] = static_cast<T>(static_cast<A>(total[c]));
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> interval_linear_backward(
    const Tensor& grad_center, const Tensor& grad_radius, const Tensor& center,
    const Tensor& radius, const Tensor& weight, const std::optional<Tensor>& out_center,
    const std::optional<Tensor>& out_radius, int64_t wanted, bool) {
  const Arguments call(center, radius, weight);
  const int64_t rows = call.rows, in = call.in, out = call.out;
  FUSEE_REQUIRE(out_center.has_value() == out_radius.has_value(),
                "out_center and out_radius must be given together");
  call.check_result(grad_center);
  call.check_result(grad_radius);
  if (out_center.has_value()) {
    call.check_result(*out_center);
    call.check_result(*out_radius);
  }
  const Tensor of_center = as_contiguous(grad_center), of_radius = as_contiguous(grad_radius);
  const std::optional<Tensor> result_center = as_contiguous(out_center),
                              result_radius = as_contiguous(out_radius);
  const auto result = [&](int bit, const Shape& shape) {
    return empty(center, wanted >> bit & 1 ? shape : Shape{0}, center.scalar_type());
  };
  const std::array<Tensor, 4> results{result(0, {rows, in}), result(1, {rows, in}),
                                      result(2, {out, in}), result(3, {out})};
  dispatch_floating(center.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Upstream<T> upstream{data<T>(of_center), data<T>(of_radius),
                               data_or_null<T>(result_center), data_or_null<T>(result_radius)};
    const PaddedRows<A, 2> grads(
        rows, out, [&](int64_t row, A* const* to) { upstream.load(row * out, out, to[0], to[1]); });
    const Gradients<T> gradients{call, grads};
    const auto to = [&](int which) {
      return wanted >> which & 1 ? mutable_data<T>(results[which]) : nullptr;
    };
    if (wanted & 3) gradients.of_boxes({to(0), to(1)});
    if (wanted & 4) gradients.of_weight(to(2));
    if (wanted & 8) gradients.of_bias(to(3));
  });
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) {
  m.impl("interval_linear", TORCH_BOX(&interval_linear));
  m.impl("interval_linear_backward", TORCH_BOX(&interval_linear_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
