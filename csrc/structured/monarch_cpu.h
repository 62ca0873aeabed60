// The parts of a Monarch product on the CPU. The tokens of a chunk go through both factors while the
// middle lies in cache as lines of tokens; a permutation is which line is written.
#pragma once

#include "core/ahead_cpu.h"
#include "structured/blocks_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// Part of the second factor: some of its blocks, with some of each one's outputs.
struct Part {
  int64_t block, blocks, output, outputs;
};

// Parts whose columns of the output are vectors in memory: whole vectors of blocks, or all blocks. They
// have about so many lines; from the width of the output on, all outputs of their blocks.
template <typename A>
class Parts {
 public:
  explicit Parts(const Blocks& shape, int64_t lines) : shape_(shape) {
    groups_ = std::max<int64_t>(1, shape.count / kAtOnce);
    step_ = std::clamp<int64_t>(lines / std::max<int64_t>(1, most_blocks()), 1,
                                std::max<int64_t>(1, shape.out));
    steps_ = std::max<int64_t>(1, (shape.out + step_ - 1) / step_);
  }

  int64_t count() const { return shape_.count == 0 ? 0 : groups_ * steps_; }
  Part operator[](int64_t i) const {
    const int64_t group = i / steps_, block = group * kAtOnce, output = i % steps_ * step_;
    return {block, group + 1 == groups_ ? shape_.count - block : kAtOnce, output,
            std::min(step_, shape_.out - output)};
  }
  int64_t most_blocks() const { return groups_ == 1 ? shape_.count : 2 * kAtOnce; }
  bool all_blocks() const { return groups_ == 1; }

 private:
  static constexpr int64_t kAtOnce = 32;

  Blocks shape_;
  int64_t groups_, step_, steps_;
};

// The lines of a chunk between the factors, as inputs of the second: those of a block together.
template <typename A>
struct Middle {
  A* data;
  MonarchShape shape;
  Chunk chunk;

  static int64_t size(const MonarchShape& shape, const Chunk& chunk) {
    return Features<A>::size(shape.middle(), chunk);
  }
  Features<A> block(int64_t block) const {
    const int64_t lines = shape.second.in;
    return {data + block * Features<A>::size(lines, chunk), lines};
  }
};

// The same as outputs of the first.
template <typename A>
struct MiddleGrad {
  A* data;
  MonarchShape shape;
  Chunk chunk;

  Features<A> block(int64_t block) const {
    const int64_t lines = shape.first.out;
    return {data + block * Features<A>::size(lines, chunk), lines};
  }
};

// Pieces of `columns` columns in each of a chunk's rows of a matrix, from a column on.
template <typename T>
Pieces rows_of(const T* matrix, const Chunk& chunk, int64_t row_stride, int64_t column,
               int64_t count, int64_t stride, int64_t columns) {
  constexpr int64_t bytes = sizeof(T);
  return {matrix + chunk.first * row_stride + column,
          columns > 0 ? chunk.count : 0,
          row_stride * bytes,
          count,
          stride * bytes,
          columns * bytes};
}

template <typename T>
struct Monarch {
  using A = accumulate_t<T>;

  MonarchShape shape;
  Widened<T> w1, w2;
  Weight<A> first, second;
  const T* input;

  Monarch(const MonarchShape& shape_, const Tensor& w1_, const Tensor& w2_, const Tensor& input_)
      : shape(shape_),
        w1(w1_),
        w2(w2_),
        first{shape.first, w1.get()},
        second{shape.second, w2.get()},
        input(data<T>(input_)) {}

  // The first factor's blocks [begin, end).
  void to_middle(const Chunk& chunk, int64_t begin, int64_t end, const Middle<A>& middle) const {
    const Blocks& blocks = shape.first;
    const int64_t at_once = blocks_at_once(blocks);
    InputWalk walk(shape);
    Scratch<A> space(Features<A>::size(at_once * blocks.in, chunk));
    for (int64_t block = begin; block < end; block += at_once) {
      const int64_t count = std::min(at_once, end - block);
      const Features<A> x{space.get(), count * blocks.in};
      x.load(input + block * blocks.in, blocks.width_in(), chunk);
      const int64_t next = std::min(at_once, end - block - count);
      Ahead<false> ahead(rows_of(input, chunk, blocks.width_in(), (block + count) * blocks.in, 1, 0,
                                 next * blocks.in),
                         count * tiles_of<A>(blocks.out, blocks.in, chunk.vectors<A>()));
      for (int64_t b = 0; b < count; ++b)
        multiply(
            first.forward(block + b), blocks.out, blocks.in, x.from(b * blocks.in),
            chunk.vectors<A>(),
            [&](int64_t f) {
              const Place place = walk((block + b) * blocks.out + f);
              return middle.block(place.block).line(place.index);
            },
            shape.second.in * kTileLanes<A>, false, ahead);
    }
  }

  // The second factor's parts [begin, end).
  void from_middle(const Chunk& chunk, const Parts<A>& parts, int64_t begin, int64_t end,
                   const Middle<A>& middle, const A* bias, T* output) const {
    const Blocks& blocks = shape.second;
    for (int64_t i = begin; i < end; ++i) {
      const Part part = parts[i];
      Scratch<A> space(Features<A>::size(part.blocks * part.outputs, chunk));
      const Features<A> y{space.get(), part.blocks * part.outputs};
      const int64_t column = shape.column(part.block, part.output), m = blocks.width_out();
      const bool whole = parts.all_blocks();
      Ahead<true> ahead(rows_of(output, chunk, m, column, whole ? 1 : part.outputs, blocks.count,
                                part.blocks * (whole ? part.outputs : 1)),
                        part.blocks * tiles_of<A>(part.outputs, blocks.in, chunk.vectors<A>()));
      for (int64_t b = 0; b < part.blocks; ++b) {
        Factor<A> factor = second.forward(part.block + b);
        factor.data += part.output * factor.feature_stride;
        multiply(
            factor, part.outputs, blocks.in, middle.block(part.block + b).from(0),
            chunk.vectors<A>(), [&](int64_t f) { return y.line(f * part.blocks + b); },
            y.tile_stride(), false, ahead);
      }
      if (whole) {
        y.store(chunk, bias ? bias + column : nullptr, output + column, m);
      } else {
        for (int64_t f = 0; f < part.outputs; ++f) {
          const int64_t at = column + f * blocks.count;
          store_lines(y.line(f * part.blocks), y.tile_stride(), part.blocks, chunk,
                      bias ? bias + at : nullptr, output + at, m);
        }
      }
    }
  }
};

// The gradient of the output as lines, those of a block together, from block `first` on.
template <typename A>
struct OutputGrad {
  A* data;
  int64_t first;
  Blocks shape;
  Chunk chunk;

  Features<A> block(int64_t block) const {
    return {data + (block - first) * Features<A>::size(shape.out, chunk), shape.out};
  }
};

// The gradients of the second factor, from lines of the output's gradient.
template <typename T>
struct SecondGradients {
  using A = accumulate_t<T>;

  const Monarch<T>& monarch;
  const T* grad;
  const WeightGradient<T>* grad_weight;  // or null
  bool middle_grad;

  // Parts [begin, end) of the gradient.
  void load(const Parts<A>& parts, int64_t begin, int64_t end, const OutputGrad<A>& u) const {
    const Blocks& blocks = monarch.shape.second;
    const int64_t m = blocks.width_out(), tile_stride = blocks.out * kTileLanes<A>;
    std::vector<int64_t> at;
    for (int64_t i = begin; i < end; ++i) {
      const Part part = parts[i];
      // Outputs of all blocks are one run of columns.
      const int64_t rows = parts.all_blocks() ? 1 : part.outputs,
                    outputs = part.outputs / std::max<int64_t>(1, rows);
      at.clear();
      for (int64_t f = 0; f < outputs; ++f)
        for (int64_t b = 0; b < part.blocks; ++b)
          at.push_back(b * Features<A>::size(blocks.out, u.chunk) + f * kTileLanes<A>);
      const int64_t columns = outputs * part.blocks;
      for (int64_t row = 0; row < rows; ++row) {
        A* to = u.block(part.block).line(part.output + row);
        load_lines(grad + monarch.shape.column(part.block, part.output + row), m, columns, u.chunk,
                   to, tile_stride, [&](int64_t c) { return at[c]; });
      }
    }
  }

  // Blocks [begin, end).
  void add(int64_t begin, int64_t end, const OutputGrad<A>& u, const Middle<A>& middle,
           const MiddleGrad<A>& o) const {
    const Blocks& blocks = monarch.shape.second;
    const Chunk& chunk = u.chunk;
    Scratch<A> rows(grad_weight != nullptr ? chunk.count * grad_weight->width() : 0);
    for (int64_t block = begin; block < end; ++block) {
      const Features<A> du = u.block(block);
      if (grad_weight != nullptr) {
        const Features<A> z = middle.block(block);
        const int64_t width = grad_weight->width();
        for (int64_t i = 0; i < chunk.count; ++i)
          std::fill(rows.get() + i * width + blocks.in, rows.get() + (i + 1) * width, A(0));
        z.store({0, chunk.count}, static_cast<const A*>(nullptr), rows.get(), width);
        grad_weight->add(block, chunk, du.from(0), rows.get());
      }
      if (!middle_grad) continue;
      multiply(
          monarch.second.backward(block), blocks.in, blocks.out, du.from(0), chunk.vectors<A>(),
          [&](int64_t f) {
            const Place place = monarch.shape.output_place(block, f);
            return o.block(place.block).line(place.index);
          },
          monarch.shape.first.out * kTileLanes<A>, false);
    }
  }
};

// How many tokens go through a product together: as many as the middle fits into the cache for, and more
// where blocks do not, so that each is read for more tokens. Most tiles of a gradient are twice those.
template <typename A>
int64_t chunk_tokens(const MonarchShape& shape, bool gradient) {
  constexpr int64_t kMiddleBytes = 512 * 1024, kBlockBytes = 64 * 1024, kMostTiles = 4;
  constexpr int64_t bytes = sizeof(A);
  const Blocks &first = shape.first, &second = shape.second;
  const int64_t block = std::max(first.out * first.in, second.out * second.in) * bytes;
  if (block >= kBlockBytes) return (gradient ? 2 : 1) * kMostTiles * kTileLanes<A>;
  const int64_t tile = std::max<int64_t>(1, shape.middle() * kTileLanes<A> * bytes);
  return std::clamp<int64_t>(kMiddleBytes / tile, gradient ? 2 : 1, kMostTiles) * kTileLanes<A>;
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
