// Block-diagonal products on the CPU.

#include "structured/blocks_cpu.h"
#include "structured/few_rows_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

constexpr int64_t kChunkTiles = 4;

struct Arguments {
  Tensor input, weight;
  Blocks shape;
  int64_t rows;

  Arguments(const Tensor& input_, const Tensor& weight_)
      : input(as_contiguous(input_)), weight(as_contiguous(weight_)) {
    FUSEE_REQUIRE(input.dim() == 2 && weight.dim() == 3,
                  "expected input (rows, k p) and weight (k, q, p)");
    FUSEE_REQUIRE(input.scalar_type() == weight.scalar_type(),
                  "input and weight must have one dtype");
    shape = {weight.size(0), weight.size(1), weight.size(2)};
    rows = input.size(0);
    FUSEE_REQUIRE(input.size(1) == shape.width_in(), "the weight does not fit the input");
  }

  // Calls f(chunk, first block, number of blocks), in parallel over blocks, and over chunks where asked.
  template <typename A, typename F>
  void for_each(bool parallel_chunks, const F& f) const {
    const int64_t tokens = kChunkTiles * kTileLanes<A>, at_once = blocks_at_once(shape);
    const int64_t groups = (shape.count + at_once - 1) / at_once;
    const int64_t chunks = (rows + tokens - 1) / tokens;
    const int64_t work = std::min(tokens, rows) * at_once * shape.out * shape.in / 8;
    const auto run = [&](int64_t chunk, int64_t group) {
      const int64_t first = group * at_once;
      f(Chunk{chunk * tokens, std::min(tokens, rows - chunk * tokens)}, first,
        std::min(at_once, shape.count - first));
    };
    if (parallel_chunks) {
      parallel_for(0, chunks * groups, grain(work), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) run(i / groups, i % groups);
      });
    } else {
      parallel_for(0, groups, grain(work * chunks), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          for (int64_t chunk = 0; chunk < chunks; ++chunk) run(chunk, i);
      });
    }
  }
};

// A few rows, whose time is that of reading the weight: in its own dtype, once.
template <typename T, typename A = accumulate_t<T>>
void blocks_of_few(const Arguments& call, const A* bias, T* output) {
  const Blocks& shape = call.shape;
  const int64_t rows = call.rows, n = shape.width_in(), m = shape.width_out();
  const Scratch<A> x(rows * n);
  const T* const weight = data<T>(call.weight);
  widen(data<T>(call.input), rows * n, x.get());
  parallel_for(0, shape.count, grain(shape.out * shape.in), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      multiply_few(
          weight + block * shape.out * shape.in, shape.out, shape.in, x.get() + block * shape.in, n,
          rows, [&](int64_t row, int64_t feature, int64_t count, const A* values) {
            for (int64_t f = 0; f < count; ++f) {
              const int64_t column = block * shape.out + feature + f;
              output[row * m + column] = static_cast<T>(values[f] + (bias ? bias[column] : A(0)));
            }
          });
  });
}

Tensor block_diagonal_matmul(const Tensor& input, const Tensor& weight,
                             const std::optional<Tensor>& bias, bool) {
  const Arguments call(input, weight);
  const Blocks& shape = call.shape;
  check_bias(bias, input, shape.width_out());
  const Tensor output = empty(input, {call.rows, shape.width_out()}, input.scalar_type());
  dispatch_floating(input.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Widened<T> wide_bias(bias);
    if (few_rows<T>(shape, call.rows)) {
      blocks_of_few(call, wide_bias.get(), mutable_data<T>(output));
      return;
    }
    const Widened<T> wide(call.weight);
    const Weight<A> blocks{shape, wide.get()};
    call.for_each<A>(true, [&](const Chunk& chunk, int64_t first, int64_t count) {
      const int64_t in = count * shape.in, out = count * shape.out;
      Scratch<A> space(Features<A>::size(in + out, chunk));
      const Features<A> x{space.get(), in}, y{space.get() + Features<A>::size(in, chunk), out};
      x.load(data<T>(call.input) + first * shape.in, shape.width_in(), chunk);
      for (int64_t b = 0; b < count; ++b)
        multiply(
            blocks.forward(first + b), shape.out, shape.in, x.from(b * shape.in),
            chunk.vectors<A>(), [&](int64_t f) { return y.line(b * shape.out + f); },
            y.tile_stride(), false);
      y.store(chunk, wide_bias.from(first * shape.out), mutable_data<T>(output) + first * shape.out,
              shape.width_out());
    });
  });
  return output;
}

std::tuple<Tensor, Tensor> block_diagonal_matmul_backward(const Tensor& grad, const Tensor& input,
                                                          const Tensor& weight, int64_t wanted,
                                                          bool) {
  const bool input_grad = wanted & 1, weight_grad = wanted & 2;
  const Arguments call(input, weight);
  const Blocks& shape = call.shape;
  const Tensor upstream = as_contiguous(grad);
  check_grad(upstream, input, shape.width_out());
  const Tensor grad_input =
      empty(input, input_grad ? Shape{call.rows, shape.width_in()} : Shape{0}, input.scalar_type());
  return dispatch_floating(input.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Widened<T> wide(call.weight);
    WeightGradient<T> grad_weight(weight, shape, weight_grad);
    const BlockGradients<T> gradients{{shape, wide.get()},
                                      data<T>(call.input),
                                      input_grad ? mutable_data<T>(grad_input) : nullptr,
                                      weight_grad ? &grad_weight : nullptr};
    if (input_grad || weight_grad)
      call.for_each<A>(!weight_grad, [&](const Chunk& chunk, int64_t first, int64_t count) {
        Scratch<A> space(Features<A>::size(count * shape.out, chunk));
        const Features<A> g{space.get(), count * shape.out};
        g.load(data<T>(upstream) + first * shape.out, shape.width_out(), chunk);
        gradients.add(chunk, first, count, [&](int64_t b) { return g.from(b * shape.out); });
      });
    return std::make_tuple(grad_input, grad_weight.finish(call.rows));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) {
  m.impl("block_diagonal_matmul", TORCH_BOX(&block_diagonal_matmul));
  m.impl("block_diagonal_matmul_backward", TORCH_BOX(&block_diagonal_matmul_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
