// The emulator's state, shared by its own sources only.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "runtime.h"
#include "vocabulary.h"

namespace emulator {

struct Block;
struct Warp;
struct SyncVariable;

struct AsyncCopy {
  void* to;
  const void* from;
  uint32_t bytes, valid, element, group;
};

enum class State : uint8_t { fresh, ready, at_barrier, at_grid_barrier, in_warp, done };

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint3 index{};
  uint32_t rank = 0;  // within the block
  uint32_t lane = 0;
  State state = State::done;
  // The operation it waits in, and where.
  const char* waits_for = nullptr;
  Where where;
  // Counts the thread's own synchronisations; accesses are stamped with it.
  uint32_t clock = 0;
  // After a fence: the clock up to which the thread's next atomic publishes its accesses, plus one.
  uint32_t published = 0;
  std::vector<const SyncVariable*> acquired;
  std::vector<AsyncCopy> copies;
  uint32_t copy_group = 0;
  // For each access site, how often this thread passed it since the warp last converged.
  std::vector<uint64_t> passes;
};

// The operands of one collective operation of a warp.
struct Exchange {
  alignas(16) unsigned char values[32][32];
  const char* name;
  uint32_t mask, arrived, readers;
  Where where;
};

// The accesses of one warp to one site that count as one request.
struct Request {
  uint64_t address[32];
  uint32_t lanes;
  uint32_t bytes;
};

struct Warp {
  Block* block = nullptr;
  uint32_t first = 0;  // rank of lane 0
  uint32_t alive = 0;  // lanes that have not exited
  std::vector<Exchange*> open;
  std::vector<std::unique_ptr<Exchange>> pool;
  std::vector<Exchange*> idle;
  // seen[a][b]: the clock of lane b up to which __syncwarp has ordered its accesses before lane
  // a's.
  uint32_t seen[32][32];
  // Requests by site, of the present period between convergences.
  std::vector<std::vector<Request>> requests;
  std::vector<uint32_t> used;     // how many of them are in use
  std::vector<uint32_t> touched;  // sites with any in use
  uint32_t period = 1;
};

struct Block {
  uint3 index{};
  uint32_t serial = 0;  // unique among all blocks of all launches
  uint32_t alive = 0;
  uint32_t at_barrier = 0;
  const Thread* first_at_barrier = nullptr;
  uint32_t at_grid_barrier = 0;
  int votes = 0, result = 0;
  // Accesses with a smaller clock are ordered before everything that the block does now.
  uint32_t floor = 1;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<const SyncVariable*> acquired;
  std::unique_ptr<unsigned char[]> shared;  // static tiles from the end of the dynamic ones
  size_t static_bytes = 0;
  struct Tile {
    const void* key;
    size_t offset, bytes;
  };
  std::vector<Tile> tiles;
};

inline constexpr size_t shared_limit = 227 * 1024;
inline constexpr size_t static_shared_limit = 48 * 1024;

// Everything about the launch under way. One at a time: `run` holds a mutex.
struct Run {
  const Launch* launch = nullptr;
  std::string name;
  uint32_t threads_per_block = 0;
  uint32_t first_serial = 1, next_serial = 1;
  uint32_t grid_floor = 0;
  uint32_t blocks_resident = 0;
  bool failed = false;
  std::string report;
  uint64_t random = 0;
  std::vector<Thread*> ready;
  std::vector<std::unique_ptr<Block>> blocks;
  uint64_t barriers = 0, mma = 0, blocks_done = 0;
  uint64_t idle_atomics = 0;  // atomics since anything else happened
};
extern Run run_state;
extern Thread* current;

struct Cancelled {};

uint64_t random_number();
// Suspends the current thread in state `state` until something makes it ready.
void suspend(State state, const char* what, const Where& where);
void make_ready(Thread& thread);
// Lets another thread run first, perhaps.
void maybe_yield(const Where& where);
std::string place(const Where& where);
std::string describe(const Thread& thread);

// memory.cpp
void begin_memory();
void end_memory();
void publish_and_acquire(const void* address);

// counters.cpp
uint32_t site_id(const Where& where, Space space, Kind kind);
const Where& site_where(uint32_t site);
void begin_counters();
void count_access(uint32_t site, const void* address, uint32_t bytes);
void count_footprint(Kind kind, uint32_t bytes);
void converge(Warp& warp);
void end_counters();

// symbols.cpp
std::string function_name(const void* function);

}  // namespace emulator
