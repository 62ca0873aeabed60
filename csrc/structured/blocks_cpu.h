// What the block-diagonal and the Monarch product share: weights as factors, lines of a chunk of
// tokens, the gradients of a factor, and how work is split.
#pragma once

#include "core/buffers_cpu.h"
#include "core/lines_cpu.h"
#include "structured/monarch.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// Lines of a chunk: those of a tile one after another, then those of the next.
template <typename A>
struct Features {
  A* data;
  int64_t lines;

  static int64_t size(int64_t lines, const Chunk& chunk) {
    return lines * chunk.tiles<A>() * kTileLanes<A>;
  }
  int64_t tile_stride() const { return lines * kTileLanes<A>; }
  A* line(int64_t i) const { return data + i * kTileLanes<A>; }
  // For a product over every step-th line from the first.
  Lines<A> from(int64_t first) const { return {line(first), kTileLanes<A>, tile_stride()}; }

  template <typename T>
  void load(const T* input, int64_t row_stride, const Chunk& chunk) const {
    load_lines(input, row_stride, lines, chunk, data, tile_stride(),
               [](int64_t c) { return c * kTileLanes<A>; });
  }
  template <typename T>
  void store(const Chunk& chunk, const A* bias, T* output, int64_t row_stride) const {
    store_lines(data, tile_stride(), lines, chunk, bias, output, row_stride);
  }
};

template <typename A>
struct Weight {
  Blocks shape;
  const A* data;

  // For a block's outputs from its inputs, and for the gradients the other way.
  Factor<A> forward(int64_t block) const {
    return {data + block * shape.out * shape.in, shape.in, 1};
  }
  Factor<A> backward(int64_t block) const {
    return {data + block * shape.out * shape.in, 1, shape.in};
  }
};

// The gradient of a weight, summed over chunks in their order: in the result itself where its rows are
// whole vectors of the accumulation type, else in memory of its own.
template <typename T>
class WeightGradient {
 public:
  using A = accumulate_t<T>;

  WeightGradient(const Tensor& like, const Blocks& shape, bool wanted)
      : result(empty(like, wanted ? Shape{shape.count, shape.out, shape.in} : Shape{0},
                     like.scalar_type())),
        shape_(shape),
        width_((shape.in + kLanes<A> - 1) / kLanes<A> * kLanes<A>) {
    if (!wanted) return;
    if (in_place()) {
      sums_ = reinterpret_cast<A*>(mutable_data<T>(result));
    } else {
      space_.emplace(shape.count * shape.out * width_);
      sums_ = space_->get();
    }
  }

  // Rows of inputs, one for each token, as wide as `add` takes them.
  int64_t width() const { return width_; }

  void add(int64_t block, const Chunk& chunk, const Lines<A>& grad, const A* inputs) const {
    A* sums = sums_ + block * shape_.out * width_;
    const Factor<A> factor{grad.data, grad.line_stride, 1, kTileLanes<A>, grad.tile_stride};
    multiply(
        factor, shape_.out, chunk.count, Lines<A>{inputs, width_, kTileLanes<A>},
        width_ / kLanes<A>, [&](int64_t f) { return sums + f * width_; }, kTileLanes<A>,
        chunk.first != 0);
  }

  Tensor finish(int64_t rows) const {
    if (rows == 0) {
      Tensor zeros = result;
      return torch::stable::zero_(zeros);
    }
    if (space_.has_value()) {
      T* to = mutable_data<T>(result);
      parallel_for(0, shape_.count * shape_.out, grain(shape_.in), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          for (int64_t i = 0; i < shape_.in; ++i)
            to[row * shape_.in + i] = static_cast<T>(sums_[row * width_ + i]);
      });
    }
    return result;
  }

 private:
  Tensor result;
  Blocks shape_;
  int64_t width_;
  std::optional<Scratch<A>> space_;
  A* sums_ = nullptr;

  bool in_place() const { return std::is_same_v<T, A> && width_ == shape_.in; }
};

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& input, int64_t width) {
  FUSEE_REQUIRE(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == width &&
                                      bias->scalar_type() == input.scalar_type()),
                "bias must have one entry per output, of the input's dtype");
}

inline void check_grad(const Tensor& grad, const Tensor& input, int64_t width) {
  FUSEE_REQUIRE(grad.dim() == 2 && grad.size(0) == input.size(0) && grad.size(1) == width &&
                    grad.scalar_type() == input.scalar_type(),
                "grad must have the output's shape and dtype");
}

// How many blocks go through a computation together, so that narrow ones fill vectors.
inline int64_t blocks_at_once(const Blocks& shape) {
  return std::max<int64_t>(1, 64 / std::max<int64_t>({1, shape.in, shape.out}));
}

// The data of the gradients of a block-diagonal product.
template <typename T>
struct BlockGradients {
  using A = accumulate_t<T>;

  Weight<A> weight;
  const T* input;
  T* grad_input;                         // or null
  const WeightGradient<T>* grad_weight;  // or null

  // grad(b) are the lines of the output's gradient of block first + b.
  template <typename Grad>
  void add(const Chunk& chunk, int64_t first, int64_t count, const Grad& grad) const {
    const Blocks& shape = weight.shape;
    const int64_t columns = count * shape.in, row_stride = shape.width_in();
    if (grad_weight != nullptr) {
      const int64_t width = grad_weight->width();
      Scratch<A> rows(chunk.count * width);
      for (int64_t b = 0; b < count; ++b) {
        const T* from = input + chunk.first * row_stride + (first + b) * shape.in;
        for (int64_t i = 0; i < chunk.count; ++i) {
          A* FUSEE_RESTRICT to = rows.get() + i * width;
          const T* FUSEE_RESTRICT row = from + i * row_stride;
#pragma omp simd
          for (int64_t c = 0; c < shape.in; ++c) to[c] = static_cast<A>(row[c]);
          for (int64_t c = shape.in; c < width; ++c) to[c] = A(0);
        }
        grad_weight->add(first + b, chunk, grad(b), rows.get());
      }
    }
    if (grad_input != nullptr) {
      Scratch<A> space(Features<A>::size(columns, chunk));
      const Features<A> lines{space.get(), columns};
      for (int64_t b = 0; b < count; ++b)
        multiply(
            weight.backward(first + b), shape.in, shape.out, grad(b), chunk.vectors<A>(),
            [&](int64_t f) { return lines.line(b * shape.in + f); }, lines.tile_stride(), false);
      lines.store(chunk, static_cast<const A*>(nullptr), grad_input + first * shape.in, row_stride);
    }
  }
};

template <typename F>
void for_each_chunk(int64_t rows, int64_t tokens, const F& f) {
  for (int64_t first = 0; first < rows; first += tokens)
    f(Chunk{first, std::min(tokens, rows - first)});
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
