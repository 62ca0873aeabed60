// Boxes through a scale and a shift of their channel on the CPU.

#include "bounds/boxes_cpu.h"
#include "core/buffers_cpu.h"
#include "core/lanes_cpu.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace {

// So many elements are a piece of work. In the accumulation type no more of them are summed.
constexpr int64_t kPiece = 1024;

// The tensor as lines: each of one channel, or where those would be short, each of the same channels.
struct Walk {
  int64_t channels, inner, elements;
  bool mixed;
  int64_t line, lines;

  Walk(int64_t outer, int64_t channels_, int64_t inner_)
      : channels(std::max<int64_t>(1, channels_)),
        inner(std::max<int64_t>(1, inner_)),
        elements(outer * channels_ * inner_) {
    constexpr int64_t kShort = 64;
    mixed = channels > 1 && inner < kShort;
    const int64_t period = channels * inner;
    line = mixed ? std::max<int64_t>(1, kPiece / period) * period : inner;
    lines = (elements + line - 1) / line;
  }

  int64_t pieces() const { return (line + kPiece - 1) / kPiece; }
  int64_t channel(int64_t in_line) const { return in_line / inner % channels; }

  // f(line, first element in the line, where that lies, count) for the pieces of a line.
  template <typename F>
  void piece(int64_t of_line, int64_t piece, const F& f) const {
    const int64_t first = piece * kPiece, at = of_line * line + first;
    f(of_line, first, at, std::min({kPiece, line - first, elements - at}));
  }
};

// --- what a piece is multiplied with ------------------------------------------------------------------
template <typename A>
struct Same {
  static constexpr bool kIdentity = true, kEach = false;
  A scale(int64_t) const { return A(1); }
  A shift(int64_t) const { return A(0); }
};
template <typename A>
struct One {
  static constexpr bool kIdentity = false, kEach = false;
  A scale_, shift_;
  A scale(int64_t) const { return scale_; }
  A shift(int64_t) const { return shift_; }
};
template <typename A>
struct Each {
  static constexpr bool kIdentity = false, kEach = true;
  const A* FUSEE_RESTRICT scale_;
  const A* FUSEE_RESTRICT shift_;
  A scale(int64_t i) const { return scale_[i]; }
  A shift(int64_t i) const { return shift_[i]; }
};

// Scales and shifts of the elements of a line, or of all channels.
template <typename A>
class Scales {
 public:
  Scales(const Walk& walk, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift)
      : walk_(walk),
        identity_(!scale.has_value() && !shift.has_value()),
        count_(walk.elements == 0 ? 0
               : walk.mixed       ? walk.line
                                  : walk.channels),
        space_(2 * count_) {
    const A *const scales = data_or_null<A>(scale), *const shifts = data_or_null<A>(shift);
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t channel = walk.mixed ? walk.channel(i) : i;
      space_.get()[i] = scales != nullptr ? scales[channel] : A(1);
      space_.get()[count_ + i] = shifts != nullptr ? shifts[channel] : A(0);
    }
  }

  // f with those of a piece.
  template <typename F>
  void visit(int64_t line, int64_t first, const F& f) const {
    const A *const scale = space_.get(), *const shift = scale + count_;
    if (walk_.mixed) return f(Each<A>{scale + first, shift + first});
    if (identity_) return f(Same<A>{});
    f(One<A>{scale[line % walk_.channels], shift[line % walk_.channels]});
  }

 private:
  const Walk& walk_;
  bool identity_;
  int64_t count_;
  Scratch<A> space_;
};

template <bool kRelu, bool kSound, typename T, typename By, typename A = accumulate_t<T>>
FUSEE_HOST_DEVICE void element_through(A center, A radius, const By& by, int64_t i, T* to_center,
                                       T* to_radius) {
  const A r = checked_radius(radius);
  Box<A> box{r == r ? center : r, r};
  if (!By::kIdentity) box = box_affine(box, by.scale(i), by.shift(i), kSound);
  if (kRelu) box = box_relu(box, kSound);
  store_box(box, kSound, to_center, to_radius);
}

template <bool kRelu, bool kSound, typename T, typename By>
void through(const T* FUSEE_RESTRICT center, const T* FUSEE_RESTRICT radius, int64_t count,
             const By& by, T* FUSEE_RESTRICT to_center, T* FUSEE_RESTRICT to_radius) {
  using A = accumulate_t<T>;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    element_through<kRelu, kSound>(static_cast<A>(center[i]), static_cast<A>(radius[i]), by, i,
                                   to_center + i, to_radius + i);
}

struct Arguments {
  Tensor center, radius;
  std::optional<Tensor> scale;
  int64_t outer, channels, inner;

  Arguments(const Tensor& center_, const Tensor& radius_, const std::optional<Tensor>& scale_)
      : center(as_contiguous(center_)),
        radius(as_contiguous(radius_)),
        scale(as_contiguous(scale_)) {
    FUSEE_REQUIRE(center.dim() == 3, "expected center (outer, channels, inner)");
    check_same(radius);
    outer = center.size(0);
    channels = center.size(1);
    inner = center.size(2);
    check_channels(scale);
  }

  void check_same(const Tensor& tensor) const {
    FUSEE_REQUIRE(tensor.dim() == 3 && tensor.size(0) == center.size(0) &&
                      tensor.size(1) == center.size(1) && tensor.size(2) == center.size(2) &&
                      tensor.scalar_type() == center.scalar_type(),
                  "radius, results and their gradients must have center's shape and dtype");
  }
  void check_channels(const std::optional<Tensor>& tensor) const {
    FUSEE_REQUIRE(
        !tensor.has_value() || (tensor->dim() == 1 && tensor->size(0) == channels &&
                                tensor->scalar_type() == accumulate_type(center.scalar_type())),
        "scale and shift must have one entry per channel, of the accumulation type");
  }
};

std::tuple<Tensor, Tensor> interval_affine(const Tensor& center, const Tensor& radius,
                                           const std::optional<Tensor>& scale,
                                           const std::optional<Tensor>& shift, bool relu,
                                           bool sound) {
  const Arguments call(center, radius, scale);
  call.check_channels(shift);
  const Tensor out_center = make_like(call.center), out_radius = make_like(call.radius);
  const bool identity = !scale.has_value() && !shift.has_value();
  // Without scales all channels are one.
  const Walk walk =
      identity ? Walk(1, 1, call.center.numel()) : Walk(call.outer, call.channels, call.inner);
  dispatch_floating(center.scalar_type(), [&]<typename T>(T) {
    const Scales<accumulate_t<T>> scales(walk, call.scale, as_contiguous(shift));
    const T *const c = data<T>(call.center), *const r = data<T>(call.radius);
    T *const to_c = mutable_data<T>(out_center), *const to_r = mutable_data<T>(out_radius);
    const auto run = [&]<bool kRelu, bool kSound>() {
      const int64_t pieces = walk.pieces();
      const auto piece = [&](int64_t line, int64_t first, int64_t at, int64_t count) {
        scales.visit(line, first, [&](const auto& by) {
          through<kRelu, kSound>(c + at, r + at, count, by, to_c + at, to_r + at);
        });
      };
      parallel_for(0, walk.lines * pieces, grain(std::min(kPiece, walk.line)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i)
                       walk.piece(i / pieces, i % pieces, piece);
                   });
    };
    if (relu)
      sound ? run.template operator()<true, true>() : run.template operator()<true, false>();
    else
      sound ? run.template operator()<false, true>() : run.template operator()<false, false>();
  });
  return {out_center, out_radius};
}

// --- gradients ----------------------------------------------------------------------------------------
// Sums in groups of lines: of each element of a line where channels are mixed, else of each piece of a line.
struct SumLayout {
  const Walk& walk;

  int64_t group() const { return walk.mixed ? 256 : 1; }
  int64_t groups() const { return (walk.lines + group() - 1) / group(); }
  int64_t per_group() const { return walk.mixed ? walk.line : walk.pieces(); }
  int64_t size() const { return groups() * per_group(); }
  int64_t channel(int64_t group, int64_t i) const {
    return walk.mixed ? walk.channel(i) : group % walk.channels;
  }

  void sum_channels(const double* sums, std::vector<double>& totals) const {
    for (int64_t g = 0; g < groups(); ++g)
      for (int64_t i = 0; i < per_group(); ++i) totals[channel(g, i)] += *sums++;
  }
};

// One piece of every line of a group.
template <typename T>
struct PieceGradients {
  using A = accumulate_t<T>;

  const T *center, *radius;
  Upstream<T> upstream;
  T *grad_center, *grad_radius;  // or null
  bool parameters;

  A before_center[kPiece] = {}, before_radius[kPiece] = {};
  // What the gradients of scales and shifts are sums of: of each element, or in the first of all.
  A of_scale[kPiece] = {}, of_shift[kPiece] = {};

  template <typename By>
  void add(int64_t at, int64_t count, const By& by) {
    upstream.load(at, count, before_center, before_radius);
    if (parameters) add_terms(at, count, by);
    if (grad_center != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) before_center[i] *= by.scale(i);
      narrow(before_center, count, grad_center + at);
    }
    if (grad_radius != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) before_radius[i] *= absolute(by.scale(i));
      narrow(before_radius, count, grad_radius + at);
    }
  }

  template <typename By>
  void add_terms(int64_t at, int64_t count, const By& by) {
    const T *FUSEE_RESTRICT c = center + at, *FUSEE_RESTRICT r = radius + at;
    if constexpr (By::kEach) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        of_scale[i] += term(c, r, i, by);
        of_shift[i] += before_center[i];
      }
    } else {
      A scales = 0, shifts = 0;
#pragma omp simd reduction(+ : scales, shifts)
      for (int64_t i = 0; i < count; ++i) {
        scales += term(c, r, i, by);
        shifts += before_center[i];
      }
      of_scale[0] = scales;
      of_shift[0] = shifts;
    }
  }

  template <typename By>
  FUSEE_HOST_DEVICE A term(const T* c, const T* r, int64_t i, const By& by) const {
    return before_center[i] * static_cast<A>(c[i]) +
           sign_of(by.scale(i)) * before_radius[i] * static_cast<A>(r[i]);
  }
};

template <typename T>
void gradients(const Arguments& call, const Walk& walk, const Upstream<T>& upstream,
               const std::array<Tensor, 4>& results, int64_t wanted) {
  using A = accumulate_t<T>;
  const Scales<A> scales(walk, call.scale, std::nullopt);
  const SumLayout layout{walk};
  const bool parameters = wanted & 12;
  const Scratch<double> space(parameters ? 2 * layout.size() : 0);
  double* const sums[2] = {space.get(), space.get() + layout.size()};
  const auto to = [&](int which) {
    return wanted >> which & 1 ? mutable_data<T>(results[which]) : nullptr;
  };
  const int64_t pieces = walk.pieces(), group = layout.group();
  parallel_for(
      0, layout.groups() * pieces, grain(group * std::min(kPiece, walk.line)),
      [&](int64_t begin, int64_t end) {
        PieceGradients<T> piece{
            data<T>(call.center), data<T>(call.radius), upstream, to(0), to(1), parameters};
        for (int64_t i = begin; i < end; ++i) {
          const int64_t g = i / pieces, first = i % pieces * kPiece;
          if (walk.mixed) {
            std::fill_n(piece.of_scale, kPiece, 0);
            std::fill_n(piece.of_shift, kPiece, 0);
          }
          for (int64_t line = g * group; line < std::min(walk.lines, (g + 1) * group); ++line)
            walk.piece(line, i % pieces, [&](int64_t, int64_t, int64_t at, int64_t count) {
              scales.visit(line, first, [&](const auto& by) { piece.add(at, count, by); });
            });
          if (!parameters) continue;
          const int64_t count = walk.mixed ? std::min(kPiece, walk.line - first) : 1;
          const int64_t at = walk.mixed ? g * walk.line + first : i;
          std::copy_n(piece.of_scale, count, sums[0] + at);
          std::copy_n(piece.of_shift, count, sums[1] + at);
        }
      });
  for (int which = 0; which < 2; ++which) {
    if (!(wanted >> (2 + which) & 1)) continue;
    std::vector<double> totals(call.channels);
    layout.sum_channels(sums[which], totals);
    for (int64_t channel = 0; channel < call.channels; ++channel)
      mutable_data<A>(results[2 + which])[channel] = static_cast<A>(totals[channel]);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> interval_affine_backward(
    const Tensor& grad_center, const Tensor& grad_radius, const Tensor& center,
    const Tensor& radius, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& out_center, const std::optional<Tensor>& out_radius,
    int64_t wanted) {
  const Arguments call(center, radius, scale);
  FUSEE_REQUIRE(out_center.has_value() == out_radius.has_value(),
                "out_center and out_radius must be given together");
  call.check_same(grad_center);
  call.check_same(grad_radius);
  if (out_center.has_value()) {
    call.check_same(*out_center);
    call.check_same(*out_radius);
  }
  const Tensor of_center = as_contiguous(grad_center), of_radius = as_contiguous(grad_radius);
  const std::optional<Tensor> result_center = as_contiguous(out_center),
                              result_radius = as_contiguous(out_radius);
  const Shape whole{call.outer, call.channels, call.inner};
  const auto result = [&](int bit, const Shape& shape, ScalarType type) {
    return empty(center, wanted >> bit & 1 ? shape : Shape{0}, type);
  };
  const ScalarType type = center.scalar_type(), sums = accumulate_type(type);
  const Shape of_channels{call.channels};
  const std::array<Tensor, 4> results{result(0, whole, type), result(1, whole, type),
                                      result(2, of_channels, sums), result(3, of_channels, sums)};
  const Walk walk(call.outer, call.channels, call.inner);
  dispatch_floating(center.scalar_type(), [&]<typename T>(T) {
    gradients<T>(call, walk,
                 {data<T>(of_center), data<T>(of_radius), data_or_null<T>(result_center),
                  data_or_null<T>(result_radius)},
                 results, wanted);
  });
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusee, CPU, m) {
  m.impl("interval_affine", TORCH_BOX(&interval_affine));
  m.impl("interval_affine_backward", TORCH_BOX(&interval_affine_backward));
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
