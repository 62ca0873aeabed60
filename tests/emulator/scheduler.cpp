// The scheduler: runs a launch's blocks, their threads in random order, and reports what went
// wrong.
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

#include "emulator.h"
#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Run run_state;
Thread* current = nullptr;

namespace {

std::mutex launches;  // one launch at a time, whichever process threads they come from
Fiber caller;
uint64_t seed = 0;
uint64_t launch_number = 0;
bool seeded = false;
thread_local bool running = false;  // whether this process thread is inside `run`

uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

void resume(Thread& thread, Fiber& from) {
  current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  if (thread.state == State::fresh) thread.state = State::ready;
  // A thread may draw itself: then there is nothing to switch.
  if (&thread.fiber != &from) switch_fiber(from, thread.fiber);
}

// Hands over to a ready thread, or to the caller of the launch when there is none.
void hand_over(Fiber& from) {
  auto& ready = run_state.ready;
  if (ready.empty()) {
    current = nullptr;
    switch_fiber(from, caller);
    return;
  }
  const size_t i = static_cast<size_t>(random_number() % ready.size());
  Thread* const next = ready[i];
  ready[i] = ready.back();
  ready.pop_back();
  resume(*next, from);
}

// A failed launch runs no kernel code any more: threads that had begun only unwind.
void cancel_waiting() {
  auto& ready = run_state.ready;
  ready.clear();
  for (uint32_t b = 0; b < run_state.blocks_resident; ++b) {
    for (auto& thread : run_state.blocks[b]->threads) {
      if (thread->state == State::fresh) thread->state = State::done;
      if (thread->state != State::done && thread.get() != current) ready.push_back(thread.get());
    }
  }
}

void record(const std::string& what, const Where& where, const Thread* thread) {
  if (run_state.failed) return;
  run_state.failed = true;
  run_state.report = "emulated kernel " + run_state.name;
  if (thread != nullptr) run_state.report += ", " + describe(*thread);
  run_state.report += ": " + what + " at " + place(where);
  cancel_waiting();
}

void exit_thread(Thread& thread) {
  Block& block = *thread.block;
  thread.state = State::done;
  --block.alive;
  thread.warp->alive &= ~(1u << thread.lane);
  if (run_state.failed) return;
  if (thread.warp->alive == 0) converge(*thread.warp);
  // Those who wait for this thread would wait for ever.
  if (block.at_barrier + block.at_grid_barrier == 0 && thread.warp->open.empty()) return;
  for (const auto& other : block.threads) {
    const bool waits =
        other->state == State::at_barrier || other->state == State::at_grid_barrier ||
        (other->state == State::in_warp && other->warp == thread.warp &&
         std::any_of(other->warp->open.begin(), other->warp->open.end(), [&](const Exchange* e) {
           return (e->arrived >> other->lane & 1) != 0 && (e->mask >> thread.lane & 1) != 0;
         }));
    if (waits) {
      record(std::string(other->waits_for) + " can never complete: " + describe(thread) +
                 " has exited, while this thread waits",
             other->where, other.get());
      return;
    }
  }
}

void fiber_main() {
  fiber_started();
  for (;;) {
    Thread& thread = *current;
    try {
      run_state.launch->invoke(run_state.launch->closure);
    } catch (const Cancelled&) {
    } catch (const std::exception& error) {
      record(std::string("the kernel threw an exception: ") + error.what(), run_state.launch->where,
             &thread);
    }
    exit_thread(thread);
    hand_over(thread.fiber);
  }
}

void prepare(Block& block, uint64_t number) {
  const Launch& launch = *run_state.launch;
  const Shape& grid = launch.grid;
  block.index = {static_cast<unsigned>(number % grid.x),
                 static_cast<unsigned>(number / grid.x % grid.y),
                 static_cast<unsigned>(number / grid.x / grid.y)};
  block.serial = run_state.first_serial + static_cast<uint32_t>(number);
  block.alive = run_state.threads_per_block;
  block.at_barrier = block.at_grid_barrier = 0;
  block.votes = 0;
  block.floor = std::max(1u, run_state.grid_floor);
  block.acquired.clear();
  block.tiles.clear();
  block.static_bytes = 0;
  if (block.shared == nullptr) block.shared.reset(new unsigned char[shared_limit + 1024]);
  // Poison: a NaN in every floating-point type, and nothing like an index.
  memset(block.shared.get(), 0xff, std::min(shared_limit, launch.dynamic_shared_bytes + 1024));
  const uint32_t warps = (run_state.threads_per_block + 31) / 32;
  while (block.warps.size() < warps) block.warps.push_back(std::make_unique<Warp>());
  for (uint32_t w = 0; w < warps; ++w) {
    Warp& warp = *block.warps[w];
    const uint32_t lanes = std::min(32u, run_state.threads_per_block - 32 * w);
    warp.block = &block;
    warp.first = 32 * w;
    warp.alive = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
    warp.open.clear();
    warp.idle.clear();
    for (auto& exchange : warp.pool) warp.idle.push_back(exchange.get());
    memset(warp.seen, 0, sizeof(warp.seen));
  }
  while (block.threads.size() < run_state.threads_per_block) {
    block.threads.push_back(std::make_unique<Thread>());
    make_fiber(block.threads.back()->fiber, fiber_main);
  }
  for (uint32_t rank = 0; rank < block.threads.size(); ++rank) {
    Thread& thread = *block.threads[rank];
    thread.state = State::done;
    if (rank >= run_state.threads_per_block) continue;
    thread.block = &block;
    thread.warp = block.warps[rank / 32].get();
    thread.rank = rank;
    thread.lane = rank % 32;
    thread.index = {rank % launch.block.x, rank / launch.block.x % launch.block.y,
                    rank / launch.block.x / launch.block.y};
    thread.clock = block.floor;
    thread.published = 0;
    thread.acquired.clear();
    thread.copies.clear();
    thread.copy_group = 0;
    thread.state = State::fresh;
    run_state.ready.push_back(&thread);
  }
}

void report_deadlock() {
  for (uint32_t b = 0; b < run_state.blocks_resident; ++b) {
    std::string others;
    const Thread* first = nullptr;
    for (const auto& thread : run_state.blocks[b]->threads) {
      if (thread->state == State::done) continue;
      if (first == nullptr) {
        first = thread.get();
        continue;
      }
      const std::string line = std::string(thread->waits_for) + " (" + place(thread->where) + ")";
      if (line == std::string(first->waits_for) + " (" + place(first->where) + ")") continue;
      if (others.find(line) == std::string::npos) {
        others += "; " + describe(*thread) + " waits in " + line;
      }
    }
    if (first != nullptr) {
      record(
          "deadlock, no thread can go on" + others + "; this thread waits in " + first->waits_for,
          first->where, first);
      return;
    }
  }
}

// Runs all threads of the resident blocks to their ends.
void run_resident() {
  for (;;) {
    hand_over(caller);
    bool waiting = false;
    for (uint32_t b = 0; b < run_state.blocks_resident; ++b) {
      waiting = waiting || run_state.blocks[b]->alive != 0;
    }
    if (run_state.failed) {
      cancel_waiting();
      if (run_state.ready.empty()) return;
    } else if (waiting) {
      report_deadlock();
      if (run_state.ready.empty()) return;
    } else {
      run_state.blocks_done += run_state.blocks_resident;
      return;
    }
  }
}

void check_shape(const Launch& launch, uint64_t threads) {
  const Shape &g = launch.grid, &b = launch.block;
  std::string problem;
  if (threads == 0 || threads > 1024 || b.x > 1024 || b.y > 1024 || b.z > 64) {
    problem = "a block of " + text({b.x, b.y, b.z}) + " threads";
  } else if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
    problem = "a grid of " + text({g.x, g.y, g.z}) + " blocks";
  } else if (launch.dynamic_shared_bytes > shared_limit) {
    problem = std::to_string(launch.dynamic_shared_bytes) + " bytes of dynamic shared memory";
  } else if (launch.cooperative && static_cast<uint64_t>(g.x) * g.y * g.z >
                                       static_cast<uint64_t>(cooperative_blocks(threads))) {
    problem = "a cooperative grid of " + text({g.x, g.y, g.z}) + " blocks, more than fit at once,";
  }
  if (!problem.empty()) {
    throw std::runtime_error("emulated kernel " + function_name(launch.function) + ": " + problem +
                             " cannot be launched, at " + place(launch.where));
  }
}

}  // namespace

uint64_t random_number() {
  uint64_t& x = run_state.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x >> 11;
}

bool in_kernel() { return running && current != nullptr; }
unsigned lane() { return current->lane; }

std::string place(const Where& where) {
  const std::string file = where.file_name();
  const size_t slash = file.find_last_of('/');
  return (slash == std::string::npos ? file : file.substr(slash + 1)) + ":" +
         std::to_string(where.line());
}

std::string describe(const Thread& thread) {
  return "block " + text(thread.block->index) + " thread " + text(thread.index);
}

void fault(const std::string& what, const Where& where) {
  if (!in_kernel()) throw std::runtime_error(what + " at " + place(where) + ", outside a kernel");
  record(what, where, current);
  throw Cancelled{};
}

void suspend(State state, const char* what, const Where& where) {
  Thread& thread = *current;
  thread.state = state;
  thread.waits_for = what;
  thread.where = where;
  run_state.idle_atomics = 0;
  hand_over(thread.fiber);
  if (run_state.failed) throw Cancelled{};
}

void make_ready(Thread& thread) {
  thread.state = State::ready;
  run_state.ready.push_back(&thread);
}

void maybe_yield(const Where& where) {
  if (++run_state.idle_atomics > (1u << 24)) {
    fault("no progress: threads only repeat atomics (a block cannot wait for another block here)",
          where);
  }
  if (random_number() % 4 != 0 || run_state.ready.empty()) return;
  Thread& thread = *current;
  run_state.ready.push_back(&thread);
  hand_over(thread.fiber);
  if (run_state.failed) throw Cancelled{};
}

int cooperative_blocks(unsigned threads) {
  // A device of four multiprocessors with 2048 threads each, and at most eight blocks.
  return static_cast<int>(std::min(16u, 4 * (2048 / std::max(1u, threads))));
}

void run(const Launch& launch) {
  const uint64_t threads = static_cast<uint64_t>(launch.block.x) * launch.block.y * launch.block.z;
  const uint64_t blocks = static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
  if (running) throw std::runtime_error("a kernel cannot launch another in the emulator");
  if (blocks == 0) return;
  const std::lock_guard<std::mutex> lock(launches);
  running = true;
  struct Stopped {
    ~Stopped() { running = false; }
  } stopped;
  check_shape(launch, threads);
  if (!seeded) {
    const char* const text = std::getenv("FUSEE_EMULATOR_SEED");
    seed = text == nullptr ? 0 : std::strtoull(text, nullptr, 0);
    seeded = true;
  }

  run_state.launch = &launch;
  run_state.name = function_name(launch.function);
  if (run_state.name.empty()) run_state.name = launch.where.function_name();
  run_state.threads_per_block = static_cast<uint32_t>(threads);
  run_state.failed = false;
  run_state.report.clear();
  run_state.ready.clear();
  run_state.random = mix(seed ^ mix(launch_number++)) | 1;
  run_state.grid_floor = 0;
  run_state.barriers = run_state.mma = run_state.blocks_done = run_state.idle_atomics = 0;
  run_state.first_serial = run_state.next_serial;
  run_state.next_serial += static_cast<uint32_t>(blocks);
  blockDim = dim3(launch.block.x, launch.block.y, launch.block.z);
  gridDim = dim3(launch.grid.x, launch.grid.y, launch.grid.z);
  begin_memory();
  begin_counters();

  const uint32_t resident = launch.cooperative ? static_cast<uint32_t>(blocks) : 1;
  while (run_state.blocks.size() < resident) run_state.blocks.push_back(std::make_unique<Block>());
  run_state.blocks_resident = resident;
  // Blocks come in a random order too: a random start and a stride without common factor.
  const uint64_t start = random_number() % blocks;
  uint64_t stride = blocks > 2 ? random_number() % (blocks - 1) + 1 : 1;
  while (std::__gcd(stride, blocks) != 1) ++stride;
  if (launch.cooperative) {
    for (uint32_t b = 0; b < resident; ++b) prepare(*run_state.blocks[b], b);
    run_resident();
  } else {
    for (uint64_t i = 0; i < blocks && !run_state.failed; ++i) {
      prepare(*run_state.blocks[0],
              (start + static_cast<uint64_t>(static_cast<unsigned __int128>(i) * stride % blocks)) %
                  blocks);
      run_resident();
    }
  }
  current = nullptr;
  end_memory();
  end_counters();
  if (run_state.failed) throw std::runtime_error(run_state.report);
}

}  // namespace emulator

extern "C" void fusee_emulator_set_seed(uint64_t value) {
  const std::lock_guard<std::mutex> lock(emulator::launches);
  emulator::seed = value;
  emulator::seeded = true;
  emulator::launch_number = 0;
}
