// What the kernels of the operator in a metric of elements work on: the table of tensors, and the numbers kept in
// device memory for each group and scope.
#pragma once

#include "core/cuda/table.h"
#include "prox/metric_envelope.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

constexpr int kScopeThreads = 512;
// Shorter rows are read across, a column by each thread.
constexpr int64_t kLongRow = 64;
constexpr int64_t kColumnPart = 128;
// A tensor. Its parts are the sums of ranges of rows, or of columns over a range of the outer dimension.
struct MetricEntry : Share {
  int64_t first_part;
  int64_t first_group;  // among those of all scopes
  int64_t outer, groups, inner;
  void* v;
  const void* H;
  int32_t scope;
  ScalarType type;
  bool float_metric;  // of half types
  bool wide;          // whether the scope has tensors of float64

  FUSEE_HOST_DEVICE bool columns() const { return inner < kLongRow; }
  FUSEE_HOST_DEVICE int64_t width() const { return groups * inner; }
  int64_t tiles() const { return (width() + kTableThreads - 1) / kTableThreads; }
  int64_t blocks() const { return columns() ? ranges * tiles() : Share::blocks(); }

  // How many parts a group has, and where.
  FUSEE_HOST_DEVICE int64_t ranges_of_row() const { return ranges == 0 ? 1 : ranges; }
  FUSEE_HOST_DEVICE int64_t parts_of_group() const {
    return columns() ? ranges * inner : outer * ranges_of_row();
  }
  FUSEE_HOST_DEVICE int64_t parts() const { return parts_of_group() * groups; }
  FUSEE_HOST_DEVICE int64_t part(int64_t group, int64_t i) const {
    const int64_t in_row = columns() ? inner : ranges_of_row();
    return first_part + (i / in_row * groups + group) * in_row + i % in_row;
  }
};

// The numbers that the kernels keep of each group, all of a kind one after another.
enum Field : int {
  kScaleOfC,
  kSize,
  kMean,
  kFirst,
  kMost,
  kLast,
  kLeast,
  kKey,
  kShare,
  kAlpha,
  kBeta,
  kUsed,          // whether the next pass sums over the group
  kCoefficients,  // of its MetricCurve
  kFields = kCoefficients + MetricCurve<float>::kCoefficients
};
// And of each scope.
enum OfScope : int { kSettled, kEta, kNumbersOfScope };

struct MetricState {
  Global<double> numbers, parts;
  Global<const double> weights, k, lam;
  Global<int64_t> left;
  int64_t groups, parts_count;
  Form form;

  FUSEE_DEVICE double get(Field field, int64_t group, int offset = 0) const {
    return load(numbers, (field + offset) * groups + group);
  }
  FUSEE_DEVICE void set(Field field, int64_t group, double value, int offset = 0) const {
    store(numbers, (field + offset) * groups + group, value);
  }
  FUSEE_DEVICE int64_t at(OfScope field, int64_t scope) const {
    return kFields * groups + scope * kNumbersOfScope + field;
  }
  FUSEE_DEVICE bool settled(int64_t scope) const { return load(numbers, at(kSettled, scope)) != 0; }

  // A group but for what a pass finds.
  FUSEE_DEVICE MetricGroup bare(int64_t group, int64_t scope) const {
    return MetricGroup(weights ? load(weights, group) : 1.0, load(lam, scope),
                       form == Form::kDebiased);
  }
  FUSEE_DEVICE MetricGroup group(int64_t group, int64_t scope) const {
    MetricGroup g = bare(group, scope);
    g.size = get(kSize, group);
    g.mean = get(kMean, group);
    g.first = get(kFirst, group);
    g.most = get(kMost, group);
    g.last = get(kLast, group);
    g.least = get(kLeast, group);
    return g;
  }
};

// Calls f(T{}, U{}) with values of the types of an entry's tensor and metric; the whole block takes the same branch.
template <typename F>
FUSEE_DEVICE void by_types(const MetricEntry& entry, const F& f) {
  switch (entry.type) {
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Half:
      return entry.float_metric ? f(Half{}, float{}) : f(Half{}, Half{});
    default:
      return entry.float_metric ? f(BFloat16{}, float{}) : f(BFloat16{}, BFloat16{});
  }
}

template <typename T, typename Void>
FUSEE_DEVICE Global<T> memory_of(Void* memory, [[maybe_unused]] const MetricEntry& entry) {
  Global<T> all{static_cast<T*>(memory)};
#if defined(FUSEE_EMULATED)
  all.size = entry.outer * entry.width();
#endif
  return all;
}

// Of two types that are read side by side.
template <typename T, typename U>
constexpr int kWidth = 16 / static_cast<int>(sizeof(T) > sizeof(U) ? sizeof(T) : sizeof(U));

// The part of the columns that a thread works on.
struct Column {
  int64_t column, begin, end;  // of the outer dimension
  int64_t range;

  FUSEE_DEVICE Column(const MetricEntry& entry, int block) {
    const int64_t tiles = (entry.width() + kTableThreads - 1) / kTableThreads;
    const int64_t local = block - entry.first_block;
    range = local / tiles;
    column = local % tiles * kTableThreads + thread_rank();
    const int64_t share = (entry.outer + entry.ranges - 1) / entry.ranges;
    begin = range * share;
    end = begin + share < entry.outer ? begin + share : entry.outer;
  }
};

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
