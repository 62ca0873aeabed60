// What the emulator's CUDA vocabulary and fusee's device layer ask of the emulator's runtime.
//
// Every function that may report takes the place of the call as a std::source_location, so that a
// report names the file and the line of the kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

namespace emulator {

using Where = std::source_location;

enum class Space : uint8_t { global, shared };
enum class Kind : uint8_t { load, store, atomic, async_copy };

// Ends the launch with a report about the thread that runs: unwinds this thread, then the others.
[[noreturn]] void fault(const std::string& what, const Where& where);

// Checks one access of `bytes` bytes for races, alignment and initialisation, and counts it.
// `element` is the size of the elements that it consists of: threads may touch neighbouring
// elements freely, so this is the unit in which races are found.
void access(Space space, Kind kind, const void* address, uint32_t bytes, uint32_t element,
            const Where& where);
[[noreturn]] void out_of_bounds(Space space, Kind kind, int64_t index, int64_t count, int64_t size,
                                const Where& where);

// True inside a kernel; host code may use Global too, to set up its data.
bool in_kernel();
Space space_of(const void* address);

// Shared memory. A static tile is known by the address of a static object at its declaration; the
// threads of a block get the same bytes for the same key.
void* static_shared(const void* key, size_t bytes, const Where& where);
void* dynamic_shared(size_t offset, size_t bytes, size_t alignment, const Where& where);

// Barriers. `barrier` returns the number of threads whose predicate was true.
int barrier(const char* name, bool predicate, const Where& where);
void grid_barrier(const Where& where);
void warp_barrier(uint32_t mask, const Where& where);
void fence();

// One exchange among the lanes of `mask`: each lane gives up to 32 bytes and then sees those of the
// others. The values stay valid until `exchange_end`.
struct Exchange;
Exchange* exchange_begin(const char* name, uint32_t mask, const void* value, size_t bytes,
                         const Where& where);
const unsigned char* exchange_value(const Exchange*, unsigned lane);
void exchange_end(Exchange*);
unsigned lane();

// cp.async: the bytes arrive at the wait, never before it. `valid` bytes come from `from`, the rest
// of `bytes` are zeros.
void async_copy(void* to, const void* from, uint32_t bytes, uint32_t valid, uint32_t element,
                const Where& where);
void async_commit();
void async_wait(unsigned groups_left, const Where& where);

void count_mma();

struct Shape {
  unsigned x = 1, y = 1, z = 1;
};
struct Launch {
  const void* function;  // for the name, where the symbol table has it
  Shape grid, block;
  size_t dynamic_shared_bytes;
  bool cooperative;
  Where where;
  void (*invoke)(const void* closure);
  const void* closure;
};
// Runs every block; throws std::runtime_error with the report if there is one.
void run(const Launch& launch);
int cooperative_blocks(unsigned threads);

}  // namespace emulator
