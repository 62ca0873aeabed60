// Barriers of a block, a warp and a grid, and the exchange behind every warp operation.
#include <algorithm>

#include "emulator.h"
#include "state.h"

namespace emulator {
namespace {

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0);
}

std::string hex(uint32_t mask) {
  char text[16];
  snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

constexpr uint32_t clock_limit = 1u << 20;

// Orders everything the block did so far before everything it does from now on.
void order_block(Block& block, uint32_t floor) {
  if (floor >= clock_limit)
    fault("more synchronisations than the race check counts", current->where);
  block.floor = floor;
  for (auto& thread : block.threads) {
    if (thread->state == State::done) continue;
    thread->clock = floor;
    for (const SyncVariable* variable : thread->acquired) block.acquired.push_back(variable);
    thread->acquired.clear();
  }
  for (auto& warp : block.warps) converge(*warp);
}

uint32_t next_floor(const Block& block) {
  uint32_t floor = block.floor;
  for (const auto& thread : block.threads) {
    // An exited thread keeps the block it ran in last.
    if (thread->block == &block) floor = std::max(floor, thread->clock);
  }
  return floor + 1;
}

void check_no_exit(const Block& block, const char* name, const Where& where) {
  if (block.alive == run_state.threads_per_block) return;
  for (uint32_t rank = 0; rank < run_state.threads_per_block; ++rank) {
    if (block.threads[rank]->state == State::done) {
      fault(std::string("divergent barrier: ") + name + " after " + describe(*block.threads[rank]) +
                " has exited",
            where);
    }
  }
}

// The lanes that `mask` names must be there, and must be able to come.
void check_mask(const char* name, uint32_t mask, const Where& where) {
  const Thread& thread = *current;
  const Warp& warp = *thread.warp;
  if (!(mask >> thread.lane & 1)) {
    fault(std::string(name) + " with mask " + hex(mask) + ", which lacks the calling lane " +
              std::to_string(thread.lane),
          where);
  }
  if (const uint32_t absent = mask & ~warp.alive) {
    fault(std::string(name) + " with mask " + hex(mask) + " names lane " +
              std::to_string(__builtin_ctz(absent)) + ", which has exited or never was",
          where);
  }
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1) || lane == thread.lane) continue;
    const Thread& other = *warp.block->threads[warp.first + lane];
    if (other.state == State::at_barrier || other.state == State::at_grid_barrier) {
      fault(std::string("divergent warp: ") + name + " names lane " + std::to_string(lane) +
                ", which waits in " + other.waits_for + " (" + place(other.where) + ")",
            where);
    }
  }
}

Exchange* join(const char* name, uint32_t mask, const Where& where) {
  check_mask(name, mask, where);
  Warp& warp = *current->warp;
  // Other masks may be open at the same time: lanes may meet in smaller groups first. A lane that
  // never comes shows as its exit or as a deadlock.
  for (Exchange* exchange : warp.open) {
    if (exchange->mask == mask && strcmp(exchange->name, name) == 0) return exchange;
  }
  if (warp.idle.empty()) {
    warp.pool.push_back(std::make_unique<Exchange>());
    warp.idle.push_back(warp.pool.back().get());
  }
  Exchange* const exchange = warp.idle.back();
  warp.idle.pop_back();
  exchange->name = name;
  exchange->mask = mask;
  exchange->arrived = 0;
  exchange->where = where;
  warp.open.push_back(exchange);
  return exchange;
}

// Waits until all lanes of the exchange have come.
void arrive(Exchange* exchange, const Where& where) {
  Thread& thread = *current;
  Warp& warp = *thread.warp;
  exchange->arrived |= 1u << thread.lane;
  if (exchange->arrived != exchange->mask) {
    suspend(State::in_warp, exchange->name, where);
    return;
  }
  warp.open.erase(std::find(warp.open.begin(), warp.open.end(), exchange));
  exchange->readers = static_cast<uint32_t>(__builtin_popcount(exchange->mask));
  if (exchange->mask == warp.alive) converge(warp);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if (exchange->mask >> lane & 1 && lane != thread.lane) {
      make_ready(*warp.block->threads[warp.first + lane]);
    }
  }
  // The last to come need not be the first to go on.
  make_ready(thread);
  suspend(State::ready, exchange->name, where);
}

}  // namespace

int barrier(const char* name, bool predicate, const Where& where) {
  Thread& thread = *current;
  Block& block = *thread.block;
  check_no_exit(block, name, where);
  if (block.at_barrier == 0) {
    block.first_at_barrier = &thread;
  } else if (const Thread& other = *block.first_at_barrier; !same_place(other.where, where)) {
    fault(std::string("divergent barrier: ") + name + " while " + describe(other) +
              " waits in another, " + other.waits_for + " (" + place(other.where) + ")",
          where);
  }
  block.votes += predicate;
  if (++block.at_barrier < run_state.threads_per_block) {
    suspend(State::at_barrier, name, where);
    return block.result;
  }
  block.result = block.votes;
  block.votes = 0;
  block.at_barrier = 0;
  thread.where = where;
  ++run_state.barriers;
  order_block(block, next_floor(block));
  for (uint32_t rank = 0; rank < run_state.threads_per_block; ++rank) {
    make_ready(*block.threads[rank]);
  }
  suspend(State::ready, name, where);
  return block.result;
}

void grid_barrier(const Where& where) {
  Block& block = *current->block;
  if (!run_state.launch->cooperative) fault("grid_sync in a launch that is not cooperative", where);
  for (uint32_t b = 0; b < run_state.blocks_resident; ++b) {
    check_no_exit(*run_state.blocks[b], "grid_sync", where);
  }
  ++block.at_grid_barrier;
  uint32_t arrived = 0;
  for (uint32_t b = 0; b < run_state.blocks_resident; ++b) {
    arrived += run_state.blocks[b]->at_grid_barrier;
  }
  if (arrived < run_state.blocks_resident * run_state.threads_per_block) {
    suspend(State::at_grid_barrier, "grid_sync", where);
    return;
  }
  current->where = where;
  uint32_t floor = 0;
  for (uint32_t b = 0; b < run_state.blocks_resident; ++b) {
    floor = std::max(floor, next_floor(*run_state.blocks[b]));
  }
  run_state.grid_floor = floor;
  for (uint32_t b = 0; b < run_state.blocks_resident; ++b) {
    Block& each = *run_state.blocks[b];
    each.at_grid_barrier = 0;
    order_block(each, floor);
    for (uint32_t rank = 0; rank < run_state.threads_per_block; ++rank) {
      make_ready(*each.threads[rank]);
    }
  }
  suspend(State::ready, "grid_sync", where);
}

void warp_barrier(uint32_t mask, const Where& where) {
  Exchange* const exchange = join("__syncwarp", mask, where);
  Warp& warp = *current->warp;
  // The last lane to come orders the accesses: all lanes have seen what any of them had.
  if ((exchange->arrived | 1u << current->lane) == mask) {
    uint32_t joined[32] = {};
    for (uint32_t lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (uint32_t i = 0; i < 32; ++i) joined[i] = std::max(joined[i], warp.seen[lane][i]);
      Thread& thread = *warp.block->threads[warp.first + lane];
      joined[lane] = std::max(joined[lane], thread.clock++);
      if (thread.clock >= clock_limit) {
        fault("more synchronisations than the race check counts", where);
      }
    }
    for (uint32_t lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) memcpy(warp.seen[lane], joined, sizeof(joined));
    }
  }
  arrive(exchange, where);
  exchange_end(exchange);
}

Exchange* exchange_begin(const char* name, uint32_t mask, const void* value, size_t bytes,
                         const Where& where) {
  Exchange* const exchange = join(name, mask, where);
  memcpy(exchange->values[current->lane], value, bytes);
  arrive(exchange, where);
  return exchange;
}

const unsigned char* exchange_value(const Exchange* exchange, unsigned lane) {
  return exchange->values[lane];
}

void exchange_end(Exchange* exchange) {
  if (--exchange->readers == 0) current->warp->idle.push_back(exchange);
}

void absent_source(const char* name, unsigned mask, unsigned source, const Where& where) {
  fault(std::string(name) + " reads lane " + std::to_string(source) + ", which mask " + hex(mask) +
            " does not name",
        where);
}

void check_width(const char* name, int width, const Where& where) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fault(std::string(name) + " with width " + std::to_string(width) +
              ", which is not a power of two up to 32",
          where);
  }
}

void count_mma() {
  if (current->lane == 0) ++run_state.mma;
}

}  // namespace emulator
