// Kernels with a planted fault each, and a clean twin of each: the emulator must report the first
// and pass the second. The line that carries the fault is marked, and the report must name it.
// Where a fault lies in two accesses that may come in either order, both lines are marked.
#include "case.h"

using namespace fusee;
using namespace fusee::cuda;

namespace {

template <bool Faulty>
__global__ void missing_barrier(Global<float> out) {
  FUSEE_SHARED(float, tile, 64);
  tile.store(threadIdx.x, float(threadIdx.x));  // FAULT missing_barrier
  if constexpr (!Faulty) __syncthreads();
  const float value = tile.load((threadIdx.x + 33) % 64);  // FAULT missing_barrier
  store(out, threadIdx.x, value);
}

// The first barrier is there, the one that protects the tile from the next round is not.
template <bool Faulty>
__global__ void missing_second_barrier(Global<float> out) {
  FUSEE_SHARED(float, tile, 64);
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    tile.store(threadIdx.x, float(round));  // FAULT missing_second_barrier
    __syncthreads();
    sum += tile.load((threadIdx.x + 33) % 64);  // FAULT missing_second_barrier
    if constexpr (!Faulty) __syncthreads();
  }
  store(out, threadIdx.x, sum);
}

template <bool Faulty>
__global__ void divergent_barrier(Global<float> out) {
  if (Faulty && threadIdx.x < 32) {
    __syncthreads();  // FAULT divergent_barrier
  } else {
    __syncthreads();  // FAULT divergent_barrier
  }
  store(out, threadIdx.x, 1.0f);
}

template <bool Faulty>
__global__ void exited_thread(Global<float> out) {
  if (Faulty && threadIdx.x == 5) return;
  __syncthreads();  // FAULT exited_thread
  store(out, threadIdx.x, 1.0f);
}

template <bool Faulty>
__global__ void load_out_of_bounds(Global<const float> in, Global<float> out) {
  const int i = threadIdx.x + (Faulty ? 1 : 0);
  const float value = load(in, i);  // FAULT load_out_of_bounds
  store(out, threadIdx.x, value);
}

template <bool Faulty>
__global__ void vector_out_of_bounds(Global<const float> in, Global<float> out) {
  // The last vector begins inside, and ends outside.
  const int64_t i = Faulty ? 64 - 60 + 4 * (threadIdx.x % 16) : 4 * (threadIdx.x % 16);
  const auto value = load<4>(in, i);  // FAULT vector_out_of_bounds
  store(out, threadIdx.x, value[0]);
}

template <bool Faulty>
__global__ void store_out_of_bounds(Global<float> out) {
  const int i = static_cast<int>(threadIdx.x) - (Faulty ? 1 : 0);
  store(out, i, 1.0f);  // FAULT store_out_of_bounds
}

template <bool Faulty>
__global__ void shared_out_of_bounds(Global<float> out) {
  FUSEE_SHARED(float, tile, 64);
  tile.store(threadIdx.x + (Faulty ? 1 : 0), 1.0f);  // FAULT shared_out_of_bounds
  store(out, threadIdx.x, 1.0f);
}

template <bool Faulty>
__global__ void dynamic_out_of_bounds(Global<float> out) {
  FUSEE_DYNAMIC_SHARED_AT(float, tile, 64, Faulty ? 4 : 0);  // FAULT dynamic_out_of_bounds
  tile.store(threadIdx.x, 1.0f);
  store(out, threadIdx.x, tile.load(threadIdx.x));
}

template <bool Faulty>
__global__ void misaligned_vector(Global<const float> in, Global<float> out) {
  const auto value =
      load<4>(in, 4 * (threadIdx.x % 8) + (Faulty ? 2 : 0));  // FAULT misaligned_vector
  store(out, threadIdx.x, value[0]);
}

template <bool Faulty>
__global__ void misaligned_shared(Global<float> out) {
  FUSEE_SHARED(float, tile, 256 + 1);
  tile.store(4 * threadIdx.x + (Faulty ? 1 : 0), Vector<float, 4>{});  // FAULT misaligned_shared
  store(out, threadIdx.x, 1.0f);
}

template <bool Faulty>
__global__ void global_write_race(Global<float> out) {
  const int64_t i = Faulty ? threadIdx.x : threadIdx.x + blockIdx.x * blockDim.x;
  store(out, i, float(blockIdx.x));  // FAULT global_write_race
}

template <bool Faulty>
__global__ void global_read_race(Global<float> out) {
  const int64_t i = threadIdx.x + blockIdx.x * blockDim.x;
  store(out, i, 1.0f);                                        // FAULT global_read_race
  if (Faulty) store(out, i, load(out, (i + 64) % (4 * 64)));  // FAULT global_read_race
}

template <bool Faulty>
__global__ void atomic_and_plain(Global<float> out) {
  atomic_add(out, 0, 1.0f);                             // FAULT atomic_and_plain
  if (Faulty && threadIdx.x == 7) store(out, 0, 0.0f);  // FAULT atomic_and_plain
}

// The last block to finish sums the others' results, which a fence must have published.
template <bool Faulty>
__global__ void missing_fence(Global<float> partial, Global<unsigned> ticket, Global<float> out) {
  FUSEE_SHARED(unsigned, last, 1);
  if (threadIdx.x == 0) {
    store(partial, blockIdx.x, 1.0f);
    if constexpr (!Faulty) __threadfence();
    last.store(0, atomic_add(ticket, 0, 1u));
  }
  __syncthreads();
  if (last.load(0) + 1 == gridDim.x && threadIdx.x == 0) {
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += load(partial, i);  // FAULT missing_fence
    store(out, 0, sum);
  }
}

template <bool Faulty>
__global__ void missing_syncwarp(Global<float> out) {
  FUSEE_SHARED(float, tile, 64);
  tile.store(threadIdx.x, float(threadIdx.x));  // FAULT missing_syncwarp
  if constexpr (!Faulty) __syncwarp();
  const float value = tile.load(threadIdx.x ^ 1);  // FAULT missing_syncwarp
  store(out, threadIdx.x, value);
}

// A shuffle makes the lanes meet, but does not order their memory accesses.
template <bool Faulty>
__global__ void shuffle_is_no_fence(Global<float> out) {
  FUSEE_SHARED(float, tile, 64);
  tile.store(threadIdx.x, float(threadIdx.x));
  const float other = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  if constexpr (!Faulty) __syncwarp();
  const float value = tile.load(threadIdx.x ^ 1);  // FAULT shuffle_is_no_fence
  store(out, threadIdx.x, value + other);
}

// __syncwarp of each half orders nothing between the halves.
template <bool Faulty>
__global__ void syncwarp_of_halves(Global<float> out) {
  FUSEE_SHARED(float, tile, 64);
  tile.store(threadIdx.x, float(threadIdx.x));  // FAULT syncwarp_of_halves
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  const float value = tile.load(threadIdx.x ^ (Faulty ? 16 : 1));  // FAULT syncwarp_of_halves
  store(out, threadIdx.x, value);
}

template <bool Faulty>
__global__ void uninitialised_shared(Global<float> out) {
  FUSEE_SHARED(float, tile, 64);
  if (!Faulty || threadIdx.x != 3) tile.store(threadIdx.x, 1.0f);
  const float value = tile.load(threadIdx.x);  // FAULT uninitialised_shared
  store(out, threadIdx.x, value);
}

template <bool Faulty>
__global__ void absent_lane(Global<float> out) {
  if (threadIdx.x >= 48) return;
  const unsigned mask = threadIdx.x < 32 || Faulty ? 0xffffffffu : 0x0000ffffu;
  const float value = __shfl_xor_sync(mask, float(threadIdx.x), 1);  // FAULT absent_lane
  store(out, threadIdx.x, value);
}

template <bool Faulty>
__global__ void mask_without_caller(Global<float> out) {
  const unsigned mask = Faulty ? 0x7fffffffu : 0xffffffffu;
  store(out, threadIdx.x, float(__ballot_sync(mask, 1)));  // FAULT mask_without_caller
}

template <bool Faulty>
__global__ void source_outside_mask(Global<float> out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const float value = __shfl_xor_sync(mask, 1.0f, Faulty ? 16 : 1);  // FAULT source_outside_mask
  store(out, threadIdx.x, value);
}

template <bool Faulty>
__global__ void mismatched_masks(Global<float> out) {
  // Lane 0 means the whole warp, the others leave it out.
  const unsigned mask = !Faulty || threadIdx.x % 32 == 0 ? 0xffffffffu : 0xfffffffeu;
  store(out, threadIdx.x, float(__any_sync(mask, 1)));  // FAULT mismatched_masks
}

template <bool Faulty>
__global__ void barrier_in_warp_branch(Global<float> out) {
  if (Faulty && threadIdx.x % 32 < 16) __syncthreads();        // FAULT barrier_in_warp_branch
  store(out, threadIdx.x, float(__any_sync(0xffffffffu, 1)));  // FAULT barrier_in_warp_branch
}

// One warp waits at the block's barrier, the other at the grid's: neither can ever be full.
template <bool Faulty>
__global__ void deadlock(Global<float> out) {
  if (Faulty && threadIdx.x >= 32) {
    grid_sync();  // FAULT deadlock
  } else {
    __syncthreads();  // FAULT deadlock
  }
  store(out, threadIdx.x + 64 * blockIdx.x, 1.0f);
}

// A thread that spins on a flag that nobody will ever set.
template <bool Faulty>
__global__ void livelock(Global<unsigned> flag, Global<float> out) {
  if (!Faulty && threadIdx.x == 0) atomic_exch(flag, 0, 1u);
  while (atomic_add(flag, 0, 0u) == 0) {  // FAULT livelock
  }
  store(out, threadIdx.x, 1.0f);
}

// The tile holds older data, so only the missing wait is wrong, not an uninitialised read.
template <bool Faulty>
__global__ void copy_before_wait(Global<const float> in, Global<float> out) {
  FUSEE_SHARED(float, tile, 64);
  tile.store(threadIdx.x, -1.0f);
  cp_async<1>(tile, threadIdx.x, in, threadIdx.x);
  cp_async_commit();
  if constexpr (!Faulty) cp_async_wait_group<0>();
  const float value = tile.load(threadIdx.x);  // FAULT copy_before_wait
  cp_async_wait_group<0>();
  store(out, threadIdx.x, value);
}

// Waiting for all but the last group is one group short.
template <bool Faulty>
__global__ void copy_waits_too_little(Global<const float> in, Global<float> out) {
  FUSEE_SHARED(float, tile, 128);
  cp_async<1>(tile, threadIdx.x, in, threadIdx.x);
  cp_async_commit();
  cp_async<1>(tile, threadIdx.x + 64, in, threadIdx.x);
  cp_async_commit();
  cp_async_wait_group<Faulty ? 1 : 0>();
  const float value = tile.load(threadIdx.x + 64);  // FAULT copy_waits_too_little
  cp_async_wait_group<0>();
  store(out, threadIdx.x, value);
}

// A wait serves the thread that copied; the others need a barrier after it.
template <bool Faulty>
__global__ void copy_without_barrier(Global<const float> in, Global<float> out) {
  FUSEE_SHARED(float, tile, 64);
  cp_async<1>(tile, threadIdx.x, in, threadIdx.x);  // FAULT copy_without_barrier
  cp_async_commit();
  cp_async_wait_group<0>();  // FAULT copy_without_barrier
  if constexpr (!Faulty) __syncthreads();
  const float value = tile.load((threadIdx.x + 33) % 64);  // FAULT copy_without_barrier
  store(out, threadIdx.x, value);
}

template <bool Faulty>
__global__ void missing_grid_sync(Global<float> data, Global<float> out) {
  const int64_t i = threadIdx.x + 64 * blockIdx.x, n = 64 * gridDim.x;
  store(data, i, 1.0f);  // FAULT missing_grid_sync
  if constexpr (Faulty) {
    __syncthreads();
  } else {
    grid_sync();
  }
  store(out, i, load(data, (i + 64) % n));  // FAULT missing_grid_sync
}

template <bool Faulty>
__global__ void misaligned_ldmatrix(Global<float> out) {
  FUSEE_SHARED(Half, tile, 8 * 8 + 8);
  for (int i = threadIdx.x; i < 72; i += 64) tile.store(i, Half(0.0f));
  __syncthreads();
  uint32_t registers[1];
  ldmatrix(registers, tile, 8 * (threadIdx.x % 8) + (Faulty ? 1 : 0));  // FAULT misaligned_ldmatrix
  store(out, threadIdx.x, float(registers[0]));
}

struct Program {
  std::string name;
  std::function<void(bool faulty)> run;
};

// Every kernel gets 64 threads; the arrays that it takes hold 64 elements unless said otherwise.
#define KERNEL(name) (faulty ? name<true> : name<false>)
#define PROGRAM(name, ...)                        \
  Program {                                       \
    #name, [](bool faulty) {                      \
      Buffer<float> in(64, 1.0f), out(256, 0.0f); \
      Buffer<unsigned> flag(1, 0u);               \
      const auto kernel = KERNEL(name);           \
      __VA_ARGS__;                                \
      static_cast<void>(in);                      \
      static_cast<void>(out);                     \
      static_cast<void>(flag);                    \
    }                                             \
  }
#define OUT fusee::cuda::global(&out[0], 64)
#define PLAIN(name) PROGRAM(name, launch(kernel, 2 - 1, 64, 0, nullptr, OUT))
#define FROM_INPUT(name) PROGRAM(name, launch(kernel, 1, 64, 0, nullptr, in.input(), OUT))

const Program programs[] = {
    PLAIN(missing_barrier),
    PLAIN(missing_second_barrier),
    PLAIN(divergent_barrier),
    PLAIN(exited_thread),
    FROM_INPUT(load_out_of_bounds),
    FROM_INPUT(vector_out_of_bounds),
    PLAIN(store_out_of_bounds),
    PLAIN(shared_out_of_bounds),
    PROGRAM(dynamic_out_of_bounds, launch(kernel, 1, 64, 256, nullptr, OUT)),
    FROM_INPUT(misaligned_vector),
    PLAIN(misaligned_shared),
    PROGRAM(global_write_race, launch(kernel, 4, 64, 0, nullptr, out.global())),
    PROGRAM(global_read_race, launch(kernel, 4, 64, 0, nullptr, out.global())),
    PLAIN(atomic_and_plain),
    PROGRAM(missing_fence, launch(kernel, 4, 64, 0, nullptr, in.global(), flag.global(), OUT)),
    PLAIN(missing_syncwarp),
    PLAIN(shuffle_is_no_fence),
    PLAIN(syncwarp_of_halves),
    PLAIN(uninitialised_shared),
    PLAIN(absent_lane),
    PLAIN(mask_without_caller),
    PLAIN(source_outside_mask),
    PLAIN(mismatched_masks),
    PLAIN(barrier_in_warp_branch),
    PROGRAM(deadlock, launch_cooperative(kernel, 2, 64, 0, nullptr, out.global())),
    PROGRAM(livelock, launch(kernel, 1, 64, 0, nullptr, flag.global(), OUT)),
    FROM_INPUT(copy_before_wait),
    FROM_INPUT(copy_waits_too_little),
    FROM_INPUT(copy_without_barrier),
    PROGRAM(missing_grid_sync, Buffer<float> data(256, 0.0f);
            launch_cooperative(kernel, 4, 64, 0, nullptr, data.global(), out.global())),
    PLAIN(misaligned_ldmatrix),
};

}  // namespace

// faults NAME fault|clean SEEDS: prints one line for each seed, the report or "clean".
int main(int argc, char** argv) {
  if (argc != 4) {
    for (const Program& program : programs) std::printf("%s\n", program.name.c_str());
    return 0;
  }
  for (const Program& program : programs) {
    if (program.name != argv[1]) continue;
    for (int seed = 0; seed < std::atoi(argv[3]); ++seed) {
      fusee_emulator_set_seed(static_cast<uint64_t>(seed));
      try {
        program.run(std::string(argv[2]) == "fault");
        std::printf("clean\n");
      } catch (const std::runtime_error& report) {
        std::printf("%s\n", report.what());
      }
    }
    // Whatever was reported, the next launch must work.
    Buffer<float> in(64, 1.0f), out(64, 0.0f);
    launch(load_out_of_bounds<false>, 1, 64, 0, nullptr, in.input(), out.global());
    for (int i = 0; i < 64; ++i) EXPECT(out[i] == 1.0f);
    return 0;
  }
  return 2;
}
