// Who works on the problems of a call in CUDA, and what it has to do so: a thread, a block, or all blocks.
#pragma once

#include "core/cuda/kernel.h"
#include "core/cuda/torch_stream.h"
#include "prox/group_layout.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

constexpr int kRootThreads = 256;
constexpr int64_t kMostRemembered = 4096;  // groups that a block keeps in shared memory

// Who works on a problem: a thread where small problems are many, a block of one warp or more, or where groups are
// many and problems few all blocks, one problem after the other. Workers are what takes a group together.
enum class Worker { kThread, kBlock, kAllBlocks };
// How many blocks a multiprocessor must hold: two, of all, hide each other's latency.
constexpr int blocks_at_once(Worker worker) { return worker == Worker::kAllBlocks ? 2 : 1; }

// A structure of doubles, of which each is reduced: one latency for all.
template <int N>
struct Numbers {
  double data[N];
};
template <typename T>
using numbers_of = Numbers<static_cast<int>(sizeof(T) / sizeof(double))>;
template <typename Op>
struct Each {
  template <int N>
  FUSEE_DEVICE Numbers<N> operator()(const Numbers<N>& a, const Numbers<N>& b) const {
    Numbers<N> result;
    for (int i = 0; i < N; ++i) result.data[i] = Op{}(a.data[i], b.data[i]);
    return result;
  }
};

struct Block {
  const Shared<double>& scratch;  // of kScratch

  static constexpr int kMostNumbers = 5, kScratch = 32 * kMostNumbers;
  static constexpr int kLanes = 32;

  FUSEE_DEVICE int rank() const { return thread_rank(); }
  FUSEE_DEVICE int size() const { return thread_count(); }
  FUSEE_DEVICE int lane() const { return thread_rank() & 31; }
  template <typename T>
  FUSEE_DEVICE T sum(const T& own) const {
    return bit_cast<T>(reduce<Sum>(bit_cast<numbers_of<T>>(own), 0));
  }
  FUSEE_DEVICE double least(double own) const {
    return reduce<Minimum>(Numbers<1>{{own}}, std::numeric_limits<double>::infinity()).data[0];
  }
  // As block_reduce.
  template <typename Op, int N>
  FUSEE_DEVICE Numbers<N> reduce(Numbers<N> numbers, double identity) const {
    static_assert(N <= kMostNumbers);
    numbers = warp_reduce(numbers, Each<Op>{});
    const int warps = thread_count() >> 5;
    if (warps == 1) return numbers;
    __syncthreads();
    if (lane() == 0)
      for (int i = 0; i < N; ++i) scratch.store(i * 32 + (thread_rank() >> 5), numbers.data[i]);
    __syncthreads();
    for (int i = 0; i < N; ++i)
      numbers.data[i] = lane() < warps ? scratch.load(i * 32 + lane()) : identity;
    return warp_reduce(numbers, Each<Op>{});
  }
  FUSEE_DEVICE double lane_sum(double own) const { return warp_sum(own); }
  FUSEE_DEVICE double lane_most(double own) const { return warp_reduce(own, Maximum{}); }
  FUSEE_DEVICE void barrier() const { __syncthreads(); }
};
// A block that keeps what it knows of its groups.
template <typename A>
struct Remembering : Block {
  const Shared<Coefficients<A>>& memory;
  int64_t remembered;  // how many of the first groups

  FUSEE_DEVICE void keep(int64_t j, const Coefficients<A>& of) const {
    if (j < remembered) memory.store(j, of);
  }
  // What was kept before a barrier, or what `of` makes of j.
  template <typename Of>
  FUSEE_DEVICE Coefficients<A> recall(int64_t j, const Of& of) const {
    return j < remembered ? memory.load(j) : of(j);
  }
};
// The blocks of a cooperative launch. Each leaves its part of a sum, and after a barrier every warp adds all parts
// in the same order, so that all threads hold the same bits.
template <typename A>
struct AllBlocks : Block {
  Global<double> parts;
  Global<Coefficients<A>> memory;
  mutable int turn = 0;  // of two places for parts: one is free while others still read the other

  static constexpr int64_t parts_count(int64_t blocks) { return 2 * kMostNumbers * blocks; }

  FUSEE_DEVICE int rank() const {
    return static_cast<int>(blockIdx.x) * thread_count() + thread_rank();
  }
  FUSEE_DEVICE int size() const { return static_cast<int>(gridDim.x) * thread_count(); }
  template <typename T>
  FUSEE_DEVICE T sum(const T& own) const {
    return bit_cast<T>(over_blocks<Sum>(bit_cast<numbers_of<T>>(own), 0));
  }
  FUSEE_DEVICE double least(double own) const {
    return over_blocks<Minimum>(Numbers<1>{{own}}, std::numeric_limits<double>::infinity()).data[0];
  }
  FUSEE_DEVICE void barrier() const { grid_sync(); }
  FUSEE_DEVICE void keep(int64_t j, const Coefficients<A>& of) const { store(memory, j, of); }
  template <typename Of>
  FUSEE_DEVICE Coefficients<A> recall(int64_t j, const Of&) const {
    return load(memory, j);
  }

 private:
  template <typename Op, int N>
  FUSEE_DEVICE Numbers<N> over_blocks(Numbers<N> numbers, double identity) const {
    const int blocks = static_cast<int>(gridDim.x);
    const Global<double> here = parts + turn * kMostNumbers * blocks;
    turn = 1 - turn;
    numbers = reduce<Op>(numbers, identity);
    if (thread_rank() == 0)
      for (int i = 0; i < N; ++i) store(here, i * blocks + blockIdx.x, numbers.data[i]);
    grid_sync();
    for (double& number : numbers.data) number = identity;
    for (int block = lane(); block < blocks; block += kLanes)
      for (int i = 0; i < N; ++i)
        numbers.data[i] = Op{}(numbers.data[i], load(here, i * blocks + block));
    return warp_reduce(numbers, Each<Op>{});
  }
};
struct Alone {
  FUSEE_DEVICE int rank() const { return 0; }
  FUSEE_DEVICE int size() const { return 1; }
  FUSEE_DEVICE int lane() const { return 0; }
  static constexpr int kLanes = 1;
  template <typename T>
  FUSEE_DEVICE T sum(const T& own) const {
    return own;
  }
  FUSEE_DEVICE double least(double own) const { return own; }
  FUSEE_DEVICE double lane_sum(double own) const { return own; }
  FUSEE_DEVICE double lane_most(double own) const { return own; }
  FUSEE_DEVICE void barrier() const {}
  template <typename A>
  FUSEE_DEVICE void keep(int64_t, const Coefficients<A>&) const {}
  template <typename Of>
  FUSEE_DEVICE auto recall(int64_t j, const Of& of) const {
    return of(j);
  }
};

// What a launch's workers have beside their problems.
template <typename A>
struct WorkerMemory {
  int64_t batch;
  int64_t remembered;  // by a block in shared memory
  // All blocks'
  Global<double> parts;
  Global<Coefficients<A>> groups;
};

// Of the blocks of a cooperative launch.
template <typename A>
struct AllBlocksMemory {
  Tensor tensor;
  Global<double> parts;
  Global<Coefficients<A>> groups;

  AllBlocksMemory(const Tensor& like, int64_t blocks, int64_t groups_count) {
    constexpr int64_t kDoubles = sizeof(double), kGroup = sizeof(Coefficients<A>);
    const int64_t of_parts = AllBlocks<A>::parts_count(blocks);
    const int64_t of_groups = groups_count * kGroup / kDoubles;
    tensor = empty(like, {of_parts + of_groups}, ScalarType::Double);
    double* const memory = mutable_data<double>(tensor);
    parts = global(memory, of_parts);
    groups = global(reinterpret_cast<Coefficients<A>*>(memory + of_parts), groups_count);
  }
};

// All blocks take about as long for so many groups as one block does, most of it to wait for one another at each of the
// search's passes. Of several problems one block each works at the same time.
inline bool by_all_blocks(int64_t batch, int64_t groups) {
  constexpr int64_t kManyGroups = 16384;
  return groups > kManyGroups * batch;
}

// Launches a kernel whose blocks work together on `batch` problems of at most `groups` groups, and remember as many.
template <typename A, typename... P, typename... Arguments>
void launch_all_blocks(void (*kernel)(WorkerMemory<A>, P...), int64_t batch, int64_t groups,
                       int64_t remembered, const Tensor& like, Stream stream,
                       const Arguments&... arguments) {
  // Most devices hold so many, so that the order of the sums is the same on all.
  constexpr int64_t kMost = 256, kGroupsOfThread = 4;
  const int64_t wanted = std::clamp<int64_t>(groups / (kGroupsOfThread * kRootThreads), 1, kMost);
  const int64_t blocks = std::min<int64_t>(wanted, cooperative_blocks(kernel, kRootThreads, 0));
  const AllBlocksMemory<A> memory(like, blocks, remembered);
  launch_cooperative(kernel, blocks, kRootThreads, 0, stream,
                     WorkerMemory<A>{batch, 0, memory.parts, memory.groups}, arguments...);
}

// Launches kernel_of(worker) for the problems of a layout, with what its workers have, which is memory for the groups
// if they are to remember, and the arguments.
template <typename A, typename KernelOf, typename... Arguments>
void launch_workers(const Layout& l, const KernelOf& kernel_of, bool remember, const Tensor& like,
                    Stream stream, const Arguments&... arguments) {
  if (by_all_blocks(l.batch, l.groups)) {
    const auto kernel = kernel_of(std::integral_constant<Worker, Worker::kAllBlocks>{});
    const int64_t remembered = remember ? l.groups : 0;
    launch_all_blocks<A>(kernel, l.batch, l.groups, remembered, like, stream, arguments...);
  } else if (l.groups <= 32 && l.batch >= 256) {
    const auto kernel = kernel_of(std::integral_constant<Worker, Worker::kThread>{});
    launch(kernel, (l.batch + kRootThreads - 1) / kRootThreads, kRootThreads, 0, stream,
           WorkerMemory<A>{l.batch, 0, {}, {}}, arguments...);
  } else {
    const auto kernel = kernel_of(std::integral_constant<Worker, Worker::kBlock>{});
    const int64_t remembered = remember && l.groups <= kMostRemembered ? l.groups : 0;
    const size_t shared = static_cast<size_t>(remembered) * sizeof(Coefficients<A>);
    launch(kernel, l.batch, l.groups > 256 ? kRootThreads : 32, shared, stream,
           WorkerMemory<A>{l.batch, remembered, {}, {}}, arguments...);
  }
}

// Calls f(team, problem).
template <typename A, Worker kWorker, typename F>
FUSEE_DEVICE void for_problem(const WorkerMemory<A>& own, const F& f) {
  if constexpr (kWorker == Worker::kThread) {
    const int64_t problem = static_cast<int64_t>(blockIdx.x) * kRootThreads + thread_rank();
    if (problem < own.batch) f(Alone{}, problem);
  } else if constexpr (kWorker == Worker::kBlock) {
    FUSEE_SHARED(double, scratch, Block::kScratch);
    FUSEE_DYNAMIC_SHARED(Coefficients<A>, memory, own.remembered);
    f(Remembering<A>{{scratch}, memory, own.remembered}, static_cast<int64_t>(blockIdx.x));
  } else {
    FUSEE_SHARED(double, scratch, Block::kScratch);
    const AllBlocks<A> team{{scratch}, own.parts, own.groups};
    for (int64_t problem = 0; problem < own.batch; ++problem) f(team, problem);
  }
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
