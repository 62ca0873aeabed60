// Kernels whose traffic is known by hand. The program prints the emulator's counters after running
// the one that its argument names; the test does the arithmetic.
#include "case.h"

using namespace fusee;
using namespace fusee::cuda;

namespace {

__global__ void strided(Global<const float> in, Global<float> out, int stride) {
  const int i = threadIdx.x + blockDim.x * blockIdx.x;
  store(out, i, load(in, i * stride));
}

__global__ void vectors(Global<const float> in, Global<float> out) {
  const int64_t i = 4 * (threadIdx.x + blockDim.x * blockIdx.x);
  store(out, i, load<4>(in, i));
}

__global__ void broadcast(Global<const float> in, Global<float> out) {
  store(out, threadIdx.x, load(in, 0));
}

__global__ void twice(Global<const float> in, Global<float> out) {
  const float first = load(in, threadIdx.x);
  store(out, threadIdx.x, first + load(in, 127 - threadIdx.x));
}

// Lanes do different numbers of rounds; the rounds that they share are one request.
__global__ void ragged_loop(Global<const float> in, Global<float> out) {
  float sum = 0;
  for (int i = threadIdx.x; i < 80; i += 32) sum += load(in, i);
  store(out, threadIdx.x, sum);
}

template <typename T, int N>
__global__ void banks(int stride) {
  FUSEE_DYNAMIC_SHARED(T, tile, 32 * stride);
  tile.store(threadIdx.x * stride, Vector<T, N>{});
}

__global__ void everything(Global<float> out) {
  FUSEE_SHARED(Half, tile, 32 * 8);
  tile.store(8 * threadIdx.x, Vector<Half, 8>{});
  __syncthreads();
  uint32_t a[4], b[2];
  float d[4] = {};
  ldmatrix(a, tile, 8 * threadIdx.x);
  ldmatrix(b, tile, 8 * threadIdx.x);
  mma_m16n8k16<Half>(d, a, b);
  atomic_add(out, 0, d[0]);
}

template <int Stride>
void run_strided() {
  Buffer<float> in(256 * Stride, 0.0f), out(256, 0.0f);
  launch(strided, 2, 128, 0, nullptr, in.input(), out.global(), Stride);
}
CASE(coalesced) { run_strided<1>(); }
CASE(stride_2) { run_strided<2>(); }
CASE(stride_8) { run_strided<8>(); }
CASE(misplaced) {
  // One element off a sector's beginning: each request touches five sectors.
  Buffer<float> in(257, 0.0f), out(256, 0.0f);
  launch(strided, 2, 128, 0, nullptr, fusee::cuda::global<const float>(&in[1], 256), out.global(),
         1);
}
CASE(wide) {
  Buffer<float> in(1024, 0.0f), out(1024, 0.0f);
  launch(vectors, 2, 128, 0, nullptr, in.input(), out.global());
}
CASE(broadcast) {
  Buffer<float> in(1, 0.0f), out(128, 0.0f);
  launch(broadcast, 1, 128, 0, nullptr, in.input(), out.global());
}
CASE(twice) {
  Buffer<float> in(128, 0.0f), out(128, 0.0f);
  for (int i = 0; i < 3; ++i) launch(twice, 1, 128, 0, nullptr, in.input(), out.global());
}
CASE(ragged_loop) {
  Buffer<float> in(80, 0.0f), out(32, 0.0f);
  launch(ragged_loop, 1, 32, 0, nullptr, in.input(), out.global());
}
template <typename T, int N>
void run_banks(int stride) {
  launch(banks<T, N>, 1, 32, 32 * stride * sizeof(T), nullptr, stride);
}
CASE(banks_1) { run_banks<float, 1>(1); }
CASE(banks_2) { run_banks<float, 1>(2); }
CASE(banks_32) { run_banks<float, 1>(32); }
CASE(banks_33) { run_banks<float, 1>(33); }
CASE(banks_half) { run_banks<Half, 1>(1); }
CASE(banks_wide) { run_banks<float, 4>(4); }
CASE(banks_wide_32) { run_banks<float, 4>(32); }
CASE(everything) {
  Buffer<float> out(1, 0.0f);
  launch(everything, 2, 32, 0, nullptr, out.global());
}

// The emulator's cost: blocks of 128 threads with 4 barriers and 20 shuffles each.
__global__ void busy(Global<const float> in, Global<float> out) {
  FUSEE_SHARED(float, scratch, 32);
  float value = load(in, threadIdx.x);
  value = block_sum(value, scratch) * 1e-3f;
  value = block_sum(value, scratch) * 1e-3f;
  store(out, threadIdx.x + static_cast<int64_t>(128) * blockIdx.x, value);
}
CASE(busy) {
  Buffer<float> in(128, 1.0f), out(128 * 500, 0.0f);
  launch(busy, 500, 128, 0, nullptr, in.input(), out.global());
}

// With the check for uninitialised reads off, the poison is what a kernel reads.
__global__ void read_poison(Global<float> out) {
  FUSEE_SHARED(float, still, 32);
  FUSEE_DYNAMIC_SHARED(Half, moving, 32);
  store(out, threadIdx.x, still.load(threadIdx.x));
  store(out, threadIdx.x + 32, float(moving.load(threadIdx.x)));
}
CASE(poison) {
  Buffer<float> out(64, 0.0f);
  fusee_emulator_set_initcheck(0);
  launch(read_poison, 1, 32, 64, nullptr, out.global());
  for (int i = 0; i < 64; ++i) EXPECT(std::isnan(out[i]));
}

// Schedules depend on the seed, and on nothing else.
__global__ void arrivals(Global<int> ticket, Global<int> out) {
  store(out, threadIdx.x, atomic_add(ticket, 0, 1));
}
CASE(seeds) {
  const auto order = [](uint64_t seed) {
    Buffer<int> ticket(1, 0), out(64, 0);
    fusee_emulator_set_seed(seed);
    launch(arrivals, 1, 64, 0, nullptr, ticket.global(), out.global());
    return std::vector<int>(&out[0], &out[0] + 64);
  };
  EXPECT(order(1) == order(1));
  EXPECT(order(1) != order(2));
}

}  // namespace

int main(int argc, char** argv) {
  fusee_emulator_reset();
  const int result = run_cases(argc, argv);
  if (argc > 1 && result == 0) std::printf("%s\n", fusee_emulator_counters());
  return result;
}
