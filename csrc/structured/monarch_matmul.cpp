// Monarch products on the CPU.

#include "structured/few_rows_cpu.h"
#include "structured/monarch_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

struct Arguments {
  Tensor input, w1, w2;
  MonarchShape shape;
  int64_t rows;

  Arguments(const Tensor& input_, const Tensor& w1_, const Tensor& w2_)
      : input(as_contiguous(input_)), w1(as_contiguous(w1_)), w2(as_contiguous(w2_)) {
    FUSEE_REQUIRE(input.dim() == 2 && w1.dim() == 3 && w2.dim() == 3,
                  "expected input (rows, k p), w1 (k, q, p) and w2 (l, s, r)");
    FUSEE_REQUIRE(
        input.scalar_type() == w1.scalar_type() && input.scalar_type() == w2.scalar_type(),
        "input, w1 and w2 must have one dtype");
    shape.first = {w1.size(0), w1.size(1), w1.size(2)};
    shape.second = {w2.size(0), w2.size(1), w2.size(2)};
    rows = input.size(0);
    FUSEE_REQUIRE(input.size(1) == shape.width_in() && shape.fits(),
                  "w1 does not fit the input, or w2 does not fit w1");
  }
};

// A few rows, whose time is that of reading the weights: in the weights' own dtype, once.
template <typename T, typename A = accumulate_t<T>>
void monarch_of_few(const Arguments& call, const A* bias, T* output) {
  const MonarchShape& shape = call.shape;
  const Blocks &first = shape.first, &second = shape.second;
  const int64_t rows = call.rows, n = shape.width_in(), h = shape.middle(), m = shape.width_out();
  const Scratch<A> space(rows * (n + h));
  A* const x = space.get();
  A* const middle = space.get() + rows * n;
  const T *const w1 = data<T>(call.w1), *const w2 = data<T>(call.w2);
  widen(data<T>(call.input), rows * n, x);
  parallel_for(0, first.count, grain(first.out * first.in), [&](int64_t begin, int64_t end) {
    InputWalk walk(shape);
    for (int64_t block = begin; block < end; ++block)
      multiply_few(w1 + block * first.out * first.in, first.out, first.in, x + block * first.in, n,
                   rows, [&](int64_t row, int64_t feature, int64_t count, const A* values) {
                     for (int64_t f = 0; f < count; ++f) {
                       const Place place = walk(block * first.out + feature + f);
                       middle[row * h + place.block * second.in + place.index] = values[f];
                     }
                   });
  });
  parallel_for(0, second.count, grain(second.out * second.in), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      multiply_few(
          w2 + block * second.out * second.in, second.out, second.in, middle + block * second.in, h,
          rows, [&](int64_t row, int64_t feature, int64_t count, const A* values) {
            for (int64_t f = 0; f < count; ++f) {
              const int64_t column = shape.column(block, feature + f);
              output[row * m + column] = static_cast<T>(values[f] + (bias ? bias[column] : A(0)));
            }
          });
  });
}

constexpr int64_t kOutputLines = 1024;

Tensor monarch_matmul(const Tensor& input, const Tensor& w1, const Tensor& w2,
                      const std::optional<Tensor>& bias, bool) {
  const Arguments call(input, w1, w2);
  const MonarchShape& shape = call.shape;
  check_bias(bias, input, shape.width_out());
  const Tensor output = empty(input, {call.rows, shape.width_out()}, input.scalar_type());
  dispatch_floating(input.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Widened<T> wide_bias(bias);
    const Parts<A> parts(shape.second, kOutputLines);
    T* to = mutable_data<T>(output);
    if (few_rows<T>(shape.first, call.rows) && few_rows<T>(shape.second, call.rows)) {
      monarch_of_few(call, wide_bias.get(), to);
      return;
    }
    const Monarch<T> monarch(shape, call.w1, call.w2, call.input);
    const int64_t tokens = chunk_tokens<A>(shape, false),
                  chunks = (call.rows + tokens - 1) / tokens;
    const int64_t threads = torch::stable::get_num_threads();
    if (chunks % threads == 0 || chunks >= 4 * threads) {
      parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        Scratch<A> space(Middle<A>::size(shape, {0, tokens}));
        for (int64_t i = begin; i < end; ++i) {
          const Chunk chunk{i * tokens, std::min(tokens, call.rows - i * tokens)};
          const Middle<A> middle{space.get(), shape, chunk};
          monarch.to_middle(chunk, 0, shape.first.count, middle);
          monarch.from_middle(chunk, parts, 0, parts.count(), middle, wide_bias.get(), to);
        }
      });
    } else {
      Scratch<A> space(Middle<A>::size(shape, {0, tokens}));
      for_each_chunk(call.rows, tokens, [&](const Chunk& chunk) {
        const Middle<A> middle{space.get(), shape, chunk};
        parallel_for(
            0, shape.first.count, grain(shape.first.out * shape.first.in * chunk.count / 8),
            [&](int64_t begin, int64_t end) { monarch.to_middle(chunk, begin, end, middle); });
        parallel_for(
            0, parts.count(),
            grain(shape.second.elements() / std::max<int64_t>(1, parts.count()) * chunk.count / 8),
            [&](int64_t begin, int64_t end) {
              monarch.from_middle(chunk, parts, begin, end, middle, wide_bias.get(), to);
            });
      });
    }
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> monarch_matmul_backward(const Tensor& grad, const Tensor& input,
                                                           const Tensor& w1, const Tensor& w2,
                                                           int64_t wanted, bool) {
  const bool input_grad = wanted & 1, w1_grad = wanted & 2, w2_grad = wanted & 4;
  const Arguments call(input, w1, w2);
  const MonarchShape& shape = call.shape;
  const Tensor upstream = as_contiguous(grad);
  check_grad(upstream, input, shape.width_out());
  const Tensor grad_input =
      empty(input, input_grad ? Shape{call.rows, shape.width_in()} : Shape{0}, input.scalar_type());
  return dispatch_floating(input.scalar_type(), [&]<typename T>(T) {
    using A = accumulate_t<T>;
    const Monarch<T> monarch(shape, call.w1, call.w2, call.input);
    WeightGradient<T> grad_w1(w1, shape.first, w1_grad), grad_w2(w2, shape.second, w2_grad);
    const BlockGradients<T> of_first{monarch.first, monarch.input,
                                     input_grad ? mutable_data<T>(grad_input) : nullptr,
                                     w1_grad ? &grad_w1 : nullptr};
    const SecondGradients<T> of_second{monarch, data<T>(upstream), w2_grad ? &grad_w2 : nullptr,
                                       input_grad || w1_grad};
    const Blocks &first = shape.first, &second = shape.second;
    const bool alone = torch::stable::get_num_threads() == 1;
    const Parts<A> parts(second, alone ? second.width_out() : kOutputLines);
    const int64_t tokens = std::min(chunk_tokens<A>(shape, true), call.rows);
    const Chunk whole{0, tokens};
    Scratch<A> z_space(w2_grad ? Middle<A>::size(shape, whole) : 0);
    Scratch<A> o_space(of_second.middle_grad ? Middle<A>::size(shape, whole) : 0);
    Scratch<A> u_space(
        Features<A>::size(second.out * (alone ? parts.most_blocks() : second.count), whole));
    for_each_chunk(call.rows, tokens, [&](const Chunk& chunk) {
      const Middle<A> z{z_space.get(), shape, chunk};
      const MiddleGrad<A> o{o_space.get(), shape, chunk};
      const int64_t share = std::max<int64_t>(1, chunk.count / 8);
      if (w2_grad)
        parallel_for(0, first.count, grain(first.out * first.in * share),
                     [&](int64_t begin, int64_t end) { monarch.to_middle(chunk, begin, end, z); });
      if (alone) {
        for (int64_t i = 0; i < parts.count(); ++i) {
          const OutputGrad<A> u{u_space.get(), parts[i].block, second, chunk};
          of_second.load(parts, i, i + 1, u);
          of_second.add(parts[i].block, parts[i].block + parts[i].blocks, u, z, o);
        }
      } else {
        const OutputGrad<A> u{u_space.get(), 0, second, chunk};
        parallel_for(0, parts.count(), 1,
                     [&](int64_t begin, int64_t end) { of_second.load(parts, begin, end, u); });
        parallel_for(0, second.count, grain(second.out * second.in * share),
                     [&](int64_t begin, int64_t end) { of_second.add(begin, end, u, z, o); });
      }
      if (!of_second.middle_grad) return;
      const int64_t at_once = blocks_at_once(first);
      parallel_for(0, (first.count + at_once - 1) / at_once,
                   grain(at_once * first.out * first.in * share), [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin * at_once; i < std::min(end * at_once, first.count);
                          i += at_once)
                       of_first.add(chunk, i, std::min(at_once, first.count - i),
                                    [&](int64_t b) { return o.block(i + b).from(0); });
                   });
    });
    return std::make_tuple(grad_input, grad_w1.finish(call.rows), grad_w2.finish(call.rows));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) {
  m.impl("monarch_matmul", TORCH_BOX(&monarch_matmul));
  m.impl("monarch_matmul_backward", TORCH_BOX(&monarch_matmul_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
