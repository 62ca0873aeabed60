// The race check: who touched each element of memory last, and whether that was ordered before now.
//
// Every access leaves a stamp: block, thread, and the thread's clock, which counts
// synchronisations. An older access is ordered before the present one if the block has passed a
// barrier since (its clock is under the block's floor), if __syncwarp ordered it (Warp::seen), or,
// between blocks, after a grid barrier or an atomic that followed a fence. Anything else that
// conflicts is a race. Shuffles and votes order nothing: CUDA does not promise that they do.
#include <algorithm>
#include <array>

#include "emulator.h"
#include "state.h"

namespace emulator {

// What fenced atomics on one address have published: for each block, its accesses up to a clock.
struct SyncVariable {
  struct Entry {
    uint32_t rank, clock, floor;
  };
  std::unordered_map<uint32_t, std::vector<Entry>> published;  // by the block's serial
};

namespace {

// serial : 32 | rank : 10 | asynchronous : 1 | atomic : 1 | clock : 20. Zero is no access at all.
using Stamp = uint64_t;
constexpr Stamp asynchronous = 1u << 21, atomically = 1u << 20;
uint32_t serial_of(Stamp stamp) { return static_cast<uint32_t>(stamp >> 32); }
uint32_t rank_of(Stamp stamp) { return static_cast<uint32_t>(stamp >> 22) & 1023; }
uint32_t clock_of(Stamp stamp) { return static_cast<uint32_t>(stamp) & 0xfffff; }

struct Cell {
  Stamp write = 0;
  // Two different readers are enough: whoever writes differs from one of them.
  Stamp reads[2] = {0, 0};
  uint16_t write_site = 0, read_site = 0;
  uint8_t touched = 0;  // 1: loaded, 2: stored in this launch
};

// The cells of one stretch of memory, one for each 2^shift bytes: the size of the smallest element
// that was accessed there, so that neighbouring elements are never taken for one another.
constexpr uintptr_t page_bytes = 1024;
struct Page {
  uint32_t first_serial = 0;
  uint8_t shift = 0;
  std::vector<Cell> cells;
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
struct Cached {
  uintptr_t key = ~uintptr_t{0};
  Page* page = nullptr;
};
std::array<Cached, 1024> cache;
std::unordered_map<const void*, SyncVariable> variables;
bool check_initialised = true;

Page& page_of(uintptr_t address, uint8_t shift) {
  const uintptr_t key = address / page_bytes;
  Cached& cached = cache[key % cache.size()];
  if (cached.key != key) {
    auto& slot = pages[key];
    if (slot == nullptr) slot = std::make_unique<Page>();
    cached = {key, slot.get()};
  }
  Page& page = *cached.page;
  if (page.first_serial != run_state.first_serial) {
    page.first_serial = run_state.first_serial;
    page.shift = shift;
    page.cells.assign(page_bytes >> shift, Cell{});
  } else if (shift < page.shift) {
    std::vector<Cell> finer(page_bytes >> shift);
    for (size_t i = 0; i < finer.size(); ++i) finer[i] = page.cells[i >> (page.shift - shift)];
    page.cells.swap(finer);
    page.shift = shift;
  }
  return page;
}

bool published_to(const std::vector<const SyncVariable*>& acquired, Stamp stamp) {
  for (const SyncVariable* variable : acquired) {
    const auto found = variable->published.find(serial_of(stamp));
    if (found == variable->published.end()) continue;
    for (const SyncVariable::Entry& entry : found->second) {
      if (clock_of(stamp) < entry.floor) return true;
      if (rank_of(stamp) == entry.rank && clock_of(stamp) < entry.clock) return true;
    }
  }
  return false;
}

// Whether the stamped access happened before whatever `thread` does now.
bool ordered(Stamp stamp, const Thread& thread, Space space) {
  if (stamp == 0) return true;
  const Block& block = *thread.block;
  if (serial_of(stamp) != block.serial) {
    return space == Space::shared || clock_of(stamp) < run_state.grid_floor ||
           published_to(thread.acquired, stamp) || published_to(block.acquired, stamp);
  }
  if (clock_of(stamp) < block.floor) return true;
  const uint32_t rank = rank_of(stamp);
  if (rank == thread.rank) return true;
  return rank / 32 == thread.rank / 32 &&
         clock_of(stamp) <= thread.warp->seen[thread.lane][rank % 32];
}

std::string author(Stamp stamp) {
  const Shape &grid = run_state.launch->grid, &block = run_state.launch->block;
  const uint32_t number = serial_of(stamp) - run_state.first_serial, rank = rank_of(stamp);
  const auto text = [](uint32_t i, const Shape& shape) {
    return "(" + std::to_string(i % shape.x) + ", " + std::to_string(i / shape.x % shape.y) + ", " +
           std::to_string(i / shape.x / shape.y) + ")";
  };
  return "block " + text(number, grid) + " thread " + text(rank, block);
}

const char* noun(Space space) { return space == Space::global ? "global" : "shared"; }
const char* noun(Kind kind) {
  switch (kind) {
    case Kind::load:
      return "load";
    case Kind::store:
      return "store";
    case Kind::atomic:
      return "atomic";
    case Kind::async_copy:
      return "cp.async";
  }
  return "";
}

[[noreturn]] void race(Space space, Kind kind, const char* earlier, Stamp stamp, uint16_t site,
                       const Where& where) {
  fault(std::string(noun(space)) + " memory race: " + noun(kind) + ", not ordered after the " +
            earlier + " by " + author(stamp) + " (" + place(site_where(site)) + ")",
        where);
}

void check_cell(Cell& cell, Space space, Kind kind, Stamp me, uint16_t site, uint32_t bytes,
                const Where& where) {
  const Thread& thread = *current;
  const bool in_block = serial_of(cell.write) == thread.block->serial;
  if (in_block && (cell.write & asynchronous) != 0) {
    fault(std::string("cp.async data used before its wait: ") + noun(kind) +
              " of shared memory that the copy by " + author(cell.write) + " (" +
              place(site_where(cell.write_site)) + ") is still to fill",
          where);
  }
  const bool both_atomic = kind == Kind::atomic && (cell.write & atomically) != 0;
  if (!both_atomic && !ordered(cell.write, thread, space)) {
    race(space, kind, (cell.write & atomically) != 0 ? "atomic" : "store", cell.write,
         cell.write_site, where);
  }
  if (space == Space::shared && !in_block && check_initialised &&
      (kind == Kind::load || kind == Kind::atomic)) {
    fault(std::string("uninitialised shared memory: ") + noun(kind) +
              " of an element that this block has not stored yet",
          where);
  }
  if (kind == Kind::load) {
    if (space == Space::global && (cell.touched & 1) == 0) count_footprint(kind, bytes);
    cell.touched |= 1;
    Stamp* const slot = ordered(cell.reads[0], thread, space)   ? &cell.reads[0]
                        : ordered(cell.reads[1], thread, space) ? &cell.reads[1]
                                                                : nullptr;
    if (slot != nullptr) *slot = me;
    cell.read_site = site;
    return;
  }
  for (const Stamp read : cell.reads) {
    if (!ordered(read, thread, space)) race(space, kind, "load", read, cell.read_site, where);
  }
  if (space == Space::global && (cell.touched & 2) == 0) count_footprint(kind, bytes);
  cell.touched |= 2;
  cell.reads[0] = cell.reads[1] = 0;
  cell.write = me;
  cell.write_site = site;
}

Stamp own_stamp() {
  return static_cast<Stamp>(current->block->serial) << 32 |
         static_cast<Stamp>(current->rank) << 22 | current->clock;
}

void check_cells(Space space, Kind kind, Stamp me, const void* memory, uint32_t bytes,
                 uint32_t element, uint32_t site, const Where& where) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const auto shift = static_cast<uint8_t>(std::min(3, __builtin_ctz(element)));
  Page& page = page_of(address, shift);
  const uint32_t last = static_cast<uint32_t>((address % page_bytes + bytes - 1) >> page.shift);
  for (auto i = static_cast<uint32_t>((address % page_bytes) >> page.shift); i <= last; ++i) {
    check_cell(page.cells[i], space, kind, me, static_cast<uint16_t>(site), 1u << page.shift,
               where);
  }
}

void check_alignment(Space space, Kind kind, const void* address, uint32_t bytes,
                     const Where& where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  fault(std::string("misaligned ") + noun(space) + " " + noun(kind) + " of " +
            std::to_string(bytes) + " bytes, at an address that is " +
            std::to_string(reinterpret_cast<uintptr_t>(address) % bytes) + " bytes past a multiple",
        where);
}

}  // namespace

Space space_of(const void* address) {
  for (uint32_t b = 0; b < run_state.blocks_resident; ++b) {
    const unsigned char* const shared = run_state.blocks[b]->shared.get();
    if (address >= shared && address < shared + shared_limit + 1024) return Space::shared;
  }
  return Space::global;
}

void access(Space space, Kind kind, const void* address, uint32_t bytes, uint32_t element,
            const Where& where) {
  if (current == nullptr) return;
  check_alignment(space, kind, address, bytes, where);
  const uint32_t site = site_id(where, space, kind);
  Stamp me = own_stamp();
  if (kind == Kind::atomic) {
    me |= atomically;
    maybe_yield(where);
    if (space == Space::global) publish_and_acquire(address);
  }
  check_cells(space, kind, me, address, bytes, element, site, where);
  count_access(site, address, bytes);
}

void out_of_bounds(Space space, Kind kind, int64_t index, int64_t count, int64_t size,
                   const Where& where) {
  fault(std::string(noun(space)) + " " + noun(kind) + " out of bounds: " +
            (count == 1 ? "element " + std::to_string(index)
                        : "elements " + std::to_string(index) + " to " +
                              std::to_string(index + count - 1)) +
            " of " + std::to_string(size),
        where);
}

// ---- order between blocks
// ---------------------------------------------------------------------------

void fence() { current->published = ++current->clock; }

// An atomic after a fence publishes what this thread and, up to its last barrier, its block have
// done, to whoever does an atomic on the same address later.
void publish_and_acquire(const void* address) {
  Thread& thread = *current;
  auto found = variables.find(address);
  if (found != variables.end()) {
    auto& acquired = thread.acquired;
    if (std::find(acquired.begin(), acquired.end(), &found->second) == acquired.end()) {
      acquired.push_back(&found->second);
    }
  }
  if (thread.published == 0) return;
  SyncVariable& variable = variables[address];
  auto& entries = variable.published[thread.block->serial];
  const SyncVariable::Entry entry{thread.rank, thread.published, thread.block->floor};
  for (auto& known : entries) {
    if (known.rank == thread.rank) {
      known = entry;
      return;
    }
  }
  entries.push_back(entry);
}

// ---- shared memory
// ----------------------------------------------------------------------------------

void* static_shared(const void* key, size_t bytes, const Where& where) {
  Block& block = *current->block;
  const size_t dynamic = (run_state.launch->dynamic_shared_bytes + 127) / 128 * 128;
  for (const Block::Tile& tile : block.tiles) {
    if (tile.key == key) return block.shared.get() + dynamic + tile.offset;
  }
  const size_t offset = block.static_bytes;
  block.static_bytes += (bytes + 15) / 16 * 16;
  if (block.static_bytes > static_shared_limit || dynamic + block.static_bytes > shared_limit) {
    fault("too much shared memory: " + std::to_string(block.static_bytes) + " bytes static and " +
              std::to_string(dynamic) + " dynamic",
          where);
  }
  block.tiles.push_back({key, offset, bytes});
  unsigned char* const tile = block.shared.get() + dynamic + offset;
  memset(tile, 0xff, bytes);
  return tile;
}

void* dynamic_shared(size_t offset, size_t bytes, size_t alignment, const Where& where) {
  const size_t size = run_state.launch->dynamic_shared_bytes;
  if (offset > size || bytes > size - offset) {
    fault("a tile of dynamic shared memory at bytes " + std::to_string(offset) + " to " +
              std::to_string(offset + bytes) + " of the launch's " + std::to_string(size),
          where);
  }
  if (offset % alignment != 0) {
    fault("a misaligned tile of dynamic shared memory, at byte " + std::to_string(offset), where);
  }
  return current->block->shared.get() + offset;
}

// ---- cp.async
// ---------------------------------------------------------------------------------------

void async_copy(void* to, const void* from, uint32_t bytes, uint32_t valid, uint32_t element,
                const Where& where) {
  check_alignment(Space::shared, Kind::async_copy, to, bytes, where);
  if (valid > bytes) fault("cp.async of more elements than it moves", where);
  if (valid != 0) {
    check_alignment(Space::global, Kind::async_copy, from, bytes, where);
    const uint32_t site = site_id(where, Space::global, Kind::load);
    check_cells(Space::global, Kind::load, own_stamp(), from, valid, element, site, where);
    count_access(site, from, valid);
  }
  const uint32_t site = site_id(where, Space::shared, Kind::store);
  check_cells(Space::shared, Kind::async_copy, own_stamp() | asynchronous, to, bytes, element, site,
              where);
  count_access(site, to, bytes);
  current->copies.push_back({to, from, bytes, valid, element, current->copy_group});
}

void async_commit() { ++current->copy_group; }

void async_wait(unsigned groups_left, const Where& where) {
  Thread& thread = *current;
  auto& copies = thread.copies;
  size_t kept = 0;
  for (const AsyncCopy& copy : copies) {
    // Copies that no commit has closed yet belong to no group that could be waited for.
    if (copy.group + groups_left >= thread.copy_group) {
      copies[kept++] = copy;
      continue;
    }
    if (copy.valid != 0) memcpy(copy.to, copy.from, copy.valid);
    memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
    // From here on it counts as this thread's own store.
    const auto address = reinterpret_cast<uintptr_t>(copy.to);
    Page& page = page_of(address, 3);
    for (uintptr_t i = address; i < address + copy.bytes; i += uintptr_t{1} << page.shift) {
      Cell& cell = page.cells[(i % page_bytes) >> page.shift];
      cell.write = own_stamp();
      cell.write_site = static_cast<uint16_t>(site_id(where, Space::shared, Kind::store));
    }
  }
  copies.resize(kept);
}

// ---- the launch's beginning and end
// -------------------------------------------------------------------

void begin_memory() { variables.clear(); }

void end_memory() {
  // Shadow memory is kept for the next launch unless it has become large.
  if (pages.size() < 16384) return;
  pages.clear();
  cache.fill({});
}

}  // namespace emulator

extern "C" void fusee_emulator_set_initcheck(int on) { emulator::check_initialised = on != 0; }
