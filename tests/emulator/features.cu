// What the device layer and the emulator must do right: blocks, memory, atomics, grids. (warps.cu,
// tensor.cu and arithmetic.cu are the rest of this program.) The host computes what each kernel
// should have found. Compiled by nvcc too, and on a machine with a GPU the same program checks the
// device against the same answers.
#include <thread>

#include "case.h"

using namespace fusee;
using namespace fusee::cuda;

namespace {

template <typename G>
concept Storable = requires(G memory) { store(memory, 0, 1.0f); };
static_assert(Storable<Global<float>>);
static_assert(!Storable<Global<const float>>, "inputs cannot be written");
static_assert(sizeof(Vector<Half, 8>) == 16 && alignof(Vector<float, 4>) == 16);

// ---- grids and blocks
// ---------------------------------------------------------------------------------

__global__ void number_threads(Global<int> out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int i = block * thread_count() + thread_rank();
  store(out, i, int(threadIdx.x + 16 * threadIdx.y + 256 * threadIdx.z) + 4096 * block);
}

CASE(grids_and_blocks) {
  const dim3 grid(3, 2, 4), block(5, 7, 3);
  Buffer<int> out(24 * 105, -1);
  launch(number_threads, grid, block, 0, nullptr, out.global());
  synchronize();
  for (int b = 0; b < 24; ++b) {
    for (int i = 0; i < 105; ++i) {
      EXPECT_EQUAL(out[b * 105 + i], i % 5 + 16 * (i / 5 % 7) + 256 * (i / 35) + 4096 * b);
    }
  }
  Buffer<int> large(2 * 1024, -1);
  launch(number_threads, 2, 1024, 0, nullptr, large.global());
  synchronize();
  EXPECT_EQUAL(large[2047], 1023 + 4096);
  launch(number_threads, 0, 32, 0, nullptr, large.global());  // nothing to do, and no error
}

CASE(impossible_launches) {
  Buffer<int> out(4096, -1);
  for (const dim3 block : {dim3(1025), dim3(1, 1, 65), dim3(0)}) {
    std::string message;
    try {
      launch(number_threads, 1, block, 0, nullptr, out.global());
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    EXPECT(message.find("number_threads") != std::string::npos);
  }
  bool thrown = false;
  try {
    launch(number_threads, 1, 32, 300 * 1024, nullptr, out.global());
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  EXPECT(thrown);
  for (int i = 0; i < 4096; ++i) EXPECT_EQUAL(out[i], -1);
}

__global__ void reverse_tiles(Global<const float> in, Global<float> out) {
  FUSEE_SHARED(float, first, 256);
  FUSEE_SHARED(Half, second, 256);
  FUSEE_DYNAMIC_SHARED(double, third, 256);
  FUSEE_DYNAMIC_SHARED_AT(float, fourth, 256, 256 * sizeof(double));
  const int i = threadIdx.x, n = blockDim.x;
  const float value = load(in, i + static_cast<int64_t>(blockIdx.x) * n);
  first.store(i, value);
  second.store(i, Half(value));
  third.store(i, value);
  fourth.slice(i / 128 * 128, 128).store(i % 128, value);
  __syncthreads();
  const int j = n - 1 - i;
  const float sum = first.load(j) + float(second.load(j)) + float(third.load(j)) + fourth.load(j);
  store(out, i + static_cast<int64_t>(blockIdx.x) * n, sum);
}

CASE(shared_tiles) {
  Buffer<float> in(256 * 3, 0.0f), out(256 * 3, 0.0f);
  for (int i = 0; i < 768; ++i) in[i] = static_cast<float>(i);
  for (const size_t bytes : {256 * sizeof(double) + 256 * sizeof(float), size_t{64 * 1024}}) {
    // Over 48 KiB the launch must ask for the memory.
    launch(reverse_tiles, 3, 256, bytes, nullptr, in.input(), out.global());
    synchronize();
    for (int i = 0; i < 768; ++i)
      EXPECT_EQUAL(out[i], 4.0f * static_cast<float>(i / 256 * 256 + 255 - i % 256));
  }
}

__global__ void barrier_votes(Global<int> out) {
  const int i = threadIdx.x;
  const int count = __syncthreads_count(i % 3 == 0);
  const int all = __syncthreads_and(i < 95), every = __syncthreads_and(i < 96);
  const int any = __syncthreads_or(i == 95), none = __syncthreads_or(i == 96);
  store(out, i,
        count + 1000 * (all != 0) + 2000 * (every != 0) + 4000 * (any != 0) + 8000 * (none != 0));
}

CASE(voting_barriers) {
  Buffer<int> out(96, 0);
  launch(barrier_votes, 1, 96, 0, nullptr, out.global());
  synchronize();
  for (int i = 0; i < 96; ++i) EXPECT_EQUAL(out[i], 32 + 2000 + 4000);
}

// ---- memory and atomics
// -------------------------------------------------------------------------------

template <typename T, int N>
__global__ void copy(Global<const T> in, Global<T> out) {
  const int64_t i = static_cast<int64_t>(N) * (threadIdx.x + blockDim.x * blockIdx.x);
  const Vector<T, N> a = load<N>(in, i);
  const auto b = load_streaming<N>(in, i);
  const auto c = load_readonly<N>(in, i);
  Vector<T, N> result;
  for (int k = 0; k < N; ++k) result[k] = k % 3 == 0 ? a[k] : k % 3 == 1 ? b[k] : c[k];
  store(out, i, result);
  if (threadIdx.x == 0) store_streaming(out, i, load_streaming(in, i));
  if (threadIdx.x == 1) store(out + i, 0, load_readonly(in + i, 0));
}

template <typename T, int N>
void check_copy() {
  Buffer<T> in(64 * N), out(64 * N);
  for (int i = 0; i < 64 * N; ++i) in[i] = T(static_cast<float>(i % 100));
  launch(copy<T, N>, 2, 32, 0, nullptr, in.global(), out.global());
  synchronize();
  for (int i = 0; i < 64 * N; ++i) EXPECT(float(out[i]) == float(in[i]));
}

CASE(vectors) {
  check_copy<float, 1>();
  check_copy<float, 2>();
  check_copy<float, 4>();
  check_copy<double, 2>();
  check_copy<Half, 8>();
  check_copy<BFloat16, 4>();
  check_copy<uint8_t, 16>();
  check_copy<uint8_t, 1>();
  check_copy<int64_t, 2>();
}

template <typename T>
__global__ void add_up(Global<T> out) {
  FUSEE_SHARED(T, sums, 4);
  if (threadIdx.x < 4) sums.store(threadIdx.x, T(0));
  __syncthreads();
  sums.atomic_add(threadIdx.x % 4, T(threadIdx.x));
  __syncthreads();
  if (threadIdx.x < 4) atomic_add(out, threadIdx.x, sums.load(threadIdx.x));
}

template <typename T>
void check_add() {
  Buffer<T> out(4, T(1));
  launch(add_up<T>, 3, 128, 0, nullptr, out.global());
  synchronize();
  for (int i = 0; i < 4; ++i) EXPECT(out[i] == T(1 + 3 * (4 * 496 + 32 * i)));
}

template <typename T>
__global__ void other_atomics(Global<T> out, Global<int> order) {
  const T i = T(threadIdx.x + blockDim.x * blockIdx.x);
  atomic_max(out, 0, i);
  atomic_min(out, 1, i);
  atomic_exch(out, 2, i);
  // A lock: lanes come in turn, whatever order the scheduler has.
  T seen = 0;
  while ((seen = atomic_cas(out, 3, T(0), T(1))) != 0) {
  }
  atomic_add(order, 0, 1);
  atomic_exch(out, 3, T(0));
}

template <typename T>
void check_other_atomics() {
  Buffer<T> out(4, T(0));
  Buffer<int> order(1, 0);
  out[1] = 1000;
  launch(other_atomics<T>, 4, 32, 0, nullptr, out.global(), order.global());
  synchronize();
  EXPECT(out[0] == 127 && out[1] == 0 && static_cast<uint64_t>(out[2]) < 128 && out[3] == 0);
  EXPECT_EQUAL(order[0], 128);
}

CASE(atomics) {
  check_add<int>();
  check_add<unsigned>();
  check_add<unsigned long long>();
  check_add<int64_t>();
  check_add<float>();
  check_add<double>();
  check_other_atomics<int>();
  check_other_atomics<unsigned>();
  check_other_atomics<int64_t>();
  check_other_atomics<unsigned long long>();
}

// ---- between blocks
// -----------------------------------------------------------------------------------

__global__ void rotate(Global<int> data, Global<int> out, int rounds) {
  const int n = gridDim.x * blockDim.x, i = threadIdx.x + blockDim.x * blockIdx.x;
  int value = i;
  for (int round = 0; round < rounds; ++round) {
    store(data, i, value);
    grid_sync();
    value = load(data, (i + 40) % n);
    grid_sync();
  }
  store(out, i, value);
}

CASE(cooperative_grid) {
  Buffer<int> data(4 * 64), out(4 * 64);
  launch_cooperative(rotate, 4, 64, 0, nullptr, data.global(), out.global(), 3);
  synchronize();
  for (int i = 0; i < 256; ++i) EXPECT_EQUAL(out[i], (i + 120) % 256);
  EXPECT(cooperative_blocks(rotate, 64, 0) >= 4);
  bool thrown = false;
  try {
    launch_cooperative(rotate, 1 << 20, 64, 0, nullptr, data.global(), out.global(), 3);
  } catch (const std::runtime_error& error) {
    thrown = std::string(error.what()).find("rotate") != std::string::npos;
  }
  EXPECT(thrown);
}

__global__ void last_block_sums(Global<const float> in, Global<float> partial,
                                Global<unsigned> ticket, Global<float> out) {
  FUSEE_SHARED(float, scratch, 32);
  FUSEE_SHARED(unsigned, last, 1);
  const float sum = block_sum(load(in, threadIdx.x + 64 * blockIdx.x), scratch);
  if (threadIdx.x == 0) {
    store(partial, blockIdx.x, sum);
    __threadfence();
    last.store(0, atomic_add(ticket, 0, 1u));
    __threadfence();
  }
  __syncthreads();
  if (last.load(0) + 1 != gridDim.x) return;
  float total = 0;
  for (int i = threadIdx.x; i < static_cast<int>(gridDim.x); i += 64) total += load(partial, i);
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) store(out, 0, total);
}

CASE(last_block) {
  Buffer<float> in(64 * 100, 1.0f), partial(100, 0.0f), out(1, 0.0f);
  Buffer<unsigned> ticket(1, 0u);
  launch(last_block_sums, 100, 64, 0, nullptr, in.input(), partial.global(), ticket.global(),
         out.global());
  synchronize();
  EXPECT_EQUAL(out[0], 6400.0f);
}

CASE(process_threads) {
  std::vector<std::string> failures(4);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t, &failures] {
      try {
        for (int i = 0; i < 20; ++i) case_last_block();
      } catch (const std::exception& error) {
        failures[t] = error.what();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const std::string& failure : failures) EXPECT(failure.empty());
}

}  // namespace

int main(int argc, char** argv) { return run_cases(argc, argv); }
